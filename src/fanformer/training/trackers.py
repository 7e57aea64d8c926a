"""Figures of a run, sent to a tracker as well: adapters on the events, each for a package that is imported at use.

metrics.jsonl stays the truth: a tracker that fails ends its own part and not the training.
"""

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from fanformer.errors import DependencyError
from fanformer.training.events import Event, Listener
from fanformer.training.fields import RunConfig

_PROJECT = "fanformer"


class Tracker(Protocol):
    """Where figures go."""

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Take one step's figures."""

    def close(self) -> None:
        """Write what is left."""


class _TensorBoard:
    """Event files in the folder `tensorboard` of the run; steps that a resumed run does again replace the earlier."""

    def __init__(self, config: RunConfig, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(config.folder / "tensorboard"), purge_step=step)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Trackio:
    """trackio's own database on this machine; nothing leaves it."""

    def __init__(self, config: RunConfig, step: int) -> None:
        import trackio

        self._trackio = trackio
        with contextlib.redirect_stdout(sys.stderr):  # where the run's result does not go
            trackio.init(
                _PROJECT, config.folder.resolve().name, config=config.to_dict(), resume="allow", embed=False,
                auto_log_gpu=False, auto_log_cpu=False,
            )  # fmt: skip

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._trackio.log(dict(figures), step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._trackio.finish()


class _Wandb:
    """Weights & Biases: files in the run's folder, which `wandb sync` sends; at once where WANDB_MODE says online."""

    def __init__(self, config: RunConfig, step: int) -> None:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE", "offline")
        with contextlib.redirect_stdout(sys.stderr):
            self._run = wandb.init(
                project=_PROJECT, name=config.folder.resolve().name, dir=str(config.folder), mode=mode,
                config=config.to_dict(), resume="allow",
            )  # fmt: skip

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._run.finish()


TRACKERS: Mapping[str, Callable[[RunConfig, int], Tracker]] = {
    "trackio": _Trackio,
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
}
"""What makes a tracker from a run and its first step, by the name of its package and extra."""


@contextlib.contextmanager
def also_to(name: str, config: RunConfig, listener: Listener) -> Iterator[Listener]:
    """Give a listener that passes every event on, and its figures to a tracker too, which begins with the first.

    Args:
        name: of the tracker, one of TRACKERS.
        config: the run.
        listener: hears everything, and one line if the tracker fails.

    Raises:
        DependencyError: if the tracker's package is not installed.
    """
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise DependencyError(
            f"`--log-to` {name} needs {error.name or name}, which is not installed: pip install 'fanformer[{name}]'"
        ) from error
    tracker: Tracker | None = None
    has_failed = False

    def hear(event: Event) -> None:
        nonlocal tracker, has_failed
        listener(event)
        if event.kind != "record" or has_failed:
            return
        step = event.figures["step"]
        try:
            if tracker is None:  # not before: the folder is another's until the run has claimed it
                tracker = TRACKERS[name](config, step)
            tracker.log(_numbers(event.figures), step)
        except Exception as error:
            has_failed = True
            listener(_failure(name, error))

    try:
        yield hear
    finally:
        if tracker is not None:
            try:
                tracker.close()
            except Exception as error:
                listener(_failure(name, error))


def _numbers(figures: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in figures.items() if isinstance(value, int | float) and key != "step"}


def _failure(name: str, error: Exception) -> Event:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return Event("note", f"logging to {name} ended ({reason}): training goes on, metrics.jsonl has every figure")
