"""One process at a time in a folder, by a lock that the kernel takes back when the process dies."""

import datetime
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fanformer.errors import DataError, FANformerError


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
    descriptor = _acquire(path, what, error_type, wait)
    try:
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        }
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        except OSError:
            pass  # a full disk: the lock itself needs no space
        yield
    finally:
        # while it is held: who opens the file later makes a new one
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(path: Path, what: str, error_type: type[FANformerError], wait: bool) -> int:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise error_type(f"{path} cannot be written: {error.strerror or error}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # its last holder may have deleted it between our opening and locking it
            if os.path.exists(path) and os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except BlockingIOError as error:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise error_type(f"{what} is in use by {holder}: wait until it ends, or stop it") from error
        except OSError as error:
            os.close(descriptor)
            raise error_type(f"{path} cannot be locked: {error.strerror or error}") from error
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return "another process"
