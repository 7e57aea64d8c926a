"""A folder that one process at a time may write: the lock says who holds it, and goes with the process."""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from fanformer.errors import FANformerError

LOCK_FILE = ".lock"


@contextlib.contextmanager
def hold(folder: Path, error: type[FANformerError]) -> Iterator[None]:
    """Hold the lock of a folder while the block runs; the kernel releases it if the process dies.

    Args:
        folder: that exists and can be written.
        error: what to raise where another process holds the lock.

    Raises:
        FANformerError: of the given class, naming the process that holds the lock, its machine and since when.
    """
    import fcntl

    path = folder / LOCK_FILE
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as blocked:
            raise error(
                f"{folder.absolute()} is being written by {_holder(handle)}: wait until it is done, stop it, or choose "
                "another --output-dir."
            ) from blocked
        who = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(who).encode(), 0)
        yield
    finally:
        os.close(handle)  # the file stays: deleting it would let two processes hold two files of one name


def _holder(handle: int) -> str:
    try:
        who = json.loads(os.pread(handle, 4096, 0))
        return f"process {who['pid']} on {who['host']} since {who['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
