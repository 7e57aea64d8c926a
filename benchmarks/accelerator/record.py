"""The accelerator's results as an entry of the ledger: the claims' figures, and everything else in its details."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fanformer.comparison.ledger import EXACT, Entry, Figure, read_entry, write_entry
from fanformer.machine.versions import hardware, versions

COMMAND = "python benchmarks/accelerator/accelerator.py"
TRAINING = ("training_regional", "training_whole")
INFERENCE = ("inference_eager", "inference_compiled")


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write everything known so far as the entry `path.name` of the ledger in its folder."""
    parts = results["parts"]
    json.dumps(parts, allow_nan=False)
    gpus = [] if results["dry_run"] else [results["device"]]
    entry = Entry(
        name=path.name,
        what=f"FANformer 92m beside Llama in SmolLM2-135M's shape on {results['device']}",
        kind="benchmark",
        command=COMMAND + " --dry-run" * results["dry_run"],
        date=results["date"][:10],
        seeds=[],
        configuration={"scale": "tiny" if results["dry_run"] else "92m", "parts": results["asked"]},
        data=None,
        hardware=hardware() | {"gpus": gpus},
        versions=versions(),
        result=figures(parts),
        details=dict(results),
    )
    write_entry(path.parent, entry)


def read_results(path: Path) -> dict[str, Any]:
    """Return what `write_results` was given."""
    entry = read_entry(path.parent, path.name)
    assert entry is not None, "write_results came first"
    return entry.details


def figures(parts: Mapping[str, Any]) -> dict[str, Figure]:
    """Return what the claims ask for, of those parts that have it; FANformer's faster way of compiling counts."""
    whole = [name for name, part in parts.items() if "error" not in part and "skipped" not in part]
    found = {"parts_done": Figure(len(whole), "parts", interval=EXACT)}
    checks = [check["ok"] for check in parts.get("checks", {}).values() if isinstance(check, Mapping) and "ok" in check]
    if checks:
        found["checks_held"] = Figure(sum(checks), f"of {len(checks)} checks", interval=EXACT)
    trained = [parts[name] for name in TRAINING if "iterations_per_second" in parts.get(name, {}).get("fanformer", {})]
    if trained:
        found |= _training(max(trained, key=lambda part: part["fanformer"]["iterations_per_second"]))
    decoded = [
        parts[name]["batch_1"]
        for name in INFERENCE
        if "ratio_of_tokens_per_second" in parts.get(name, {}).get("batch_1", {})
    ]
    if decoded:
        best = max(decoded, key=lambda batch: batch["fanformer"]["tokens_per_second"])
        found["inference_tokens_per_second_ratio"] = _ratio(best["ratio_of_tokens_per_second"])
    return found


def _training(part: Mapping[str, Any]) -> dict[str, Figure]:
    mine = part["fanformer"]
    batch = " x ".join(map(str, part["batch"]))
    found = {"train_iterations_per_second": _rate(mine, 1.0, f"steps of {batch} tokens a second")}
    if "utilisation" in mine:
        share = mine["utilisation"] * mine["seconds_per_step"]
        found["model_flops_utilisation"] = _rate(mine, share, "share of the measured peak")
    if "roofline_seconds" in mine:
        found["share_of_roofline"] = _rate(mine, mine["roofline_seconds"]["total"], "of the roofline's time")
    if "peak_memory_gib" in mine:
        found["peak_memory_bytes"] = Figure(round(mine["peak_memory_gib"] * 2**30), "bytes", interval=EXACT)
        if "peak_memory_gib" in part.get("llama", {}):
            ratio = mine["peak_memory_gib"] / part["llama"]["peak_memory_gib"]
            found["peak_memory_ratio"] = Figure(ratio, "times Llama's", interval=EXACT)
    if "ratio_of_tokens_per_second" in part:
        found["train_tokens_per_second_ratio"] = _ratio(part["ratio_of_tokens_per_second"])
    return found


def _rate(mine: Mapping[str, Any], per_step: float, unit: str) -> Figure:
    """Return what is done each second, with the range over the timed blocks."""
    value, low, high = (per_step / mine[name] for name in ("seconds_per_step", "slowest_block", "fastest_block"))
    return Figure(value, unit, low, high, "range of the timed blocks")


def _ratio(spread: Mapping[str, float]) -> Figure:
    return Figure(spread["median"], "times Llama's", spread["lowest"], spread["highest"], "range of the timed blocks")
