"""What a preparation has written so far: both streams, counts, attribution, and the text to compress."""

import lzma
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fanformer.data.preparation.workers import Encoded
from fanformer.data.prepared import SPLITS
from fanformer.data.sources.documents import Document
from fanformer.data.token_files import StreamWriter
from fanformer.errors import ConfigError
from fanformer.files.durable import read_pieces

MOST_SOURCES = 10_000
"""Most rows of the attribution: every one is in memory and in the journal."""
_ONE_SHARD = 1 << 62


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
        state = state or {"streams": {}, "counts": {}, "text_bytes": 0, "text_sha256": ""}
        self.attribution = attribution
        self._streams = {
            name: StreamWriter(folder, f"{name}-{{:05d}}.bin", dtype, shard_tokens, state["streams"].get(name))
            for name in SPLITS
        }
        empty = {"documents": 0, "bytes": 0, "replaced_bytes": 0}
        self.counts = {name: dict(state["counts"].get(name, empty)) for name in SPLITS}
        kept = state["text_bytes"] if state["text_bytes"] <= LARGEST_COMPRESSED else 0
        text = {"shards": [], "open_bytes": kept, "open_sha256": state["text_sha256"]}
        self._text_path = work / "heldout.txt"
        self._text = StreamWriter(work, self._text_path.name, np.dtype("u1"), _ONE_SHARD, text)

    @property
    def tokens(self) -> int:
        """Tokens written to both streams."""
        return sum(stream.tokens for stream in self._streams.values())

    def add(self, documents: list[tuple[bool, Document]], encoded: Encoded) -> bool:
        """Append the documents of a batch and return whether that completed a shard.

        Args:
            documents: each with whether it is held out.
            encoded: what they became.
        """
        completed = [self._streams[name].write(content) for name, content in zip(SPLITS, encoded.streams, strict=True)]
        for (held_out, document), size, length in zip(documents, encoded.num_bytes, encoded.num_tokens, strict=True):
            counts = self.counts[SPLITS[held_out]]
            counts["documents"] += 1
            counts["bytes"] += size
            counts["replaced_bytes"] += document.replaced_bytes
            self.attribution.add(document, size, length)
            if held_out and counts["bytes"] <= LARGEST_COMPRESSED:
                self._text.write(document.text.encode())
        return any(completed)

    def sync(self) -> None:
        """Have the disk hold everything that was written."""
        for stream in (*self._streams.values(), self._text):
            stream.sync()

    def state(self) -> dict[str, Any]:
        """Return what was written and counted, as JSON values."""
        return {
            "streams": {name: stream.state() for name, stream in self._streams.items()},
            "counts": self.counts,
            "text_bytes": self.counts["heldout"]["bytes"],
            "text_sha256": self._text.state()["open_sha256"],
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
        self._text.finish()
        if entries["heldout"]["bytes"] > LARGEST_COMPRESSED:
            self._text_path.unlink(missing_ok=True)
        entries["heldout"] |= compressed_sizes(self._text_path)
        return entries

    def close(self) -> None:
        """Close all files as they are."""
        for stream in (*self._streams.values(), self._text):
            stream.close()


LARGEST_COMPRESSED = 8 * 10**6
"""Bytes of text above which gzip and xz, a model's marks to beat, are not measured: xz -9 would take longer than
encoding everything else."""


def compressed_sizes(path: Path) -> dict[str, int | None]:
    """Return gzip_bytes and xz_bytes: a file's size under `gzip -9` and `xz -9`, None where it is empty or missing."""
    if not path.is_file() or not path.stat().st_size:
        return {"gzip_bytes": None, "xz_bytes": None}
    gzip, xz = zlib.compressobj(9, zlib.DEFLATED, wbits=31), lzma.LZMACompressor(preset=9)
    gzip_bytes = xz_bytes = 0
    for content in read_pieces(path):
        gzip_bytes += len(gzip.compress(content))
        xz_bytes += len(xz.compress(content))
    return {"gzip_bytes": gzip_bytes + len(gzip.flush()), "xz_bytes": xz_bytes + len(xz.flush())}
