"""What each setting of training on a CPU is worth, one at a time: a step without it over a step with everything.

    python benchmarks/speed/settings.py [--batch 2] [--length 512] [--rounds 5] [--write]

The default model on packed rows, float32, blocks and loss compiled, attention in blocks, all threads; AdamW. Every
other way changes one thing, and steps take turns. What keeping freed memory is worth needs processes of its own:
malloc.py.
"""

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
from speed import OURS, Trainee, arguments_of, build, finish, in_turns, random_ids, times_faster
from torch import Tensor

from fanformer.comparison.ledger import Figure, range_of


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use so many threads within the `with` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def packed_positions(batch: int, length: int, document: int = 170) -> Tensor:
    """Return the positions (batch, length) of rows of documents with so many tokens."""
    return (torch.arange(length) % document).expand(batch, length).clone()


def step(trainee: Trainee, batch: dict[str, Tensor], dtype: torch.dtype, count: int) -> None:
    """Take a step with so many threads, products in `dtype`."""
    with threads(count), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        trainee.step(**batch)


def main() -> None:
    """Measure and print."""
    arguments = arguments_of(__doc__ or "", batch=2, length=512, rounds=5)
    torch._dynamo.config.recompile_limit = 64  # the models share the code of their layers, compiled for each way
    ids = random_ids(arguments.batch, arguments.length)
    single = {"input_ids": ids, "labels": ids}
    packed = {**single, "position_ids": packed_positions(arguments.batch, arguments.length)}
    all_threads = arguments.threads
    with threads(1):
        one_thread = Trainee(build(OURS))
    full = Trainee(build(OURS))
    ways = {
        "everything": partial(step, full, packed, torch.float32, all_threads),
        "eager": partial(step, Trainee(build(OURS), compiled=False), packed, torch.float32, all_threads),
        "attention_not_in_blocks": partial(
            step, Trainee(build(OURS), blocks=False), packed, torch.float32, all_threads
        ),
        "loss_not_compiled": partial(step, Trainee(build(OURS), loss=False), packed, torch.float32, all_threads),
        "bfloat16_products": partial(step, Trainee(build(OURS)), packed, torch.bfloat16, all_threads),
        "one_thread": partial(step, one_thread, packed, torch.float32, 1),
        "one_document_a_row": partial(step, full, single, torch.float32, all_threads),
    }
    seconds = in_turns(ways, arguments.rounds, warm_up=2)
    result: dict[str, Figure] = {}
    for name in ways:
        if name != "everything":
            result[f"times_as_long_{name}"] = times_faster(seconds, "everything", name)
    for name, values in seconds.items():
        result[f"tokens_per_second_{name}"] = range_of([ids.numel() / value for value in values], "tokens/s")
    finish("speed-settings", "what each setting of training on a CPU is worth", arguments, result)


if __name__ == "__main__":
    main()
