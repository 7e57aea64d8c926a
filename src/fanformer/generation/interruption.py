"""A way to stop a text while it is written; torch-free."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interruption:
    """Whether somebody asked for the text to stop."""

    def __init__(self) -> None:
        self.requested = False

    def request(self) -> None:
        """Ask for the text to stop after the token in work."""
        self.requested = True


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Let Ctrl-C request an interruption instead of raising, within the block; a second Ctrl-C raises after all.

    Only a program's main thread gets signals: in another thread the block changes nothing.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        if interruption.requested:
            raise KeyboardInterrupt
        interruption.request()

    previous = signal.signal(signal.SIGINT, on_signal)
    try:
        yield interruption
    finally:
        signal.signal(signal.SIGINT, previous)
