"""How far a written answer is a right one: exact match and token F1, without case, punctuation and articles."""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalized(answer: str) -> str:
    """Return an answer in lower case, without punctuation and articles, its words apart by one space.

    Source: SQuAD, arXiv:1606.05250, whose evaluation ignores both.
    """
    kept = (sign for sign in answer.lower() if sign not in string.punctuation and unicodedata.category(sign)[0] != "P")
    return " ".join(_ARTICLES.sub(" ", "".join(kept)).split())


def exact_match(answer: str, references: Sequence[str]) -> bool:
    """Return whether an answer is one of the right ones once both are normalized."""
    return any(normalized(answer) == normalized(reference) for reference in references)


def token_f1(answer: str, references: Sequence[str]) -> float:
    """Return the largest F1 of an answer's words with those of a right one, in [0, 1].

    Words count as often as they occur. Where one of both has no words, it is 1 if the other has none either, else 0.

    Source: SQuAD, arXiv:1606.05250.

    Args:
        answer: what was written.
        references: right answers, one or several.
    """
    return max(
        (_f1(normalized(answer).split(), normalized(reference).split()) for reference in references), default=0.0
    )


def _f1(words: list[str], reference: list[str]) -> float:
    if not words or not reference:
        return float(words == reference)
    common = (Counter(words) & Counter(reference)).total()
    return 2 * common / (len(words) + len(reference))
