"""Outputs that are whole when they have their name: written aside, and nothing old goes before the new is complete."""

import ctypes
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fanformer.errors import ConfigError
from fanformer.files.durable import sync

_CURRENT_FOLDER, _EXCHANGE = -100, 2  # AT_FDCWD, RENAME_EXCHANGE


def check_free(*files: Path, overwrite: bool) -> None:
    """Refuse, before any work, to write files that are there already.

    Raises:
        ConfigError: if one is a folder, or is there and must not be replaced.
    """
    for file in files:
        if file.is_dir():
            raise ConfigError(
                f"{file.absolute()} is a folder, expected a file or nothing: give another `--output-dir`."
            )
        if file.exists() and not overwrite:
            raise ConfigError(f"{file.absolute()} is there already: give another `--output-dir`, or `--overwrite`.")


@contextmanager
def staged(*files: Path) -> Iterator[tuple[Path, ...]]:
    """Give a path beside each file to write to; after the block all are synced, and then take their names in order.

    If the block or the disk fails, whatever had the names has them still.
    """
    asides = tuple(file.with_name(file.name + ".new") for file in files)
    try:
        yield asides
        for aside in asides:
            sync(aside)
        for aside, file in zip(asides, files, strict=True):
            os.replace(aside, file)
    finally:
        for aside in asides:
            aside.unlink(missing_ok=True)
    sync(files[0].parent)


def replace_folder(new: Path, place: Path) -> None:
    """Give a folder the name `place`, and delete the folder that had it.

    Linux exchanges the two in one step. Elsewhere the old one is called `place` and `.old` for a moment, and a process
    killed in it leaves both, whole.
    """
    if not place.exists():
        os.replace(new, place)
        return
    old = new
    if not _exchange(new, place):
        old = place.with_name(place.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(place, old)
        os.replace(new, place)
    shutil.rmtree(old)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; return False where the system or file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    paths = os.fsencode(first), os.fsencode(second)
    return rename is not None and rename(_CURRENT_FOLDER, paths[0], _CURRENT_FOLDER, paths[1], _EXCHANGE) == 0
