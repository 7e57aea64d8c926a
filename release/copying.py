"""Rows whose answers stand in their questions: what a small base has to see before it looks things up in a passage."""

import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks/quality"))

from answer_data import Row, conversation

from fanformer.data.conversations.instructions import split_words

SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[.!?][\"”'])\s+")
_PLAIN_WORD = re.compile(r"(?<= )[a-z]{3,9}\b")
_SHORTEST, _LONGEST = 200, 700
"""Characters of a passage."""
_GAP = "___"
_SIGNS = ".,;:!?\"'“”()"
_REPEAT = ("Repeat: {words}", "Say this again, word by word: {words}")
_FOLLOWS = ("What follows the word {word} here? {words}", "{words}\nWhich word follows {word}?")
_PAIRS = ("{pairs}\nWhat is the {word}?", "What is the {word} here? {pairs}")
_FILL = ("What is missing here? {sentence}", "Fill the gap: {sentence}")
_FIND = ("Which sentence has the word {word}?", "Say the sentence with {word}.", "What is said of {word}?")
_BEGIN = ("How does the sentence go on that begins with {start}?", "What is said after {start}?")
_RECALL = ("What goes with {words}?", "{words}: what is missing?")


def common_words(texts: Iterable[str], count: int) -> list[str]:
    """Return the most frequent plain words of texts, without those of instructions that are held out."""
    counts = Counter(word for text in texts for word in _PLAIN_WORD.findall(text))
    held_out = frozenset(split_words(held_out=True))
    return [word for word, _ in counts.most_common() if word not in held_out][:count]


def list_rows(words: Sequence[str], count: int, seed: int, *, longest: int = 50) -> Iterator[Row]:
    """Yield lists of random words to be said again, to be gone on with, and to be looked up in.

    Args:
        words: what is drawn from.
        count: how many rows.
        seed: of what is drawn.
        longest: words of a list.
    """
    draw = random.Random(seed)
    kinds: tuple[Callable[[random.Random, Sequence[str]], Row], ...] = (_again, _again, _follows, _pairs)
    for index in range(count):
        drawn = draw.sample(words, draw.randint(4, min(longest, len(words))))
        yield kinds[index % len(kinds)](draw, drawn)


def _again(draw: random.Random, drawn: Sequence[str]) -> Row:
    said = " ".join(drawn)
    return conversation(draw.choice(_REPEAT).format(words=said), said, kind="list")


def _follows(draw: random.Random, drawn: Sequence[str]) -> Row:
    index = draw.randrange(len(drawn) - 1)
    asked = draw.choice(_FOLLOWS).format(word=drawn[index], words=" ".join(drawn))
    return conversation(asked, drawn[index + 1], kind="list")


def _pairs(draw: random.Random, drawn: Sequence[str]) -> Row:
    pairs = list(zip(drawn[::2], drawn[1::2], strict=False))
    key, value = draw.choice(pairs)
    told = " ".join(f"The {one} is {other}." for one, other in pairs)
    return conversation(draw.choice(_PAIRS).format(pairs=told, word=key), value, kind="list")


def passages(texts: Iterable[str]) -> list[list[str]]:
    """Return the passages of texts, each as its sentences: paragraphs, or what whole sentences of one have room."""
    found = []
    for text in texts:
        for paragraph in text.split("\n\n"):
            part: list[str] = []
            for sentence in SENTENCE_END.split(" ".join(paragraph.split())):
                if part and sum(map(len, part)) + len(sentence) > _LONGEST:
                    found.append(part)
                    part = []
                part.append(sentence)
            found.append(part)
    return [part for part in found if len(part) >= 3 and _SHORTEST <= sum(map(len, part)) <= _LONGEST]


def passage_rows(
    found: Sequence[Sequence[str]], count: int, seed: int, *, absent: float, stop_words: frozenset[str], not_there: str
) -> Iterator[Row]:
    """Yield passages with a question that a part of them answers word by word, some behind another passage.

    Args:
        found: sentences of each passage.
        count: how many rows, at most.
        seed: of what is drawn.
        absent: share of the questions that are asked behind another passage, in [0, 1].
        stop_words: words that say little.
        not_there: the answer where the passage does not hold it.
    """
    draw = random.Random(seed)
    asks = (_fill, _find, _begin, _recall, _recall)
    for index in range(count):
        sentences = draw.choice(found)
        sentence = draw.choice(sentences)
        asked = asks[index % len(asks)](draw, sentence, stop_words)
        if asked is None:
            continue
        question, answer, key = asked
        if draw.random() < absent:
            sentences, answer = draw.choice(found), not_there
        passage = " ".join(sentences)
        if (key in passage) != (answer != not_there) or passage.count(key) > 1:
            continue
        yield conversation(f"{passage}\n\n{question}", answer, kind="passage")


Asked = tuple[str, str, str]
"""A question, its answer, and what of the passage stands there once where the answer does."""


def _fill(draw: random.Random, sentence: str, stop_words: frozenset[str]) -> Asked | None:
    """Ask for some words of a sentence."""
    words = sentence.split()
    if len(words) < 6 or len(words) > 40:
        return None
    size = draw.randint(1, 4)
    start = draw.randint(1, len(words) - size)
    gap = " ".join(words[start : start + size])
    told = " ".join([*words[:start], _GAP, *words[start + size :]])
    if not _telling(gap.split(), stop_words):
        return None
    return draw.choice(_FILL).format(sentence=told), gap.rstrip(".,;:!?"), sentence


def _find(draw: random.Random, sentence: str, stop_words: frozenset[str]) -> Asked | None:
    """Ask for the sentence that has a word."""
    words = [word for word in re.findall(r"[A-Za-z]{3,}", sentence) if word.lower() not in stop_words]
    if not words or len(sentence) > 250:
        return None
    word = draw.choice(words)
    return draw.choice(_FIND).format(word=word), sentence, word


def _begin(draw: random.Random, sentence: str, stop_words: frozenset[str]) -> Asked | None:
    """Ask for the rest of a sentence."""
    words = sentence.split()
    size = draw.randint(2, 4)
    if len(words) < size + 2 or len(sentence) > 250:
        return None
    start = " ".join(words[:size])
    return draw.choice(_BEGIN).format(start=start), " ".join(words[size:]), start


def _recall(draw: random.Random, sentence: str, stop_words: frozenset[str]) -> Asked | None:
    """Ask, by the telling words of the rest, for some words of a sentence that stand together."""
    words = sentence.split()
    if len(words) < 6 or len(words) > 40:
        return None
    size = draw.randint(1, 5)
    start = draw.randrange(len(words) - size)
    telling = _telling((*words[:start], *words[start + size :]), stop_words)
    kept = telling if len(telling) < 5 else [word for word in telling if draw.random() < 0.7]
    gap = words[start : start + size]
    if len(kept) < 2 or not _telling(gap, stop_words):
        return None
    return draw.choice(_RECALL).format(words=" ".join(kept)), " ".join(gap).strip(_SIGNS), sentence


def _telling(words: Iterable[str], stop_words: frozenset[str]) -> list[str]:
    """Return the words that say what a sentence is about, without signs around them."""
    bare = (word.strip(_SIGNS) for word in words)
    return [word for word in bare if word and word.lower() not in stop_words]
