"""What a preparation has written so far: both streams, counts, attribution, and the text to compress."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fanformer.data.preparation import compression
from fanformer.data.prepared import SPLITS
from fanformer.data.sources.documents import Document
from fanformer.data.token_files import StreamWriter
from fanformer.errors import ConfigError, DataError

MOST_SOURCES = 10_000
"""Most rows of the attribution: every one is in memory and in the journal."""


class Attribution:
    """Documents, bytes and tokens by source and licence."""

    def __init__(self, source: str, licence: str | None, rows: Sequence[dict[str, Any]] = ()) -> None:
        """Begin, or go on from rows that `rows` returned.

        Args:
            source: of documents that name none.
            licence: of documents that name none.
            rows: what was counted before.
        """
        self._source, self._licence = source, licence
        self._rows = {(row["source"], row["licence"]): dict(row) for row in rows}

    def add(self, document: Document, num_bytes: int, num_tokens: int) -> None:
        """Count a document.

        Raises:
            ConfigError: if there are more than MOST_SOURCES sources.
        """
        key = (document.source or self._source, document.licence or self._licence)
        row = self._rows.get(key)
        if row is None:
            if len(self._rows) == MOST_SOURCES:
                raise ConfigError(
                    f"the field that names sources has more than {MOST_SOURCES} values, such as {key[0]!r}: "
                    "name one that groups documents with `--source-field`"
                )
            row = self._rows[key] = {"source": key[0], "licence": key[1], "documents": 0, "bytes": 0, "tokens": 0}
        row["documents"] += 1
        row["bytes"] += num_bytes
        row["tokens"] += num_tokens

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for every source and licence, most bytes first."""
        return sorted(self._rows.values(), key=lambda row: (-row["bytes"], row["source"], row["licence"] or ""))


class Outputs:
    """The streams of both splits with what is counted beside them; `state` and a restart go together."""

    def __init__(
        self,
        folder: Path,
        work: Path,
        dtype: np.dtype,
        shard_tokens: int,
        attribution: Attribution,
        state: dict[str, Any] | None = None,
    ) -> None:
        """Begin, or go on.

        Args:
            folder: where the shards go.
            work: where files go that are not part of the result.
            dtype: little-endian unsigned integers that hold every id.
            shard_tokens: tokens of a shard.
            attribution: what was counted so far.
            state: what `state` returned, to go on from there.

        Raises:
            DataError: if the files do not hold what `state` says.
        """
        state = state or {"streams": {}, "counts": {}, "text_bytes": 0}
        self.attribution = attribution
        self._streams = {
            name: StreamWriter(folder, name, dtype, shard_tokens, state["streams"].get(name)) for name in SPLITS
        }
        empty = {"documents": 0, "bytes": 0, "replaced_bytes": 0}
        self.counts = {name: dict(state["counts"].get(name, empty)) for name in SPLITS}
        self._text_path = work / "heldout.txt"
        self._text_bytes = state["text_bytes"]
        self._text_digest = hashlib.sha256()
        if 0 < self._text_bytes <= compression.LARGEST_COMPRESSED:
            self._restore_text(state["text_sha256"])
        self._text = self._text_path.open("ab", buffering=0)
        self._text.truncate(min(self._text_bytes, compression.LARGEST_COMPRESSED))

    def _restore_text(self, expected: str) -> None:
        """Read again the held-out text that was kept, which the first `_text_bytes` of its file hold."""
        if self._text_path.is_file():
            with self._text_path.open("rb") as file:
                self._text_digest.update(file.read(self._text_bytes))
        if self._text_digest.hexdigest() != expected:
            raise DataError(
                f"{self._text_path} is not as it was left: delete {self._text_path.parent.parent} and prepare the data "
                "again"
            )

    @property
    def tokens(self) -> int:
        """Tokens written to both streams."""
        return sum(stream.tokens for stream in self._streams.values())

    def add(
        self,
        documents: list[tuple[bool, Document]],
        streams: tuple[bytes, bytes],
        num_bytes: list[int],
        num_tokens: list[int],
    ) -> bool:
        """Append the documents of a batch and return whether that completed a shard.

        Args:
            documents: each with whether it is held out.
            streams: the tokens of both splits, laid out.
            num_bytes: of each document's text.
            num_tokens: of each document.
        """
        completed = [self._streams[name].write(content) for name, content in zip(SPLITS, streams, strict=True)]
        for (held_out, document), size, length in zip(documents, num_bytes, num_tokens, strict=True):
            counts = self.counts[SPLITS[held_out]]
            counts["documents"] += 1
            counts["bytes"] += size
            counts["replaced_bytes"] += document.replaced_bytes
            self.attribution.add(document, size, length)
            if held_out:
                self._keep_text(document.text.encode())
        return any(completed)

    def _keep_text(self, content: bytes) -> None:
        self._text_bytes += len(content)
        if self._text_bytes <= compression.LARGEST_COMPRESSED:
            self._text_digest.update(content)
            view = memoryview(content)
            while view:
                view = view[self._text.write(view) :]

    def sync(self) -> None:
        """Have the disk hold everything that was written."""
        for stream in self._streams.values():
            stream.sync()
        os.fsync(self._text.fileno())

    def state(self) -> dict[str, Any]:
        """Return what was written and counted, as JSON values."""
        return {
            "streams": {name: stream.state() for name, stream in self._streams.items()},
            "counts": self.counts,
            "text_bytes": self._text_bytes,
            "text_sha256": self._text_digest.hexdigest(),
            "attribution": self.attribution.rows(),
        }

    def finish(self, closing: bytes) -> dict[str, dict[str, Any]]:
        """Close the streams and return the entry of each in data.json.

        Args:
            closing: what ends a stream that holds documents.
        """
        entries: dict[str, dict[str, Any]] = {}
        for name, stream in self._streams.items():
            if self.counts[name]["documents"]:
                stream.write(closing)
            entries[name] = self.counts[name] | stream.finish()
        self._text.close()
        if self._text_bytes > compression.LARGEST_COMPRESSED:
            self._text_path.unlink()
        entries["heldout"] |= compression.compressed_sizes(self._text_path)
        return entries

    def close(self) -> None:
        """Close all files as they are."""
        self._text.close()
        for stream in self._streams.values():
            stream.close()
