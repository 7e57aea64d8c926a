"""Exact match and F1 of answers, on values counted by hand."""

import pytest

from fanformer.evaluation.answers import exact_match, normalized, token_f1


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The Cat, a hat!", "cat hat"),
        ("well-to-do farmer's", "welltodo farmers"),
        ("an\nanother  theme", "another theme"),
        ("\u201cYes\u201d \u2014 \u00dcber", "yes \u00fcber"),
        ("a the", ""),
    ],
)
def test_case_punctuation_and_articles_do_not_count(answer, expected):
    assert normalized(answer) == expected


@pytest.mark.parametrize(
    ("answer", "references", "match", "f1"),
    [
        ("a farmer", ["The farmer."], True, 1.0),
        ("the rich farmer", ["a well-to-do farmer"], False, 0.5),  # 1 of 2 and 1 of 2
        ("the rich farmer", ["a poor man", "rich man and farmer"], False, 2 * 2 / (2 + 4)),
        ("cat cat cat", ["cat"], False, 2 * 1 / (3 + 1)),  # a word counts as often as it occurs in both
        ("dog", ["cat"], False, 0.0),
        ("", ["cat"], False, 0.0),
        ("the", ["a"], True, 1.0),
        ("cat", [], False, 0.0),
    ],
)
def test_match_and_f1_are_those_counted_by_hand(answer, references, match, f1):
    assert exact_match(answer, references) is match
    assert token_f1(answer, references) == pytest.approx(f1)
