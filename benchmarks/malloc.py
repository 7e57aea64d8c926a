"""Measure what keeping freed memory is worth to a training step of the nano preset on the CPU.

    python benchmarks/malloc.py [--steps 12] [--rounds 3] [--write]

Every measurement is a process of its own, with the setting and without it in turns: first on the machine as it is,
then with one busy process on each core. Figures are ratios of steps that ran one after the other; the load is told.
"""

import argparse
import contextlib
import datetime
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from fanformer.model import FANformerConfig, FANformerForCausalLM
from fanformer.training.configuration import load_preset, resolve
from fanformer.training.environment import keep_freed_memory, product_rate

RESULTS = Path(__file__).parent / "results"
WARM_UP_STEPS = 3
CONDITIONS = {"as it is": 0, "busy": os.cpu_count() or 1}
"""Busy processes beside the measured one."""


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what `function` returns in a process that is forked for it: its memory settings end with it."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)


def choose_precision() -> str:
    """Return the precision that a run would choose here."""
    rates = [product_rate("cpu", dtype) for dtype in (torch.float32, torch.bfloat16)]
    return "bfloat16" if rates[1] > 1.3 * rates[0] else "float32"


def step_seconds(keep: bool, precision: str, steps: int) -> list[float]:
    """Train the nano preset on random tokens and return the seconds of every step after the first few."""
    if keep:
        keep_freed_memory()
    recipe = resolve("nano")
    torch.manual_seed(0)
    model = FANformerForCausalLM(FANformerConfig(**load_preset("nano").model)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, fused=True)
    shape = (recipe.batch_size, recipe.sequence_length)
    seconds = []
    for _ in range(WARM_UP_STEPS + steps):
        ids = torch.randint(model.config.vocab_size, shape)
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
    return seconds[WARM_UP_STEPS:]


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keep `count` processes busy meanwhile."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def compare(busy: int, precision: str, rounds: int, steps: int) -> dict[str, Any]:
    """Measure with and without the setting in turns, beside `busy` busy processes."""
    load_before = os.getloadavg()[0]
    medians: dict[bool, list[float]] = {False: [], True: []}
    with busy_processes(busy):
        for round_number in range(rounds):
            for keep in (False, True) if round_number % 2 == 0 else (True, False):
                medians[keep].append(statistics.median(in_a_process(step_seconds, keep, precision, steps)))
    ratios = [without / kept for without, kept in zip(medians[False], medians[True], strict=True)]
    return {
        "busy_processes": busy,
        "load_before": load_before,
        "load_after": os.getloadavg()[0],
        "step_seconds_without": medians[False],
        "step_seconds_with": medians[True],
        "times_faster": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
    }


def main() -> None:
    """Measure under both conditions, print a table, and write it where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=12, help="timed steps per measurement (default 12)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements with and without, each (default 3)")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/malloc-DATE.json")
    arguments = parser.parse_args()
    if not in_a_process(keep_freed_memory):
        sys.exit("the C library is not glibc, which this setting belongs to: there is nothing to measure here")
    date = datetime.datetime.now(datetime.UTC)
    precision = in_a_process(choose_precision)
    results: dict[str, Any] = {
        "date": date.isoformat(timespec="seconds"),
        "what": "seconds of a training step, preset nano, batch 16 x 256, AdamW; medians of each process",
        "steps": arguments.steps,
        "precision": precision,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "conditions": {},
    }
    print(f"{'machine':<10} {'load':>11} {'without, s':>11} {'with, s':>9} {'times faster':>13} {'range':>13}")
    for condition, busy in CONDITIONS.items():
        row = compare(busy, precision, arguments.rounds, arguments.steps)
        results["conditions"][condition] = row
        without, kept = (statistics.median(row[f"step_seconds_{key}"]) for key in ("without", "with"))
        print(
            f"{condition:<10} {row['load_before']:>4.1f} to {row['load_after']:>4.1f} {without:>10.3f} {kept:>9.3f} "
            f"{row['times_faster']:>13.2f} {row['lowest']:>6.2f}-{row['highest']:.2f}",
            flush=True,
        )
    if arguments.write:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"malloc-{date:%Y-%m-%d}.json"
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(f"written to {path}")


if __name__ == "__main__":
    main()
