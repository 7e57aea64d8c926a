"""The default model beside 92m-tuned on the CPU: training, decoding on torch, and decoding GGUF files.

    python benchmarks/speed/blocks.py [--batch 2] [--length 512] [--context 128] [--types q8_0 q4_k] [--rounds 7]
        [--write]

Both have as many parameters, so the ratios say what the form of a block costs. Everything in turns: training steps as
`training.py` takes them, tokens as `decode.py` decodes them, files as `quantized.py` does, with a
process for each; those need the extra `gguf` and are left out without it.
"""

import importlib.util
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from decode import continue_by, measure
from quantized import DECODE, in_a_process, write_folder
from speed import OURS, TUNED, Trainee, arguments_of, build, finish, in_turns, random_ids, release, times_faster

from fanformer.comparison.ledger import Figure

NEW = 48
"""Tokens decoded in a round."""


def training(batch: int, length: int, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of training steps of both."""
    ids = random_ids(batch, length)
    trainees = {name: Trainee(build(name)) for name in (OURS, TUNED)}
    steps = {
        name: lambda trainee=trainee: trainee.step(input_ids=ids, labels=ids) for name, trainee in trainees.items()
    }
    return in_turns(steps, rounds, warm_up=2)


def decoding(context: int, compiled: bool, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of a decoded token of both."""
    ids = random_ids(1, context)
    models = {name: build(name).eval() for name in (OURS, TUNED)}
    ways: dict[str, Callable[[int], list[float]]] = {
        name: partial(continue_by, model, ids, compiled, context + NEW + 8, fast=True) for name, model in models.items()
    }
    return {name: seconds for name, (seconds, _) in measure(ways, NEW, rounds).items()}


def files(kind: str, threads: int, rounds: int, folder: Path) -> dict[str, list[float]]:
    """Return the seconds of a token that the engine decodes from the files of both."""
    from fanformer.gguf.export import Settings, export_gguf

    for name in (OURS, TUNED):
        if not (folder / name).is_dir():
            write_folder(name, folder / name)
        export_gguf(folder / name, folder / f"{name}-files", Settings(kind))
    found: dict[str, list[float]] = {OURS: [], TUNED: []}
    for number in range(rounds):
        for name in (OURS, TUNED) if number % 2 == 0 else (TUNED, OURS):
            words = (DECODE, str(folder / f"{name}-files" / f"model-{kind}.gguf"), "--threads", str(threads))
            found[name].append(1 / in_a_process(sys.executable, *words)["tokens_per_second"])
    return found


def main() -> None:
    """Measure and print."""
    arguments = arguments_of(__doc__ or "", batch=2, length=512, context=128, types=("q8_0", "q4_k"), rounds=7)
    seconds = {"training": training(arguments.batch, arguments.length, arguments.rounds)}
    release()
    for compiled in (False, True):
        way = "compiled" if compiled else "eager"
        seconds[f"decoding_{way}"] = decoding(arguments.context, compiled, arguments.rounds)
        release()
    if importlib.util.find_spec("ggml") is not None:
        with tempfile.TemporaryDirectory() as folder:
            for kind in arguments.types:
                seconds[f"decoding_{kind}"] = files(kind, arguments.threads, arguments.rounds, Path(folder))
    else:
        print("GGUF files are left out: they need the extra `gguf`", flush=True)
    result: dict[str, Figure] = {
        f"times_tuned_{name}": times_faster(measured, OURS, TUNED) for name, measured in seconds.items()
    }
    finish("speed-blocks", "the default model's speed over 92m-tuned's", arguments, result, {"seconds": seconds})


if __name__ == "__main__":
    main()
