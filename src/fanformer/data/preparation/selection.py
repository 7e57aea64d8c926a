"""Which documents of a source are used, in order: up to a limit, filtered, without repetitions, assigned to a split."""

import copy
import dataclasses
import errno
import functools
import hashlib
import os
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fanformer.data.sources.documents import Document, DocumentSource
from fanformer.data.token_files import changed
from fanformer.errors import ConfigError, DataError, did_you_mean

Filter = Callable[[str], str | None]
FEWEST_WORDS = 10
"""Documents of this many words or fewer are dropped by `min-words`."""
_URL = re.compile(r"(?:https?://|www\.)[^\s<>\"')\]}]+")


def min_words(text: str) -> str | None:
    """Drop a text of FEWEST_WORDS words or fewer, a word being what stands between spaces."""
    return text if len(text.split(maxsplit=FEWEST_WORDS)) > FEWEST_WORDS else None


def clean_urls(text: str) -> str | None:
    """Delete web addresses, those that begin with `http://`, `https://` or `www.`; drop a text that holds no more."""
    cleaned = _URL.sub("", text)
    return cleaned if cleaned.strip() or cleaned == text else None


FILTERS: Mapping[str, Filter] = {"min-words": min_words, "clean-urls": clean_urls}
"""All filters by name; the name stands in data.json, so that a filter that changes must take another one."""


def require_filters(names: Sequence[str]) -> None:
    """Raise ConfigError where one of `names` is no filter; the message names the nearest."""
    for name in names:
        if name not in FILTERS:
            raise ConfigError(f"no filter `{name}`: {did_you_mean(name, FILTERS)}")


def first_to_drop(text: str, names: Sequence[str]) -> tuple[str, str | None]:
    """Apply filters in order; return the text and the name of the filter that dropped it, None if none did."""
    for name in names:
        result = FILTERS[name](text)
        if result is None:
            return text, name
        text = result
    return text, None


_CACHE_KIBIBYTES = 1 << 16


class SeenTexts:
    """A set of texts on disk, each with the number of the document that had it first."""

    def __init__(self, path: Path | None = None) -> None:
        """Open the set, or create it.

        Args:
            path: its file; None is a temporary one, which goes with this object.
        """
        self._path = path
        self.checksum = 0
        """All digests, exclusive or: it tells whether a file holds what it held, in whatever order."""
        # Made here and used by one thread after another: a tokenizer is trained in a thread of its own.
        try:
            self._database = sqlite3.connect(str(path) if path else "", isolation_level=None, check_same_thread=False)
        except sqlite3.DatabaseError as error:
            raise _failure(path, error) from error
        self._execute(f"PRAGMA cache_size = -{_CACHE_KIBIBYTES}")
        columns = "digest BLOB PRIMARY KEY, number INTEGER"
        self._execute(f"CREATE TABLE IF NOT EXISTS seen ({columns}) WITHOUT ROWID")
        self._execute("BEGIN")

    def _execute(self, command: str, values: tuple[object, ...] = ()) -> sqlite3.Cursor:
        try:
            return self._database.execute(command, values)
        except sqlite3.DatabaseError as error:
            raise _failure(self._path, error) from error

    def add(self, text: str, number: int) -> bool:
        """Add a text and return whether it is new.

        Args:
            text: the text.
            number: of its document, larger than those before.
        """
        # two texts share one with a chance of 2**-128
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if self._execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (digest, number)).rowcount != 1:
            return False
        self.checksum ^= int.from_bytes(digest)
        return True

    def commit(self) -> None:
        """Write everything added so far to the disk."""
        self._execute("COMMIT")
        self._execute("BEGIN")

    def go_back(self, number: int, checksum: int) -> None:
        """Forget the texts of all documents after the one with this number.

        Args:
            number: of the last document that counts.
            checksum: what `checksum` was after it.

        Raises:
            DataError: if the other texts are not all there.
        """
        self._execute("DELETE FROM seen WHERE number > ?", (number,))
        self.checksum = 0
        try:
            for (digest,) in self._execute("SELECT digest FROM seen"):
                self.checksum ^= int.from_bytes(digest)
        except (sqlite3.DatabaseError, TypeError) as error:
            raise _damaged(self._path) from error
        if self.checksum != checksum:
            raise _damaged(self._path)

    def close(self) -> None:
        """Close the file; what was not committed is lost."""
        self._database.close()


def _damaged(path: Path | None) -> DataError:
    return changed(path) if path else DataError("the set of texts seen is not as it was left: start anew")


def _failure(path: Path | None, error: sqlite3.DatabaseError) -> Exception:
    """Return what is to be raised in place of an error of the database."""
    place = str(path) if path else "a temporary file for the texts seen, in the folder that TMPDIR names,"
    kind = getattr(error, "sqlite_errorname", "")
    if kind == "SQLITE_FULL":
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), place)
    if kind.startswith("SQLITE_IOERR") or kind in ("SQLITE_CANTOPEN", "SQLITE_READONLY"):
        return DataError(f"{place} cannot be written ({error}): make room, or choose another place")
    return _damaged(path)


SURVEYED_DOCUMENTS = 1000
"""Sources with more documents than this are split by document without reading them first."""
SHARE_TOLERANCE = 3.0
"""Largest factor by which the held-out share of a smaller source may miss the share asked for."""


def is_held_out(name: str, fraction: float) -> bool:
    """Return whether the document with this name is held out; depends on nothing else."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


@dataclass(frozen=True)
class Split:
    """A rule that sends every text of a source to training or to the held-out part."""

    kind: Literal["by document", "by position", "none"]
    held_out_fraction: float
    boundary: int = 0
    """Characters in front of the held-out part; only by position."""

    def place(self, document: Document, position: int) -> list[tuple[bool, Document]]:
        """Return (held out, document), twice with its two parts where the boundary cuts it by position.

        Args:
            document: the next document.
            position: characters of all documents before it.
        """
        if self.kind != "by position":
            return [(is_held_out(document.name, self.held_out_fraction), document)]
        if position < self.boundary < position + len(document.text):
            return list(zip((False, True), _cut(document, self.boundary - position), strict=True))
        return [(position >= self.boundary, document)]

    def assign(self, documents: Iterable[Document]) -> Iterator[tuple[bool, Document]]:
        """Yield (held out, document) in order, from the first document on."""
        position = 0
        for document in documents:
            yield from self.place(document, position)
            position += len(document.text)


def choose_split(documents: Iterable[Document], held_out_fraction: float) -> Split:
    """Choose how to split: by document where there are enough of them, else by position; 0 holds out none.

    Raises:
        ConfigError: if the fraction is not in [0, 0.5].
        DataError: if there is too little text for two parts.
    """
    if not 0 <= held_out_fraction <= 0.5:
        raise ConfigError(f"`held_out_fraction` must be in [0, 0.5], got {held_out_fraction}")
    if held_out_fraction == 0:
        return Split("none", held_out_fraction)
    characters = {False: 0, True: 0}
    for number, document in enumerate(documents, start=1):
        if number > SURVEYED_DOCUMENTS:
            return Split("by document", held_out_fraction)
        characters[is_held_out(document.name, held_out_fraction)] += len(document.text)
    total = sum(characters.values())
    if total < 2:
        raise DataError(f"data must hold at least 2 characters, one to train on and one held out, got {total}")
    share = characters[True] / total
    if characters[False] and 1 / SHARE_TOLERANCE <= share / held_out_fraction <= SHARE_TOLERANCE:
        return Split("by document", held_out_fraction)
    held_out_characters = max(1, round(total * held_out_fraction))
    return Split("by position", held_out_fraction, boundary=total - held_out_characters)


def _cut(document: Document, position: int) -> tuple[Document, Document]:
    """Cut a document at a line end or space before `position`, or there if none is near; the end at most doubles."""
    text = document.text
    earliest = max(0, 2 * position - len(text))
    for mark in ("\n", " "):
        found = text.rfind(mark, earliest, position)
        if found >= 0:
            position = found + 1
            break
    head, tail = text[:position], text[position:]
    replaced_in_head = min(document.replaced_bytes, head.count("\ufffd"))
    return (
        dataclasses.replace(document, text=head, replaced_bytes=replaced_in_head),
        dataclasses.replace(document, text=tail, replaced_bytes=document.replaced_bytes - replaced_in_head),
    )


BATCH_CHARACTERS = 1 << 20
"""Characters of documents that are encoded at a time."""
DUPLICATE = "duplicate"
"""The name under which repeated texts are counted among the dropped documents."""


@dataclass
class Position:
    """How far a source was read, and what was left out until there; JSON values, to go on from."""

    part: int = 0
    documents_of_part: int = 0
    number: int = 0
    """Documents read, empty and dropped ones included."""
    source_bytes: int = 0
    """UTF-8 bytes of their text, before any filter."""
    kept: int = 0
    kept_characters: int = 0
    seen_checksum: int = 0
    """`SeenTexts.checksum` after them."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Documents that were left out, by filter, and as DUPLICATE."""


@dataclass(frozen=True)
class Batch:
    """Documents to encode, each with whether it is held out, and the position after them."""

    documents: list[tuple[bool, Document]]
    position: Position


class Selection:
    """The documents of a source that are used; every reading gives the same."""

    def __init__(
        self, source: DocumentSource, max_bytes: int | None, filters: Sequence[str], *, deduplicate: bool
    ) -> None:
        """Check the rules.

        Args:
            source: all documents.
            max_bytes: read the source only until its documents hold this many UTF-8 bytes; None reads all.
            filters: names in the order they are applied.
            deduplicate: whether to drop a text that was there before, after all filters.

        Raises:
            ConfigError: if a rule is out of range or unknown.
        """
        if max_bytes is not None and max_bytes < 1:
            raise ConfigError(f"`max_bytes` must be at least 1, got {max_bytes}")
        require_filters(filters)
        self.source, self.max_bytes, self.filters, self.deduplicate = source, max_bytes, filters, deduplicate
        expected = [size for size in (source.total_bytes, max_bytes) if size is not None]
        self.total_bytes = min(expected, default=None)
        """UTF-8 bytes that will be read, as far as that is known."""

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents from the first one on; raises as `read` does."""
        seen = SeenTexts() if self.deduplicate else None
        try:
            yield from self.read(Position(), seen)
        finally:
            if seen is not None:
                seen.close()

    @functools.cached_property
    def description(self) -> dict[str, Any]:
        """What identifies the source; found once, since it may read every file."""
        return self.source.describe()

    def read(self, position: Position, seen: SeenTexts | None) -> Iterator[Document]:
        """Yield the documents after a position, which moves on with them.

        Args:
            position: where to begin; changed before every document that is yielded.
            seen: the texts before it, where repetitions are dropped.

        Raises:
            DataError: if the source is broken or has nothing to use.
        """
        for part in range(position.part, len(self.source.parts)):
            if self._is_enough(position):  # before the part is opened, which may be a download
                break
            if part != position.part:
                position.part, position.documents_of_part = part, 0
            for document in self.source.read_part(part, position.documents_of_part):
                if self._is_enough(position):
                    break
                position.documents_of_part += 1
                position.number += 1
                position.source_bytes += len(document.text.encode())
                if not document.text:
                    continue
                chosen, reason = self._filtered(document)
                if reason is None and seen is not None:
                    reason = None if seen.add(chosen.text, position.number) else DUPLICATE
                    position.seen_checksum = seen.checksum
                if reason is None:
                    position.kept += 1
                    yield chosen
                else:
                    position.dropped[reason] = position.dropped.get(reason, 0) + 1
        if not position.kept:
            raise DataError(self._nothing(position))
        self.total_bytes = position.source_bytes

    def _is_enough(self, position: Position) -> bool:
        return self.max_bytes is not None and position.source_bytes >= self.max_bytes

    def _filtered(self, document: Document) -> tuple[Document, str | None]:
        """Return a document as the filters leave it, and the name of the filter that drops it, None if none does."""
        text, reason = first_to_drop(document.text, self.filters)
        if text is document.text:
            return document, reason
        replaced = min(document.replaced_bytes, text.count("\ufffd"))
        return dataclasses.replace(document, text=text, replaced_bytes=replaced), reason

    def _nothing(self, position: Position) -> str:
        if position.dropped:
            reasons = ", ".join(f"{name} {count}" for name, count in position.dropped.items())
            return f"data `{self.source.spec}`: every document was dropped ({reasons}): leave out a filter"
        return f"data `{self.source.spec}` holds no text: name a source that does"

    def batches(self, split: Split, position: Position, seen: SeenTexts | None) -> Iterator[Batch]:
        """Yield the documents after a position in batches of about BATCH_CHARACTERS; `position` moves on with them."""
        batch: list[tuple[bool, Document]] = []
        characters = 0
        for document in self.read(position, seen):
            batch += split.place(document, position.kept_characters)
            position.kept_characters += len(document.text)
            characters += len(document.text)
            if characters >= BATCH_CHARACTERS:
                yield Batch(batch, copy.deepcopy(position))
                batch, characters = [], 0
        if batch:
            yield Batch(batch, copy.deepcopy(position))
