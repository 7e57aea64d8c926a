"""The server's log: one line a request, and never a reason to fail."""

import logging
import sys
from pathlib import Path

_NAMES = ("fanformer.server", "uvicorn.error")


class LogHandler(logging.StreamHandler):
    """Writes lines; one that cannot be written, for the disk is full or the reader gone, is counted and forgotten."""

    lost = 0
    """Lines that could not be written."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  logging's own name
        """Count the line."""
        self.lost += 1


def begin_log(file: str | Path | None) -> LogHandler:
    """Let the server's log go to a file, or to standard error, and return who writes it.

    Raises:
        OSError: if the file cannot be opened.
    """
    stream = sys.stderr if file is None else open(file, "a", encoding="utf-8", errors="replace")  # noqa: SIM115
    handler = LogHandler(stream)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name in _NAMES:
        log = logging.getLogger(name)
        log.handlers[:] = [handler]
        log.setLevel(logging.INFO if name == _NAMES[0] else logging.WARNING)
        log.propagate = False
    return handler
