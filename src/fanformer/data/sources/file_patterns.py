"""The files that a pattern names, each once: `glob` follows links in circles and gives a file once for every way."""

import fnmatch
import glob
import heapq
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class _Place(NamedTuple):
    """A path that fits the first parts of a pattern; places are visited in this order."""

    num_links: int
    """Symbolic links on the way here."""
    depth: int
    path: str
    next_part: int
    """The part of the pattern that comes next."""


def matching_files(pattern: Path) -> list[Path]:
    """Return the regular files that a pattern names, as `glob` with `recursive=True` would, but each once.

    A folder is searched once for each part of the pattern and a file is returned once, however many ways lead to it,
    by symbolic links or several names of one file. The way with the fewest links is the one that counts, then the
    shortest, then the first in the order of names.

    Args:
        pattern: absolute, with a wildcard in some part.
    """
    parts = pattern.parts
    first = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    waiting = [_Place(0, 0, str(Path(*parts[:first])), first)]
    seen: set[tuple[object, int]] = set()
    found = []
    while waiting:
        place = heapq.heappop(waiting)
        at_end = place.next_part == len(parts)
        if at_end and not os.path.isfile(place.path):
            continue
        key = (_identity(place.path), place.next_part)
        if key in seen:
            continue
        seen.add(key)
        if at_end:
            found.append(Path(place.path))
            continue
        for next_place in _steps(place, parts[place.next_part], is_last=place.next_part == len(parts) - 1):
            heapq.heappush(waiting, next_place)
    return found


def _identity(path: str) -> object:
    """Return what two paths share exactly where they lead to the same file or folder."""
    status = os.stat(path)
    if status.st_nlink > 1 and not os.path.isdir(path):
        return status.st_dev, status.st_ino
    return os.path.realpath(path)


def _steps(place: _Place, part: str, *, is_last: bool) -> Iterator[_Place]:
    """Yield the places that one part of a pattern leads to."""
    if not glob.has_magic(part):
        path = os.path.join(place.path, part)
        if os.path.exists(path) if is_last else os.path.isdir(path):
            yield _Place(place.num_links + os.path.islink(path), place.depth + 1, path, place.next_part + 1)
        return
    recursive = part == "**"
    if recursive and not is_last:  # it stands for no folder, too
        yield place._replace(next_part=place.next_part + 1)
    fits = re.compile(fnmatch.translate("*" if recursive else part)).match
    for entry in _entries(place.path):
        if not fits(entry.name) or (entry.name.startswith(".") and not part.startswith(".")):
            continue
        following = _Place(place.num_links + entry.is_symlink(), place.depth + 1, entry.path, place.next_part)
        is_folder = _is_folder(entry)
        if recursive and is_folder:
            yield following
        if is_last or (is_folder and not recursive):
            yield following._replace(next_part=place.next_part + 1)


def _entries(folder: str) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:  # no folder, or one that may not be searched: like `glob`, it holds nothing
        return []


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False
