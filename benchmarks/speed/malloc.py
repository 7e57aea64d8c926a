"""Measure what keeping freed memory is worth to a training step of the nano preset on the CPU.

    python benchmarks/speed/malloc.py [--steps 8] [--rounds 3] [--threads N] [--write]

Every measurement is a process of its own, with the setting and without it in turns: first on the machine as it is,
then with one busy process on each core. Figures are ratios of steps that ran one after the other; the load is told.
Page faults and the kernel's share of the time say where a gain comes from, whatever else the machine does.
"""

import argparse
import contextlib
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fanformer.comparison.ledger import Figure, measured_today, range_of, write_entry
from fanformer.model import FANformerConfig, FANformerForCausalLM
from fanformer.training.configuration import load_preset, resolve
from fanformer.training.environment import keep_freed_memory, product_rate

RESULTS = Path(__file__).parents[1] / "results"
WARM_UP_STEPS = 2
CONDITIONS = {"as it is": 0, "busy": os.cpu_count() or 1}
"""Busy processes beside the measured one."""


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what `function` returns in a process that is forked for it: its memory settings end with it."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)


def choose_precision(threads: int) -> str:
    """Return the precision that a run would choose here."""
    torch.set_num_threads(threads)
    rates = [product_rate("cpu", dtype) for dtype in (torch.float32, torch.bfloat16)]
    return "bfloat16" if rates[1] > 1.3 * rates[0] else "float32"


def measure(keep: bool, precision: str, threads: int, steps: int) -> dict[str, float]:
    """Train the nano preset on random tokens; return what a step costs once the first few are over."""
    torch.set_num_threads(threads)
    if keep:
        keep_freed_memory()
    recipe = resolve("nano")
    torch.manual_seed(0)
    model = FANformerForCausalLM(FANformerConfig(**load_preset("nano").model)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.optimizer.learning_rate, fused=True)
    shape = (recipe.batch.batch_size, recipe.batch.sequence_length)
    seconds = []
    before = resource.getrusage(resource.RUSAGE_SELF)
    for step in range(WARM_UP_STEPS + steps):
        if step == WARM_UP_STEPS:
            before = resource.getrusage(resource.RUSAGE_SELF)
        ids = torch.randint(model.config.vocab_size, shape)
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": statistics.median(seconds[WARM_UP_STEPS:]),
        "page_faults": (after.ru_minflt - before.ru_minflt) / steps,
        "kernel_seconds": (after.ru_stime - before.ru_stime) / steps,
    }


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


def compare(busy: int, precision: str, threads: int, rounds: int, steps: int) -> dict[str, Any]:
    """Measure with and without the setting in turns, beside `busy` busy processes."""
    load_before = os.getloadavg()[0]
    measured: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    with busy_processes(busy):
        for round_number in range(rounds):
            for keep in (False, True) if round_number % 2 == 0 else (True, False):
                measured[keep].append(in_a_process(measure, keep, precision, threads, steps))
    pairs = zip(measured[False], measured[True], strict=True)
    ratios = [without["seconds"] / kept["seconds"] for without, kept in pairs]
    return {
        "busy_processes": busy,
        "load_before": load_before,
        "load_after": os.getloadavg()[0],
        "without": measured[False],
        "with": measured[True],
        "times_faster": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
    }


def row_text(condition: str, row: dict[str, Any]) -> str:
    """Return one condition as a row of the table."""
    cells = [f"{condition:<10} {row['load_before']:>5.1f} to {row['load_after']:<5.1f}"]
    for name, width, digits in (("seconds", 8, 3), ("kernel_seconds", 8, 3), ("page_faults", 8, 0)):
        for setting in ("without", "with"):
            median = statistics.median(measured[name] for measured in row[setting])
            cells.append(f"{median:>{width}.{digits}f}")
    return " ".join([*cells, f"{row['times_faster']:>7.2f} ({row['lowest']:.2f}-{row['highest']:.2f})"])


def to_result(conditions: Mapping[str, dict[str, Any]]) -> dict[str, Figure]:
    """Return the figures of every condition by name."""
    result = {}
    for condition, row in conditions.items():
        name = condition.replace(" ", "_")
        pairs = zip(row["without"], row["with"], strict=True)
        ratios = [without["seconds"] / kept["seconds"] for without, kept in pairs]
        result[f"times_faster_{name}"] = range_of(ratios, "times")
        for key, unit in (("seconds", "s"), ("page_faults", "page faults per step"), ("kernel_seconds", "s per step")):
            for setting in ("without", "with"):
                values = [measured[key] for measured in row[setting]]
                result[f"{key}_{setting}_{name}"] = range_of(values, unit)
    return result


def main() -> None:
    """Measure under both conditions, print a table, and write it where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=8, help="timed steps per measurement (default 8)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements with and without, each (default 3)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads (default torch's)")
    parser.add_argument("--write", action="store_true", help="write the entry to benchmarks/results")
    arguments = parser.parse_args()
    if not in_a_process(keep_freed_memory):
        sys.exit("the C library is not glibc, which this setting belongs to: there is nothing to measure here")
    precision = in_a_process(choose_precision, arguments.threads)
    conditions: dict[str, Any] = {}
    print(f"{precision}, {arguments.threads} threads; each pair of columns: without the setting, with it")
    columns = f"{'step, s':>17} {'in the kernel, s':>17} {'page faults':>17} times faster"
    print(f"{'machine':<10} {'load':^14} {columns}")
    for condition, busy in CONDITIONS.items():
        row = compare(busy, precision, arguments.threads, arguments.rounds, arguments.steps)
        conditions[condition] = row
        print(row_text(condition, row), flush=True)
    if arguments.write:
        fields = {name: getattr(arguments, name) for name in ("steps", "rounds", "threads")}
        entry = measured_today(
            "malloc-{date}",
            what="a training step of preset nano with and without keeping freed memory, AdamW",
            seeds=[0],
            configuration={"preset": "nano", "precision": precision, **fields},
            result=to_result(conditions),
            details={"conditions": conditions},
        )
        print(f"written to {write_entry(RESULTS, entry)}")


if __name__ == "__main__":
    main()
