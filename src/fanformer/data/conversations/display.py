"""A training row as text for a terminal, the tokens that are learnt marked."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from fanformer.data.packing import IGNORED_LABEL

_CONTROL = re.compile(r"[^\S\n ]|[\x00-\x09\x0b-\x1f\x7f-\x9f]")
_LEARNT, _READ, _PLAIN = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"


class TextOfIds(Protocol):
    """What a tokenizer must offer."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = ...) -> str:
        """Return the text of token ids."""


def marked_row(tokenizer: TextOfIds, row: Mapping[str, Tensor], *, colour: bool) -> str:
    """Return a row as lines for a terminal, what it teaches marked.

    The marks are read off the labels that the loss sees: bold green where `colour`, else between [[ and ]]. Documents
    are apart by a line that says how many tokens of each are learnt, or of pairs that the loss weighs; filler is only
    counted. Control characters are escaped.

    Args:
        tokenizer: of the row.
        row: `input_ids`, `labels` (shifted already) and `position_ids`, and of preferences `document_ids`, each (T,).
        colour: whether the terminal shows colours.
    """
    lines, filler = [], 0
    for number, (ids, trained) in enumerate(_documents(row), start=1):
        learnt = sum(trained)
        if not learnt:
            filler += len(ids)
            continue
        text = "".join(_marked(tokenizer.decode(span), mark, colour) for span, mark in _spans(ids, trained))
        title = f"document {number}: {learnt} of {len(ids)} tokens are learnt"
        if "document_ids" in row:
            end = ("rejected", "chosen")[number % 2]
            title = f"pair {(number + 1) // 2}, {end}: {learnt} of {len(ids)} tokens are weighed"
        lines += [f"-- {title} --", text.rstrip("\n")]
    if filler:
        lines.append(f"-- {filler} tokens of which nothing is learnt --")
    return "\n".join(lines)


def _documents(row: Mapping[str, Tensor]) -> Iterator[tuple[list[int], list[bool]]]:
    """Yield the tokens of each document, the last label among them, and whether each is learnt."""
    inputs, labels, positions = (row[name].tolist() for name in ("input_ids", "labels", "position_ids"))
    starts = [place for place, position in enumerate(positions) if position == 0 or place == 0]
    for start, end in zip(starts, [*starts[1:], len(inputs)], strict=True):
        ids = inputs[start:end]
        trained = [False, *(label != IGNORED_LABEL for label in labels[start:end])]
        if trained[-1]:
            yield [*ids, labels[end - 1]], trained
        else:
            yield ids, trained[:-1]


def _spans(ids: Sequence[int], trained: Sequence[bool]) -> Iterator[tuple[Sequence[int], bool]]:
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or trained[end] != trained[start]:
            yield ids[start:end], trained[start]
            start = end


def _marked(text: str, learnt: bool, colour: bool) -> str:
    shown = _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    if colour:
        return f"{_LEARNT if learnt else _READ}{shown}{_PLAIN}"
    return f"[[{shown}]]" if learnt else shown
