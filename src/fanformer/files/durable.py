"""Files that are on the disk when we say so: replaced as a whole, synced, hashed; and how a full disk shows.

Names of files need not be UTF-8; Python has their other bytes as lone surrogates (PEP 383), which no file of UTF-8 can
hold: `printable` is what they are called in ours.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

LARGEST_JSON = 1 << 30
"""Bytes of a description or journal; one of a million files has 200 MB."""
_READ_BYTES = 1 << 24  # large, so that a background thread that hashes seldom wants the interpreter


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    if sys.platform == "win32" and path.is_dir():
        return  # Windows has no such wait for folders
    handle = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def printable(name: str) -> str:
    r"""Return a name as text that can be written: each lone surrogate as an escape such as \udce9."""
    return name.encode("utf-8", "backslashreplace").decode()


def replace_text(path: Path, text: str) -> None:
    """Give a file new content in one step: a reader, or the disk after a power cut, has the old or the new.

    The file is UTF-8; what of the text cannot be is written as `printable` has it.
    """
    aside = path.with_name(path.name + ".new")
    aside.write_text(text, encoding="utf-8", errors="backslashreplace")
    sync(aside)
    os.replace(aside, path)
    sync(path.parent)


def replace_json(path: Path, content: Any) -> None:
    """Give a file a JSON value as its content, as `replace_text` does."""
    replace_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Return the JSON value that a file holds.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it holds no JSON, or more of it than Python or LARGEST_JSON allow.
    """
    size = path.stat().st_size
    if size > LARGEST_JSON:
        raise ValueError(f"{size:,} bytes")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def read_pieces(path: Path) -> Iterator[bytes]:
    """Yield the content of a file in pieces that fit into memory."""
    with path.open("rb", buffering=0) as file:
        while content := file.read(_READ_BYTES):
            yield content


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    for content in read_pieces(path):
        digest.update(content)
    return digest.hexdigest()


def hash_files(paths: Iterable[Path]) -> dict[str, str]:
    """Return the SHA-256 of those of the files that are there, by their names."""
    return {path.name: hash_file(path) for path in sorted(paths) if path.is_file()}


def error_number(error: BaseException) -> int | None:
    """Return the number of the operating system's error; libraries in Rust have it in their words only."""
    number = getattr(error, "errno", None)
    if number is None and (found := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(found[1])
    return number


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error means a full disk or quota."""
    return error_number(error) in (errno.ENOSPC, errno.EDQUOT)


def delete(path: Path) -> None:
    """Delete a file or a folder with all that is in it; of a link the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
