"""What each setting does to the distribution, against its definition."""

import numpy as np
import pytest

from fanformer.errors import CheckpointError
from fanformer.gguf.sampling import most_likely, nucleus
from fanformer.server.sampling import Sampling, TokenSampler, _nucleus, likeliest, log_probabilities

LOGITS = np.array([2.0, 1.0, 0.0, -1.0, 3.0], dtype=np.float32)
KNOWN = 4
DRAWS = 4000


def sampler(prompt=(), end_ids=(), excluded=None, **settings):
    random = np.random.default_rng(settings.pop("seed", 0))
    noise = lambda: random.standard_exponential(KNOWN, dtype=np.float32)  # noqa: E731
    return TokenSampler(Sampling(**settings), noise, KNOWN, end_ids, prompt, excluded)


def shares(**settings):
    """How often each id is drawn first."""
    random = np.random.default_rng(1)
    noise = lambda: random.standard_exponential(KNOWN, dtype=np.float32)  # noqa: E731
    drawn = [TokenSampler(Sampling(**settings), noise, KNOWN, [], []).draw(LOGITS) for _ in range(DRAWS)]
    return np.bincount(drawn, minlength=KNOWN) / DRAWS


def softmax(values):
    weights = np.exp(np.array(values) - max(values))
    return weights / weights.sum()


# four standard deviations of a share of 0.5 in 4,000 draws
TOLERANCE = 4 * 0.5 / DRAWS**0.5


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, softmax(LOGITS[:KNOWN])),
        ({"temperature": 2.0}, softmax(LOGITS[:KNOWN] / 2)),
        ({"top_k": 2}, [*softmax([2, 1]), 0, 0]),
        ({"top_p": 0.8}, [*softmax([2, 1]), 0, 0]),
        ({"min_p": 0.2}, [*softmax([2, 1]), 0, 0]),
        ({"min_p": 0.1}, [*softmax([2, 1, 0]), 0]),
        ({"logit_bias": {0: -100.0, 3: 2.0}}, [0, *softmax([1, 0, 1])]),
        ({"top_k": 1}, [1, 0, 0, 0]),
    ],
)
def test_shares_are_those_of_the_definition(settings, expected):
    np.testing.assert_allclose(shares(**settings), expected, atol=TOLERANCE)


def test_ids_beyond_the_known_ones_are_never_drawn():
    assert sampler(temperature=0).draw(LOGITS) == 0


def test_the_frequency_penalty_counts_what_was_written_and_not_the_prompt():
    one = sampler(prompt=[0, 0, 0], temperature=0, frequency_penalty=0.6)
    assert [one.draw(LOGITS) for _ in range(5)] == [0, 0, 1, 0, 1]


def test_the_presence_penalty_counts_once():
    one = sampler(temperature=0, presence_penalty=1.5)
    assert [one.draw(LOGITS) for _ in range(4)] == [0, 1, 0, 0]


def test_the_repetition_penalty_counts_the_prompt_and_raises_no_negative_logit():
    one = sampler(prompt=[0, 3], temperature=0, repetition_penalty=4.0)
    assert one.draw(LOGITS) == 1  # 2 / 4 is below 1
    below = np.array([-1.0, -2.0, -9.0, -9.0, 0.0], dtype=np.float32)
    assert sampler(prompt=[0], temperature=0, repetition_penalty=4.0).draw(below) == 1  # -1 * 4 is below -2


def test_the_end_token_is_masked_before_the_least_number_of_tokens():
    one = sampler(end_ids=[0], temperature=0, min_tokens=2)
    assert [one.draw(LOGITS) for _ in range(3)] == [1, 1, 0]


def test_the_first_token_alone_is_restricted():
    one = sampler(temperature=0, excluded=np.array([True, True, False, False]))
    assert [one.draw(LOGITS) for _ in range(2)] == [2, 0]


def test_logits_that_are_no_numbers_are_an_error():
    with pytest.raises(CheckpointError, match="no numbers"):
        sampler().draw(np.array([np.nan] * 5, dtype=np.float32))


@pytest.mark.parametrize("share", [0.05, 0.3, 0.9, 0.9999])
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_bins_give_the_nucleus_that_sorting_gives(share, scale):
    scores = (np.random.default_rng(0).standard_normal(6000) * scale).astype(np.float32)
    scores -= scores.max()
    ids = most_likely(scores, 5000)
    np.testing.assert_array_equal(_nucleus(ids, scores, share), nucleus(ids, scores, share))


def test_log_probabilities_sum_to_one_and_the_likeliest_come_best_first():
    rows = np.stack([LOGITS, LOGITS * 100])
    found = log_probabilities(rows)
    np.testing.assert_allclose(np.exp(found.astype(np.float64)).sum(-1), 1, rtol=1e-6)
    assert [number for number, _ in likeliest(found[0], 3, KNOWN)] == [0, 1, 2]
    assert likeliest(found[0], 1, KNOWN)[0][1] == float(found[0][0])
