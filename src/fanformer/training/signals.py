"""SIGTERM, SIGINT and the like as a wish to stop: the step under way ends, a checkpoint is written, the run ends."""

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGXCPU") if hasattr(signal, name)
)
"""What schedulers and terminals send: Slurm sends SIGTERM or, with --signal, another before its time limit."""


class StopRequest:
    """Remembers the first stop signal while a `with` block runs; a second one, or the end of the grace, exits at once.

    Exiting at once is safe at any moment: checkpoints get their name only when they are whole.
    """

    def __init__(self, grace_seconds: float) -> None:
        """Set up.

        Args:
            grace_seconds: longest time from the signal to the end of the block; then the process exits.
        """
        self.grace_seconds = grace_seconds
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._timer: threading.Timer | None = None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            self._exit("a second signal came")
        self.signal = signal.Signals(number)
        self._timer = threading.Timer(self.grace_seconds, self._exit, [f"{self.grace_seconds:g} s of grace are over"])
        self._timer.daemon = True
        self._timer.start()

    def _exit(self, why: str) -> None:
        assert self.signal is not None, "called after a signal only"
        print(  # noqa: T201  # nothing else can be relied on here
            f"{why}: stopped without a checkpoint of the last steps; the ones before are whole, go on with --resume.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(128 + self.signal)
