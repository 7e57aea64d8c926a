"""The grammar checker: sentences are found as a reader would, human ones pass and shuffled ones do not."""

import os
import shutil

import pytest


@pytest.fixture
def parser():
    if shutil.which("link-parser") is None and "FANFORMER_NEEDS_PACKAGES" not in os.environ:
        pytest.skip("link-grammar is not installed: Debian's package link-grammar")


STORIES = [
    "The cat sat on the mat. She was very happy. Her friend gave her a big red ball, and they played in the garden.",
    "A boy went to the river. He saw a fish in the water. The fish was small and green. He took it home.",
]


def test_sentences_end_at_their_signs():
    from grammar import sentences

    assert sentences('He ran. "Stop!" said she. And then') == ["He ran.", "Stop!", "said she."]


def test_shuffling_leaves_names_and_i_as_they_are():
    from grammar import shuffled

    mixed = shuffled("She saw Anna and I.", seed=0)
    assert mixed[0].isupper()
    assert {"Anna", "I"} <= set(mixed.rstrip(".").split())


def test_human_stories_pass_and_shuffled_ones_do_not(parser):
    from grammar import passes, shuffled

    assert passes(STORIES) == [True, True]
    assert passes([shuffled(text, seed=1) for text in STORIES]) == [False, False]


def test_a_story_is_judged_by_its_own_sentences(parser):
    from grammar import share_grammatical, shuffled

    texts = [shuffled(STORIES[0], seed=1), STORIES[1], "He ran home. Dog the a on.", STORIES[0], "No end", "He ran."]
    assert share_grammatical(texts) == [share_grammatical([text])[0] for text in texts] == [0, 1, 0.5, 1, 0, 1]


def test_a_text_without_a_sentence_fails(parser):
    from grammar import passes

    assert passes(["no end", STORIES[0]]) == [False, True]
