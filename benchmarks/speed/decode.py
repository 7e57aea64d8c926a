"""Decoding tokens a second on the CPU by context and by batch, ours beside Llama in SmolLM2-135M's shape.

    python benchmarks/speed/decode.py [--contexts 128 1024 4096 8192] [--batches 1 8 64] [--rounds 5] [--write]

Greedy `generate` of transformers on both, float32: eager with its growing cache, as a user of transformers has it, and
as `fanformer generate --compile` does it, the step compiled on a cache of fixed size, their model's as well as ours. A
round continues the prompt once: the time to its first token, and the median time between the others. Each rate stands
beside the bytes that a token must read over the machine's measured bandwidth.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from speed import OURS, THEIRS, arguments_of, build, bytes_a_token, ceilings, finish, random_ids, release
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from fanformer.comparison.ledger import Figure, range_of
from fanformer.generation.fast_decoding import fast_decoding
from fanformer.machine.compiling import compiled_decoding, fixed_cache
from fanformer.model.recurrence_fanformer import CACHE


class Clock(BaseStreamer):
    """Takes the time of every token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Take the time; the first call is for the prompt."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing: the last token has had its time."""


@torch.inference_mode()
def continue_by(
    model: PreTrainedModel, ids: Tensor, compiled: bool, capacity: int, new: int, fast: bool = False
) -> list[float]:
    """Continue `ids` (batch, context) by so many tokens, on a cache for `capacity`; return when each came, from 0.

    Compiled code is always our fast way; what is not compiled is transformers' own way unless `fast`.
    """
    options: dict[str, Any] = compiled_decoding("cpu") if compiled else {}
    settings = GenerationConfig(
        max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, disable_compile=not compiled, **options
    )
    clock = Clock()
    with fast_decoding(model) if compiled or fast else nullcontext():
        cache = fixed_cache(model, capacity) if compiled else None
        mask = torch.ones_like(ids)
        model.generate(ids, attention_mask=mask, generation_config=settings, streamer=clock, **{CACHE: cache})
    return [value - clock.times[0] for value in clock.times[1:]]


def measure(
    ways: dict[str, Callable[[int], list[float]]], new: int, rounds: int
) -> dict[str, tuple[list[float], list[float]]]:
    """Return for each way, in turns, the seconds a decoded token, and the seconds to the first one."""
    figures: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            came = way(1 + new if turn else 3)
            if turn:  # the first compiles
                figures[name][0].append(statistics.median(b - a for a, b in pairwise(came)))
                figures[name][1].append(came[0])
    return figures


def main() -> None:
    """Measure and print."""
    arguments = arguments_of(__doc__ or "", contexts=(128, 1024, 4096, 8192), batches=(1, 8, 64), new=24, rounds=5)
    result: dict[str, Figure] = {}
    ceiling = ceilings()
    result["bandwidth"] = Figure(ceiling["read_gb_per_second"], "GB/s")
    cases = [(1, context) for context in arguments.contexts]
    cases += [(batch, arguments.contexts[0]) for batch in arguments.batches if batch != 1]
    models = {name: build(name, max_position_embeddings=16384).eval() for name in (OURS, THEIRS)}
    for batch, context in cases:
        ids, capacity = random_ids(batch, context), context + arguments.new + 8
        ways: dict[str, Callable[[int], list[float]]] = {}
        for name, model in models.items():
            for compiled in (False, True):
                way = f"{name} {'compiled' if compiled else 'eager'}"
                ways[way] = partial(continue_by, model, ids, compiled, capacity)
        figures = measure(ways, arguments.new, arguments.rounds)
        case = f"batch_{batch}_context_{context}"
        for way, (decoding, first) in figures.items():
            key = f"{way.replace('-', '_').replace(' ', '_')}_{case}"
            result[f"tokens_per_second_{key}"] = range_of([batch / value for value in decoding], "tokens/s")
            result[f"first_token_{key}"] = range_of(first, "s")
            read = bytes_a_token(models[way.split()[0]], batch * context)
            shares = [read / value / ceiling["read_gb_per_second"] / 1e9 for value in decoding]
            result[f"share_of_bandwidth_{key}"] = range_of(shares, "of the measured bandwidth")
        theirs, compiled_theirs = figures[f"{THEIRS} eager"][0], figures[f"{THEIRS} compiled"][0]
        ours = figures[f"{OURS} compiled"][0]
        for name, other in (("generate", theirs), ("compiled", compiled_theirs)):
            ratios = [b / a for a, b in zip(ours, other, strict=True)]
            result[f"times_smollm2_135m_{name}_{case}"] = range_of(ratios, "times")
        print(f"{case}: done", flush=True)
        release()
    finish("speed-decode", "decoding tokens a second on the CPU beside Llama", arguments, result, {"ceilings": ceiling})


if __name__ == "__main__":
    main()
