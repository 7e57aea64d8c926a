"""What is done of a chain of stages, in files, so that it goes on after any end and says where it stands."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from fanformer.comparison.queue import STATUS_FILE
from fanformer.errors import ConfigError
from fanformer.files.durable import read_json, replace_json
from fanformer.training.folder import METRICS_FILE, RUN_FILE, read_records, read_run_file


@dataclass(frozen=True)
class Chain:
    """Stages of one folder, each with what decides its result; `stages/NAME.json` says that it was begun, or done.

    Attributes:
        folder: where the stages work.
        settings: of each stage, by its name: all that its result depends on, that of earlier stages included.
    """

    folder: Path
    settings: Mapping[str, Mapping[str, Any]]

    def result(self, name: str) -> dict[str, Any] | None:
        """Return the result of a stage, None where it is not done.

        Raises:
            ConfigError: if it was begun with other settings.
        """
        return None if (known := self._known(name)) is None else known["result"]

    def begin(self, name: str) -> None:
        """Keep with which settings a stage is begun; raises as `result`."""
        if self._known(name) is None:
            self._write(name, None)

    def finish(self, name: str, result: Mapping[str, Any]) -> None:
        """Keep the result of a stage, which is not done again."""
        self._write(name, result)

    def state(self, name: str) -> tuple[str, str]:
        """Return how far a stage is, in the words of a queue, and figures of it; raises as `result`."""
        known = self._known(name)
        if known is None:
            return "waiting", ""
        if known["result"] is not None:
            return "done", ", ".join(f"{key} {_shown(value)}" for key, value in known["result"].items())
        return "stopped", how_far(self.folder / name)

    def lines(self, names: Sequence[str], *, is_running: bool = False) -> list[str]:
        """Return a line for each stage; `is_running` says whether a process is at the one that was begun last."""
        states = {name: self.state(name) for name in names}
        words = {"stopped": "running"} if is_running else {}
        return [f"{name:10} {words.get(state, state):8} {text}".rstrip() for name, (state, text) in states.items()]

    def tell(self, names: Sequence[str], running: str | None = None) -> list[str]:
        """Write the status file, which `fanformer compare --status` reads, and return the lines of all stages."""
        states = {name: ("running", "") if name == running else self.state(name) for name in names}
        content = {
            "pid": os.getpid(),
            "updated": datetime.now().astimezone().isoformat(timespec="seconds"),
            "entries": {
                name: {"state": state, "done": 0, "planned": None, "text": text}
                for name, (state, text) in states.items()
            },
            "trainings": [],
        }
        replace_json(self.folder / STATUS_FILE, content)
        return self.lines(names, is_running=running is not None)

    def _file(self, name: str) -> Path:
        return self.folder / "stages" / f"{name}.json"

    def _known(self, name: str) -> dict[str, Any] | None:
        path = self._file(name)
        if not path.is_file():
            return None
        known, now = dict(read_json(path)), _plain(self.settings[name])
        if known["settings"] != now:
            key = next(key for key in {**now, **known["settings"]} if known["settings"].get(key) != now.get(key))
            raise ConfigError(
                f"stage {name} of {self.folder} was begun with {key} {known['settings'].get(key)}, got {now.get(key)}: "
                f"put that back, give another --work, or delete {path} and {self.folder / name} to do it again."
            )
        return known

    def _write(self, name: str, result: Mapping[str, Any] | None) -> None:
        self._file(name).parent.mkdir(parents=True, exist_ok=True)
        replace_json(self._file(name), {"settings": _plain(self.settings[name]), "result": result})


def how_far(run: Path) -> str:
    """Return how far a training in a folder is, in words; empty where none has begun there."""
    if not (run / RUN_FILE).is_file() or not (run / METRICS_FILE).is_file():
        return ""
    steps, records = read_run_file(run)["length"]["max_steps"], read_records(run)
    if not records or not steps:
        return ""
    step = int(records[-1]["step"])
    hours = max(record.get("elapsed_seconds", 0.0) for record in records) / 3600
    return f"step {step:,} of {steps:,}, {step / steps:.0%}, after {hours:.2f} h"


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as JSON gives them back."""
    return dict(json.loads(json.dumps(settings)))


def _shown(value: Any) -> str:
    return f"{value:,.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
