"""The prepared folder: token files with their tokenizer, description and fingerprint, mapped into memory.

It holds `train-00000.bin`, `heldout-00000.bin` and so on (little-endian token ids, nothing else), the tokenizer,
`ATTRIBUTION.json`, and `data.json`, written last.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fanformer.data.sources.decompression import unreadable
from fanformer.data.sources.documents import PREPARED_METADATA
from fanformer.data.token_files import ShardedTokens
from fanformer.data.tokenizer import load_tokenizer
from fanformer.errors import DataError
from fanformer.files.durable import hash_file, read_json, read_pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSION = 2
SplitName = Literal["train", "heldout"]
SPLITS: tuple[SplitName, SplitName] = ("train", "heldout")
ATTRIBUTION = "ATTRIBUTION.json"
VERIFIED_BYTES = 1 << 30
"""Folders with fewer bytes of tokens are read and compared with their hashes whenever they are opened."""
_CHECKED_TOKENS = 1 << 26
_NOT_CONTENT = ("tokenizer_config.json", "chat_template.jinja")
"""Tokenizer files that do not change which ids a text becomes."""


@dataclass(frozen=True)
class TokenStream:
    """The tokens of one split, every document opened by `start_id` and ended by `end_id`."""

    tokens: np.ndarray | ShardedTokens
    """Token ids, uint16 or uint32, with a length and slices; mapped where they come from a prepared folder."""
    start_id: int
    end_id: int
    num_documents: int
    num_bytes: int
    """UTF-8 bytes of the documents' text."""


@dataclass(frozen=True)
class PreparedData:
    """A prepared folder: what `data.json` says, the tokenizer, and the tokens of both splits."""

    folder: Path
    metadata: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """The SHA-256 over both streams and the tokenizer: equal exactly where training sees equal data."""
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
        shards = entry["shards"]
        tokens = ShardedTokens(
            [str(self.folder / shard["name"]) for shard in shards],
            [shard["tokens"] for shard in shards],
            self.metadata["dtype"],
        )
        start_id, end_id = self.metadata["start_token_id"], self.metadata["end_token_id"]
        return TokenStream(tokens, start_id, end_id, entry["documents"], entry["bytes"])


def of_ids(tokenizer_files: dict[str, str]) -> dict[str, str]:
    """Return the hashes of those of a tokenizer's files that have a say in which ids a text becomes."""
    return {name: digest for name, digest in tokenizer_files.items() if name not in _NOT_CONTENT}


def fingerprint(metadata: dict[str, Any]) -> str:
    """Return the SHA-256 over the streams' and the tokenizer's, whatever the number and size of the shards."""
    digest = hashlib.sha256(f"{metadata['format_version']} {metadata['dtype']}".encode())
    for name in SPLITS:
        digest.update(bytes.fromhex(metadata["splits"][name]["sha256"]))
    for name, file_hash in sorted(metadata["tokenizer_files"].items()):
        digest.update(name.encode() + bytes.fromhex(file_hash))
    return digest.hexdigest()


def open_prepared(folder: Path, *, verify: bool | None = None) -> PreparedData:
    """Open a folder that `prepare` wrote.

    Args:
        folder: the folder.
        verify: whether to read every shard and compare it with its hash; None does where all together have fewer
            than VERIFIED_BYTES.

    Raises:
        DataError: if it is missing, incomplete, of another format version, or does not fit its own description.
    """
    folder = Path(folder).expanduser().absolute()
    metadata = _read_metadata(folder)
    data = PreparedData(folder, metadata)
    _check_counts(folder / PREPARED_METADATA, metadata)
    shards = [shard for name in SPLITS for shard in metadata["splits"][name]["shards"]]
    for shard in shards:
        _check_size(folder / shard["name"], shard["bytes"])
    for name in SPLITS:
        _check_vocabulary(data, name)
    if verify or (verify is None and sum(shard["bytes"] for shard in shards) < VERIFIED_BYTES):
        _check_content(data)
    return data


def _check_kinds(metadata: dict[str, Any]) -> None:
    """Raise KeyError, TypeError or AttributeError where a value that is used is missing or of another kind."""
    splits = [metadata["splits"][name] for name in SPLITS]
    shards = [shard for entry in splits for shard in entry["shards"]]
    files = metadata["tokenizer_files"]
    counts = [metadata[name] for name in ("vocab_size", "start_token_id", "end_token_id")]
    counts += [entry[name] for entry in splits for name in ("tokens", "documents", "bytes")]
    counts += [shard[name] for shard in shards for name in ("tokens", "bytes")]
    hashes = [entry["sha256"] for entry in (*splits, *shards)] + [metadata["fingerprint"], *files.values()]
    names = [*(shard["name"] for shard in shards), *files]
    if not (
        all(type(count) is int and count >= 0 for count in counts)
        and all(re.fullmatch("[0-9a-f]{64}", text) for text in hashes)
        and all(os.path.basename(name) == name for name in names)
        and metadata["dtype"] in ("<u2", "<u4")
        and isinstance(metadata["dropped"], dict)
        and isinstance(metadata["source"], dict)
    ):
        raise TypeError("a value is out of range")


def _check_counts(path: Path, metadata: dict[str, Any]) -> None:
    """Raise DataError where a split is said to hold more or less than its shards."""
    for name in SPLITS:
        entry = metadata["splits"][name]
        tokens = sum(shard["tokens"] for shard in entry["shards"])
        size = sum(shard["bytes"] for shard in entry["shards"]) // np.dtype(metadata["dtype"]).itemsize
        if not tokens == size == entry["tokens"] >= entry["documents"]:
            raise DataError(
                f"{path} says that {name} has {entry['documents']:,} documents of {entry['tokens']:,} tokens, and that "
                f"its shards hold {tokens:,} in {size:,} places: prepare the data again"
            )


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file() or path.stat().st_size != expected:
        got = f"{path.stat().st_size} bytes" if path.is_file() else "no file"
        raise DataError(f"{path} must have {expected} bytes, got {got}: prepare the data again")


def _check_vocabulary(data: PreparedData, name: SplitName) -> None:
    size, dtype = data.metadata["vocab_size"], np.dtype(data.metadata["dtype"])
    if size - 1 > np.iinfo(dtype).max:
        raise DataError(
            f"{data.folder / PREPARED_METADATA} says {size} tokens in {dtype.itemsize} bytes each, which hold "
            f"{np.iinfo(dtype).max + 1}: prepare the data again"
        )
    if not data.metadata["splits"][name]["tokens"]:
        return
    largest = int(data.split(name).tokens[:_CHECKED_TOKENS].max())
    if largest >= size:
        raise DataError(
            f"{data.folder}: {name} holds the token {largest}, and its tokenizer has {size}: prepare the data again"
        )


def _check_content(data: PreparedData) -> None:
    metadata, digests = data.metadata, {}
    for name in SPLITS:
        digest = hashlib.sha256()
        for shard in metadata["splits"][name]["shards"]:
            own_digest = hashlib.sha256()
            for content in read_pieces(data.folder / shard["name"]):
                digest.update(content)
                own_digest.update(content)
            if own_digest.hexdigest() != shard["sha256"]:
                raise DataError(
                    f"{data.folder / shard['name']} is not the file that {PREPARED_METADATA} describes: its SHA-256 "
                    "differs: copy the folder again, or prepare the data again"
                )
        digests[name] = digest.hexdigest()
    for name, expected in metadata["tokenizer_files"].items():
        path = data.folder / name
        if not path.is_file() or hash_file(path) != expected:
            raise DataError(f"{path} is not the tokenizer that the tokens were made with: prepare the data again")
    streams = {name: metadata["splits"][name]["sha256"] for name in SPLITS}
    if digests != streams or fingerprint(metadata) != metadata["fingerprint"]:
        raise DataError(
            f"{data.folder / PREPARED_METADATA} has a fingerprint that its shards do not: prepare the data again"
        )


def _read_metadata(folder: Path) -> dict[str, Any]:
    path = folder / PREPARED_METADATA
    if not path.is_file():
        raise DataError(f"{path} does not exist: create the folder with `fanformer data prepare SPEC --output-dir DIR`")
    try:
        metadata = read_json(path)
        version = metadata["format_version"]
        if version == FORMAT_VERSION:
            _check_kinds(metadata)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} was not written by `fanformer data prepare`: name another folder") from error
    except OSError as error:
        raise unreadable(path, error) from error
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path} must have format version {FORMAT_VERSION}, got {version!r:.40}: prepare the data again"
        )
    return metadata
