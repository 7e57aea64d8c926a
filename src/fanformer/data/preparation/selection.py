"""Which documents of a source are used, in order: up to a limit, filtered, without repetitions, assigned to a split."""

import copy
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fanformer.data.preparation.deduplication import SeenTexts
from fanformer.data.preparation.filters import first_to_drop, require_filters
from fanformer.data.preparation.splitting import Split
from fanformer.data.sources.documents import Document, DocumentSource
from fanformer.errors import ConfigError, DataError

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
            if part != position.part:
                position.part, position.documents_of_part = part, 0
            for document in self.source.read_part(part, position.documents_of_part):
                if self.max_bytes is not None and position.source_bytes >= self.max_bytes:
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
