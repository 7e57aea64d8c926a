"""Where a preparation writes, what it may delete there, and how far it has come, for the same command to go on."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fanformer.data.sources.decompression import unreadable
from fanformer.data.sources.documents import PREPARED_METADATA
from fanformer.errors import DataError, FANformerError
from fanformer.files.durable import delete, printable, read_json, replace_text

JOURNAL_VERSION = 3
INTERVAL_SECONDS = 5.0
"""Shortest time between two entries, and before the first: shorter work is not worth keeping."""


class OtherArgumentsError(DataError):
    """Work that is there was begun with other arguments than those that are given now."""


class Journal:
    """The last entry, in a file that is replaced as a whole, and the arguments that it belongs to."""

    def __init__(self, path: Path, arguments: Mapping[str, Any]) -> None:
        """Name the file; nothing is written yet.

        Args:
            path: the file, in the subfolder `work` of a partial folder.
            arguments: everything that the result depends on, as JSON values.
        """
        self.path = path
        self._remedy = f"delete {path.parent.parent} and start anew"
        self._arguments = json.loads(json.dumps(arguments))
        self._last = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """Return the last entry, None if there is none.

        Raises:
            OtherArgumentsError: if it was made with other arguments; the message says which.
            DataError: if it is damaged.
        """
        if not self.path.is_file():
            return None
        try:
            content = read_json(self.path)
            version = content["version"]
            if version == JOURNAL_VERSION:
                arguments, entry = content["arguments"], content["entry"]
                if content["sha256"] != _digest(arguments, entry):
                    raise ValueError("its content is not what its checksum was made of")
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.path} is damaged: {self._remedy}") from error
        except OSError as error:
            raise unreadable(self.path, error) from error
        if version != JOURNAL_VERSION:
            raise DataError(f"{self.path} must have version {JOURNAL_VERSION}, got {version!r:.40}: {self._remedy}")
        difference = _difference(arguments, self._arguments)
        if difference:
            raise OtherArgumentsError(
                f"{self.path.parent.parent} was begun with {difference}: give the same again to go on from there, "
                "or delete it to start anew"
            )
        return entry

    def is_due(self) -> bool:
        """Return whether INTERVAL_SECONDS have passed since the last entry or the beginning."""
        return time.monotonic() - self._last >= INTERVAL_SECONDS

    def save(self, entry: Mapping[str, Any]) -> None:
        """Replace the entry; what it speaks of must be on the disk already."""
        digest = _digest(self._arguments, entry)
        content = {"version": JOURNAL_VERSION, "sha256": digest, "arguments": self._arguments, "entry": entry}
        replace_text(self.path, json.dumps(content))
        self._last = time.monotonic()


def _digest(arguments: Any, entry: Any) -> str:
    return hashlib.sha256(json.dumps([arguments, entry], sort_keys=True).encode()).hexdigest()


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Describe the first argument that differs, "" if none does."""
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            return f"another {name} ({_difference(old, new).removeprefix('another ')})"
        if isinstance(old, list) and isinstance(new, list) and old and isinstance(old[0], dict):
            changed = next((a for a, b in zip(old, new, strict=False) if a != b), None)
            return f"`{name}` as they were before {changed['name'] if changed else 'some came or went'} changed"
        return f"`{name}` {old!r}, not {new!r}"
    return ""


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
