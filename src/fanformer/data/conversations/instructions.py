"""Self-made instructions whose replies a rule can check, with words that training has never seen held out."""

import json
import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fanformer.data.conversations.examples import Example, Message
from fanformer.errors import ConfigError, did_you_mean

Values = Mapping[str, Any]

_WORDS = (
    "apple arrow baker barn basket beach bear bell bench berry bird boat book boot bottle bowl box branch bread "
    "bridge broom brush bucket bush button cabin cake camel candle cap carpet castle cave chair cheese cherry church "
    "clock cloud coat coin comb corn cousin cow crown cup curtain daisy desk dish dog donkey door dragon dress drum "
    "duck eagle egg elephant engine farm feather fence field finger fire fish flag flower flute forest fork fox frog "
    "garden gate giant glass glove goat goose grape grass guitar hammer hat hen hill honey horn horse house island "
    "jacket jar kettle key king kite kitten knife ladder lake lamb lamp leaf lemon letter lion lock log map market "
    "melon mill mirror monkey moon mountain mouse nail needle nest net nut oak oven owl paper parrot path pear pencil "
    "pig pillow pipe plate pocket pond pony pot prince purse queen rabbit rain ring river road robin rock roof rope "
    "rose sail salt sand saw school seed sheep shell ship shirt shoe shop silver sister snake snow sock spoon "
    "squirrel stable star stone stove street sugar sun swan table tail tent thread tiger toad tower town train tree "
    "tunnel turtle uncle valley village violin wagon wall watch water wave well whale wheel wind window wing wolf "
    "wood yard"
)
HELD_OUT_SHARE = 5
"""One word of so many is held out."""
_NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
_LETTERS = "ABCD"


@dataclass(frozen=True)
class Kind:
    """A kind of instruction.

    Attributes:
        questions: wordings, with the values' names in braces.
        draw: makes values from words and random numbers.
        answer: gives a right reply for values.
        follows: tells whether a reply, without spaces around it, is right for values.
    """

    questions: Sequence[str]
    draw: Callable[[random.Random, Sequence[str]], dict[str, Any]]
    answer: Callable[[Values], str]
    follows: Callable[[Values, str], bool]


@dataclass(frozen=True)
class Instruction:
    """What is asked, and what its reply is checked by.

    Attributes:
        kind: its name in KINDS.
        values: what fills the wording in.
        question: the instruction.
    """

    kind: str
    values: Values
    question: str

    @property
    def answer(self) -> str:
        """A right reply."""
        return KINDS[self.kind].answer(self.values)

    @property
    def example(self) -> Example:
        """What teaches it."""
        return Example((Message("user", self.question), Message("assistant", self.answer)), 1)

    def is_followed_by(self, reply: str) -> bool:
        """Return whether a reply does what is asked; spaces and line ends around it do not count."""
        return KINDS[self.kind].follows(self.values, reply.strip())


def split_words(*, held_out: bool) -> list[str]:
    """Return the words of instructions for training, or those held out of them."""
    return [word for word in _WORDS.split() if (zlib.crc32(word.encode()) % HELD_OUT_SHARE == 0) == held_out]


def make_instructions(
    count: int, seed: int, *, held_out: bool, kinds: Sequence[str] | None = None, words: Sequence[str] | None = None
) -> list[Instruction]:
    """Return instructions of all kinds in turns, no two alike; equal arguments give equal ones.

    Args:
        count: how many.
        seed: any integer.
        held_out: whether their words are those that training never sees, or those of training.
        kinds: names of KINDS; None takes all.
        words: what is drawn from in place of the words of training; none of those held out.

    Raises:
        ConfigError: if a kind is not known, a word is held out, or there are not so many different instructions.
    """
    chosen = list(KINDS if kinds is None else kinds)
    for name in chosen:
        if name not in KINDS:
            raise ConfigError(f"`{name}` is not a kind of instruction: {did_you_mean(name, KINDS)}")
    draw = random.Random(f"{seed},{held_out}")
    words = split_words(held_out=held_out) if words is None else words
    if not held_out and (shared := sorted({*words} & {*split_words(held_out=True)})):
        raise ConfigError(f"`words` must have no word that is held out, got {', '.join(shared)}.")
    found: dict[str, Instruction] = {}
    attempts = 0
    while len(found) < count:
        if attempts > 50 * count + 1000:
            raise ConfigError(f"`count` must be smaller, got {count}: there are not so many different instructions.")
        name = chosen[attempts % len(chosen)]
        attempts += 1
        kind = KINDS[name]
        values = kind.draw(draw, words)
        shown = {key: _shown(value) for key, value in values.items()}
        question = draw.choice(kind.questions).format(**shown)
        found.setdefault(question, Instruction(name, values, question))
    return list(found.values())


def _shown(value: Any) -> str:
    if isinstance(value, int):
        return _NUMBERS[value]
    return value if isinstance(value, str) else " ".join(value)


def _exactly(answer: Callable[[Values], str]) -> Callable[[Values, str], bool]:
    return lambda values, reply: reply == answer(values)


def _phrase(shortest: int, longest: int) -> Callable[[random.Random, Sequence[str]], dict[str, Any]]:
    """Return what draws different words."""
    return lambda draw, words: {"words": draw.sample(words, draw.randint(shortest, longest))}


def _phrase_and_one_of_it(draw: random.Random, words: Sequence[str]) -> dict[str, Any]:
    phrase = draw.sample(words, draw.randint(3, 5))
    return {"words": phrase, "word": draw.choice(phrase)}


def _about(number: int) -> Callable[[random.Random, Sequence[str]], dict[str, Any]]:
    """Return what draws so many different words, called thing, word and so on."""
    return lambda draw, words: dict(zip(("thing", "word")[:number], draw.sample(words, number), strict=True))


def _with_number(smallest: int) -> Callable[[random.Random, Sequence[str]], dict[str, Any]]:
    return lambda draw, words: {"thing": draw.choice(words), "number": draw.randint(smallest, max(_NUMBERS))}


def _some_words(values: Values) -> str:
    patterns = ("old {0}", "the old {0}", "the {0} is old", "the old {0} is here", "the {0} is old and here")
    return patterns[values["number"] - 2].format(values["thing"])


def _draw_choice(draw: random.Random, words: Sequence[str]) -> dict[str, Any]:
    options = draw.sample(words, 4)
    lines = "\n".join(f"{letter}: {option}" for letter, option in zip(_LETTERS, options, strict=True))
    return {"options": lines, "word": draw.choice(options)}


def _letter(values: Values) -> str:
    return next(line[0] for line in values["options"].split("\n") if line[3:] == values["word"])


def _draw_membership(draw: random.Random, words: Sequence[str]) -> dict[str, Any]:
    drawn = draw.sample(words, 5)
    return {"words": drawn[:4], "word": draw.choice([drawn[4], draw.choice(drawn[:4])])}


def _is_json(values: Values, reply: str) -> bool:
    try:
        return bool(json.loads(reply) == {values["thing"]: values["word"]})
    except (ValueError, RecursionError):
        return False


def _kind(questions: Sequence[str], draw: Any, answer: Callable[[Values], str], follows: Any = None) -> Kind:
    return Kind(questions, draw, answer, follows or _exactly(answer))


KINDS: dict[str, Kind] = {
    "one word": _kind(
        ("Choose one of these and say that word alone: {words}", "Answer with one word, one of: {words}"),
        _phrase(2, 4),
        lambda values: str(values["words"][0]),
        lambda values, reply: reply in values["words"],
    ),
    "number of words": _kind(
        ("Write exactly {number} words, one of them {thing}.", "In {number} words, say something of the {thing}."),
        _with_number(2),
        _some_words,
        lambda values, reply: (
            len(reply.split()) == values["number"] and values["thing"] in reply.lower().rstrip(".").split()
        ),
    ),
    "begins with": _kind(
        ("Begin with the word {word} and write of the {thing}.", "Write of the {thing}. Your first word is {word}."),
        _about(2),
        lambda values: f"{values['word']} and {values['thing']}",
        lambda values, reply: (
            reply.lower().split()[:1] == [values["word"]] and values["thing"] in reply.lower().rstrip(".").split()[1:]
        ),
    ),
    "ends with": _kind(
        ("End with the word {word} and write of the {thing}.", "Write of the {thing}. Your last word is {word}."),
        _about(2),
        lambda values: f"the {values['thing']} and the {values['word']}",
        lambda values, reply: (
            reply.lower().rstrip(".").split()[-1:] == [values["word"]] and values["thing"] in reply.lower().split()[:-1]
        ),
    ),
    "capitals": _kind(
        ("Write in capital letters: {words}", "Say this in capitals: {words}"),
        _phrase(1, 3),
        lambda values: " ".join(values["words"]).upper(),
    ),
    "JSON": _kind(
        ("Write JSON with the key {thing} and the value {word}.", "Give a JSON object: {thing} is {word}."),
        _about(2),
        lambda values: json.dumps({values["thing"]: values["word"]}),
        _is_json,
    ),
    "choose a letter": _kind(
        ("Which line says {word}? Answer with its letter.\n{options}", "{options}\nThe letter of {word}?"),
        _draw_choice,
        _letter,
    ),
    "repeat": _kind(
        ("Repeat: {words}", "Say this again, word by word: {words}"),
        _phrase(2, 5),
        lambda values: " ".join(values["words"]),
    ),
    "write several times": _kind(
        ("Write {thing} {number} times.", "Say the word {thing} {number} times."),
        _with_number(2),
        lambda values: " ".join([values["thing"]] * values["number"]),
    ),
    "count": _kind(
        ("How many words are these? {words}", "Count the words: {words}"),
        _phrase(1, 6),
        lambda values: str(len(values["words"])),
    ),
    "reverse": _kind(
        ("Write these words from last to first: {words}", "Turn the order of the words around: {words}"),
        _phrase(2, 4),
        lambda values: " ".join(reversed(values["words"])),
    ),
    "last word": _kind(
        ("What is the last word of this? {words}", "Say only the last word: {words}"),
        _phrase(2, 5),
        lambda values: str(values["words"][-1]),
    ),
    "commas": _kind(
        ("Put commas between these words: {words}", "Write as a list with commas: {words}"),
        _phrase(2, 5),
        lambda values: ", ".join(values["words"]),
    ),
    "is it there": _kind(
        ("Is {word} among these? Answer yes or no. {words}", "Yes or no: do you see {word} here? {words}"),
        _draw_membership,
        lambda values: "yes" if values["word"] in values["words"] else "no",
        lambda values, reply: reply.lower().rstrip(".") == ("yes" if values["word"] in values["words"] else "no"),
    ),
    "leave out": _kind(
        ("Write this without the word {word}: {words}", "Leave out {word}: {words}"),
        _phrase_and_one_of_it,
        lambda values: " ".join(word for word in values["words"] if word != values["word"]),
    ),
}
"""Every kind by its name."""
