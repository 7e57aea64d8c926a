"""What ends a process from outside, as an end that `finally` and `except` see."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def sigterm_as_exit() -> Iterator[None]:
    """Let SIGTERM, within the block, end this process through its `finally` blocks, in which work under way is saved.

    Raises:
        SystemExit: where the signal comes, with 128 and its number.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
