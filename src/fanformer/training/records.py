"""metrics.jsonl: a line for every logged step, which a resumed run continues without a gap or a repetition."""

import contextlib
import errno
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path

from fanformer.errors import CheckpointError
from fanformer.files.durable import replace_text

METRICS_FILE = "metrics.jsonl"
EXACT = frozenset({"loss", "grad_norm", "learning_rate", "val_loss", "val_loss_stderr", "val_bits_per_byte"})
"""Figures written with all their digits, so that two runs can be compared bit for bit."""


def read_records(folder: Path) -> list[dict[str, float]]:
    """Return the lines of a run's metrics.jsonl; a last line that a kill left half written is passed over.

    Raises:
        CheckpointError: if another line is no record; the message names it.
    """
    path = folder / METRICS_FILE
    if not path.exists():
        return []
    *whole, _ = path.read_bytes().split(b"\n")
    return [_parse(line, f"{path.absolute()}:{number}") for number, line in enumerate(whole, start=1)]


def _parse(line: bytes, where: str) -> dict[str, float]:
    try:
        record = json.loads(line)
        if isinstance(record["step"], int):
            return record
    except (ValueError, RecursionError, KeyError, TypeError):
        pass
    shown = line[:40].decode("utf-8", "replace")
    raise CheckpointError(
        f"{where} must be a JSON object with `step`, got {shown!r}: delete that line; its figures are lost, the run's "
        "checkpoints are not."
    )


class RecordFile:
    """The metrics.jsonl that a run writes; lines that the disk has no room for wait for the next one."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / METRICS_FILE
        self._pending: list[str] = []
        self._lock = threading.Lock()  # checkpoints are written in a thread of their own, which calls `sync`

    def append(self, record: Mapping[str, float | str]) -> None:
        """Add one line."""
        rounded = {
            key: float(f"{value:.6g}") if isinstance(value, float) and key not in EXACT else value
            for key, value in record.items()
        }
        with self._lock:
            self._pending.append(json.dumps(rounded) + "\n")
            with contextlib.suppress(OSError):
                self._write()

    def _write(self) -> None:
        content = "".join(self._pending).encode()
        handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = os.fstat(handle).st_size
            try:
                written = os.write(handle, content)
            except OSError:
                written = 0
            if written < len(content):  # a full disk took some of it: leave whole lines only
                os.ftruncate(handle, size)
                return
            self._pending.clear()
        finally:
            os.close(handle)

    def sync(self) -> None:
        """Wait until all lines are on the disk.

        Raises:
            OSError: if they cannot be written.
        """
        with self._lock:
            if self._pending:
                self._write()
            left = bool(self._pending)
        if left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps that will be trained again."""
        folder = self._path.parent
        kept = [json.dumps(record) + "\n" for record in read_records(folder) if record["step"] <= step]
        replace_text(self._path, "".join(kept))
        self._pending.clear()
