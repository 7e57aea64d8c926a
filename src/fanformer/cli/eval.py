"""`fanformer eval`: how well a model predicts text."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fanformer.cli.failure import writing
from fanformer.cli.options import (
    Verb,
    adapter_option,
    device_option,
    dtype_option,
    exit_threshold_option,
    say_depth,
)
from fanformer.cli.progress import counted_progress
from fanformer.errors import ConfigError
from fanformer.evaluation.files import MeasuredFiles, check_files, check_sizes
from fanformer.files.durable import replace_text

if TYPE_CHECKING:
    from fanformer.generation.loading import LoadedModel


@click.command(
    "eval",
    cls=Verb,
    example="fanformer eval runs/nano --text held-out.txt --tasks arc_easy,blimp --data-dir eval --json result.json",
)
@click.argument("folder", metavar="DIR")
@click.argument("more_files", nargs=-1, metavar="")
@click.option(
    "--text", "files", metavar="FILE ...", multiple=True, help="Text, jsonl or parquet files to predict; repeatable."
)
@click.option(
    "--by",
    metavar="FIELD",
    help="Field or column of jsonl and parquet files to give figures by; none leaves them out.  "
    "[default: src, if all such files have it]",
)
@click.option("--sequence-length", type=int, help="Longest context.  [default: the model's longest, at most 2048]")
@click.option("--batch-size", default=8, help="Rows of text computed together; tasks divide by themselves.")
@click.option(
    "--tasks",
    metavar="NAME,...",
    help="Benchmarks by upstream's definitions: arc_easy, arc_challenge, sciq, piqa, hellaswag, winogrande, "
    "openbookqa, lambada, blimp, mmlu.",
)
@click.option("--data-dir", metavar="DIR", help="Local files of the tasks.  [default: the hub]")
@click.option("--limit", type=int, help="Documents of each task.  [default: all]")
@click.option("--num-fewshot", type=int, help="Examples in front of each question.  [default: the task's own]")
@click.option(
    "--cache-dir",
    metavar="DIR",
    help="Finished requests, to go on from after a kill.  [default: ~/.cache/fanformer/eval]",
)
@click.option("--json", "json_file", metavar="OUT", help="Write the figures to this file; - is standard output.")
@click.option(
    "--num-steps",
    metavar="R,...",
    help="How often a recurrent depth runs its core; several are measured one after the other.  [default: the mean of "
    "its training]",
)
@exit_threshold_option
@adapter_option
@device_option
@dtype_option
def evaluate(
    folder: str,
    more_files: tuple[str, ...],
    files: tuple[str, ...],
    by: str | None,
    sequence_length: int | None,
    batch_size: int,
    tasks: str | None,
    json_file: str | None,
    num_steps: str | None,
    exit_threshold: float | None,
    adapter: str | None,
    device: str,
    dtype: str,
    **task_options: Any,
) -> None:
    """Measure how well the model saved in DIR predicts text files, each and in total, or does benchmark tasks.

    loss is in nats per token; bits_per_byte is comparable between models with different tokenizers. After +- stands
    the standard error that the documents give.
    """
    paths = [*files, *more_files]
    _check_wanted(paths, bool(files), tasks, task_options)
    check_sizes(sequence_length, batch_size)
    field = check_files(paths, by)
    if json_file not in (None, "-"):
        _check_writable(Path(json_file))
    wanted: dict[str, Any] = {"names": ()}
    if tasks is not None:
        from fanformer.evaluation.tasks import what_to_measure

        wanted = what_to_measure(tasks, **task_options)

    from fanformer.generation.depth import check_steps, chosen_depth, note_of, parse_steps
    from fanformer.loading import load

    chosen = parse_steps(num_steps)
    loaded = load(folder, device, dtype, adapter)
    say_depth(note_of(loaded.model), num_steps)
    check_steps(loaded.model, chosen, exit_threshold)
    found: dict[str, dict[str, Any]] = {}
    for number in chosen:
        texts = MeasuredFiles(*loaded, field, sequence_length, batch_size)
        try:
            with chosen_depth(loaded.model, number, exit_threshold) as depth:
                figures = _measure(texts, paths, loaded, wanted)
        except BaseException:  # Ctrl-C as well: what took minutes is told before the error
            if texts.by_file:
                partial = {**texts.result(), **({} if number is None else {"num_steps": number}), "incomplete": True}
                found[str(number or "")] = partial
            if found:
                _tell({**_joined(found), "incomplete": True, "model": folder}, json_file, wanted["names"])
            raise
        found[str(depth.get("num_steps", ""))] = {**figures, **depth}
    _tell({**_joined(found), "model": folder}, json_file, wanted["names"])


def _measure(
    texts: MeasuredFiles, paths: Sequence[str], loaded: "LoadedModel", wanted: dict[str, Any]
) -> dict[str, Any]:
    for path in paths:
        click.echo(f"{path} ...", err=True)
        texts.measure(path)
    result = texts.result() if paths else {}
    return result | (_measure_tasks(loaded, wanted) if wanted["names"] else {})


def _joined(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of the first depth, with those of all of them where the model has some."""
    first = next(iter(found.values()), {})
    return {**first, "by_num_steps": found} if "num_steps" in first else first


def _tell(result: dict[str, Any], json_file: str | None, tasks: Sequence[str] = ()) -> None:
    """Write figures where they are wanted: to a file as JSON, to standard output as JSON or as tables."""
    record = json.dumps(result, indent=2)
    if json_file == "-":
        click.echo(record)
        return
    if json_file is not None:
        with writing(Path(json_file)):
            replace_text(Path(json_file), record + "\n")
    depths = result.get("by_num_steps", {})
    for figures in depths.values() if len(depths) > 1 else [result]:
        if len(depths) > 1:
            click.echo(f"{figures['num_steps']} step{'s' if figures['num_steps'] > 1 else ''}:")
        if "files" in figures:
            _show_text(figures)
        if "tasks" in figures:
            _show_tasks(figures["tasks"], tasks)
        if figures.get("mean_steps") is not None:
            saved = 1 - figures["mean_steps"] / figures["num_steps"]
            click.echo(f"{figures['mean_steps']:.2f} steps a token on average, {saved:.1%} fewer")
    whole = {name: figures for name, figures in depths.items() if "bits_per_byte" in figures}
    bits = {name: figures["bits_per_byte"] for name, figures in whole.items() if "incomplete" not in figures}
    if len(bits) > 1:
        _show_curve(bits)


def _show_curve(bits: dict[str, float]) -> None:
    """Print bits per byte over the number of steps, a bar for what each has above the lowest."""
    low, high = min(bits.values()), max(bits.values())
    click.echo(f"{'steps':>5} {'bits_per_byte':>13}")
    for steps, value in bits.items():
        width = round(40 * (value - low) / (high - low)) if high > low else 0
        click.echo(f"{steps:>5} {value:13.4f} {'#' * width}".rstrip())


def _check_wanted(paths: list[str], has_text: bool, tasks: str | None, task_options: dict[str, Any]) -> None:
    """Raise ConfigError where there is nothing to measure, or an option has no effect."""
    if not has_text and tasks is None:
        raise ConfigError(
            "`--text` or `--tasks` is needed to evaluate: give the files to predict, as `--text FILE ...`, or tasks."
        )
    if paths and not has_text:
        raise ConfigError(f"`{paths[0]}` stands alone: give files to predict as `--text FILE ...`.")
    for name, value in task_options.items():
        if value is not None and tasks is None:
            raise ConfigError(f"`--{name.replace('_', '-')}` applies to `--tasks`, got {value} without: leave it out.")


def _measure_tasks(loaded: "LoadedModel", wanted: dict[str, Any]) -> dict[str, Any]:
    """Return the tasks' figures, and what they rest on."""
    from importlib.metadata import version

    from fanformer.evaluation.tasks import evaluate_tasks

    started, requests = time.monotonic(), 0

    def note(name: str, done: int, total: int) -> None:
        nonlocal requests
        requests = total
        show(name, done, total)

    with counted_progress("requests") as show:
        figures = evaluate_tasks(*loaded, **wanted, on_progress=note)
    seconds = time.monotonic() - started
    click.echo(f"{requests:,} requests in {seconds:.1f} s ({requests / seconds:,.0f}/s)", err=True)
    return {"tasks": figures, "limit": wanted["limit"], "lm_eval": version("lm_eval")}


def _show_tasks(figures: dict[str, dict[str, Any]], names: Sequence[str]) -> None:
    """Print every metric of the tasks that were asked for; the members of groups are in the JSON."""
    click.echo(f"{'task':<16} {'metric':<22} {'value':>12} {'stderr':>10} {'documents':>10} {'few-shot':>9}")
    for name in names:
        entry = figures[name]
        for metric in (key for key in entry if f"{key}_stderr" in entry):
            value, error = (entry[key] for key in (metric, f"{metric}_stderr"))
            shown = "-" if value is None else f"{value:.4f}" if value < 1e6 else f"{value:.4g}"
            told = "-" if error is None else f"{error:.4f}" if error < 1e5 else f"{error:.4g}"
            line = f"{name:<16} {metric:<22} {shown:>12} {told:>10} {entry['documents']:>10,} {entry['num_fewshot']:>9}"
            click.echo(line)
        if entry["truncated_requests"]:
            click.echo(f"{name}: {entry['truncated_requests']:,} requests were cut on the left to the model's context")


def _show_text(result: dict[str, Any]) -> None:
    """Print the figures as a table, one line for each source, each file, and all of them."""
    sources, files = result.get("sources", {}), result["files"]
    click.echo(f"{'loss':>17} {'perplexity':>23} {'bits_per_byte':>17} {'documents':>10} {'tokens':>12} {'bytes':>14}")
    rows = [(f"{result['by']} {name}", figures) for name, figures in sources.items()]
    rows += [*files.items(), *([("total", result)] if len(files) > 1 else [])]
    for name, figures in rows:
        click.echo(
            f"{_with_error(figures, 'loss', 8, 4)} {_with_error(figures, 'perplexity', 12, 3)} "
            f"{_with_error(figures, 'bits_per_byte', 8, 4)} {figures['documents']:10,} {figures['tokens']:12,} "
            f"{figures['bytes']:14,}  {name}"
        )
    if any(figures["loss_stderr"] is None for _, figures in rows):
        click.echo("no standard error (-) where there is one document only")


def _with_error(figures: dict[str, Any], name: str, width: int, digits: int) -> str:
    error = figures[f"{name}_stderr"]
    told = "-" if error is None else f"{error:.{digits}f}"
    return f"{figures[name]:{width}.{digits}f} +-{told:>{width - 2}}"


def _check_writable(path: Path) -> None:
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"`--json` must be a file in an existing folder, got {path.absolute()}.")
