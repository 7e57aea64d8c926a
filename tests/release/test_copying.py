"""Rows whose answers stand in their questions: every answer can be looked up, and none is given where it cannot."""

import re

import pytest

from fanformer.data.conversations.instructions import split_words

TALES = [
    "The old miller kept a grey donkey behind the mill. Every morning the donkey carried flour to the market in town. "
    "One winter the river froze, and the great wheel stood still for nine days. The miller sat by the stove and told "
    "his daughters long stories about dragons. When spring came at last, the wheel turned again and everybody laughed.",
    "A young sailor bought a broken compass from a merchant. The compass pointed neither north nor south, but always "
    "towards hidden treasure. He followed the trembling needle across seven stormy seas without any sleep. On a tiny "
    "island he dug beneath a crooked palm and found an iron chest. Inside lay nothing but a letter from his mother.",
]
LITTLE = frozenset(("the", "a", "and", "of", "his", "to", "by", "in", "for", "from", "on", "he"))
WORDS = [f"{first}{second}" for first in ("ab", "ce", "di", "fo", "gu") for second in ("lan", "mer", "tis", "von")]


def parts(rows):
    """Return (question, answer) of each row."""
    return [tuple(message["content"] for message in row["messages"]) for row in rows]


def test_common_words_leave_out_those_of_the_test():
    from copying import common_words

    held_out = split_words(held_out=True)[0]
    text = f"so many words, many many {held_out} {held_out} {held_out} {held_out} and one Tom"
    assert common_words([text], 3) == ["many", "words", "and"]


def test_lists_are_said_again_gone_on_with_and_looked_up_in():
    from copying import list_rows

    found = parts(list_rows(WORDS, 80, seed=0, longest=12))
    again = [one for one in found if len(one[1].split()) > 1]
    assert len(again) == 40
    assert all(question.endswith(f": {answer}") for question, answer in again)
    follows = [one for one in found if "follow" in one[0]]
    assert len(follows) == 20
    for question, answer in follows:
        [word] = re.findall(r"the word (\w+) here|follows (\w+)\?", question)
        assert f"{''.join(word)} {answer}" in question
    pairs = [one for one in found if "The " in one[0]]
    assert len(pairs) == 20
    for question, answer in pairs:
        [word] = re.findall(r"What is the (\w+)", question)
        assert f"The {word} is {answer}." in question
    assert found == parts(list_rows(WORDS, 80, seed=0, longest=12))
    assert found != parts(list_rows(WORDS, 80, seed=1, longest=12))


def test_passages_are_whole_sentences_of_a_fair_length():
    from copying import passages

    assert passages(["Too short. It is. So it is.", *TALES]) == [re.split(r"(?<=\.) ", tale) for tale in TALES]
    long = "\n\n".join(["A title", f"{TALES[0]} " * 8])
    cut = passages([long])
    assert len(cut) > 2
    assert [one for part in cut for one in part] == 8 * re.split(r"(?<=\.) ", TALES[0])
    assert all(sum(map(len, part)) <= 700 for part in cut)


@pytest.fixture
def asked():
    """Questions on two passages, as (passage, question, answer)."""
    from copying import passage_rows, passages

    rows = passage_rows(passages(TALES), 400, seed=0, absent=0.15, stop_words=LITTLE, not_there="It is not there.")
    return [(*question.split("\n\n"), answer) for question, answer in parts(rows)]


def test_an_answer_stands_in_its_passage_or_is_said_not_to(asked):
    assert len(asked) > 200
    absent = [one for one in asked if one[2] == "It is not there."]
    assert 0.03 < len(absent) / len(asked) < 0.15  # half of them fell on the passage itself, and were left out
    assert all(passage in TALES for passage, _, _ in asked)
    for passage, _, answer in asked:
        assert answer in passage or answer == "It is not there."
        assert set(re.findall(r"\w+", answer.lower())) - LITTLE


def test_each_question_has_one_answer(asked):
    told = {"gap": 0, "word": 0, "start": 0}
    for passage, question, answer in asked:
        there = answer != "It is not there."
        sentences = re.split(r"(?<=\.) ", passage)
        if "___" in question:
            before, after = re.split(r" ?___ ?", question.split(": " if "gap" in question else "? ", 1)[1])
            assert any(one.startswith(before) and one.endswith(after) for one in sentences) == there
            told["gap"] += 1
        elif found := re.search(r"has the word (\w+)|sentence with (\w+)|said of (\w+)", question):
            word = next(filter(None, found.groups()))
            assert ([one for one in sentences if word in one] == [answer]) if there else word not in passage
            told["word"] += 1
        elif found := re.search(r"begins with (.+)\?|said after (.+)\?", question):
            start = next(filter(None, found.groups()))
            assert (f"{start} {answer}" in sentences) == there
            told["start"] += 1
        else:
            words = re.findall(r"\w+", question.removeprefix("What goes with ").removesuffix(": what is missing?"))
            assert any({*words} <= {*re.findall(r"\w+", one)} for one in sentences) == there
    assert min(told.values()) > 20
