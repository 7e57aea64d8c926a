"""One process at a time in a folder, by a lock that the system takes back when the process dies."""

import datetime
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from fanformer.errors import DataError, FANformerError

_PATIENCE_SECONDS = 0.1
"""For a lock file that its last holder deletes between our opening and locking it."""


@contextmanager
def hold(path: Path, what: str, error_type: type[FANformerError] = DataError, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path` during the block; the file says who does, and is gone afterwards.

    Args:
        path: the lock file, in a folder that exists.
        what: what is locked, for the message.
        error_type: what is raised where another process holds it, or the file cannot be written.
        wait: whether to wait for another process that holds it.

    Raises:
        FANformerError: of `error_type`; the message names the holder's process, machine and time.
    """
    lock = FileLock(path, timeout=-1 if wait else _PATIENCE_SECONDS, on_acquired=_write_holder)
    try:
        path.parent.stat()  # `acquire` would create a folder
        lock.acquire()
    except Timeout as error:
        raise error_type(f"{what} is in use by {_holder(path)}: wait until it ends, or stop it") from error
    except OSError as error:
        raise error_type(f"{path} cannot be written: {error.strerror or error}") from error
    try:
        yield
    finally:
        with suppress(OSError):  # Windows has no deletion before the release, which does it there
            path.unlink()
        lock.release()


def _write_holder(descriptor: int) -> None:
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    with suppress(OSError):  # a full disk: the lock itself needs no space
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(holder).encode())


def _holder(path: Path) -> str:
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(1)  # Windows locks the first byte, which is always the same
            holder = json.loads(b"{" + file.read(4096))
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "another process"
