"""Measure `fanformer data prepare` against tokenization by `datasets.map`, its memory, and a restart after a kill.

    python benchmarks/speed/prepare.py --data 'FOLDER/train-*.jsonl.xz' [--megabytes 48] [--rounds 3] [--write]

Both read the same jsonl file and use the same tokenizer, in turns, each in a process of its own, with one process and
with one per core. The time of `datasets.map` is that of the call alone, with its table of the text made before; ours
is everything from reading the file to the written shards.
"""

import argparse
import cProfile
import glob
import importlib.metadata
import io
import json
import os
import pstats
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from fanformer.comparison.ledger import EXACT, Figure, measured_today, range_of, write_entry
from fanformer.machine.versions import command_line, versions

RESULTS = Path(__file__).parents[1] / "results"
VOCABULARY = 16_384
SAMPLES_PER_SECOND = 20
FLATNESS = (0.25, 0.5, 1.0)
"""Shares of all data at which the memory is measured."""


def cpu_seconds() -> float:
    """Return the processor time of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def ours(data: str, tokenizer: str, folder: str, workers: int, max_bytes: int | None = None) -> dict[str, Any]:
    """Prepare the data and return what it took."""
    from fanformer.data.preparation.prepare import prepare
    from fanformer.data.sources.documents import open_source
    from fanformer.data.tokenizer import load_tokenizer

    outcome: list[Any] = []
    before = cpu_seconds()
    prepared = prepare(
        open_source(data),
        Path(folder) / "out",
        tokenizer=load_tokenizer(tokenizer),
        vocab_size=0,
        max_bytes=max_bytes,
        workers=workers,
        report=outcome.append,
    )
    return {
        "seconds": outcome[0].encoding_seconds,
        "cpu_seconds": cpu_seconds() - before,
        "bytes": outcome[0].bytes,
        "resumed_bytes": outcome[0].resumed_bytes,
        "tokens": outcome[0].tokens,
        "fingerprint": prepared.fingerprint,
    }


def theirs(data: str, tokenizer: str, folder: str, workers: int, max_bytes: int | None = None) -> dict[str, Any]:
    """Tokenize the data with `datasets.map` and return what the call took."""
    os.environ["HF_DATASETS_CACHE"] = folder
    import datasets

    from fanformer.data.tokenizer import encode_documents, load_tokenizer

    datasets.disable_progress_bars()
    loaded = load_tokenizer(tokenizer)
    table = datasets.load_dataset("json", data_files=data, split="train")
    before, started = cpu_seconds(), time.perf_counter()
    tokenized = table.map(
        lambda batch: {"input_ids": encode_documents(loaded, batch["text"])},
        batched=True,
        remove_columns=table.column_names,
        num_proc=workers if workers > 1 else None,
    )
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds() - before,
        "bytes": sum(len(text.encode()) for text in table["text"]),
        "tokens": sum(map(len, tokenized["input_ids"])) + len(tokenized),
    }


def measured(kind: str, *arguments: Any, folder: str | None = None) -> dict[str, Any]:
    """Run `ours` or `theirs` in a process of its own and add the peak memory of that process and its children."""
    with tempfile.TemporaryDirectory() as own:
        data, tokenizer, *rest = map(str, arguments)
        command = [sys.executable, __file__, "--run", kind, data, tokenizer, folder or own, *rest]
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        peaks: list[int] = [0]
        watcher = threading.Thread(target=watch, args=(process.pid, peaks))
        watcher.start()
        out, _ = process.communicate()
        watcher.join()
    if process.returncode:
        sys.exit(f"measuring {kind} failed")
    return json.loads(out.splitlines()[-1]) | {"peak_bytes": peaks[0]}


def watch(pid: int, peaks: list[int]) -> None:
    """Keep the largest sum of the memory of a process and its descendants, each its own share of what is shared."""
    try:
        root = psutil.Process(pid)
        while root.is_running() and root.status() != psutil.STATUS_ZOMBIE:
            total = 0
            for process in [root, *root.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:
                    continue
            peaks[0] = max(peaks[0], total)
            time.sleep(1 / SAMPLES_PER_SECOND)
    except psutil.Error:
        return


def compare(data: Path, tokenizer: str, workers: int, rounds: int) -> dict[str, Any]:
    """Measure both in turns and return all figures with the ratio of each pair."""
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []}
    load_before = os.getloadavg()[0]
    for number in range(rounds):
        for kind in ("ours", "theirs") if number % 2 == 0 else ("theirs", "ours"):
            runs[kind].append(measured(kind, data, tokenizer, workers))
    # ours holds out a part, which ends with a token of its own
    assert abs(runs["ours"][0]["tokens"] - runs["theirs"][0]["tokens"]) <= 2, "both must make the same tokens"
    ratios = [b["seconds"] / a["seconds"] for a, b in zip(runs["ours"], runs["theirs"], strict=True)]
    cpu_ratios = [b["cpu_seconds"] / a["cpu_seconds"] for a, b in zip(runs["ours"], runs["theirs"], strict=True)]
    rates = {
        kind: statistics.median(run["bytes"] / run["seconds"] / 1e6 for run in measured_runs)
        for kind, measured_runs in runs.items()
    }
    return {
        "workers": workers,
        "load_before": load_before,
        "load_after": os.getloadavg()[0],
        "megabytes_per_second": rates,
        "times_faster": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "times_less_cpu": statistics.median(cpu_ratios),
        "runs": runs,
    }


def killed_and_restarted(data: Path, tokenizer: str, workers: int) -> dict[str, Any]:
    """Kill a preparation once it has noted its work, go on, and compare with one that was not killed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--run", "ours", str(data), tokenizer, folder, str(workers)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while process.poll() is None and not (Path(folder) / "out.partial/work/journal.json").exists():
            time.sleep(0.05)
        process.kill()
        process.wait()
        resumed = measured("ours", data, tokenizer, workers, folder=folder)
    whole = measured("ours", data, tokenizer, workers)
    return {
        "resumed_bytes": resumed["resumed_bytes"],
        "total_bytes": whole["bytes"],
        "same_fingerprint": resumed["fingerprint"] == whole["fingerprint"],
    }


def profile(data: Path, tokenizer: str) -> list[str]:
    """Return where one process spends its time, the largest shares first."""
    profiler = cProfile.Profile()
    with tempfile.TemporaryDirectory() as folder:
        profiler.runcall(ours, str(data), tokenizer, folder, 1)
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).strip_dirs().sort_stats("tottime").print_stats(12)
    return [line.rstrip() for line in text.getvalue().splitlines() if line.strip()][1:]


def slice_of(pattern: str, megabytes: int, folder: Path) -> tuple[Path, str]:
    """Write the first documents as one plain jsonl file, train a tokenizer on some; return both."""
    from fanformer.data.sources.documents import open_source
    from fanformer.data.tokenizer import train_tokenizer

    path, size, sample = folder / "slice.jsonl", 0, []
    with path.open("w", encoding="utf-8") as file:
        for document in open_source(pattern):
            file.write(json.dumps({"text": document.text}) + "\n")
            if size < 20e6:
                sample.append(document.text)
            size += len(document.text.encode())
            if size >= megabytes * 1e6:
                break
    train_tokenizer(sample, VOCABULARY).save_pretrained(folder / "tokenizer")
    return path, str(folder / "tokenizer")


def measure_all(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run every part and print its outcome."""
    cores = os.cpu_count() or 1
    data, tokenizer = slice_of(arguments.data, arguments.megabytes, folder)
    results: dict[str, Any] = {"comparison": [], "memory": []}
    for workers in sorted({1, cores}):
        row = compare(data, tokenizer, workers, arguments.rounds)
        results["comparison"].append(row)
        rates = row["megabytes_per_second"]
        print(
            f"{workers} processes: {rates['ours']:.1f} against {rates['theirs']:.1f} MB/s, {row['times_faster']:.2f} "
            f"times faster ({row['lowest']:.2f}-{row['highest']:.2f}), {row['times_less_cpu']:.2f} times less CPU",
            flush=True,
        )
    everything = measured("ours", arguments.data, tokenizer, cores)
    for share in FLATNESS[:-1]:
        limit = round(share * everything["bytes"])
        results["memory"].append(measured("ours", arguments.data, tokenizer, cores, limit))
    results["memory"].append(everything)
    for row in results["memory"]:
        rate = row["bytes"] / row["seconds"] / 1e6
        print(
            f"{row['bytes'] / 1e6:.0f} MB of text: {rate:.1f} MB/s, peak {row['peak_bytes'] / 1e6:.0f} MB", flush=True
        )
    results["restart"] = killed_and_restarted(data, tokenizer, cores)
    print(f"killed and restarted: {results['restart']}", flush=True)
    results["profile"] = profile(data, tokenizer)
    print("\n".join(results["profile"]))
    return results


def to_result(results: dict[str, Any]) -> dict[str, Figure]:
    """Return the figures of all parts by name."""
    result = {}
    for row in results["comparison"]:
        processes = f"{row['workers']}_processes" if row["workers"] > 1 else "1_process"
        pairs = list(zip(row["runs"]["ours"], row["runs"]["theirs"], strict=True))
        for name, key in (("times_faster", "seconds"), ("times_less_cpu", "cpu_seconds")):
            ratios = [theirs[key] / ours[key] for ours, theirs in pairs]
            result[f"{name}_{processes}"] = range_of(ratios, "times")
        for kind, runs in row["runs"].items():
            rates = [run["bytes"] / run["seconds"] / 1e6 for run in runs]
            result[f"megabytes_per_second_{kind}_{processes}"] = range_of(rates, "MB/s")
    for share, row in zip(FLATNESS, results["memory"], strict=True):
        result[f"peak_bytes_at_{share:.0%}"] = Figure(
            row["peak_bytes"], f"bytes for {row['bytes'] / 1e6:.0f} MB of text"
        )
    growth = results["memory"][-1]["peak_bytes"] / results["memory"][0]["peak_bytes"]
    result["peak_memory_growth"] = Figure(growth, f"times for {FLATNESS[-1] / FLATNESS[0]:g} times the text")
    same = results["restart"]["same_fingerprint"]
    result["restart_same_fingerprint"] = Figure(int(same), "1 if the same", interval=EXACT)
    return result


def main() -> None:
    """Measure, print, and write where that is asked for."""
    if sys.argv[1:2] == ["--run"]:
        kind, data, tokenizer, folder, workers, *limit = sys.argv[2:]
        function = {"ours": ours, "theirs": theirs}[kind]
        print(json.dumps(function(data, tokenizer, folder, int(workers), int(limit[0]) if limit else None)))
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="file or glob of jsonl with the field `text`")
    parser.add_argument("--megabytes", type=int, default=48, help="text that both tokenize (default 48)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each (default 3)")
    parser.add_argument("--write", action="store_true", help="write the entry to benchmarks/results")
    arguments = parser.parse_args()
    if not glob.glob(arguments.data):
        sys.exit(f"--data {arguments.data}: no file matches")
    folder = Path(tempfile.mkdtemp())
    try:
        results = measure_all(arguments, folder)
    finally:
        shutil.rmtree(folder)
    if arguments.write:
        more = {name: importlib.metadata.version(name) for name in ("datasets", "regex")}
        entry = measured_today(
            "prepare-{date}",
            what="tokenization of the same jsonl text with the same tokenizer; memory is that of all processes",
            configuration={
                "megabytes": arguments.megabytes,
                "rounds": arguments.rounds,
                "vocab_size": VOCABULARY,
            },
            data={
                "source": command_line(["data", arguments.data]).removeprefix("data "),
                "fingerprint": results["comparison"][0]["runs"]["ours"][0]["fingerprint"],
            },
            versions=versions() | more,
            result=to_result(results),
            details=results,
        )
        print(f"written to {write_entry(RESULTS, entry)}")


if __name__ == "__main__":
    main()
