"""Check FANformer on an accelerator and measure it beside Llama in SmolLM2-135M's shape: one command, no network.

    python benchmarks/accelerator/accelerator.py [--minutes 9] [--output DIR] [--parts A,B] [--queue FILE] [--jobs N]
        [--dry-run]

Needs torch, transformers, accelerate, tokenizers and numpy (and pytest, if tests/ is to be run); the package itself
need not be installed. Every part runs in a process of its own, and the results, an entry of the ledger, are complete
after each: a part that fails, hangs or is killed costs only itself. The last part spends the time that is left on a
queue of trainings (benchmarks/queues/accelerator.yaml); `--parts queue` goes on with it. `--dry-run` walks the same
path on the CPU with tiny models.
"""

import argparse
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from context import REPOSITORY, Context, one_line  # first: it finds the package where that is not installed
from record import read_results, write_results

RESULTS = REPOSITORY / "benchmarks" / "results"
QUEUES = REPOSITORY / "benchmarks" / "queues"


@dataclass(frozen=True)
class Limits:
    """How long a part takes on a data-centre card, and after how long it counts as hung; in seconds."""

    expected: float
    longest: float


PARTS = {
    "machine": Limits(5, 60),
    "ceilings": Limits(10, 60),
    "checks": Limits(90, 200),
    "training_whole": Limits(160, 300),
    "inference_eager": Limits(40, 150),
    "inference_compiled": Limits(80, 300),
    "packing": Limits(60, 200),
    "training_regional": Limits(50, 200),
    "tests": Limits(90, 240),
    "queue": Limits(60, 24 * 3600),
}
"""The parts in their order: what says most comes first, since the time may run out."""

QUEUE_ENDS_IN = 60
"""Seconds before the end at which the queue's training is told to save; a large model takes some of them."""
UNFINISHED = "did not finish"
"""The error of a part while it runs."""

REFERENCE = {
    "figure": "92.2M parameters, batch 16 x 1024, on one RTX 4090",
    "iterations_per_second": 5.9,
    "utilisation": 0.30,
    "peak_memory_aim_gib": 22,
}
"""What the project set out with, to stand beside what is measured."""


def run_parts(
    functions: Mapping[str, Callable[[Context], dict[str, Any]]],
    names: list[str],
    path: Path,
    device: str,
    dry_run: bool,
    deadline: float,
    queue: Path,
    jobs: int = 1,
) -> None:
    """Run parts one after another; each one's figures, or its error in one line, go to `path` as soon as it ends."""
    for name in names:
        results = read_results(path)
        earlier = dict(results["parts"])

        def save(figures: Mapping[str, Any], name: str = name, results: dict[str, Any] = results) -> None:
            results["parts"][name] = {**figures, "error": UNFINISHED}
            write_results(path, results)

        start = time.perf_counter()
        try:
            figures = functions[name](Context(device, dry_run, deadline, earlier, save, queue, jobs, path.parent))
            json.dumps(figures, allow_nan=False)
        except Exception as error:  # whatever a part dies of is a result, and the next part goes on
            figures = {**results["parts"].get(name, {}), "error": one_line(error)}
        results["parts"][name] = {**figures, "seconds": round(time.perf_counter() - start, 2)}
        write_results(path, results)


def pytest_counts(output: str) -> dict[str, int]:
    """Return the counts of pytest's closing line, as {"passed": 12, "failed": 1}."""
    closing = [line for line in output.splitlines() if re.search(r"\d+ \w+.* in [\d.]+s", line)]
    counts = re.findall(r"(\d+) (passed|failed|skipped|error|deselected|xfailed)", closing[-1]) if closing else []
    return {name: int(count) for count, name in counts}


def tests(context: Context) -> dict[str, Any]:
    """Run the model's tests with the library versions of this machine."""
    folder = REPOSITORY / "tests" / "model"
    if context.dry_run or not folder.is_dir():
        return {"skipped": "dry run" if context.dry_run else f"no folder {folder}"}
    options = ["-o", "addopts=", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
    paths = os.pathsep.join([str(REPOSITORY / "src"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(folder)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=max(1.0, min(PARTS["tests"].longest, context.seconds_left) - 5),
    )
    if "No module named pytest" in finished.stderr:
        return {"skipped": "pytest is not installed"}
    failures = [line for line in finished.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return {**pytest_counts(finished.stdout), "ok": finished.returncode == 0, "failures": failures[:40]}


def queue(context: Context) -> dict[str, Any]:
    """Train what a queue asks for, for as long as there is time; results go to the ledger as they come."""
    from fanformer.comparison.queue import read_output_dir

    if not context.dry_run:
        return train_queue(context, REPOSITORY / read_output_dir(context.queue))
    with tempfile.TemporaryDirectory() as scratch:  # a dry run trains anew
        return train_queue(context, Path(scratch))


def train_queue(context: Context, output_dir: Path) -> dict[str, Any]:
    """Run the queue in a process of its own, and return how far it came."""
    from fanformer.comparison.queue import read_status

    paths = os.pathsep.join([str(REPOSITORY / "src"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    minutes = max(0.1, (context.seconds_left - QUEUE_ENDS_IN) / 60)
    command = [sys.executable, "-m", "fanformer.comparison.queue", str(context.queue), "--minutes", f"{minutes:.2f}"]
    command += ["--jobs", str(context.jobs)]
    finished = subprocess.run(
        [*command, "--output-dir", str(output_dir), "--record-dir", str(context.output)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    status, _ = read_status(output_dir)
    figures: dict[str, Any] = {"minutes": minutes, "entries": status["entries"], "said": finished.stdout.splitlines()}
    if finished.returncode not in (0, os.EX_TEMPFAIL):
        figures["error"] = (finished.stderr.strip() or f"ended with status {finished.returncode}").splitlines()[-1]
    return figures


def worker(arguments: argparse.Namespace) -> int:
    """Run the parts named by `--parts` in this process, adding to the results file."""
    import checks
    import decoding
    import measures

    functions = {
        "machine": measures.machine,
        "ceilings": measures.ceilings,
        "checks": checks.checks,
        "training_regional": lambda context: measures.training(context, whole=False),
        "training_whole": lambda context: measures.training(context, whole=True),
        "packing": measures.packing,
        "inference_eager": lambda context: decoding.inference(context, compiled=False),
        "inference_compiled": lambda context: decoding.inference(context, compiled=True),
        "tests": tests,
        "queue": queue,
    }
    device = "cpu" if arguments.dry_run else "cuda"
    run_parts(
        functions,
        arguments.parts,
        arguments.worker,
        device,
        arguments.dry_run,
        arguments.deadline,
        arguments.queue,
        arguments.jobs,
    )
    return 0


def run_worker(names: list[str], path: Path, deadline: float, dry_run: bool, queue: Path, jobs: int = 1) -> None:
    """Run parts in a process of their own; what it leaves without a result gets the reason."""
    limit = max(1.0, min(sum(PARTS[name].longest for name in names), deadline - time.time()))
    command = [sys.executable, __file__, "--worker", str(path), "--parts", ",".join(names), "--deadline", str(deadline)]
    command += ["--queue", str(queue), "--jobs", str(jobs)]
    process = subprocess.Popen(command + ["--dry-run"] * dry_run, process_group=0)
    start = time.perf_counter()
    try:
        process.wait(limit)
        reason = f"the process ended with status {process.returncode}"
    except subprocess.TimeoutExpired:
        reason = f"stopped after {limit:.0f} s"
    finally:
        if process.poll() is None:
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)  # its own group, so that its compilers go with it
            process.kill()
            process.wait()
    results = read_results(path)
    for name in names:
        figures = results["parts"].get(name, {"error": UNFINISHED})
        if figures.get("error") == UNFINISHED:
            results["parts"][name] = {**figures, "error": reason, "seconds": round(time.perf_counter() - start, 2)}
    write_results(path, results)


def run(names: list[str], path: Path, deadline: float, dry_run: bool, queue: Path, jobs: int = 1) -> None:
    """Run every part that the time left has room for; a dry run needs one process for all."""
    if dry_run:
        run_worker(names, path, deadline, dry_run, queue, jobs)
        return
    for name in names:
        left = deadline - time.time()
        if left < PARTS[name].expected:
            results = read_results(path)
            reason = f"takes about {PARTS[name].expected:.0f} s, {max(left, 0):.0f} s left"
            results["parts"][name] = {"skipped": reason}
            write_results(path, results)
        else:
            print(f"{name}, {left:.0f} s left", flush=True)
            run_worker([name], path, deadline, dry_run, queue, jobs)


def problems(figures: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return what went wrong, one line each: errors at any depth, and checks or tests that failed."""
    found = []
    for name, value in figures.items():
        if isinstance(value, Mapping):
            found += problems(value, f"{prefix}{name}.")
        elif name == "error":
            found.append(f"{prefix[:-1]}: {value}")
        elif name == "ok" and value is False and "error" not in figures:
            found.append(f"{prefix[:-1]}: {figures.get('failures') or figures.get('distance')}")
    return found


def _row(title: str, cells: Mapping[str, Any]) -> str:
    texts = [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in cells.items()]
    return f"{title:<34} {', '.join(texts)}"


def _model_rows(title: str, figures: Mapping[str, Any]) -> list[str]:
    """Return a row for each model and one for the ratio."""
    shown = ("iterations_per_second", "tokens_per_second", "first_token_seconds", "utilisation", "peak_memory_gib")
    rows = []
    for name, value in figures.items():
        if isinstance(value, Mapping):
            cells = {key: value[key] for key in (*shown, "median", "lowest", "highest", "error") if key in value}
            rows += [_row(f"{title} {name}", cells)] if cells else _model_rows(f"{title} {name}", value)
    return rows


def table(results: Mapping[str, Any]) -> list[str]:
    """Return the results as rows of text."""
    rows = []
    for part, figures in results["parts"].items():
        trouble = {key: figures[key] for key in ("error", "skipped") if key in figures}
        rows += [_row(part, trouble)] if trouble else []
        if part == "checks":
            outcomes = [value["ok"] for value in figures.values() if isinstance(value, Mapping) and "ok" in value]
            rows.append(_row(part, {"hold": sum(outcomes), "of": len(outcomes)}))
        elif part.startswith(("training", "inference")):
            rows += _model_rows(part, figures)
        elif not trouble:
            rows.append(_row(part, {key: value for key, value in figures.items() if value not in ([], None)}))
    return [*rows, _row("reference", results["reference"])]


def cuda_device() -> str | None:
    """Return the name of the CUDA device, or None; asked in another process, so that this one keeps no memory there."""
    question = "import torch; print(torch.cuda.get_device_name(0) if torch.cuda.is_available() else '')"
    answer = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True)
    return answer.stdout.strip() or None


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command's options."""

    def parts(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in PARTS:
                raise argparse.ArgumentTypeError(f"part {name!r} does not exist: choose from {', '.join(PARTS)}")
        return names

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="time budget (default 9)")
    parser.add_argument("--output", type=Path, help="folder of the results (default benchmarks/results)")
    parser.add_argument("--queue", type=Path, help="trainings of the last part (default benchmarks/queues)")
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side (default 1)")
    parser.add_argument("--parts", type=parts, default=list(PARTS), help="comma-separated parts to run (default all)")
    parser.add_argument("--dry-run", action="store_true", help="tiny models on the CPU; writes only with --output")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    given.queue = given.queue or QUEUES / ("dry-run.yaml" if given.dry_run else "accelerator.yaml")
    return given


def main() -> int:
    """Run the command; the status is 0, 1 where something failed, or 2 where there is no CUDA device."""
    arguments = parse_arguments()
    if arguments.worker is not None:
        return worker(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a worker goes with us
    deadline = time.time() + 60 * arguments.minutes
    device = "dry-run" if arguments.dry_run else cuda_device()
    if device is None:
        print("no CUDA device was found: run this on a machine with one, or add --dry-run", file=sys.stderr)
        return 2
    date = datetime.datetime.now(datetime.UTC)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.output or (Path(scratch) if arguments.dry_run else RESULTS)
        folder.mkdir(parents=True, exist_ok=True)
        slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        path = folder / f"accelerator-{date:%Y-%m-%d}-{slug}"
        about = {"date": date.isoformat(timespec="seconds"), "device": device, "asked": arguments.parts}
        write_results(path, {**about, "parts": {}, "dry_run": arguments.dry_run, "reference": REFERENCE})
        run(arguments.parts, path, deadline, arguments.dry_run, arguments.queue.absolute(), arguments.jobs)
        results = read_results(path)
        print("\n".join(["", *table(results)]))
        if folder != Path(scratch):
            print(f"\nwritten to {path}")
    failed = problems(results["parts"])
    for line in failed:
        print(f"FAILED {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
