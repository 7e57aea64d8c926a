"""Runs as one HTML page: their curves, what they wrote as they learned, how they differ, what was measured later."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fanformer.files.durable import replace_text
from fanformer.report.page import Preformatted, page, table, text
from fanformer.training.configuration import resolve_run
from fanformer.training.fields import OutputConfig
from fanformer.training.pages.curves import run_charts
from fanformer.training.pages.runs import SeenRun, read_runs

_MOST_SAMPLES = 12
_OF_MACHINE = ("environment", "versions", "machine", "processes")


def write_run_page(folders: Sequence[Path], path: Path) -> list[Path]:
    """Write the page of runs as one file that needs no other, and its charts as pictures into a folder beside it.

    Args:
        folders: of the runs.
        path: of the page; the folder of the pictures has its name without the suffix.

    Returns:
        What was written, the page first.

    Raises:
        CheckpointError, ConfigError: as `read_runs`.
    """
    runs = read_runs(folders)
    pictures = path.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    replace_text(path, run_page(runs))
    written = [path]
    for chart in run_charts(runs):
        written.append(pictures / f"{chart.name}.png")
        written[-1].write_bytes(chart.png())
    return written


def run_page(runs: Sequence[SeenRun], script: str = "") -> str:
    """Return the page of runs.

    Args:
        runs: to show.
        script: that the page runs besides.
    """
    title = f"run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs"
    record = {
        run.name: {"run": dict(run.described), "records": [dict(record) for record in run.records]} for run in runs
    }
    return page(title, [f"<h1>{text(title)}</h1>", *run_parts(runs)], _plain(record), f"{runs[0].name}.json", script)


def run_parts(runs: Sequence[SeenRun]) -> list[str]:
    """Return the parts of the page below its heading."""
    return [
        _summary(runs),
        "<h2>Charts</h2>",
        '<div class="charts">',
        *(chart.html() for chart in run_charts(runs)),
        "</div>",
        *_samples(runs),
        *_differences(runs),
        *_evaluations(runs),
        *_quantizations(runs),
        *_settings(runs),
    ]


def _plain(record: Any) -> Any:
    """Return values as JSON has them: YAML reads dates too."""
    return json.loads(json.dumps(record, default=str))


def _summary(runs: Sequence[SeenRun]) -> str:
    header = ["run", "preset", "parameters", "steps", "tokens", "training loss", "held-out loss", "bits per byte",
              "tokens/s", "time"]  # fmt: skip
    rows = []
    for run in runs:
        planned = run.described.get("length", {}).get("max_steps")
        step = run.last("step") or 0
        steps = f"{step:,}" if planned in (None, step) else f"{step:,} of {planned:,}"
        rates = [record["tokens_per_second"] for record in run.records if "tokens_per_second" in record]
        rate = f"{statistics.median(rates):,.0f}" if rates else ""
        figures = [_digits(run.last(key)) for key in ("loss", "val_loss", "val_bits_per_byte")]
        counted = [f"{run.described['parameters']:,}", steps, f"{run.last('tokens') or 0:,}"]
        rows.append([run.name, run.configuration["preset"], *counted, *figures, rate, _time(run)])
    return table(header, rows, "runs")


def _time(run: SeenRun) -> str:
    minutes, seconds = divmod(int(run.last("elapsed_seconds") or 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _samples(runs: Sequence[SeenRun]) -> list[str]:
    """Return what every run wrote at its evaluations; of many the first, the last, and some between."""
    parts = []
    for run in runs:
        written = [record for record in run.records if "sample" in record]
        if not written:
            continue
        if len(written) > _MOST_SAMPLES:
            places = {round(index * (len(written) - 1) / (_MOST_SAMPLES - 1)) for index in range(_MOST_SAMPLES)}
            written = [written[place] for place in sorted(places)]
        rows = [[f"{one['step']:,}", _digits(one.get("val_loss")), Preformatted(one["sample"])] for one in written]
        shown = table(["step", "held-out loss", "it wrote"], rows, f"samples of {run.name}")
        is_open = " open" if len(runs) == 1 else ""
        parts.append(f"<details{is_open}><summary>{text(run.name)}</summary>{shown}</details>")
    return ["<h2>What it wrote as it learned</h2>", *parts] if parts else []


def _differences(runs: Sequence[SeenRun]) -> list[str]:
    """Return the fields in which runs differ, or a single one from its preset."""
    columns = {run.name: _flat(run.configuration) for run in runs}
    title = "How the runs differ"
    if len(runs) == 1:
        preset = runs[0].configuration["preset"]
        columns[f"preset {preset}"] = _flat(_plain(resolve_run(None, {"preset": preset}).to_dict()))
        title = f"How the run differs from preset {preset}"
    names = dict.fromkeys(name for fields in columns.values() for name in fields)
    rows = [
        [name, *values]
        for name in names
        if len(set(values := [_shown(fields.get(name)) for fields in columns.values()])) > 1
    ]
    shown = table(["setting", *columns], rows) if rows else "<p>In nothing.</p>"
    return [f"<h2>{text(title)}</h2>", shown]


def _flat(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a run that decide what it does, those of its model as `model.FIELD`."""
    left_out = {*OutputConfig.__dataclass_fields__, "model"}
    model = {f"model.{name}": value for name, value in (configuration.get("model") or {}).items()}
    return {name: value for name, value in configuration.items() if name not in left_out} | model


def _shown(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, default=str)


def _evaluations(runs: Sequence[SeenRun]) -> list[str]:
    texts, tasks = [], []
    for run in runs:
        for name, found in run.evaluations.items():
            about = [run.name, name]
            for file, figures in found.get("files", {}).items():
                told = [_digits(figures.get(key)) for key in ("loss", "bits_per_byte", "perplexity")]
                texts.append([*about, Path(file).name, *told, f"{figures['tokens']:,}"])
            for task, entry in found.get("tasks", {}).items():
                for metric in (key for key in entry if f"{key}_stderr" in entry):
                    tasks.append([*about, task, metric, _digits(entry[metric]), _digits(entry[f"{metric}_stderr"])])
    parts = []
    if texts:
        header = ["run", "measured in", "text", "nats per token", "bits per byte", "perplexity", "tokens"]
        parts.append(table(header, texts, "evaluations on text"))
    if tasks:
        header = ["run", "measured in", "task", "metric", "value", "standard error"]
        parts.append(table(header, tasks, "evaluations on tasks"))
    return ["<h2>Evaluations</h2>", *parts] if parts else []


def _quantizations(runs: Sequence[SeenRun]) -> list[str]:
    rows = []
    for run in runs:
        for name, found in run.quantizations.items():
            errors = [layer["output_error"] for layer in found["layers"] if layer["bits"] is not None]
            sizes = [f"{found[key] / 1e6:.1f}" for key in ("bytes", "bytes_before")]
            mean = f"{statistics.fmean(errors):.4f}" if errors else ""
            rows.append([run.name, name, found["method"], str(found["bits"]), str(found["group_size"]), *sizes, mean])
    header = ["run", "folder", "method", "bits", "group size", "MB", "MB before", "mean output error"]
    return ["<h2>Quantized copies</h2>", table(header, rows, "quantized copies")] if rows else []


def _settings(runs: Sequence[SeenRun]) -> list[str]:
    parts = ["<h2>Configuration</h2>"]
    for run in runs:
        about = {name: run.described[name] for name in _OF_MACHINE if name in run.described}
        for words, content in (("all settings", run.configuration), ("machine, decisions and versions", about)):
            shown = text(json.dumps(content, indent=2, default=str))
            parts.append(f"<details><summary>{text(run.name)}: {words}</summary><pre>{shown}</pre></details>")
    return parts


def live_page(folders: Sequence[Path], script: str) -> Callable[[], str]:
    """Return what reads runs and returns their page as it is now."""
    return lambda: run_page(read_runs(folders), script)
