"""The folder of a run: who may write into it, and what it must hold for a run to begin or to go on."""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from fanformer.data.locking import hold
from fanformer.errors import CheckpointError, ConfigError
from fanformer.training.artifacts import RUN_FILE
from fanformer.training.checkpoint import remove_unfinished
from fanformer.training.corpus import DATA_FOLDER, HELD_OUT_FOLDER
from fanformer.training.records import METRICS_FILE

LOCK_FILE = ".lock"
_BEGINNINGS = {RUN_FILE, METRICS_FILE} | {
    f"{name}{suffix}" for name in (DATA_FOLDER, HELD_OUT_FOLDER) for suffix in ("", ".partial", ".lock")
}
"""What a run that was killed before it wrote run.yaml may leave, beside a `.new` of each."""


@contextlib.contextmanager
def claimed(folder: Path, resume: bool, overwrite: bool) -> Iterator[bool]:
    """Hold the run's folder, made if need be, while the block runs.

    Where the block raises before it wrote run.yaml, the folder is left as it was found, gone or empty, but for a
    preparation of data that can go on.

    Args:
        folder: of the run.
        resume: whether a run in it is to go on.
        overwrite: whether a run in it is to be deleted.

    Yields:
        Whether there is a run to go on with; False where a new one begins.

    Raises:
        CheckpointError: if the folder holds a run and neither `resume` nor `overwrite` is asked for, if it holds
            something that is not a run, which is never deleted, or if another process writes into it.
        ConfigError: if it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"`output_dir` must be a folder, got the file {folder.absolute()}.")
    existed = folder.is_dir()
    if existed and _strangers(folder):
        raise CheckpointError(f"{folder.absolute()} is not empty and holds no run: choose another --output-dir.")
    folder.mkdir(parents=True, exist_ok=True)
    with hold(folder / LOCK_FILE, f"the folder {folder.absolute()}", CheckpointError):
        if (folder / RUN_FILE).is_file() and not resume:
            if not overwrite:
                raise CheckpointError(
                    f"{folder.absolute()} already holds a run: go on with --resume, replace it with --overwrite, "
                    "or choose another --output-dir."
                )
            _empty(folder)
        remove_unfinished(folder)
        try:
            yield (folder / RUN_FILE).is_file()
        except Exception:  # not Ctrl-C: the same command goes on with data that are prepared, or half prepared
            if not (folder / RUN_FILE).is_file():
                _empty(folder, keep=_worth_keeping(folder))
                (folder / LOCK_FILE).unlink(missing_ok=True)
                if not existed and not any(folder.iterdir()):
                    folder.rmdir()
            raise


def _strangers(folder: Path) -> bool:
    """Whether a folder holds what is neither a run nor the beginning of one."""
    if (folder / RUN_FILE).is_file():
        return False
    return any(path.name != LOCK_FILE and path.name.split(".new")[0] not in _BEGINNINGS for path in folder.iterdir())


def _worth_keeping(folder: Path) -> list[Path]:
    """Return the preparations that ended in an error but said that the same command goes on with them."""
    names = (f"{name}.partial" for name in (DATA_FOLDER, HELD_OUT_FOLDER))
    return [folder / name for name in names if (folder / name).is_dir() and any((folder / name).iterdir())]


def _empty(folder: Path, keep: Sequence[Path] = ()) -> None:
    """Delete everything but the lock and what is to be kept."""
    for path in folder.iterdir():
        if path in keep:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK_FILE:
            path.unlink()
