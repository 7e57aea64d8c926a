"""Which text is held out of training: whole documents by a hash of their names, or the end of the text."""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from fanformer.data.sources.documents import Document
from fanformer.errors import ConfigError, DataError

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
