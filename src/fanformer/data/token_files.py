"""Write the token file of one split, counting, hashing and measuring as it goes."""

import hashlib
import lzma
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from fanformer.data.documents import Document
from fanformer.errors import ConfigError

LARGEST_COMPRESSED = 64 * 10**6
"""Bytes of text above which gzip and xz are not measured; xz -9 takes about a minute for this much."""


class CompressedSizes:
    """Size of a text under `gzip -9` and `xz -9`, without keeping the text."""

    def __init__(self) -> None:
        self._gzip = zlib.compressobj(9, zlib.DEFLATED, wbits=31)
        self._xz = lzma.LZMACompressor(preset=9)
        self._given = self._gzip_bytes = self._xz_bytes = 0

    def add(self, content: bytes) -> None:
        """Append to the text."""
        self._given += len(content)
        if self._given <= LARGEST_COMPRESSED:
            self._gzip_bytes += len(self._gzip.compress(content))
            self._xz_bytes += len(self._xz.compress(content))

    def finish(self) -> dict[str, int | None]:
        """Return gzip_bytes and xz_bytes, each None where there is no text or more than LARGEST_COMPRESSED."""
        if not 0 < self._given <= LARGEST_COMPRESSED:
            return {"gzip_bytes": None, "xz_bytes": None}
        return {
            "gzip_bytes": self._gzip_bytes + len(self._gzip.flush()),
            "xz_bytes": self._xz_bytes + len(self._xz.flush()),
        }


class TokenFileWriter:
    """One token file: every document opened by the start token, ended by the end token where that is another."""

    def __init__(self, path: Path, dtype: np.dtype, start_id: int, end_id: int, compress: bool) -> None:
        """Open the file.

        Args:
            path: file to create.
            dtype: little-endian unsigned integers that hold every id.
            start_id: token in front of every document.
            end_id: token after every document; where it is `start_id`, only the last document gets it.
            compress: whether to measure the text under gzip and xz.
        """
        self._file = path.open("wb")
        self._dtype, self._start_id, self._end_id = dtype, start_id, end_id
        self._digest = hashlib.sha256()
        self._compressed = CompressedSizes() if compress else None
        self._documents = self._tokens = self._bytes = self._replaced_bytes = 0

    def __enter__(self) -> "TokenFileWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def add(self, document: Document, ids: list[int]) -> int:
        """Append a document and return the UTF-8 bytes of its text.

        Raises:
            ConfigError: if its tokens hold the start or end token, which only separate documents.
        """
        tokens = np.empty(len(ids) + 2, dtype=self._dtype)
        tokens[0], tokens[1:-1], tokens[-1] = self._start_id, ids, self._end_id
        if np.isin(tokens[1:-1], (self._start_id, self._end_id)).any():
            raise ConfigError(
                f"the tokenizer turns text of {document.name} into its start or end token (id {self._start_id} or "
                f"{self._end_id}), which must only separate documents: use another --tokenizer"
            )
        self._write(tokens[:-1] if self._start_id == self._end_id else tokens)
        content = document.text.encode()
        if self._compressed:
            self._compressed.add(content)
        self._documents += 1
        self._bytes += len(content)
        self._replaced_bytes += document.replaced_bytes
        return len(content)

    def _write(self, tokens: np.ndarray) -> None:
        content = tokens.tobytes()
        self._file.write(content)
        self._digest.update(content)
        self._tokens += len(tokens)

    def finish(self) -> dict[str, Any]:
        """Close the stream and the file, and return what was counted."""
        if self._documents and self._start_id == self._end_id:
            self._write(np.array([self._end_id], dtype=self._dtype))
        self._file.close()
        return {
            "documents": self._documents,
            "tokens": self._tokens,
            "bytes": self._bytes,
            "replaced_bytes": self._replaced_bytes,
            "sha256": self._digest.hexdigest(),
            **(self._compressed.finish() if self._compressed else {}),
        }
