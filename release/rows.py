"""What the base is tuned on: questions on passages, stories by their title, beginnings, instructions, small talk."""

import random
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks/quality"))

from answer_data import Row, conversation, fairytales, instruction_rows, read
from copying import SENTENCE_END, common_words, list_rows, passage_rows, passages
from texts import story_of, without_stories

NOT_THERE = "The passage does not say."
_LONGEST_STORY = 1600
"""Characters of a story that is told whole."""
_LONGEST_ANSWER = 800
"""Characters of a continuation, whole sentences."""
_THING = re.compile(r"\bthe ([a-z]{3,})(?=[.,!?]| (?:and|was|to|in|with|on|is|that|had|said)\b)")
"""A word after `the` that no other word of the same phrase follows."""
_COMMON = (
    "a about after all also an and are as at back be because been before but by can come could day did do does down "
    "for from get go had has have he her here him his home how i if in into is it its just like little long looked "
    "made many me mom more my not now of off on one other our out over said saw say she so some than that the their "
    "them then there they this time to too two up us very wanted was we went were what when where which who why will "
    "with would you your"
)
_STOP_WORDS = frozenset(_COMMON.split())
_HARD = ("JSON", "capitals", "leave out", "reverse", "choose a letter", "count", "repeat", "commas")
"""Kinds of instructions that are learnt last."""
_TELL = ("Tell me a short story called {title}.", "Tell a story with the title {title}.", "Write a story: {title}")
_CONTINUE = ("Continue: {text}", "How does this go on? {text}", "Go on with this text.\n\n{text}")
_TALK = {
    "Hello": "Hello! What would you like: a story, an answer from a passage, or a continuation?",
    "Hi": "Hello! What would you like: a story, an answer from a passage, or a continuation?",
    "Good morning": "Good morning! What would you like to read?",
    "How are you?": "I am a small program and feel nothing, but I am ready.",
    "Who are you?": "I am FANformer, a very small language model that was trained on a laptop's worth of English.",
    "What are you?": "I am FANformer, a very small language model that was trained on a laptop's worth of English.",
    "What is your name?": "My name is FANformer.",
    "What can you do?": "I tell short stories, go on with a text, answer from a passage, and follow simple orders.",
    "Are you a human?": "No. I am a small language model.",
    "Thank you": "You are welcome.",
    "Thanks": "You are welcome.",
    "Goodbye": "Goodbye!",
    "Bye": "Goodbye!",
    "Who made you?": "The people of the FANformer project made me.",
    "Help me": "Give me a title for a story, or a passage and a question about it.",
}


def content_words(text: str) -> set[str]:
    """Return the different words of a text that say what it is about."""
    return set(re.findall(r"[a-z]+", text.lower())) - _STOP_WORDS


def unanswerable_rows(path: Path, left_out: frozenset[str], count: int, seed: int) -> Iterator[Row]:
    """Yield questions behind a passage of another story that says little of what they ask about."""
    rows = [row for row in read(path) if row["story"] not in left_out]
    draw = random.Random(seed)
    for row in draw.sample(rows, min(count, len(rows))):
        asked = content_words(row["question"])
        others = (draw.choice(rows) for _ in range(50))
        for other in others:
            if other["story"] != row["story"] and len(asked & content_words(other["text"])) * 3 <= len(asked):
                passage = " ".join(other["text"].split())
                yield conversation(f"{passage}\n\n{row['question']}", NOT_THERE, kind="not there")
                break


def title_of(text: str) -> str | None:
    """Return a title for a story that has none, from the names and things that it mentions most; None where few are."""
    names = Counter(re.findall(r"(?<=[a-z,] )[A-Z][a-z]{2,}\b", text))
    things = Counter(word for word in _THING.findall(text) if word not in _STOP_WORDS)
    people = [name for name, count in names.most_common(2) if count > 1 and name not in ("Mom", "Dad", "Mommy")]
    thing = next((word for word, count in things.most_common(1) if count > 1), None)
    if people and thing:
        return f"{people[0]} and the {thing}"
    if len(people) == 2:
        return f"{people[0]} and {people[1]}"
    two = [word for word, count in things.most_common(2) if count > 1]
    return f"The {two[0]} and the {two[1]}" if len(two) == 2 else None


def titled_stories(path: Path) -> Iterator[tuple[str, str]]:
    """Yield title and text of the short stories of a part of text-small that are told whole."""
    for record in read(path):
        title, text = titled(record)
        if title and len(text) <= _LONGEST_STORY:
            yield title, text


def titled(record: Row) -> tuple[str | None, str]:
    """Return title and text of a record; no title for one that is no short story."""
    if record["src"] == "tinystories":
        return title_of(record["text"]), record["text"].strip()
    if record["src"] == "african-storybook":
        return _parts(record)
    return None, record["text"]


def titles(path: Path) -> list[str]:
    """Return the titles of all stories of a part of text-small, of those too that are too long to be told whole."""
    found = (titled(record)[0] if record["src"] != "fairytaleqa" else _parts(record)[0] for record in read(path))
    return list(dict.fromkeys(filter(None, found)))


def human_stories(path: Path) -> list[str]:
    """Return the stories of a part of text-small that people wrote, without their titles."""
    return [_parts(record)[1] for record in read(path) if record["src"] in ("african-storybook", "fairytaleqa")]


def _parts(record: Row) -> tuple[str, str]:
    """Return the first line of a record, its title, and what follows."""
    title, _, text = record["text"].partition("\n\n")
    return title.strip(), text.strip()


def story_rows(stories: Sequence[tuple[str, str]], seed: int) -> Iterator[Row]:
    """Yield stories as answers to their titles."""
    draw = random.Random(seed)
    for title, text in stories:
        yield conversation(draw.choice(_TELL).format(title=title), text, kind="story")


def continuation_rows(records: Sequence[Row], count: int, seed: int) -> Iterator[Row]:
    """Yield texts whose first sentences are given and whose next ones are the answer; half of the generated stories."""
    draw = random.Random(seed)
    records = [record for record in records if record["src"] != "tinystories" or draw.random() < 0.5]
    for record in draw.sample(records, min(count, len(records))):
        paragraphs = [part for part in record["text"].split("\n\n") if len(part) > 300]
        if not paragraphs:
            continue
        sentences = SENTENCE_END.split(" ".join(draw.choice(paragraphs).split()))
        if len(sentences) >= 3:
            answer = _first(sentences[1:], _LONGEST_ANSWER)
            if answer:
                yield conversation(draw.choice(_CONTINUE).format(text=sentences[0]), answer, kind="continuation")


def _first(sentences: Sequence[str], most: int) -> str:
    """Return the first of these sentences, those that have so many characters together."""
    joined = ""
    for sentence in sentences:
        longer = f"{joined} {sentence}".strip()
        if len(longer) > most:
            break
        joined = longer
    return joined


def talk_rows(repeats: int) -> Iterator[Row]:
    """Yield small talk and what the model says of itself, with and without a full stop."""
    for _ in range(repeats):
        for question, answer in _TALK.items():
            yield conversation(question, answer, kind="talk")
            yield conversation(question.lower().rstrip("?"), answer, kind="talk")


def tuning_rows(
    data: Path,
    base_text: Path,
    seed: int,
    *,
    words: int,
    instructions: int,
    hard_instructions: int,
    lists: int,
    passage_questions: int,
    absent: float,
    readings: float,
    unanswerable: int,
    continuations: int,
    texts: float,
    blind: bool = False,
) -> list[Row]:
    """Return all rows for training, without the stories of the held-out text, and of the held-out questions.

    Args:
        data: the folder of real data.
        base_text: what the base has read, a .jsonl file.
        seed: of what is drawn.
        words: how many of the most frequent words self-made rows draw from.
        instructions: how many self-made ones.
        hard_instructions: how many more of the kinds that are learnt last.
        lists: of words, to be said again or looked up in.
        passage_questions: self-made ones, answered by words of the passage, at most.
        absent: share of these that are asked behind another passage, in [0, 1].
        readings: how often FairytaleQA's questions are read; 0.5 is half of them.
        unanswerable: how many questions behind the passage of another story.
        continuations: of texts, at most.
        texts: share of what the base has read that is read again as plain text, in [0, 1], so that it forgets less.
        blind: whether questions stand without their passages, for a twin that shows what passages are worth.
    """
    small, questions = data / "text-small", data / "questions/fairytaleqa-train.jsonl.xz"
    held_out = frozenset(filter(None, map(story_of, read(small / "valid.jsonl.xz"))))
    read_before = list(filter(without_stories(data), read(small / "train.jsonl.xz")))
    known = common_words((one["text"] for one in read_before), words)
    asked = list(fairytales(questions, held_out, blind=blind))
    rows = asked * int(readings) + random.Random(seed).sample(asked, round(readings % 1 * len(asked)))
    if not blind:
        rows += unanswerable_rows(questions, held_out, unanswerable, seed)
        found = passages(one["text"] for one in read_before)
        rows += passage_rows(found, passage_questions, seed, absent=absent, stop_words=_STOP_WORDS, not_there=NOT_THERE)
    rows += story_rows(list(titled_stories(small / "train.jsonl.xz")), seed)
    rows += continuation_rows(read_before, continuations, seed)
    whole = list(read(base_text))
    rows += ({"text": one["text"]} for one in random.Random(seed).sample(whole, round(texts * len(whole))))
    rows += list_rows(known, lists, seed)
    rows += instruction_rows(instructions, held_out=False, seed=seed, words=known)
    rows += instruction_rows(hard_instructions, held_out=False, seed=seed + 1000, kinds=_HARD, words=known)
    rows += talk_rows(10)
    random.Random(seed).shuffle(rows)
    return list(map(with_space, rows))


def with_space(row: Row) -> Row:
    """Return a row whose answer begins with a space, so that its first word has the tokens that it has in a text.

    Without one it has others, most words several, and a word that is copied would have to be spelt.
    """
    if "messages" not in row:
        return row
    *asked, answer = row["messages"]
    return {**row, "messages": [*asked, {**answer, "content": f" {answer['content']}"}]}
