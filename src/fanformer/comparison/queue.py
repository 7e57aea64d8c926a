"""A list of comparisons, done one after another: `python -m fanformer.comparison.queue FILE [--minutes M] [--jobs N]`.

The same file goes on where an earlier process stopped, whatever ended it. A bad entry costs one line and stops no
other. Needs no command line library, so that it runs where only torch, transformers and numpy are installed.
"""

import argparse
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from fanformer.comparison.compare import OF_LANGUAGE, Comparison, Outcome, run_comparison
from fanformer.comparison.entries import read_training, write_comparison, write_training
from fanformer.comparison.summary import arms, to_record
from fanformer.comparison.sweep import OutOfTimeError
from fanformer.comparison.trial import Result, Trial
from fanformer.data.prepared import PreparedData
from fanformer.errors import ConfigError, FANformerError, refuse_unknown
from fanformer.files.durable import replace_json
from fanformer.files.locking import hold
from fanformer.machine.signals import sigterm_as_exit
from fanformer.machine.versions import command_line, hardware, versions
from fanformer.training.events import Event, Listener

RECORD_FILE, STATUS_FILE, LOCK_FILE = "comparison.json", "queue-status.json", ".queue.lock"
_FIELDS = ("output_dir", "record_dir", "defaults", "entries")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SECONDS_BETWEEN_STATUS = 1.0
_SECONDS_BETWEEN_PAGES = 60.0

Publish = Callable[[Mapping[str, Any], Path], None]
"""Makes something for people from a comparison's record, in its folder."""


@dataclass(frozen=True)
class QueueEntry:
    """A comparison to run.

    Attributes:
        name: of its folder and of its entries in the ledger.
        folder: for its trainings and results.
        comparison: what to compare; None where the entry is wrong.
        error: what is wrong with it.
    """

    name: str
    folder: Path
    comparison: Comparison | None
    error: str | None = None


@dataclass(frozen=True)
class Queue:
    """What to run.

    Attributes:
        entries: in their order.
        output_dir: where everything goes.
        record_dir: of the ledger, None to write none.
    """

    entries: tuple[QueueEntry, ...]
    output_dir: Path
    record_dir: Path | None = None


@dataclass(frozen=True)
class EntryOutcome:
    """How an entry ended.

    Attributes:
        name: of the entry.
        finished: trainings that ended, those that diverged included.
        error: why the entry, or an architecture of it, has no result; None where all have.
    """

    name: str
    finished: int
    error: str | None


def read_queue(path: Path) -> Queue:
    """Read a queue from YAML; an entry that is wrong keeps its place, with its error.

    Raises:
        ConfigError: if the file as a whole cannot be used.
    """
    content = _read_file(path)
    entries, defaults = content.get("entries"), content.get("defaults") or {}
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path.absolute()}: `entries` must be a list of comparisons, got {entries!r}.")
    if not isinstance(defaults, dict):
        raise ConfigError(f"{path.absolute()}: `defaults` must hold fields of a comparison, got {defaults!r}.")
    output_dir = _output_dir(content, path)
    record_dir = content.get("record_dir")
    read = tuple(_read_entry(entry, defaults, output_dir, number) for number, entry in enumerate(entries, start=1))
    names = [entry.name for entry in read]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{path.absolute()}: two entries are called {twice[0]}: give every entry a name of its own.")
    return Queue(read, output_dir, None if record_dir is None else Path(record_dir))


def read_output_dir(path: Path) -> Path:
    """Return where the queue in a file works, without looking at its entries.

    Raises:
        ConfigError: if the file as a whole cannot be used.
    """
    return _output_dir(_read_file(path), path)


def _output_dir(content: Mapping[str, Any], path: Path) -> Path:
    return Path(content.get("output_dir") or f"runs/{path.stem}")


def _read_file(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path.absolute()} is not YAML: {error}.") from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path.absolute()} must hold {', '.join(_FIELDS)}, got {type(content).__name__}: see docs/comparing.md."
        )
    refuse_unknown(content, _FIELDS, "a field of a queue", f"{path.absolute()}: ")
    return content


def relocate(queue: Queue, output_dir: Path | None, record_dir: Path | None) -> Queue:
    """Return a queue with other folders; None leaves one as it is."""
    if output_dir is not None:
        entries = tuple(replace(entry, folder=output_dir / entry.name) for entry in queue.entries)
        queue = replace(queue, output_dir=output_dir, entries=entries)
    return queue if record_dir is None else replace(queue, record_dir=record_dir)


def _read_entry(fields: Any, defaults: Mapping[str, Any], output_dir: Path, number: int) -> QueueEntry:
    name = f"entry-{number}"
    try:
        if not isinstance(fields, dict):
            raise ConfigError(f"must hold the fields of a comparison, got {fields!r}.")
        own = dict(fields)
        given = str(own.pop("name", name))
        if not _NAME.fullmatch(given):
            raise ConfigError(f"`name` must be letters, digits, dots, dashes and underscores, got {given!r}.")
        name = given
        # a rule is not trained on data: what the defaults say of that is for the other entries
        rule = own.get("rule", defaults.get("rule")) is not None
        shared = {key: value for key, value in defaults.items() if not (rule and key in (*OF_LANGUAGE, "run"))}
        merged = {**shared, **own}
        if isinstance(shared.get("run"), dict) and isinstance(own.get("run"), dict):
            merged["run"] = {**shared["run"], **own["run"]}
        return QueueEntry(name, output_dir / name, Comparison.from_fields(merged))
    except (FANformerError, OSError) as error:
        return QueueEntry(name, output_dir / name, None, str(error))


class _Status:
    """Passes on what a queue tells, and keeps it in a file for `fanformer compare --status`."""

    def __init__(self, listener: Listener, queue: Queue):
        self.listener, self.path = listener, queue.output_dir / STATUS_FILE
        self.entries: dict[str, dict[str, Any]] = {
            entry.name: {"state": "cannot be done" if entry.error else "waiting", "done": 0, "planned": None,
                         "text": entry.error or ""} for entry in queue.entries
        }  # fmt: skip
        self.current, self._written = "", 0.0
        self.trainings: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()  # trainings side by side tell from a thread each
        self._write()

    def __call__(self, event: Event) -> None:
        """Keep what happened and pass it on."""
        with self._lock:
            if event.kind == "entry":
                self.current = event.name
                self.entries[self.current]["state"] = "running"
            elif event.kind in ("begin", "end"):
                self.entries[self.current] |= {"done": event.figures["done"], "planned": event.figures["total"]}
            if event.kind in ("begin", "progress"):
                self.trainings[event.name] = {"share": event.share, "text": event.text}
            elif event.kind == "end":
                self.trainings.pop(event.name, None)
            late = time.monotonic() - self._written > _SECONDS_BETWEEN_STATUS
            if event.kind in ("entry", "begin") or (event.kind == "progress" and late):
                self._write()
        self.listener(event)

    def ended(self, outcome: EntryOutcome, state: str) -> None:
        """Keep how an entry ended."""
        with self._lock:
            self.trainings.clear()
            self.entries[outcome.name] |= {"state": state, "text": outcome.error or ""}
            self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        content = {
            "pid": os.getpid(),
            "updated": datetime.now().astimezone().isoformat(timespec="seconds"),
            "entries": self.entries,
            "trainings": [{"name": name, **training} for name, training in self.trainings.items()],
        }
        replace_json(self.path, content)


def run_queue(
    queue: Queue,
    listener: Listener,
    command: str,
    deadline: float | None = None,
    publish: Publish | None = None,
    jobs: int = 1,
) -> list[EntryOutcome]:
    """Run what is not done yet, entry after entry.

    Args:
        queue: what to run.
        listener: hears what happens.
        command: that runs the queue, for the records.
        deadline: when to stop, on the clock of `time.monotonic`; None for never.
        publish: called with every comparison's record as it grows, and at its end.
        jobs: trainings at a time.

    Returns:
        An outcome for each entry that was begun.

    Raises:
        ConfigError: if another process runs this queue, or `jobs` is below 1.
        OutOfTimeError: at the deadline.
    """
    if jobs < 1:
        raise ConfigError(f"`jobs`, the trainings at a time, must be at least 1, got {jobs}.")
    queue.output_dir.mkdir(parents=True, exist_ok=True)
    lock, what = queue.output_dir / LOCK_FILE, f"the queue {queue.output_dir.absolute()}"
    outcomes = []
    with hold(lock, what, ConfigError), sigterm_as_exit():
        status = _Status(listener, queue)
        for number, entry in enumerate(queue.entries, start=1):
            if entry.comparison is None:
                outcomes.append(EntryOutcome(entry.name, 0, entry.error))
                status(Event("note", f"{entry.name}: {entry.error}"))
                continue
            status(Event("entry", figures={"number": number, "total": len(queue.entries)}, name=entry.name))
            running = _Running(queue, entry, entry.comparison, command, status, publish)
            outcomes.append(running.run(deadline, jobs))
    return outcomes


@dataclass
class _Running:
    """An entry under way: its results go to disk as they come."""

    queue: Queue
    entry: QueueEntry
    comparison: Comparison
    command: str
    status: _Status
    publish: Publish | None
    outcomes: list[Outcome] = field(default_factory=list)
    data: PreparedData | None = None
    published: float = field(default_factory=time.monotonic)
    unpublished: str | None = None

    def run(self, deadline: float | None, jobs: int) -> EntryOutcome:
        """Train what is left of the entry, and return how it ended.

        Raises:
            OutOfTimeError: at the deadline; what ended until then is on disk, as after any other end.
        """
        error, state = None, "stopped"
        try:
            folder, root = self.entry.folder, self.queue.output_dir
            run_comparison(self.comparison, folder, self.status, self._on_outcome, deadline, root, self._known, jobs)
            self._write_together()
            error = self._lacking()
            state = "done" if error is None else "done in part"
        except (FANformerError, OSError) as raised:
            error, state = " ".join(str(raised).split()), "cannot be done"
        finally:
            if self.outcomes:
                self._write(publish=True)
            error = error or self.unpublished
            outcome = EntryOutcome(self.entry.name, len(self.outcomes), error)
            self.status.ended(outcome, state)
        if error is not None and error != self.unpublished:
            self.status(Event("note", f"{self.entry.name}: {error}"))
        return outcome

    def _known(self, trial: Trial) -> Result | None:
        """Return what the ledger says of a training, so that a queue goes on where its folder is lost."""
        record_dir = self.queue.record_dir
        return None if record_dir is None else read_training(record_dir, trial)

    def _on_outcome(self, outcome: Outcome, data: PreparedData | None) -> None:
        """Keep the outcome of a training."""
        self.outcomes.append(outcome)
        self.data = data
        if self.queue.record_dir is not None:
            write_training(self.queue.record_dir, self.command, outcome, data, self.comparison.data)
        self._write(publish=time.monotonic() - self.published > _SECONDS_BETWEEN_PAGES)

    def _write_together(self) -> None:
        """Put into the ledger what all trainings say together; what a stopped entry has says less than it may hold."""
        if self.queue.record_dir is not None:
            write_comparison(
                self.queue.record_dir, self.entry.name, self.command, self.comparison, self.outcomes, self.data
            )

    def _write(self, publish: bool) -> None:
        data = self.data
        about = {
            "name": self.entry.name,
            "command": self.command,
            "date": datetime.now().astimezone().strftime("%Y-%m-%d"),
            "hardware": hardware(),
            "versions": versions(),
            "data": None if data is None else {"source": self.comparison.data, "fingerprint": data.fingerprint},
            "planned": self.status.entries[self.entry.name]["planned"],
            "finished": len(self.outcomes),
        }
        record = {**about, **to_record(self.comparison, self.outcomes)}
        replace_json(self.entry.folder / RECORD_FILE, record)
        if publish and self.publish is not None:
            self.published = time.monotonic()
            try:
                self.publish(record, self.entry.folder)
                self.unpublished = None
            except Exception as error:  # a page is no reason to lose a night of trainings; the numbers are safe
                self.unpublished = f"the report could not be written, {type(error).__name__}: {error}"
                self.status(Event("note", f"{self.entry.name}: {self.unpublished}"))

    def _lacking(self) -> str | None:
        """Return what an entry that ran to its end has no result of, in one line."""
        without = [arm for arm in arms(self.comparison, self.outcomes) if not arm.outcomes]
        return None if not without else f"no training of {without[0].architecture} finished: {without[0].troubles[0]}"


def print_lines(event: Event) -> None:
    """Print what a queue tells as plain lines, without how far the data and a training are."""
    figures = event.figures
    match event.kind:
        case "entry":
            line = f"{event.name} ({figures['number']} of {figures['total']})"
        case "note":
            line = event.text
        case "end":
            line = f"  {figures['done']}/{figures['total']}  {event.name}  {event.text}"
        case _:
            return
    print(line, flush=True)  # noqa: T201  # this is a program of its own


def read_status(output_dir: Path) -> tuple[dict[str, Any], bool]:
    """Return what a queue's last process said, and whether it still runs.

    Raises:
        ConfigError: if no queue has run there.
    """
    path = output_dir / STATUS_FILE
    if not path.is_file():
        raise ConfigError(
            f"no queue has run in {output_dir.absolute()}: start it with `fanformer compare --queue FILE`."
        )
    try:
        with hold(output_dir / LOCK_FILE, "the queue", ConfigError):
            running = False
    except ConfigError:
        running = True
    return json.loads(path.read_text(encoding="utf-8")), running


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a queue; the status is 0, 2 where an entry has no result, 75 where the time is over first."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="the queue, in YAML")
    parser.add_argument("--minutes", type=float, help="stop after so long; the same command goes on")
    parser.add_argument("--output-dir", type=Path, help="where to work instead of the file's")
    parser.add_argument("--record-dir", type=Path, help="ledger to write to instead of the file's")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time (default 1)")
    given = parser.parse_args(arguments)
    deadline = None if given.minutes is None else time.monotonic() + 60 * given.minutes
    command = command_line(["python", "-m", "fanformer.comparison.queue", str(given.file)])
    try:
        queue = read_queue(given.file)
        queue = relocate(queue, given.output_dir, given.record_dir)
        outcomes = run_queue(queue, print_lines, command, deadline, jobs=given.jobs)
    except OutOfTimeError:
        print("the time is over: the same command goes on", flush=True)  # noqa: T201
        return os.EX_TEMPFAIL
    except (FANformerError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
        return 2
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    for outcome in failed:
        print(f"error: {outcome.name}: {outcome.error}", file=sys.stderr)  # noqa: T201
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
