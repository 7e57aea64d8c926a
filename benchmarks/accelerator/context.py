"""What all parts of the accelerator's benchmark need; importing it finds this package and benchmarks/speed."""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
try:
    import fanformer.model  # noqa: F401
except ModuleNotFoundError:
    sys.path.insert(0, str(REPOSITORY / "src"))
sys.path.append(str(REPOSITORY / "benchmarks" / "speed"))


@dataclass(frozen=True)
class Context:
    """What a part is told."""

    device: str
    dry_run: bool
    deadline: float
    """`time.time()` at which the budget ends."""
    earlier: Mapping[str, Any]
    """Results of the parts before."""
    save: Callable[[Mapping[str, Any]], None]
    """Keeps what a part knows so far, should it not live to its end."""
    queue: Path
    """The trainings of the last part ..."""
    jobs: int
    """... and how many of them run side by side."""
    output: Path
    """The folder of the results."""

    @property
    def seconds_left(self) -> float:
        """Seconds until the budget ends."""
        return self.deadline - time.time()


def one_line(error: BaseException) -> str:
    """Return an exception's kind and the first line of its text."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}" if text else type(error).__name__
