"""Text to a prepared folder: read, filter, split, encode on all cores, write; and go on after any end.

Everything is written to `NAME.partial` beside the folder and renamed at the end. Its subfolder `work` holds what is not
part of the result: the journal, which says how far the files are to be trusted, and the set of texts seen.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fanformer.data.preparation.encoding import document_encoder
from fanformer.data.preparation.journal import (
    Journal,
    delete_beginnings,
    delete_partial,
    lock_place,
    output_place,
    partial_place,
    refuse_existing,
)
from fanformer.data.preparation.outputs import Attribution, Outputs
from fanformer.data.preparation.selection import Position, SeenTexts, Selection, Split, choose_split
from fanformer.data.preparation.workers import BatchEncoder, check_workers, encode_in_order, peak_bytes
from fanformer.data.prepared import (
    ATTRIBUTION,
    FORMAT_VERSION,
    SPLITS,
    PreparedData,
    SplitName,
    TokenStream,
    fingerprint,
    of_ids,
    open_prepared,
)
from fanformer.data.sources.documents import PREPARED_METADATA, DocumentSource
from fanformer.data.tokenizer import end_token_id, load_tokenizer, start_token_id, train_tokenizer
from fanformer.errors import ConfigError, DataError, FANformerError
from fanformer.files.durable import error_number, hash_files, is_disk_full, read_json, replace_json, sync
from fanformer.files.locking import hold
from fanformer.machine.versions import versions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["SPLITS", "PreparedData", "SplitName", "Throughput", "TokenStream", "open_prepared", "prepare"]

SHARD_TOKENS = 1 << 24
TOKENIZER_SETTINGS = "tokenizer_config.json"
TOKENIZER_TRAINING_BYTES = 1 << 28
"""Most text that a tokenizer is trained on: the first of the training split."""


@dataclass(frozen=True)
class Throughput:
    """What a preparation did and took, its own part where it went on from an earlier one.

    Attributes:
        bytes: UTF-8 bytes that were encoded.
        tokens: tokens that they became.
        encoding_seconds: time for reading, encoding and writing them.
        tokenizer_seconds: time for training a tokenizer, 0 where none was trained.
        peak_bytes: most memory of all processes together, at most: the sum of their peaks.
        resumed_bytes: bytes that an earlier process had encoded.
    """

    bytes: int
    tokens: int
    encoding_seconds: float
    tokenizer_seconds: float
    peak_bytes: int
    resumed_bytes: int


def prepare(
    source: DocumentSource,
    output_dir: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
    held_out_fraction: float = 0.05,
    max_bytes: int | None = None,
    progress: Callable[[int, int | None], None] | None = None,
    filters: Sequence[str] = (),
    deduplicate: bool = False,
    licence: str | None = None,
    workers: int = 1,
    shard_tokens: int = SHARD_TOKENS,
    report: Callable[[Throughput], None] | None = None,
) -> PreparedData:
    """Split documents into training and held-out, encode them, and write a prepared folder.

    The folder is complete once it exists. Whatever ends the work after its first seconds, the same call goes on from
    there, and the result is the same to the byte.

    Args:
        source: the documents.
        output_dir: folder to create.
        tokenizer: encodes the text; None trains one on the training split.
        vocab_size: most tokens of a tokenizer that is trained here.
        held_out_fraction: share of the text that is held out, in [0, 0.5].
        max_bytes: read documents of the source only until they hold this many UTF-8 bytes; None reads all.
        progress: called with the UTF-8 bytes read so far, and their expected total where it is known.
        filters: names of `fanformer.data.preparation.selection.FILTERS`, in the order they are applied.
        deduplicate: whether to drop texts that were there before.
        licence: of documents that name none, for the attribution.
        workers: processes that encode large sources; the result does not depend on them. More than one needs a main
            module that can be imported without effects, as for every use of `multiprocessing`.
        shard_tokens: tokens of a shard.
        report: called at the end with what it took.

    Raises:
        ConfigError: if an argument is out of range or the tokenizer has no token to put between documents.
        DataError: if the source is empty or broken, `output_dir` exists, another process is preparing it, earlier work
            was begun with other arguments, or the disk is full.
    """
    check_workers(workers)
    if shard_tokens < 1:
        raise ConfigError(f"`shard_tokens` must be at least 1, got {shard_tokens}")
    output_dir = output_place(output_dir)
    selection = Selection(source, max_bytes, tuple(filters), deduplicate=deduplicate)
    partial = partial_place(output_dir)
    refuse_existing(output_dir)
    try:
        output_dir.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{partial} cannot be written: {error.strerror or error}") from error
    with hold(lock_place(output_dir), str(output_dir)):
        refuse_existing(output_dir)  # another process may have completed it meanwhile
        preparation = _Preparation(
            selection, partial, tokenizer, vocab_size, held_out_fraction, shard_tokens, licence, workers, progress
        )
        with preparation.kept_or_deleted():
            preparation.run()
            if output_dir.exists():
                output_dir.rmdir()
            os.replace(partial, output_dir)
        sync(output_dir.parent)
        shutil.rmtree(output_dir / "work", ignore_errors=True)  # another process may do the same
    if report is not None:
        report(preparation.throughput())
    return open_prepared(output_dir)


def saved_tokenizer_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the SHA-256 of the files that a tokenizer is saved as."""
    with _saved_aside(tokenizer) as files:
        return of_ids(hash_files(files))


def identity(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the SHA-256 of all that a tokenizer is saved as, its settings too, which name its special tokens.

    How it was found (on the hub, in the cache, in a folder) makes no difference.
    """
    with _saved_aside(tokenizer) as files:
        hashes = hash_files(files)
        for settings in (path for path in files if path.name == TOKENIZER_SETTINGS):
            content = read_json(settings)
            found = {key: value for key, value in content.items() if key not in ("is_local", "local_files_only")}
            hashes[settings.name] = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
    return hashes


@contextlib.contextmanager
def _saved_aside(tokenizer: PreTrainedTokenizerBase) -> Iterator[list[Path]]:
    """Give the files that a tokenizer is saved as, in a folder that goes with the block."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            files = [Path(path) for path in tokenizer.save_pretrained(folder)]
        except Exception as error:
            number = error_number(error)
            if number is None:
                raise
            raise DataError(
                f"{folder} cannot be written ({os.strerror(number)}): make room, or have TMPDIR name a folder with room"
            ) from error
        yield files


def _batch_encoder(tokenizer: PreTrainedTokenizerBase) -> BatchEncoder:
    """Return what encodes and lays out documents with this tokenizer, in the smallest integers that hold its ids.

    Raises:
        ConfigError: if the tokenizer has no token to put between documents.
    """
    dtype = "<u2" if len(tokenizer) <= 1 << 16 else "<u4"
    ids = start_token_id(tokenizer), end_token_id(tokenizer)
    return BatchEncoder(document_encoder(tokenizer), *ids, vocab_size=len(tokenizer), dtype=dtype)


def write_description(folder: Path, metadata: dict[str, Any], attribution: Attribution) -> None:
    """Write the attribution, then data.json with the fingerprint.

    Raises:
        DataError: if a split that was asked for is empty.
    """
    for name, entry in metadata["splits"].items():
        if not entry["documents"] and metadata["split"] != "none":
            raise DataError(f"none of the documents fell into the split {name}: use another `held_out_fraction`")
    replace_json(folder / ATTRIBUTION, attribution.rows())
    replace_json(folder / PREPARED_METADATA, metadata | {"fingerprint": fingerprint(metadata)})


@dataclass
class _Preparation:
    """One call of `prepare`, in its partial folder."""

    selection: Selection
    partial: Path
    tokenizer: PreTrainedTokenizerBase | None
    vocab_size: int
    held_out_fraction: float
    shard_tokens: int
    licence: str | None
    workers: int
    progress: Callable[[int, int | None], None] | None

    def __post_init__(self) -> None:
        self._work = self.partial / "work"
        found = versions()
        self._versions = {name: found[name] for name in ("python", "fanformer", "tokenizers", "transformers")}
        self._asked = {
            "source": self.selection.description,
            "max_bytes": self.selection.max_bytes,
            "filters": list(self.selection.filters),
            "deduplicate": self.selection.deduplicate,
            "held_out_fraction": self.held_out_fraction,
        }
        arguments = self._asked | {
            "shard_tokens": self.shard_tokens,
            "licence": self.licence,
            "tokenizer": identity(self.tokenizer) if self.tokenizer is not None else self.vocab_size,
            "versions": self._versions,
        }
        self._journal = Journal(self._work / "journal.json", arguments)
        self._outputs: Outputs | None = None
        self._seen: SeenTexts | None = None
        self._peaks: dict[int, int] = {}
        self._tokenizer_seconds = self._encoding_seconds = 0.0
        self._resumed = self._done = (0, 0)

    def run(self) -> None:
        """Write everything that the folder needs."""
        entry = self._journal.load()
        try:
            if entry is None and self.partial.exists():  # of a process that ended in its first seconds
                delete_beginnings(self.partial)
            self._work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{self.partial} cannot be written: {error.strerror or error}") from error
        split = Split(**entry["split"]) if entry else choose_split(self.selection, self.held_out_fraction)
        tokenizer, origin, saved = self._open_tokenizer(entry, split)
        encoder = _batch_encoder(tokenizer)
        outputs = self._write(
            entry, split, encoder, {"split": asdict(split), "tokenizer_files": saved, "origin": origin}
        )
        metadata = {
            "format_version": FORMAT_VERSION,
            **self._asked,
            "split": split.kind,
            "tokenizer": origin,
            "dtype": encoder.dtype,
            "vocab_size": encoder.vocab_size,
            "start_token_id": encoder.start_id,
            "end_token_id": encoder.end_id,
            "tokenizer_files": of_ids(saved),
            "asked_vocab_size": self.vocab_size if self.tokenizer is None else None,
            "dropped": self._position.dropped,
            "splits": outputs.finish(encoder.closing),
            "created_with": self._versions,
        }
        write_description(self.partial, metadata, outputs.attribution)

    def _open_tokenizer(
        self, entry: dict[str, Any] | None, split: Split
    ) -> tuple[PreTrainedTokenizerBase, str, dict[str, str]]:
        """Return the tokenizer, where it comes from, and the hashes of all its files, which are then in the folder."""
        if entry is not None:
            saved = entry["tokenizer_files"]
            if hash_files([self.partial / name for name in saved]) != saved:
                raise DataError(f"{self.partial} lacks the tokenizer it was begun with: delete it to start anew")
            return load_tokenizer(str(self.partial)), entry["origin"], saved
        tokenizer, origin = self.tokenizer, ""
        if tokenizer is None:
            started = time.monotonic()
            tokenizer = train_tokenizer(self._tokenizer_texts(split), self.vocab_size)
            self._tokenizer_seconds, origin = time.monotonic() - started, "trained on the training split"
        saved = hash_files([Path(path) for path in tokenizer.save_pretrained(self.partial)])
        return tokenizer, origin or tokenizer.name_or_path, saved

    def _tokenizer_texts(self, split: Split) -> Iterator[str]:
        seen_bytes = 0
        for held_out, document in split.assign(self.selection):
            if not held_out:
                yield document.text
                seen_bytes += len(document.text.encode())
                if seen_bytes >= TOKENIZER_TRAINING_BYTES:
                    return

    def _write(
        self, entry: dict[str, Any] | None, split: Split, encoder: BatchEncoder, fixed: dict[str, Any]
    ) -> Outputs:
        """Encode and write all documents that are left."""
        self._position = Position(**entry["position"]) if entry else Position()
        state = entry["outputs"] if entry else None
        attribution = Attribution(self.selection.source.spec, self.licence, state["attribution"] if state else ())
        dtype = np.dtype(encoder.dtype)
        outputs = Outputs(self.partial, self._work, dtype, self.shard_tokens, attribution, state)
        self._outputs = outputs
        self._resumed = self._done = (self._position.source_bytes, outputs.tokens)
        if self.selection.deduplicate:
            self._seen = SeenTexts(self._work / "seen.sqlite")
            self._seen.go_back(self._position.number, self._position.seen_checksum)
        if self._tokenizer_seconds and self._journal.is_due():  # nothing else that is done by now is worth keeping
            self._save(self._position, fixed)
        started = time.monotonic()
        batches = self.selection.batches(split, self._position, self._seen)
        # closed at once on an error, so that its processes end before files are deleted
        with contextlib.closing(encode_in_order(batches, encoder, self.workers)) as all_encoded:
            for batch, encoded in all_encoded:
                completed = outputs.add(batch.documents, encoded)
                self._peaks[encoded.process] = encoded.peak_bytes
                self._done = (batch.position.source_bytes, outputs.tokens)
                if self.progress:
                    self.progress(batch.position.source_bytes, self.selection.total_bytes)
                if completed or self._journal.is_due():
                    self._save(batch.position, fixed)
        self._encoding_seconds = time.monotonic() - started
        return outputs

    def _save(self, position: Position, fixed: dict[str, Any]) -> None:
        """Note that everything up to a position is done, once the disk holds it."""
        assert self._outputs is not None, "_write opens the outputs"
        self._outputs.sync()
        sync(self.partial)
        if self._seen is not None:
            self._seen.commit()
        self._journal.save(fixed | {"position": asdict(position), "outputs": self._outputs.state()})

    def throughput(self) -> Throughput:
        """Return what this process did."""
        self._peaks[os.getpid()] = peak_bytes()
        return Throughput(
            bytes=self._done[0] - self._resumed[0],
            tokens=self._done[1] - self._resumed[1],
            encoding_seconds=self._encoding_seconds,
            tokenizer_seconds=self._tokenizer_seconds,
            peak_bytes=sum(self._peaks.values()),
            resumed_bytes=self._resumed[0],
        )

    @contextlib.contextmanager
    def kept_or_deleted(self) -> Iterator[None]:
        """Close the files after the block; if it fails, keep the partial folder where there is work to go on from."""
        begun = self.partial.exists()
        try:
            yield
        except BaseException as error:
            self._close()
            kept = self._journal.path.is_file()
            written = sum(path.stat().st_size for path in self.partial.rglob("*") if path.is_file())
            if not kept and not (begun and self._outputs is None):
                with contextlib.suppress(OSError):
                    delete_partial(self.partial)
            if is_disk_full(error):
                raise self._disk_full(written, kept) from error
            number = None if isinstance(error, FANformerError) else error_number(error)
            if number is not None and getattr(error, "filename", None) is None:
                remedy = "the same command goes on from what is kept there" if kept else "choose another --output-dir"
                raise DataError(f"{self.partial} cannot be written ({os.strerror(number)}): {remedy}") from error
            if kept and isinstance(error, FANformerError) and self._outputs is not None:
                place = f"what was done is kept in {self.partial}, and the same command goes on from there"
                raise type(error)(f"{error} ({place})") from error
            raise
        self._close()

    def _close(self) -> None:
        with contextlib.suppress(OSError):
            if self._outputs is not None:
                self._outputs.close()
        if self._seen is not None:
            self._seen.close()

    def _disk_full(self, written: int, kept: bool) -> DataError:
        free = shutil.disk_usage(self.partial.parent).free
        total = self.selection.total_bytes
        of_total = f" of {total:,}" if total else ""
        remedy = (
            f"make room, and the same command goes on from what is kept in {self.partial}"
            if kept
            else "make room or choose another --output-dir"
        )
        return DataError(
            f"{self.partial.parent} is full: {written:,} bytes were written for {self._done[0]:,}{of_total} bytes of "
            f"text and {free:,} are free: {remedy}"
        )
