"""What takes the time on a CPU: a training step and a decoded token, by what the operators do, ours beside Llama's.

    python benchmarks/speed/profiles.py [--batch 2] [--length 512] [--context 128] [--write]

Shares of torch's profile, the time of an operator itself. Training as in training.py, decoding as in
decode.py, compiled. What the compiler fused is one kind: norms, activations, Fourier features, rotation, gates,
and in decoding the products of a single row.
"""

from collections.abc import Callable
from functools import partial

import torch
from decode import continue_by
from speed import EQUAL, OURS, THEIRS, Trainee, arguments_of, build, finish, kind_of, random_ids, release

from fanformer.comparison.ledger import Figure

KINDS = {
    "products": ("aten::mm", "aten::addmm", "aten::linear"),
    "attention": ("scaled_dot_product", "aten::bmm"),
    "loss": ("log_softmax", "nll_loss"),
    "optimizer": ("adam",),
    "fused_by_the_compiler": ("CompiledFxGraph", "cpp_fused", "graph_"),
    "copies": ("copy", "aten::cat", "fill_", "zero_"),
}
"""Words in the names of operators that tell what they do; the first that fits counts."""


def seconds_by_kind(function: Callable[[], object]) -> dict[str, float]:
    """Return the seconds that a call spends in each kind of operator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        function()
    seconds = dict.fromkeys((*KINDS, "other"), 0.0)
    for event in profiler.key_averages():
        seconds[kind_of(event.key, KINDS)] += event.self_cpu_time_total / 1e6
    return seconds


def main() -> None:
    """Measure and print."""
    arguments = arguments_of(__doc__ or "", batch=2, length=512, context=128, new=32)
    result: dict[str, Figure] = {}

    def record(phase: str, name: str, seconds: dict[str, float], units: int) -> None:
        key = f"{phase}_{name.replace('-', '_')}"
        whole = sum(seconds.values())
        result[f"milliseconds_{key}"] = Figure(1e3 * whole / units, "ms")
        for kind, value in seconds.items():
            result[f"share_of_{kind}_{key}"] = Figure(value / whole, "of the time")

    ids = random_ids(arguments.batch, arguments.length)
    for name in (OURS, THEIRS, EQUAL):
        trainee = Trainee(build(name))
        step = partial(trainee.step, input_ids=ids, labels=ids)
        for _ in range(2):
            step()
        record("training_step", name, seconds_by_kind(step), 1)
        release()
    prompt, capacity = random_ids(1, arguments.context), arguments.context + arguments.new + 8
    for name in (OURS, THEIRS):
        model = build(name).eval()
        continue_by(model, prompt, True, capacity, arguments.new)
        first = seconds_by_kind(partial(continue_by, model, prompt, True, capacity, 1))
        whole = seconds_by_kind(partial(continue_by, model, prompt, True, capacity, 1 + arguments.new))
        decoding = {kind: max(0.0, value - first[kind]) for kind, value in whole.items()}
        record("decoded_token", name, decoding, arguments.new)
        release()
    finish("speed-profile", "what takes the time of a training step and of a decoded token", arguments, result)


if __name__ == "__main__":
    main()
