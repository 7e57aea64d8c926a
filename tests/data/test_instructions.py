"""Checkable instructions: right replies pass, wrong ones do not, and held-out words are never trained on."""

import itertools
import json
import re

import pytest

from fanformer.data.conversations.instructions import KINDS, make_instructions, split_words
from fanformer.errors import ConfigError

WRONG = ["", "yes it is", "the cat sat on the mat and went home again after that", "A B", "7", '{"a": 1}', "[1, 2"]


def test_equal_seeds_give_equal_instructions_and_others_others():
    first = make_instructions(300, 1, held_out=False)
    assert first == make_instructions(300, 1, held_out=False)
    assert first != make_instructions(300, 2, held_out=False)
    assert len({item.question for item in first}) == 300
    assert {item.kind for item in first} == set(KINDS)
    assert len(KINDS) == 15


@pytest.mark.parametrize("held_out", [False, True])
def test_right_replies_follow_and_wrong_ones_do_not(held_out):
    items = make_instructions(600, 0, held_out=held_out)
    for item in items:
        assert item.is_followed_by(item.answer), item
        assert item.is_followed_by(f" {item.answer}\n"), item
        assert not item.is_followed_by(f"so {item.answer} and more of it"), item
        for reply in WRONG:
            assert not item.is_followed_by(reply), (item, reply)
        assert "{" not in item.question
        assert [message.role for message in item.example.messages] == ["user", "assistant"]
    # a reply that is right for one is hardly ever right for the next of its kind
    for kind in KINDS:
        same = [item for item in items if item.kind == kind]
        lucky = sum(one.is_followed_by(other.answer) for one, other in itertools.pairwise(same))
        limits = {"choose a letter": 0.5, "count": 0.4, "is it there": 0.75}
        assert lucky <= limits.get(kind, 0.1) * len(same), kind


def test_no_held_out_word_is_ever_in_training():
    trained, held = split_words(held_out=False), split_words(held_out=True)
    assert not {*trained} & {*held}
    assert len(trained) > 150
    assert len(held) > 30
    said = " ".join(f"{item.question} {item.answer}" for item in make_instructions(2000, 0, held_out=False))
    assert not {*re.findall(r"[a-z]+", said.lower())} & {*held}
    asked = " ".join(str(item.values) for item in make_instructions(500, 0, held_out=True))
    assert not {*re.findall(r"[a-z]+", asked)} & {*trained}


def test_words_may_be_given_but_not_those_that_are_held_out():
    words = [f"thing{letter}" for letter in "abcdefgh"]
    said = " ".join(str(item.values) for item in make_instructions(60, 0, held_out=False, words=words))
    assert {*re.findall(r"\bthing[a-h]\b", said)} == {*words}
    held_out = split_words(held_out=True)[3]
    with pytest.raises(ConfigError, match=rf"`words` must have no word that is held out, got {held_out}\."):
        make_instructions(1, 0, held_out=False, words=[*words, held_out])


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("number of words", lambda v: f"The {v['thing']} " + "x " * (v["number"] - 2), lambda v: v["thing"]),
        ("begins with", lambda v: f"{v['word'].title()} {v['thing']}.", lambda v: f"a {v['word']} {v['thing']}"),
        ("ends with", lambda v: f"A {v['thing']} {v['word']}.", lambda v: f"{v['word']} {v['thing']}"),
        ("JSON", lambda v: json.dumps({v["thing"]: v["word"]}, indent=2), lambda v: f"{{{v['thing']}: {v['word']}}}"),
        ("one word", lambda v: v["words"][-1], lambda v: " ".join(v["words"][:2])),
        ("is it there", lambda v: "Yes." if v["word"] in v["words"] else "No.", lambda v: "perhaps"),
    ],
)
def test_open_kinds_take_every_right_reply(kind, good, bad):
    for item in make_instructions(40, 3, held_out=True, kinds=[kind]):
        assert item.is_followed_by(good(item.values)), item
        assert not item.is_followed_by(bad(item.values)), item


def test_unknown_kinds_and_too_many_are_refused():
    with pytest.raises(ConfigError, match=r"`capital` is not a kind of instruction: did you mean `capitals`"):
        make_instructions(1, 0, held_out=True, kinds=["capital"])
    every = 2 * 5 * len(split_words(held_out=True))  # two wordings, two to six times
    assert len(make_instructions(every // 2, 0, held_out=True, kinds=["write several times"])) == every // 2
    with pytest.raises(ConfigError, match=rf"`count` must be smaller, got {every + 1}: there are not so many"):
        make_instructions(every + 1, 0, held_out=True, kinds=["write several times"])
