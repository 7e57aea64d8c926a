"""The folder of a run: who may write into it, and what it must hold for a run to begin, to go on or to be replaced."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fanformer.data.preparation.places import require_utf8_name
from fanformer.errors import CheckpointError, ConfigError
from fanformer.files.locking import hold
from fanformer.files.staging import delete
from fanformer.training.artifacts import RUN_FILE
from fanformer.training.checkpoint import REPLACED, checkpoints, forget_replaced, remove_unfinished
from fanformer.training.corpus import DATA_FOLDER, HELD_OUT_FOLDER
from fanformer.training.records import METRICS_FILE

LOCK_FILE = ".lock"
_REPLACING = ".replacing"
"""Folder of a run that is on its way to REPLACED or back: whatever lies beside it belongs to that run too."""
_DATA = {f"{name}{suffix}" for name in (DATA_FOLDER, HELD_OUT_FOLDER) for suffix in ("", ".partial", ".lock")}
_BEGINNINGS = {RUN_FILE, METRICS_FILE} | _DATA
"""What a run that was killed before it wrote run.yaml may leave, beside a `.new` of each."""


@contextlib.contextmanager
def claimed(
    folder: Path, resume: bool, overwrite: bool, note: Callable[[str], None] = lambda text: None
) -> Iterator[bool]:
    """Hold the run's folder, made if need be, while the block runs.

    A run that is to be replaced is put aside and deleted once the new one has a checkpoint (`forget_replaced`). Where
    the block raises before that, it is back as it was; where the process is killed, the next call puts it back, unless
    that is to replace it too. Where the block raises before a new run wrote run.yaml, the folder is left as it was
    found, but for a preparation of data that can go on.

    Args:
        folder: of the run.
        resume: whether a run in it is to go on.
        overwrite: whether a run in it is to be replaced.
        note: told what happened to the run before.

    Yields:
        Whether there is a run to go on with; False where a new one begins.

    Raises:
        CheckpointError: if the folder holds a run and neither `resume` nor `overwrite` is asked for, if it holds
            something that is not a run, which is never deleted, or if another process writes into it.
        ConfigError: if it is a file, or its name is not UTF-8.
    """
    require_utf8_name(folder, ConfigError)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"`output_dir` must be a folder, got the file {folder.absolute()}.")
    existed = folder.is_dir()
    if existed and _strangers(folder):
        raise CheckpointError(f"{folder.absolute()} is not empty and holds no run: choose another --output-dir.")
    folder.mkdir(parents=True, exist_ok=True)
    with hold(folder / LOCK_FILE, f"the folder {folder.absolute()}", CheckpointError):
        _recover(folder, overwrite, note)
        if (folder / RUN_FILE).is_file() and not resume:
            if not overwrite:
                raise CheckpointError(
                    f"{folder.absolute()} already holds a run: go on with --resume, replace it with --overwrite, "
                    "or choose another --output-dir."
                )
            _put_aside(folder)
        found = _content(folder)
        try:
            yield (folder / RUN_FILE).is_file()
        except Exception:  # not Ctrl-C: the same command goes on with data that are prepared, or half prepared
            if (folder / REPLACED).is_dir() and not checkpoints(folder):
                _put_back(folder, note)
            elif not (folder / RUN_FILE).is_file():
                _empty(folder, keep=[*found, *_worth_keeping(folder)])
                (folder / LOCK_FILE).unlink(missing_ok=True)
                if not existed and not any(folder.iterdir()):
                    folder.rmdir()
            raise


def _recover(folder: Path, overwrite: bool, note: Callable[[str], None]) -> None:
    """Bring a folder in order that a killed process left in the middle of something."""
    if (folder / _REPLACING).is_dir():
        _move_back(folder)
    remove_unfinished(folder)
    if (folder / REPLACED).is_dir():
        if checkpoints(folder):
            forget_replaced(folder)
        elif overwrite:  # once more: what it prepared is of use, if it is for the same data
            _empty(folder, keep=[folder / REPLACED, *(folder / name for name in _DATA)])
        else:
            _put_back(folder, note)


def _put_aside(folder: Path) -> None:
    """Move a run into REPLACED, so that a kill at any moment leaves either all of it there or all to be moved back."""
    aside = folder / _REPLACING
    aside.mkdir()
    for path in _content(folder):
        os.replace(path, aside / path.name)
    os.replace(aside, folder / REPLACED)


def _put_back(folder: Path, note: Callable[[str], None]) -> None:
    """Let the run that was to be replaced be the folder's again."""
    _empty(folder, keep=[folder / REPLACED])
    os.replace(folder / REPLACED, folder / _REPLACING)
    _move_back(folder)
    note(f"the run that was in {folder} before is back: the one that was to replace it ended without a checkpoint")


def _move_back(folder: Path) -> None:
    for path in (folder / _REPLACING).iterdir():
        os.replace(path, folder / path.name)
    (folder / _REPLACING).rmdir()


def _strangers(folder: Path) -> bool:
    """Whether a folder holds what is neither a run nor the beginning of one."""
    if any((folder / name).exists() for name in (RUN_FILE, REPLACED, _REPLACING)):
        return False
    return any(path.name != LOCK_FILE and path.name.split(".new")[0] not in _BEGINNINGS for path in folder.iterdir())


def _worth_keeping(folder: Path) -> list[Path]:
    """Return the preparations that ended in an error but said that the same command goes on with them."""
    names = (f"{name}.partial" for name in (DATA_FOLDER, HELD_OUT_FOLDER))
    return [folder / name for name in names if (folder / name).is_dir() and any((folder / name).iterdir())]


def _content(folder: Path) -> list[Path]:
    """Return everything in a folder but its lock and the way to REPLACED."""
    return [path for path in folder.iterdir() if path.name not in (LOCK_FILE, _REPLACING)]


def _empty(folder: Path, keep: Sequence[Path] = ()) -> None:
    """Delete everything but the lock and what is to be kept."""
    for path in _content(folder):
        if path not in keep:
            delete(path)
