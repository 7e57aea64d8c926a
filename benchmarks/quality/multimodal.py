"""What a model that sees and hears gets right on real data, held out, beside a blind twin that was trained alike.

    python benchmarks/quality/multimodal.py --base DIR [--data ../shared/data] [--work runs/multimodal] [--seeds 3]
        [--task NAME ...] [--jobs 2] [--size small|large] [--write] [--estimate] [--dry-run] [--tables]

DATA has mnist-test, emoji-captions and spoken-digits. Every task aligns towers with the base, most then tune adapters,
and each does so for every seed twice: the twin's towers are given ones. What is done is kept in WORK, and the same
command goes on; a task that fails keeps no other waiting. --write puts each task into the ledger as it ends, and the
ledger's tables into docs/multimodal.md; --tables does only the latter. --estimate trains a few steps of every task and
says how long all of them take; --dry-run does everything in little, and proves nothing.
"""

import argparse
import hashlib
import itertools
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cells import Work
from multimodal_data import GROUPS, TASK_FILE, TASKS, Sources, Task, read_task, write_task
from multimodal_tables import Results, figures, tables, write_page

from fanformer.comparison.ledger import Entry, measured_today, read_ledger, write_entry

REPOSITORY = Path(__file__).parents[2]
RESULTS, PAGE = REPOSITORY / "benchmarks" / "results", REPOSITORY / "docs" / "multimodal.md"
COMMON = {
    "optimizer": "muon", "learning_rate": 3e-3, "sequence_length": 128, "keep_last": 1, "keep_best": False,
    "precision": "float32",  # twins are the same, whatever else the machine does when each begins
}  # fmt: skip
SIZES: Mapping[str, Mapping[str, Any]] = {
    "small": {"batch_size": 8, "tower_width": 128, "tower_layers": 4},
    "large": {"batch_size": 64, "tower_width": 384, "tower_layers": 8, "learning_rate": 1e-3, "precision": "bfloat16"},
}
DRY = {"batch_size": 2, "sequence_length": 128, "tower_width": 16, "tower_layers": 1}
DRY_STEPS, DRY_ROWS, ESTIMATED_STEPS, ESTIMATED_ROWS = 2, 6, 6, 600
TWINS = ("model", "blind")
DATA = ("mnist-test", "emoji-captions", "spoken-digits")


class Cell(NamedTuple):
    """A model that is trained and measured."""

    task: str
    twin: str
    seed: int

    @property
    def name(self) -> str:
        """Names its folder and its result."""
        return f"{self.task}.{self.twin}.{self.seed}"


def parse() -> argparse.Namespace:
    """Return what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="folder of the language model that rests")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of real data")
    parser.add_argument("--work", type=Path, default=Path("runs/multimodal"), help="folder of what is done")
    parser.add_argument("--task", action="append", choices=list(GROUPS), help="may be repeated; default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="trainings at once, each with as many threads")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a training")
    parser.add_argument("--size", choices=list(SIZES), default="small", help="of towers and batches")
    parser.add_argument("--device", default="cpu")
    for flag in ("--write", "--estimate", "--dry-run", "--tables"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if not asked.tables and (asked.base is None or not (asked.base / "model.safetensors").is_file()):
        parser.error(f"--base must be the folder of a language model, got {asked.base}")
    if asked.dry_run:
        asked.seeds = 1
    asked.task = asked.task or list(GROUPS)
    return asked


def settings(asked: argparse.Namespace) -> dict[str, Any]:
    """Return what decides the results, beside the code."""
    weights = hashlib.sha256((asked.base / "model.safetensors").read_bytes()).hexdigest()[:16]
    return {"base": asked.base.name, "base_weights": weights, "size": asked.size, "dry_run": asked.dry_run}


def tasks_of(asked: argparse.Namespace, group: str) -> tuple[str, ...]:
    """Return the tasks that are told together, two of them at most in a dry run."""
    return GROUPS[group][: 2 if asked.dry_run else None]


def prepared(asked: argparse.Namespace, name: str) -> Task:
    """Return a task, its rows written unless they are."""
    place = asked.work / "rows" / name
    if not (place / TASK_FILE).is_file():
        place.mkdir(parents=True, exist_ok=True)
        limit = DRY_ROWS if asked.dry_run else ESTIMATED_ROWS if asked.estimate else None
        write_task(place, TASKS[name](Sources(asked.data, place, limit)))
    return read_task(place)


def train_stages(
    asked: argparse.Namespace, cell: Cell, task: Task, most_steps: int | None = None, listener: Any = None
) -> Path:
    """Train the stages of a cell, or go on with them, and return the folder of the last.

    Args:
        asked: what is asked for.
        cell: the model.
        task: its rows and stages.
        most_steps: of each stage; default: the task's.
        listener: hears what the runs do.
    """
    from fanformer.loading import longest_text
    from fanformer.training.configuration import resolve_multimodal
    from fanformer.training.run import train

    rows, base = asked.work / "rows" / cell.task, asked.base
    for number, stage in enumerate(task.stages):
        place, steps = asked.work / "cells" / cell.name / f"stage-{number}", min(stage.steps, most_steps or stage.steps)
        fields: dict[str, Any] = {**COMMON, **SIZES[asked.size], **task.fields, **stage.fields}
        fields |= DRY if asked.dry_run else {}
        fields |= {"device": asked.device, "threads": asked.threads, "seed": cell.seed, "max_steps": steps}
        fields |= {"init_from": str(base), "output_dir": str(place), "resume": True, "eval_steps": 10**6}
        fields |= {"data": str(rows / stage.file), "eval_data": str(rows / next(iter(task.held_out.values())).file)}
        fields |= {"blind": cell.twin == "blind", "stage": "tune" if number else "align"}
        if not (place / "ended").is_file():
            run = resolve_multimodal(lambda base=base: longest_text(base), fields)
            result = train(run, listener or (lambda event: None))
            if not result.reached_end:
                sys.exit(f"{cell.name} was stopped after step {result.step}: the same command goes on")
            (place / "ended").touch()  # first: a run whose checkpoints are half gone would begin anew
            for checkpoint in place.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
        base = place
    return base


def do_cell(asked: argparse.Namespace, cell: Cell) -> None:
    """Train and measure a cell where that is not done; its result is a file."""
    work = Work(asked.work)
    if work.has(cell.name):
        return
    from multimodal_measures import measure, text_bits
    from transformers.utils.logging import disable_progress_bar

    from fanformer.cli.failure import quiet_libraries

    quiet_libraries()
    disable_progress_bar()
    task, began = prepared(asked, cell.task), time.monotonic()
    folder = train_stages(asked, cell, task, DRY_STEPS if asked.dry_run else None)
    trained = time.monotonic()
    found = measure(folder, asked.work / "rows" / cell.task, task, cell.twin == "blind", asked.device)
    found["text_bits_per_byte"] = {"base": text_bits(asked.base), "with_towers": text_bits(folder)}
    found["seconds"] = {"training": round(trained - began), "measuring": round(time.monotonic() - trained)}
    work.keep(cell.name, found)
    print(f"{cell.name}: {found['scores']}, seconds of {found['seconds']}", flush=True)


def do_group(asked: argparse.Namespace, name: str) -> list[Entry]:
    """Do all cells of what is told together, and return its entry, and that of adapters where it has some for both."""
    of_group = tasks_of(asked, name)
    cells = [Cell(task, twin, seed) for seed in range(asked.seeds) for task in of_group for twin in TWINS]
    work = Work(asked.work)
    for task in of_group:
        if not all(work.has(cell.name) for cell in cells if cell.task == task):
            prepared(asked, task)
    work.do(cells, lambda cell: do_cell(asked, cell), asked.jobs, asked.threads)
    results: Results = {}
    for cell in cells:
        content = work.read(cell.name)
        content.pop("said")  # stays in the file
        results.setdefault(cell.task, {}).setdefault(cell.twin, []).append(content)
    tasks = {task: prepared(asked, task) for task in of_group}
    digest = hashlib.sha256()
    for task in of_group:
        for path in sorted((asked.work / "rows" / task).glob("*.jsonl")):
            digest.update(path.read_bytes())
    shape = next(iter(tasks.values()))
    configuration = {
        "task": name,
        **settings(asked),
        "scale": asked.size,
        "steps": [stage.steps for stage in shape.stages],
    }
    configuration |= {"fields": {**COMMON, **SIZES[asked.size], **shape.fields}}
    held_out = {key: {"bar": one.bar, "chance": one.chance, "score": one.score} for key, one in shape.held_out.items()}
    entry = measured_today(
        f"multimodal-{name}-{asked.base.name}" + ("" if asked.size == "small" else f"-{asked.size}"),
        what=f"{name}: right answers about pictures and sound, held out, beside a blind twin's",
        kind="evaluation",
        seeds=list(range(asked.seeds)),
        configuration=configuration,
        data={"source": "mnist-test, emoji-captions, spoken-digits", "fingerprint": digest.hexdigest()},
        result=figures(tasks, results),
        details={"held_out": held_out, "results": results},
    )
    return [entry, costs(asked)] if name == "both" else [entry]


def costs(asked: argparse.Namespace) -> Entry:
    """Return the entry of what adapters cost, measured once on the first model that adds."""
    from multimodal_measures import adapter_costs

    folder = asked.work / "cells" / Cell("both", "model", 0).name / "stage-1"
    return measured_today(
        f"multimodal-adapters-{asked.base.name}" + ("" if asked.size == "small" else f"-{asked.size}"),
        what="size of towers, projectors and adapters, and the time of rows by what they hold over that of the base",
        configuration={"task": "adapters", **settings(asked), "scale": asked.size, "adapter_rank": 16},
        result=adapter_costs(asked.base, folder, 1 if asked.dry_run else 9),
    )


def estimate(asked: argparse.Namespace) -> None:
    """Train a few steps of every stage, and print how long all of it takes by the time that a core works on a step.

    What it writes lies in `asked.work`.
    """
    total = 0.0
    for group in asked.task:
        task, times = prepared(asked, GROUPS[group][0]), list[float]()

        def hear(event: Any, times: list[float] = times) -> None:
            if event.kind == "step":
                times.append(time.process_time())

        train_stages(asked, Cell(GROUPS[group][0], "model", 0), task, ESTIMATED_STEPS, hear)
        seconds = 0.0
        for number, stage in enumerate(task.stages):
            clock = times[number * ESTIMATED_STEPS : (number + 1) * ESTIMATED_STEPS]
            seconds += stage.steps * statistics.median(b - a for a, b in itertools.pairwise(clock))
        trainings = len(GROUPS[group]) * len(TWINS) * asked.seeds
        hours = seconds * trainings / asked.jobs / 3600
        total += hours
        print(f"{group}: {seconds / 60:.0f} min a training, {trainings} of them: {hours:.1f} h", flush=True)
    print(f"all: {total:.1f} h on {asked.jobs} free cores, without reading the rows and measuring")


def main() -> None:
    """Do what is not done, print the tables, and write what is asked for."""
    asked = parse()
    ledger = asked.work / "ledger" if asked.dry_run else RESULTS
    if asked.tables:
        write_page(PAGE, read_ledger(RESULTS))
        return
    if missing := [name for name in DATA if not (asked.data / name).is_dir()]:
        sys.exit(f"--data must have {', '.join(DATA)}, got {asked.data} without {', '.join(missing)}")
    if asked.estimate:
        with tempfile.TemporaryDirectory(prefix="estimate-") as place:
            asked.work = Path(place)
            estimate(asked)
        return
    if asked.cell is not None:
        task, twin, seed = asked.cell.split(".")
        do_cell(asked, Cell(task, twin, int(seed)))
        return
    Work(asked.work).begin(settings(asked))
    left = []
    for group in asked.task:
        try:
            found = do_group(asked, group)
        except SystemExit:  # a cell failed, and has said why
            if asked.jobs == 1:  # it was this process, which is to stop
                raise
            left.append(group)
            continue
        print(tables(found), flush=True)
        if asked.write or asked.dry_run:
            write_entry(ledger, *found)
        if asked.write and not asked.dry_run:
            write_page(PAGE, read_ledger(RESULTS))
    if left:
        sys.exit(f"not done: {', '.join(left)}: the same command goes on")


if __name__ == "__main__":
    main()
