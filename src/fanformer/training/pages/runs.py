"""What runs left on the disk, read for their page: configuration, figures, evaluations, quantized copies."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fanformer.errors import ConfigError
from fanformer.training.folder import METRICS_FILE, RUN_FILE, read_records, read_run_file

QUANTIZATION_FILE = "quantization.json"


@dataclass(frozen=True)
class SeenRun:
    """A run as its page shows it.

    Attributes:
        name: the end of its path that no other run of the page has.
        folder: of the run.
        described: the content of run.yaml.
        records: the lines of metrics.jsonl.
        evaluations: what `fanformer eval --json` wrote into the folder, by the name of the file.
        quantizations: what `fanformer quantize` reported into the folder or one in it, by the path of that.
    """

    name: str
    folder: Path
    described: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    evaluations: Mapping[str, Mapping[str, Any]]
    quantizations: Mapping[str, Mapping[str, Any]]

    @property
    def configuration(self) -> Mapping[str, Any]:
        """Every field of the run, by its flat name."""
        return self.described["configuration"]

    def last(self, key: str) -> Any:
        """Return the newest value of a figure, or None."""
        return next((record[key] for record in reversed(self.records) if key in record), None)

    def points(self, x: str, y: str) -> tuple[list[float], list[float]]:
        """Return one figure over another, which stands at its newest value where a record leaves it out."""
        position: float | None = None
        found = []
        for record in self.records:
            position = record.get(x, position)
            if y in record and position is not None:
                found.append((position, record[y]))
        return [place for place, _ in found], [value for _, value in found]


def read_runs(folders: Sequence[Path]) -> list[SeenRun]:
    """Read what is known of runs, one under way too.

    Raises:
        CheckpointError: if a folder is none of a run, or its records are damaged.
        ConfigError: if a folder is named twice.
    """
    names = _names([folder.resolve() for folder in folders])
    return [
        SeenRun(name, folder, read_run_file(folder), read_records(folder), _evaluations(folder), _quantized(folder))
        for name, folder in zip(names, folders, strict=True)
    ]


def changes(folders: Sequence[Path]) -> list[tuple[str, int, int]]:
    """Return name, size and time of every file that `read_runs` reads: another list where there is something new."""
    patterns = (RUN_FILE, METRICS_FILE, "*.json", f"*/{QUANTIZATION_FILE}")
    paths = sorted({path for folder in folders for pattern in patterns for path in folder.glob(pattern)})
    found = []
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # a run under way replaces files
            state = path.stat()
            found.append((str(path), state.st_size, state.st_mtime_ns))
    return found


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of paths that tell them apart."""
    if len(set(folders)) < len(folders):
        twice = next(folder for folder in folders if folders.count(folder) > 1)
        raise ConfigError(f"each run must be named once, got {twice} twice: leave it out.")
    length = 1
    while len({folder.parts[-length:] for folder in folders}) < len(folders):
        length += 1
    return ["/".join(folder.parts[-length:]) for folder in folders]


def _evaluations(folder: Path) -> dict[str, Mapping[str, Any]]:
    found = {}
    for path in sorted(folder.glob("*.json")):
        content = _read(path)
        if "model" in content and ("files" in content or "tasks" in content):
            found[path.name] = content
    return found


def _quantized(folder: Path) -> dict[str, Mapping[str, Any]]:
    paths = [*folder.glob(QUANTIZATION_FILE), *sorted(folder.glob(f"*/{QUANTIZATION_FILE}"))]
    reports = {path.parent.name: _read(path) for path in paths}
    return {name: report for name, report in reports.items() if "layers" in report}


def _read(path: Path) -> Mapping[str, Any]:
    """Return an object of JSON; a file that holds something else is none of ours."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
