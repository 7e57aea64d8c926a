"""`fanformer compare`: train several architectures on the same tokens, and say which is better by how much."""

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fanformer.cli.options import Verb, echo_table
from fanformer.errors import ConfigError

if TYPE_CHECKING:
    from fanformer.comparison.queue import Queue

PAGE_FILE, LOG_FILE = "comparison.html", "queue.log"
_LISTS = ("tokens", "candidate_tokens", "learning_rates", "seeds", "hole_sides")
_SECONDS_TO_START = 20.0


@click.command(
    cls=Verb,
    example="fanformer compare nano llama@nano --data stdlib --tokens 1M --learning-rates 0.005,0.01 --seeds 2",
)
@click.argument("architectures", nargs=-1, metavar="[ARCHITECTURE]...")
@click.option("--data", help="What to train on, as for `fanformer train`.  [default: stdlib]")
@click.option("--tokens", metavar="N[,N]", help="Budgets of tokens, such as 2M; each is compared.  [default: 2M]")
@click.option(
    "--candidate-tokens", metavar="N[,N]", help="More budgets, for the candidate alone: tokens to equal loss."
)
@click.option(
    "--learning-rates", metavar="X[,X]", help="To sweep for every architecture.  [default: 0.0025,0.005,0.01]"
)
@click.option("--seeds", metavar="N|A,B", help="How many, or which; the best learning rate repeats.  [default: 1]")
@click.option("--preset", help="Whose training recipe is taken over.  [default: nano]")
@click.option("--rule", help="Train a rule instead, such as modular-addition; an unknown one lists them.")
@click.option("--hole-sides", metavar="N[,N]", help="Sides of the hole of a rule that has one.")
@click.option("--extend", type=int, help="Learning rates to add while the best is the sweep's first or last.")
@click.option("--evaluations", type=int, help="Points of the loss curve.  [default: 16]")
@click.option("--eval-tokens", type=int, help="Held-out tokens of each point.  [default: 131072]")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any field of the trainings, alike for all."
)
@click.option("--queue", type=click.Path(path_type=Path), help="YAML file with a list of comparisons to run instead.")
@click.option("--output-dir", type=click.Path(path_type=Path), help="Where to work.  [default: runs/compare]")
@click.option("--record-dir", type=click.Path(path_type=Path), help="Ledger to write every training to as well.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Trainings at a time.")
@click.option("--background", is_flag=True, help="Go on without this terminal.")
@click.option("--status", is_flag=True, help="Say how far it is, and change nothing.")
def compare(
    architectures: tuple[str, ...],
    settings: tuple[str, ...],
    queue: Path | None,
    output_dir: Path | None,
    record_dir: Path | None,
    jobs: int,
    background: bool,
    status: bool,
    **flags: Any,
) -> None:
    """Train architectures on the same tokens in the same order, each at its best learning rate.

    An ARCHITECTURE is a preset, a folder or config.json, or NAME[@SIZE][:FIELD=VALUE,...] with a NAME of fanformer,
    fanformer-tuned, fanformer-paper, llama, llama-qk-norm, cola-llama, hybridnorm-llama and a SIZE of a count of
    parameters without embeddings, such as 2m, or another architecture's name. The first one is the candidate, the
    others are baselines.

    Leaves comparison.html, a report of its own, and comparison.json, its numbers. The same command goes on after
    whatever ended it.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    if queue is not None:
        refused = [f"--{name.replace('_', '-')}" for name in given] + ["--set"] * bool(settings)
        if architectures or refused:
            what = refused[0] if refused else architectures[0]
            raise click.UsageError(f"a queue says everything in its file, got {what}: write it there")
    words = tuple(word for word in click.get_current_context().obj if word != "--background")
    if status:
        show_status(folder_of(queue, output_dir))
    elif background:
        start_in_background(words, folder_of(queue, output_dir))
    else:
        run(read(architectures, given, settings, queue, output_dir, record_dir), words, jobs)


def folder_of(queue: Path | None, output_dir: Path | None) -> Path:
    """Return the folder that a comparison or a queue works in."""
    from fanformer.comparison.queue import read_output_dir

    return output_dir or (Path("runs/compare") if queue is None else read_output_dir(queue))


def read(
    architectures: tuple[str, ...],
    given: Mapping[str, Any],
    settings: tuple[str, ...],
    queue: Path | None,
    output_dir: Path | None,
    record_dir: Path | None,
) -> "Queue":
    """Return what to run, from the command's words."""
    from fanformer.comparison.compare import Comparison
    from fanformer.comparison.queue import Queue, QueueEntry, read_queue, relocate
    from fanformer.training.configuration import parse_setting

    if queue is not None:
        return relocate(read_queue(queue), output_dir, record_dir)
    if not architectures:
        raise click.UsageError("nothing to compare: name architectures, such as nano llama@nano, or a --queue")
    fields = {name: value.split(",") if name in _LISTS else value for name, value in given.items()}
    seeds = fields.get("seeds", ["1"])
    if len(seeds) == 1 and "," not in given.get("seeds", ""):
        if not seeds[0].isdigit() or int(seeds[0]) < 1:
            raise ConfigError(f"`--seeds` must be how many, such as 3, or which, such as 0,1,2, got {seeds[0]!r}.")
        fields["seeds"] = int(seeds[0])
    comparison = Comparison.from_fields(
        {**fields, "architectures": architectures, "run": dict(map(parse_setting, settings))}
    )
    folder = output_dir or Path("runs/compare")
    return Queue((QueueEntry(folder.absolute().name, folder, comparison),), folder, record_dir)


def run(queue: "Queue", words: Sequence[str], jobs: int) -> None:
    """Train, draw the progress, and print what came out."""
    from fanformer.cli.terminal import SweepReporter
    from fanformer.comparison.queue import RECORD_FILE, run_queue
    from fanformer.machine.versions import command_line

    with SweepReporter() as reporter:
        outcomes = run_queue(queue, reporter, command_line(["fanformer", *words]), publish=publish, jobs=jobs)
    for entry in queue.entries:
        if entry.comparison is not None and (entry.folder / RECORD_FILE).is_file():
            print_result(entry.folder)
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    for outcome in failed:
        click.echo(f"error: {outcome.name}: {outcome.error}", err=True)
    if failed:
        raise click.exceptions.Exit(2)


def publish(record: Mapping[str, Any], folder: Path) -> None:
    """Write the report of a comparison, or as much as there is of it."""
    from fanformer.comparison.pages.report import write_comparison_page

    write_comparison_page(record, folder / PAGE_FILE)


def print_result(folder: Path) -> None:
    """Print a comparison's arms and pairs, and where the rest is."""
    from fanformer.comparison.queue import RECORD_FILE
    from fanformer.comparison.rule_score import judged_by

    record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    rule = record["comparison"]["rule"] is not None
    known = {name for arm in record["arms"] for name in arm["figures"]}
    measure = judged_by(known) if rule else "bits_per_byte"
    names = ["architecture", "hole" if rule else "tokens", "learning rate", measure.replace("_", " ")]
    lines = [names if rule else [*names, "tokens/s"]]
    for arm in record["arms"]:
        figures = arm["figures"]
        rate = "none finished" if arm["learning_rate"] is None else f"{arm['learning_rate']:g}"
        cells = [arm["architecture"], f"{arm['variant']:,}", rate + " (edge of the sweep)" * arm["at_edge"]]
        cells.append(figure_text(figures.get(measure)))
        speed = figures.get("tokens_per_second")
        lines.append(cells if rule else [*cells, "" if speed is None else f"{speed['value']:,.0f}"])
    echo_table(lines)
    for pair in record["pairs"]:
        name = f"{measure}_difference"
        text = f"{pair['candidate']} less {pair['baseline']}: {figure_text(pair['figures'].get(name), signed=True)}"
        click.echo(f"{text} {names[3]}")
    for arm in record["arms"]:
        for trouble in arm["troubles"]:
            click.echo(f"  {trouble}")
    click.echo(f"report: {folder / PAGE_FILE}, numbers: {folder / RECORD_FILE}")


def figure_text(figure: Mapping[str, Any] | None, signed: bool = False) -> str:
    """Return a figure with its interval."""
    if figure is None:
        return "none"
    sign = "+" if signed else ""
    text = f"{figure['value']:{sign}.4f}"
    return text if figure["low"] is None else f"{text} [{figure['low']:{sign}.4f}, {figure['high']:{sign}.4f}]"


def start_in_background(words: Sequence[str], folder: Path) -> None:
    """Start a command of these words in a session of its own, and say how to look after it.

    Raises:
        ConfigError: if it ends at once.
    """
    from fanformer.comparison.queue import STATUS_FILE

    folder.mkdir(parents=True, exist_ok=True)
    log = folder / LOG_FILE
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "fanformer.cli.main", *words],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    deadline = time.monotonic() + _SECONDS_TO_START
    while time.monotonic() < deadline and process.poll() is None:
        path = folder / STATUS_FILE
        if path.is_file() and json.loads(path.read_text(encoding="utf-8"))["pid"] == process.pid:
            break
        time.sleep(0.1)
    if process.poll() not in (None, 0):
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise ConfigError(f"it ended at once: {lines[-1].removeprefix('error: ') if lines else 'it said nothing'}")
    click.echo(f"running as process {process.pid}; log: {log}")
    click.echo(f"look: fanformer compare --status --output-dir {folder}")
    click.echo(f"stop: kill {process.pid}; the same command goes on")


def show_status(folder: Path) -> None:
    """Print how far a queue is."""
    from fanformer.comparison.queue import read_status

    content, running = read_status(folder)
    click.echo(f"process {content['pid']} {'runs' if running else 'has ended'}, last word {content['updated']}")
    for name, entry in content["entries"].items():
        state = "stopped" if entry["state"] == "running" and not running else entry["state"]
        count = "" if entry["planned"] is None else f"  {entry['done']} of {entry['planned']} trainings"
        click.echo(f"{name}: {state}{count}" + (f"  {entry['text']}" if entry["text"] else ""))
    for training in content["trainings"] if running else ():
        click.echo(f"now: {training['name']}  {training['share']:.0%}  {training['text']}")
