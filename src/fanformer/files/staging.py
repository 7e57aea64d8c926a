"""Outputs that are whole when they have their name: written aside, and nothing old goes before the new is complete."""

import ctypes
import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fanformer.errors import ConfigError
from fanformer.files.durable import sync
from fanformer.files.locking import hold

_CURRENT_FOLDER, _EXCHANGE = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
_NEW, _OLD, _LOCK = "new", "old", "lock"
"""In the hidden folder beside a place: what is written, what had the name before, and that somebody is at it."""
_ASIDE = ".fanformer-new"
"""How the name of such a folder ends; it begins with that of the place."""


def check_free(*files: Path, overwrite: bool) -> None:
    """Refuse, before any work, to write files that are there already or cannot be written.

    Raises:
        ConfigError: if one is a folder, or is there and must not be replaced, or as `check_place`.
    """
    for file in files:
        if file.is_dir():
            raise ConfigError(
                f"{file.absolute()} is a folder, expected a file or nothing: give another `--output-dir`."
            )
        if file.exists() and not overwrite:
            raise ConfigError(f"{file.absolute()} is there already: give another `--output-dir`, or `--overwrite`.")
        check_place(file)


def check_place(place: Path) -> None:
    """Refuse, before any work, a path that nothing new can be put at.

    Raises:
        ConfigError: if it is a mount point, or in what is no folder or cannot be written to.
    """
    if os.path.ismount(place):
        raise ConfigError(f"{place} is a mount point, which cannot be replaced: give a name in it as `--output-dir`.")
    folder = next(parent for parent in place.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        what = "cannot be written to" if folder.is_dir() else "is no folder"
        raise ConfigError(f"{folder} {what}, expected a folder for {place.name}: give another `--output-dir`.")


def check_folder(place: Path) -> None:
    """Refuse, before any work, a path that `staged_folder` cannot give a new folder.

    Args:
        place: the path, resolved: it is the folder that a link means, not the link, that is replaced.

    Raises:
        ConfigError: if somebody who runs this is in it, since his shell would stay in what is deleted; or as
            `check_place`.
    """
    if Path.cwd().is_relative_to(place):
        raise ConfigError(f"{place} is the current folder, which cannot be replaced: give another `--output-dir`.")
    check_place(place)


@contextmanager
def staged(*files: Path) -> Iterator[tuple[Path, ...]]:
    """Give a path to write to for each file; after the block all are synced, and then take their names in order.

    The files are of one folder. If the block or the disk fails, whatever had the names has them still. The paths are in
    a hidden folder beside the first, so that two who write the same file at once never write into one.
    """
    with _hidden_folder(files[0]) as hidden:
        (hidden / _NEW).mkdir()
        asides = tuple(hidden / _NEW / f"{file.name}.new" for file in files)
        yield asides
        for aside in asides:
            sync(aside)
        for aside, file in zip(asides, files, strict=True):
            os.replace(aside, file)
    sync(files[0].parent)


@contextmanager
def staged_folder(place: Path) -> Iterator[Path]:
    """Give a path to make a folder at; after the block it has the name `place`, and what had it is deleted.

    Linux exchanges old and new in one step. Elsewhere a process killed between two steps leaves both, whole, in the
    hidden folder, until something takes the name.
    """
    with _hidden_folder(place) as hidden:
        yield hidden / _NEW
        _replace(hidden / _NEW, place, hidden / _OLD)


@contextmanager
def _hidden_folder(place: Path) -> Iterator[Path]:
    """Give a new hidden folder beside `place` whose name nothing had; it is gone after the block.

    What killed processes left of such folders is deleted: the lock file in one says that it is no user's, and that
    nobody writes there any more.
    """
    _delete_leftovers(place)
    hidden = Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=_ASIDE, dir=place.parent))
    try:
        with hold(hidden / _LOCK, str(hidden), ConfigError):
            try:
                yield hidden
            finally:
                _empty(hidden, place)
    finally:
        with suppress(OSError):
            hidden.rmdir()
    _delete_leftovers(place)


def _replace(new: Path, place: Path, old: Path) -> None:
    """Give the folder `new` the name `place`, and delete the folder that had it; it may be called `old` before."""
    if not place.exists():
        os.replace(new, place)
        return
    if _exchange(new, place):
        old = new
    else:
        os.replace(place, old)
        try:
            os.replace(new, place)
        except BaseException:
            os.replace(old, place)
            raise
    shutil.rmtree(old)


def _delete_leftovers(place: Path) -> None:
    """Delete what killed processes left of the folders of `_hidden_folder`."""
    for aside in place.parent.glob(f".{glob.escape(place.name)}.*{_ASIDE}"):
        with suppress(OSError, ConfigError):  # another process writes there
            if (aside / _LOCK).is_file() and not _is_all_there_is(aside, place):
                with hold(aside / _LOCK, str(aside), ConfigError):
                    _empty(aside, place)
            aside.rmdir()  # where more is in it, it is somebody else's


def _empty(aside: Path, place: Path) -> None:
    if not _is_all_there_is(aside, place):
        for name in (_NEW, _OLD):
            shutil.rmtree(aside / name, ignore_errors=True)


def _is_all_there_is(aside: Path, place: Path) -> bool:
    """Return whether what had the name `place` has lost it, and nothing has it now."""
    return (aside / _OLD).exists() and not place.exists()


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; return False where the system or file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    paths = os.fsencode(first), os.fsencode(second)
    return rename is not None and rename(_CURRENT_FOLDER, paths[0], _CURRENT_FOLDER, paths[1], _EXCHANGE) == 0
