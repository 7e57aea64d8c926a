"""What a program of many trainings needs: a work folder of one setting, results as files, several trainings at once."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar


class Named(Protocol):
    """A cell: one training with its measurement."""

    @property
    def name(self) -> str:
        """Names its result, and the cell for `--cell`."""


Cell = TypeVar("Cell", bound=Named)


@dataclass(frozen=True)
class Work:
    """A folder in which what is done is kept, so that the same command goes on.

    Attributes:
        folder: where it is.
    """

    folder: Path

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Make the folder, or go on in one that was begun with the same settings; with others the program ends."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file, now = self.folder / "settings.json", json.loads(json.dumps(settings))
        before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else now
        if before != now:
            name = next(name for name in {**now, **before} if before.get(name) != now.get(name))
            got = f"{name} {before.get(name)}, got {now.get(name)}"
            sys.exit(f"{self.folder} was begun with {got}: give another --work")
        if not file.is_file():  # cells that run at once read it
            aside = file.with_suffix(".new")
            aside.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
            aside.replace(file)

    def file(self, name: str) -> Path:
        """Return where the result of a cell is."""
        return self.folder / "results" / f"{name}.json"

    def has(self, name: str) -> bool:
        """Return whether a cell is done."""
        return self.file(name).is_file()

    def read(self, name: str) -> dict[str, Any]:
        """Return the result of a cell."""
        return dict(json.loads(self.file(name).read_text(encoding="utf-8")))

    def keep(self, name: str, found: Mapping[str, Any]) -> None:
        """Write a result, all of it or nothing."""
        done = self.file(name)
        done.parent.mkdir(exist_ok=True)
        aside = done.with_suffix(".new")
        aside.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        aside.replace(done)

    def do(self, cells: Sequence[Cell], one: Callable[[Cell], None], jobs: int, threads: int) -> None:
        """Do the cells that are left, here, or several at a time as this program with `--cell`; ends if one fails.

        Args:
            cells: in the order in which they are begun.
            one: does a cell.
            jobs: how many at a time.
            threads: of each, where there are several.
        """
        left = [cell for cell in cells if not self.has(cell.name)]
        if jobs == 1:
            for cell in left:
                one(cell)
            return
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}

        def start(cell: Cell) -> int:
            return subprocess.run([sys.executable, *sys.argv, "--cell", cell.name], env=environment).returncode

        with ThreadPoolExecutor(jobs) as pool:
            if any(list(pool.map(start, left))):
                sys.exit("a cell failed, as it says above: the same command goes on")
