"""Text to token files in a folder of their own, with a fingerprint; `open_prepared` maps them into memory.

A prepared folder holds `train.bin` and `heldout.bin` (little-endian token ids, nothing else), the tokenizer, and
`data.json`, written last. A stream is, document after document, [start] tokens [end]; where start and end are one
token it is not doubled: it stands in front of every document and once more at the end of the stream.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fanformer.data.documents import PREPARED_METADATA, Document, DocumentSource
from fanformer.data.splitting import Split, choose_split
from fanformer.data.token_files import TokenFileWriter
from fanformer.data.tokenizer import encode_documents, end_token_id, load_tokenizer, start_token_id, train_tokenizer
from fanformer.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSION = 1
SplitName = Literal["train", "heldout"]
SPLITS: tuple[SplitName, SplitName] = ("train", "heldout")
TOKENIZER_TRAINING_BYTES = 1 << 28
"""Most text that a tokenizer is trained on: the first of the training split."""
_BATCH_CHARACTERS = 1 << 22
_CHECKED_TOKENS = 1 << 26
_NOT_CONTENT = ("tokenizer_config.json", "chat_template.jinja")
"""Tokenizer files that do not change which ids a text becomes."""


@dataclass(frozen=True)
class TokenStream:
    """The tokens of one split, every document opened by `start_id` and ended by `end_id`."""

    tokens: np.ndarray
    """Token ids, uint16 or uint32; a np.memmap where they come from a prepared folder."""
    start_id: int
    end_id: int
    num_documents: int
    num_bytes: int
    """UTF-8 bytes of the documents' text."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Send a memory map to another process by its file's name, not by its content."""
        rest = (self.start_id, self.end_id, self.num_documents, self.num_bytes)
        if isinstance(self.tokens, np.memmap):
            return _map_stream, (str(self.tokens.filename), self.tokens.dtype.str, *rest)
        return TokenStream, (self.tokens, *rest)


def _map_stream(path: str, dtype: str, *rest: int) -> TokenStream:
    return TokenStream(np.memmap(path, dtype=dtype, mode="r"), *rest)


@dataclass(frozen=True)
class PreparedData:
    """A prepared folder: what `data.json` says, the tokenizer, and the tokens of both splits."""

    folder: Path
    metadata: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """The SHA-256 over both token files and the tokenizer: equal exactly where training sees equal data."""
        return self.metadata["fingerprint"]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer that the tokens were made with."""
        return load_tokenizer(str(self.folder))

    def split(self, name: SplitName) -> TokenStream:
        """Map the tokens of a split into memory.

        Raises:
            DataError: if there is no such split, or it is empty.
        """
        if name not in SPLITS:
            raise DataError(f"split must be one of {', '.join(SPLITS)}, got {name!r}")
        entry = self.metadata["splits"][name]
        if not entry["tokens"]:
            raise DataError(f"{self.folder} has no {name} tokens: prepare it with a `held_out_fraction` above 0")
        return _map_stream(
            str(self.folder / f"{name}.bin"),
            self.metadata["dtype"],
            self.metadata["start_token_id"],
            self.metadata["end_token_id"],
            entry["documents"],
            entry["bytes"],
        )


def prepare(
    source: DocumentSource,
    output_dir: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
    held_out_fraction: float = 0.05,
    max_bytes: int | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> PreparedData:
    """Split documents into training and held-out, encode them, and write a prepared folder.

    Everything is written beside `output_dir` and renamed at the end, so that the folder is complete once it exists.

    Args:
        source: the documents.
        output_dir: folder to create.
        tokenizer: encodes the text; None trains one on the training split.
        vocab_size: most tokens of a tokenizer that is trained here.
        held_out_fraction: share of the text that is held out, in [0, 0.5].
        max_bytes: read documents of the source only until they hold this many UTF-8 bytes; None reads all.
        progress: called with the UTF-8 bytes encoded so far, and their expected total where it is known.

    Raises:
        ConfigError: if an argument is out of range or the tokenizer has no token to put between documents.
        DataError: if the source is empty or broken, `output_dir` exists, or the disk is full.
    """
    output_dir = Path(output_dir).expanduser().absolute()
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise DataError(f"{output_dir} exists already: choose another --output-dir, or delete it first")
    documents = _Documents(source, max_bytes)
    split = choose_split(documents, held_out_fraction)
    origin = "trained on the training split" if tokenizer is None else tokenizer.name_or_path
    if tokenizer is None:
        tokenizer = train_tokenizer(_tokenizer_texts(documents, split), vocab_size)
    with _folder_at_once(output_dir, documents) as partial:
        metadata = {
            "format_version": FORMAT_VERSION,
            "source": source.describe(),
            "max_bytes": max_bytes,
            "split": split.kind,
            "held_out_fraction": held_out_fraction,
            "tokenizer": origin,
            **_write_tokens(partial, documents, split, tokenizer, progress),
        }
        _write_metadata(partial, metadata, tokenizer)
    return open_prepared(output_dir)


class _Documents:
    """The documents of a source until they hold `max_bytes`, and how many bytes that is once they were read."""

    def __init__(self, source: DocumentSource, max_bytes: int | None) -> None:
        if max_bytes is not None and max_bytes < 1:
            raise ConfigError(f"`max_bytes` must be at least 1, got {max_bytes}")
        self.spec, self._source, self._max_bytes = source.spec, source, max_bytes
        expected = [size for size in (source.total_bytes, max_bytes) if size is not None]
        self.total_bytes = min(expected, default=None)

    def __iter__(self) -> Iterator[Document]:
        seen_bytes = 0
        for document in self._source:
            yield document
            seen_bytes += len(document.text.encode())
            if self._max_bytes is not None and seen_bytes >= self._max_bytes:
                break
        self.total_bytes = seen_bytes


def _tokenizer_texts(documents: _Documents, split: Split) -> Iterator[str]:
    seen_bytes = 0
    for held_out, document in split.assign(documents):
        if not held_out:
            yield document.text
            seen_bytes += len(document.text.encode())
            if seen_bytes >= TOKENIZER_TRAINING_BYTES:
                return


@contextmanager
def _folder_at_once(output_dir: Path, documents: _Documents) -> Iterator[Path]:
    """Give a folder beside `output_dir` that takes its name if the block succeeds and is deleted if it does not."""
    partial = output_dir.with_name(output_dir.name + ".partial")
    try:
        if partial.exists():  # of a run that was killed
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    except OSError as error:
        raise DataError(f"{partial} cannot be written: {error.strerror or error}") from error
    try:
        yield partial
        if output_dir.exists():
            output_dir.rmdir()
        os.replace(partial, output_dir)
    except Exception as error:
        if _is_disk_full(error):
            raise _disk_full_error(partial, documents) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_tokens(
    folder: Path,
    documents: _Documents,
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    progress: Callable[[int, int | None], None] | None,
) -> dict[str, Any]:
    """Write both token files and return their part of data.json."""
    start_id, end_id = start_token_id(tokenizer), end_token_id(tokenizer)
    dtype = np.dtype("<u2" if len(tokenizer) <= 1 << 16 else "<u4")
    encoded_bytes = 0
    with (
        TokenFileWriter(folder / "train.bin", dtype, start_id, end_id, compress=False) as train,
        TokenFileWriter(folder / "heldout.bin", dtype, start_id, end_id, compress=True) as held_out,
    ):
        for batch in _batches(split.assign(documents)):
            ids = encode_documents(tokenizer, [document.text for _, document in batch])
            for (is_held_out, document), document_ids in zip(batch, ids, strict=True):
                encoded_bytes += (held_out if is_held_out else train).add(document, document_ids)
            if progress:
                progress(encoded_bytes, documents.total_bytes)
        entries = {"train": train.finish(), "heldout": held_out.finish()}
    for name, entry in entries.items():
        if not entry["documents"] and split.kind != "none":
            raise DataError(
                f"data `{documents.spec}`: none of its documents fell into the split {name}: "
                "use another `held_out_fraction`"
            )
    return {
        "dtype": dtype.str,
        "vocab_size": len(tokenizer),
        "start_token_id": start_id,
        "end_token_id": end_id,
        "splits": entries,
    }


def _batches(assigned: Iterator[tuple[bool, Document]]) -> Iterator[list[tuple[bool, Document]]]:
    batch: list[tuple[bool, Document]] = []
    characters = 0
    for pair in assigned:
        batch.append(pair)
        characters += len(pair[1].text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _write_metadata(folder: Path, metadata: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Save the tokenizer, add the fingerprint, and write data.json last."""
    digest = hashlib.sha256(f"{FORMAT_VERSION} {metadata['dtype']}".encode())
    for name in SPLITS:
        digest.update(bytes.fromhex(metadata["splits"][name]["sha256"]))
    for path in sorted(Path(saved) for saved in tokenizer.save_pretrained(folder)):
        if path.is_file() and path.name not in _NOT_CONTENT:
            digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    metadata["fingerprint"] = digest.hexdigest()
    metadata["created_with"] = {"python": platform.python_version()} | {
        package: importlib.metadata.version(package) for package in ("fanformer", "tokenizers", "transformers")
    }
    unfinished = folder / (PREPARED_METADATA + ".partial")
    unfinished.write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, folder / PREPARED_METADATA)


def _is_disk_full(error: Exception) -> bool:
    # the tokenizer is saved by Rust code, which raises plain Exception with the number in its text
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "(os error 28)" in str(error)


def _disk_full_error(partial: Path, documents: _Documents) -> DataError:
    written = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    free = shutil.disk_usage(partial).free
    text = f" for {documents.total_bytes:,} bytes of text" if documents.total_bytes else ""
    return DataError(
        f"{partial.parent} is full: {written:,} bytes were written{text} and {free:,} are free: "
        "make room or choose another --output-dir"
    )


def open_prepared(folder: Path) -> PreparedData:
    """Open a folder that `prepare` wrote.

    Raises:
        DataError: if it is missing, incomplete, of another format version, or does not fit its own description.
    """
    folder = Path(folder).expanduser().absolute()
    metadata = _read_metadata(folder)
    data = PreparedData(folder, metadata)
    for name in SPLITS:
        expected = metadata["splits"][name]["tokens"] * np.dtype(metadata["dtype"]).itemsize
        path = folder / f"{name}.bin"
        if not path.is_file() or path.stat().st_size != expected:
            got = f"{path.stat().st_size} bytes" if path.is_file() else "no file"
            raise DataError(f"{path} must have {expected} bytes, got {got}: prepare the data again")
        largest = int(data.split(name).tokens[:_CHECKED_TOKENS].max()) if expected else 0
        if largest >= metadata["vocab_size"]:
            raise DataError(
                f"{path} holds the token {largest}, and its tokenizer has {metadata['vocab_size']}: "
                "prepare the data again"
            )
    return data


def _read_metadata(folder: Path) -> dict[str, Any]:
    path = folder / PREPARED_METADATA
    if not path.is_file():
        raise DataError(f"{path} does not exist: create the folder with `fanformer data prepare SPEC --output-dir DIR`")
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
        version = metadata["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} was not written by `fanformer data prepare`: name another folder") from error
    if version != FORMAT_VERSION:
        raise DataError(f"{path} must have format version {FORMAT_VERSION}, got {version}: prepare the data again")
    return metadata
