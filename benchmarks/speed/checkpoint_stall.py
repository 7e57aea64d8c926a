"""How long training waits for a checkpoint: written in the background, and before the next step begins.

    python benchmarks/speed/checkpoint_stall.py [--preset 92m] [--rounds 2] [--write]

Both ways train the same model in turns, each in a process of its own, on all cores and on all but one. The stall is
how much longer the time from one step to the next is where a checkpoint is taken between them, and the slowing how much
longer the step after that takes, while the writing goes on, both against the median step.
"""

import argparse
import multiprocessing
import os
import random
import re
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fanformer.cli.failure import quiet_libraries
from fanformer.comparison.ledger import Figure, measured_today, range_of, write_entry
from fanformer.training.configuration import resolve
from fanformer.training.events import Event
from fanformer.training.run import build_fanformer, train

RESULTS = Path(__file__).parents[1] / "results"
SAVE_STEPS, SAVES = 16, 3  # far enough apart for one to be written before the next begins
WORDS = ("the", "cat", "dog", "river", "runs", "sees", "under", "over", "blue", "old", "tree", "and")


class Stopwatch:
    """A listener that keeps the time of every step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, event: Event) -> None:
        """Keep the time."""
        if event.kind == "step":
            self.times.append(time.perf_counter())


def measure(preset: str, background: bool, threads: int, folder: str) -> dict[str, float]:
    """Train a little with three checkpoints on the way; return seconds."""
    work = Path(folder)
    chooser, text = random.Random(0), work / "text.txt"
    if not text.exists():
        text.write_text("\n".join(" ".join(chooser.choices(WORDS, k=12)) + "." for _ in range(2000)))
    steps, watch = SAVE_STEPS * (SAVES + 1), Stopwatch()
    fields = {
        "data": str(text), "tokenizer": None, "vocab_size": 320, "output_dir": str(work / f"run-{time.time_ns()}"),
        "max_data_bytes": None, "held_out_fraction": 0.05, "batch_size": 2, "sequence_length": 64, "eval_tokens": 64,
        "max_steps": steps, "save_steps": SAVE_STEPS, "eval_steps": steps, "keep_last": 1, "compile": "off",
        "background_save": background, "threads": threads, "model.vocab_size": 49152,
    }  # fmt: skip
    train(resolve(preset, overrides=fields), watch, build_full_size)
    gaps = [later - earlier for earlier, later in zip(watch.times, watch.times[1:], strict=False)]
    after = [gaps[number * SAVE_STEPS - 1] for number in range(1, SAVES + 1)]  # from step n * SAVE_STEPS to the next
    beside = [gaps[number * SAVE_STEPS] for number in range(1, SAVES + 1)]
    usual = statistics.median(gap for number, gap in enumerate(gaps, 1) if number % SAVE_STEPS > SAVE_STEPS // 2)
    return {
        "step": usual,
        "first_stall": after[0] - usual,  # the memory for the copy is new
        "stall": statistics.median(after[1:]) - usual,
        "slowing_of_the_next_step": statistics.median(beside) - usual,
    }


def build_full_size(fields: dict[str, Any]) -> Any:
    """Return the preset's model with its whole vocabulary, however few tokens the text gives."""
    return build_fanformer({**fields, "vocab_size": 49152})


def to_result(rows: Mapping[str, list[dict[str, float]]]) -> dict[str, Figure]:
    """Return the figures of every way by name, and how much shorter the stall is with writing in the background."""
    result = {
        re.sub(r"\W+", "_", f"{key} {way}"): range_of([row[key] for row in measured], "s")
        for way, measured in rows.items()
        for key in measured[0]
    }
    for way, measured in rows.items():
        written, where = way.split(", ")
        if written == "in the background":
            pairs = zip(measured, rows[f"before the next step, {where}"], strict=True)
            ratios = [direct["stall"] / background["stall"] for background, direct in pairs]
            result[f"times_shorter_stall_{where.replace(' ', '_')}"] = range_of(ratios, "times")
    return result


def main() -> None:
    """Read the arguments, run, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="92m")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="write the entry to benchmarks/results")
    arguments = parser.parse_args()
    quiet_libraries()
    cores = os.cpu_count() or 1
    ways = [
        (f"{where}, training on {threads} of {cores} cores", where == "in the background", threads)
        for threads in sorted({max(1, cores - 1), cores})
        for where in ("in the background", "before the next step")
    ]
    rows: dict[str, list[dict[str, float]]] = {name: [] for name, _, _ in ways}
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, spawn.Pool(1, maxtasksperchild=1) as pool:
        for _ in range(arguments.rounds):
            for name, background, threads in ways:
                rows[name].append(pool.apply(measure, (arguments.preset, background, threads, folder)))
    figures = {
        name: {key: round(statistics.median(row[key] for row in measured), 3) for key in measured[0]}
        for name, measured in rows.items()
    }
    print("| written | step, s | stall, s | slowing of the next step, s |\n|---|---|---|---|")
    for name, values in figures.items():
        print(f"| {name} | {values['step']} | {values['stall']} | {values['slowing_of_the_next_step']} |")
    print(f"load {os.getloadavg()[0]:.1f}")
    if arguments.write:
        entry = measured_today(
            "checkpoint-stall-{date}",
            what="seconds that training waits for a checkpoint",
            seeds=[0],  # of the text and the run
            configuration={"preset": arguments.preset, "rounds": arguments.rounds},
            result=to_result(rows),
            details={"load": os.getloadavg()[0], "rounded": figures, "all": rows},
        )
        print(f"written to {write_entry(RESULTS, entry)}")


if __name__ == "__main__":
    main()
