"""Where a preparation writes: the folder that is to be, the partial one beside it, and what may be deleted there."""

import os
import shutil
from pathlib import Path

from fanformer.data.sources.documents import PREPARED_METADATA
from fanformer.errors import DataError, FANformerError
from fanformer.files.durable import printable
from fanformer.files.staging import delete

_OWN_WORK = ("journal.json", "heldout.txt", "seen.sqlite")
"""What the names of files in `work` begin with."""


def output_place(output_dir: Path) -> Path:
    """Return the absolute path of a folder to be made; a link stands for what it leads to.

    Raises:
        DataError: if its name is not UTF-8, or no folder can take its place.
    """
    path = Path(output_dir).expanduser().absolute()
    if path.is_symlink() or ".." in path.parts:
        path = Path(os.path.realpath(path))
    require_utf8_name(path)
    if os.path.ismount(path):
        raise DataError(f"{path} is where a file system begins, and stays: choose an --output-dir in it")
    return path


def require_utf8_name(path: Path, error_type: type[FANformerError] = DataError) -> None:
    """Refuse a folder whose name is not UTF-8: tokenizer and weights are read and written by libraries in Rust.

    Args:
        path: the folder, which need not exist.
        error_type: what is raised.

    Raises:
        FANformerError: of `error_type`.
    """
    if printable(str(path)) != str(path):
        raise error_type(f"{path} must have a name in UTF-8, got {str(path)!a}: choose another --output-dir")


def partial_place(output_dir: Path) -> Path:
    """Return the folder that everything is written to first."""
    return output_dir.with_name(output_dir.name + ".partial")


def lock_place(output_dir: Path) -> Path:
    """Return the lock file of an output folder."""
    return output_dir.with_name(output_dir.name + ".lock")


def refuse_existing(output_dir: Path) -> None:
    """Tidy up behind a process that was killed after its folder was complete, and raise DataError if there is any."""
    if (output_dir / "work").is_dir() and (output_dir / PREPARED_METADATA).is_file():
        shutil.rmtree(output_dir / "work", ignore_errors=True)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise DataError(f"{output_dir} exists already: choose another --output-dir, or delete it first")


def delete_beginnings(partial: Path) -> None:
    """Delete what a process left that ended before its first journal.

    Raises:
        DataError: if the folder is not of such a process, but somebody's own.
        OSError: if it cannot be deleted.
    """
    work = partial / "work"
    names = os.listdir(work) if work.is_dir() else []
    if not all(name.startswith(_OWN_WORK) for name in names) or (not work.is_dir() and os.listdir(partial)):
        raise DataError(
            f"{partial} is in the way and holds what no preparation has left: choose another --output-dir, or delete it"
        )
    delete_partial(partial)


def delete_partial(partial: Path) -> None:
    """Delete a partial folder; ended on the way, it is still known as one."""
    for path in partial.iterdir():
        if path.name != "work":
            delete(path)
    shutil.rmtree(partial)
