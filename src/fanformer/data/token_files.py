"""Token files: the layout of a stream, the shards it is cut into, and reading across their borders.

A stream is, document after document, [start] tokens [end]; where start and end are one token it is not doubled: it
stands in front of every document and once more at the end of the stream. Shards are the stream cut every so many
tokens, wherever that falls: joined, they are the stream.
"""

import bisect
import hashlib
import itertools
import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fanformer.errors import DataError

_OPEN_SHARDS = 64
"""Most shards that one process keeps mapped; each map holds a file handle."""
_READ_BYTES = 1 << 24


def lay_out(documents: Sequence[np.ndarray], start_id: int, end_id: int, dtype: np.dtype, *, close: bool) -> np.ndarray:
    """Return the stream of some documents.

    Args:
        documents: the token ids of each.
        start_id: token in front of every document.
        end_id: token after every document; where it is `start_id`, only the last document of a stream gets it.
        dtype: unsigned integers that hold every id.
        close: whether the stream ends here.
    """
    start, end = np.array([start_id], dtype=dtype), np.array([end_id], dtype=dtype)
    pieces: list[np.ndarray] = []
    for ids in documents:
        pieces += (start, ids) if start_id == end_id else (start, ids, end)
    if close and documents and start_id == end_id:
        pieces.append(end)
    return np.concatenate(pieces, dtype=dtype, casting="unsafe") if pieces else np.empty(0, dtype=dtype)


class ShardedTokens:
    """The tokens of several files as one sequence: it has a length and slices, and reads what it is asked for."""

    def __init__(self, paths: Sequence[str], lengths: Sequence[int], dtype: str) -> None:
        """Note the files; none is opened yet.

        Args:
            paths: the shards, in order.
            lengths: tokens of each.
            dtype: of the token ids, such as "<u2".
        """
        self._paths, self._lengths = list(paths), list(lengths)
        self.dtype = np.dtype(dtype)
        self._ends = list(itertools.accumulate(lengths))
        self._maps: OrderedDict[int, np.memmap] = OrderedDict()

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        """Travel to another process as file names."""
        return ShardedTokens, (self._paths, self._lengths, self.dtype.str)

    def __len__(self) -> int:
        """Return the number of tokens."""
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, where: slice) -> np.ndarray:
        """Return a slice of step 1: a view of the file where it lies in one shard, else a copy."""
        start, stop, step = where.indices(len(self))
        if step != 1:
            raise IndexError(f"a token stream is sliced with step 1, got {step}")
        pieces = []
        shard = bisect.bisect_right(self._ends, start)
        while start < stop:
            first = self._ends[shard] - self._lengths[shard]
            end = min(stop, self._ends[shard])
            pieces.append(self._map(shard)[start - first : end - first])
            start, shard = end, shard + 1
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=self.dtype)

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        """Return all tokens in memory."""
        return np.array(self[:], dtype=dtype)

    def _map(self, shard: int) -> np.memmap:
        if shard in self._maps:
            self._maps.move_to_end(shard)
        else:
            self._maps[shard] = np.memmap(self._paths[shard], dtype=self.dtype, mode="r")
            if len(self._maps) > _OPEN_SHARDS:
                self._maps.popitem(last=False)
        return self._maps[shard]


class StreamWriter:
    """Writes a stream of one split as shards, and goes on where an earlier writer left off."""

    def __init__(
        self, folder: Path, names: str, dtype: np.dtype, shard_tokens: int, state: dict[str, Any] | None = None
    ) -> None:
        """Open the stream.

        Args:
            folder: where the shards are.
            names: of the shards, as a format of their number.
            dtype: little-endian unsigned integers.
            shard_tokens: tokens of every shard but the last.
            state: what `state` returned, to go on from there; later writing is undone.

        Raises:
            DataError: if the files do not hold what `state` says.
        """
        self._folder, self._names, self._dtype = folder, names, dtype
        self._shard_bytes = shard_tokens * dtype.itemsize
        self._shards: list[dict[str, Any]] = []
        self._open_bytes, self.tokens = 0, 0
        self._digest, self._shard_digest = hashlib.sha256(), hashlib.sha256()
        self._file: Any = None
        if state is not None:
            self._restore(state)

    def state(self) -> dict[str, Any]:
        """Return what has been written, as JSON values; `sync` makes it last."""
        return {
            "shards": list(self._shards),
            "open_bytes": self._open_bytes,
            "open_sha256": self._shard_digest.hexdigest(),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        for entry in state["shards"]:
            self._read_again(self._folder / entry["name"], entry["bytes"], entry["sha256"])
            self._shard_digest = hashlib.sha256()
        self._shards = list(state["shards"])
        self._open_bytes = state["open_bytes"]
        kept = {entry["name"] for entry in self._shards}
        if self._open_bytes:
            path = self._path()
            self._read_again(path, self._open_bytes, state["open_sha256"])
            os.truncate(path, self._open_bytes)
            self._file = path.open("ab", buffering=0)
            kept.add(path.name)
        for path in self._folder.glob(re.sub("{.*}", "*", self._names)):
            if path.name not in kept:
                path.unlink()
        size = sum(entry["bytes"] for entry in self._shards) + self._open_bytes
        self.tokens = size // self._dtype.itemsize

    def _read_again(self, path: Path, size: int, expected: str) -> None:
        """Take the first bytes of a file into both hashes, or raise DataError where they are not those expected."""
        if path.is_file():
            with path.open("rb") as file:
                while size and (content := file.read(min(size, _READ_BYTES))):
                    self._digest.update(content)
                    self._shard_digest.update(content)
                    size -= len(content)
        if size or self._shard_digest.hexdigest() != expected:
            raise changed(path)

    def _path(self) -> Path:
        return self._folder / self._names.format(len(self._shards))

    def write(self, content: bytes) -> bool:
        """Append whole tokens and return whether that completed a shard."""
        view, completed = memoryview(content), False
        while view:
            if self._file is None:
                self._file = self._path().open("wb", buffering=0)
            piece = view[: self._shard_bytes - self._open_bytes]
            written = 0
            while written < len(piece):
                written += self._file.write(piece[written:])
            self._digest.update(piece)
            self._shard_digest.update(piece)
            self._open_bytes += len(piece)
            self.tokens += len(piece) // self._dtype.itemsize
            view = view[len(piece) :]
            if self._open_bytes == self._shard_bytes:
                self._close_shard()
                completed = True
        return completed

    def sync(self) -> None:
        """Have the disk hold everything that was written."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def _close_shard(self) -> None:
        self.sync()
        self._file.close()
        size = self._open_bytes
        self._shards.append(
            {
                "name": self._path().name,
                "tokens": size // self._dtype.itemsize,
                "bytes": size,
                "sha256": self._shard_digest.hexdigest(),
            }
        )
        self._file, self._open_bytes, self._shard_digest = None, 0, hashlib.sha256()

    def finish(self) -> dict[str, Any]:
        """Close the last shard and return the stream's tokens, hash and shards."""
        if self._file is not None:
            self._close_shard()
        return {"tokens": self.tokens, "sha256": self._digest.hexdigest(), "shards": self._shards}

    def close(self) -> None:
        """Close the file that is open, complete or not."""
        if self._file is not None:
            self._file.close()


def changed(path: Path) -> DataError:
    """Return the error for a file, in a partial folder or its subfolder `work`, that is not as it was left."""
    partial = path.parent.parent if path.parent.name == "work" else path.parent
    return DataError(f"{path} is not as it was left: delete {partial} and prepare the data again")
