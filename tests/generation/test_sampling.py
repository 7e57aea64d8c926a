"""What each setting does to the distribution, against its definition."""

import dataclasses

import numpy as np
import pytest
import torch

from fanformer.errors import CheckpointError
from fanformer.generation.sampling import (
    Sampling,
    TokenSampler,
    _by_sorting,
    likeliest,
    log_probabilities,
    most_likely,
    noise_of,
    nucleus,
)
from fanformer.generation.settings import GenerationSettings

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


def test_ids_that_are_never_drawn_are_not_whatever_is_asked():
    for settings in ({"temperature": 0}, {"temperature": 1.0}, {"temperature": 0, "logit_bias": {0: 100.0}}):
        noise = lambda: np.ones(KNOWN, dtype=np.float32)  # noqa: E731
        made = TokenSampler(Sampling(**settings), noise, KNOWN, [], [], never=[0, 9])
        assert [made.draw(LOGITS) for _ in range(5)] == [1] * 5


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
    np.testing.assert_array_equal(nucleus(ids, scores, share), _by_sorting(ids, scores, share))


def test_log_probabilities_sum_to_one_and_the_likeliest_come_best_first():
    rows = np.stack([LOGITS, LOGITS * 100])
    found = log_probabilities(rows)
    np.testing.assert_allclose(np.exp(found.astype(np.float64)).sum(-1), 1, rtol=1e-6)
    assert [number for number, _ in likeliest(found[0], 3, KNOWN)] == [0, 1, 2]
    assert likeliest(found[0], 1, KNOWN)[0][1] == float(found[0][0])


PLAIN = GenerationSettings(max_length=10, min_length=0, top_k=0, top_p=1.0, temperature=1.0)


def of(settings, seed, known=50, end_ids=(), excluded=None):
    """What draws a text on ggml."""
    return TokenSampler(Sampling.of(settings), noise_of(seed, known), known, end_ids, [], excluded)


def logits(size=50, seed=0):
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32) * 3


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature"), [(5, 1.0, 1.0), (0, 0.6, 0.7), (20, 0.85, 0.7), (3, 0.9, 2.0)]
)
def test_the_tokens_that_may_be_drawn_are_those_of_transformers(top_k, top_p, temperature):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    for seed in range(20):
        values = logits(seed=seed)
        scores = TemperatureLogitsWarper(float(temperature))(None, torch.from_numpy(values)[None])
        if top_k:
            scores = TopKLogitsWarper(top_k)(None, scores)
        if top_p < 1:
            scores = TopPLogitsWarper(top_p)(None, scores)
        expected = torch.nonzero(scores[0] > -torch.inf).flatten().tolist()
        scaled = values / np.float32(temperature)
        assert nucleus(most_likely(scaled, top_k), scaled, top_p).tolist() == expected


def test_equal_scores_at_the_edge_stay_together():
    values = np.array([1.0, 3.0, 2.0, 2.0, 0.0], dtype=np.float32)
    assert most_likely(values, 2).tolist() == [1, 2, 3]
    assert most_likely(values, 1).tolist() == [1]
    assert most_likely(values, 9).tolist() == [0, 1, 2, 3, 4]
    assert nucleus(np.arange(5), values, 1e-9).tolist() == [1]


def test_draws_have_the_softmaxs_shares():
    values = np.array([0.0, 1.0, 2.0, -np.inf], dtype=np.float32)
    sampler = of(PLAIN, 7, 4)
    draws = np.array([sampler.draw(values) for _ in range(4000)])
    shares = np.bincount(draws, minlength=4) / 4000
    expected = np.exp(values) / np.exp(values).sum()
    # 4 standard errors of a share of 4000 draws are at most 4 * 0.5 / sqrt(4000) = 0.032
    np.testing.assert_allclose(shares, expected, atol=0.032)
    assert shares[3] == 0


def test_seed_reproduces_and_no_global_state_is_touched():
    before = np.random.get_state()[1].copy()
    texts = [[of(PLAIN, seed).draw(logits(seed=step)) for step in range(10)] for seed in (1, 1, 2)]
    streams = [of(PLAIN, seed) for seed in (1, 1, 2)]
    long = [[stream.draw(logits(seed=step)) for step in range(20)] for stream in streams]
    assert texts[0] == texts[1]
    assert long[0] == long[1] != long[2]
    np.testing.assert_array_equal(before, np.random.get_state()[1])


def test_temperature_0_and_top_k_1_take_the_most_likely():
    for settings in (dataclasses.replace(PLAIN, temperature=0.0), dataclasses.replace(PLAIN, top_k=1)):
        for seed in range(5):
            assert of(settings, 3).draw(logits(seed=seed)) == logits(seed=seed).argmax()


@pytest.mark.parametrize("temperature", [1e-320, 1e-45, 1e-42, 1e-38, 1e-37, 1e-30, 1e-10])
def test_temperatures_that_logits_overflow_by_take_the_most_likely(temperature):
    settings = dataclasses.replace(PLAIN, temperature=temperature, top_p=0.85)
    for seed in range(20):
        assert of(settings, 3).draw(logits(seed=seed)) == logits(seed=seed).argmax()


def test_high_temperatures_draw_nothing_that_is_excluded():
    values = np.array([0.0, 1.0, -np.inf, -np.inf], dtype=np.float32)
    sampler = of(dataclasses.replace(PLAIN, temperature=1e38), 3, 4)
    assert {sampler.draw(values) for _ in range(100)} == {0, 1}


def test_end_unknown_and_excluded_tokens_are_not_drawn():
    values = np.array([9.0, 8.0, 7.0, 6.0, 99.0], dtype=np.float32)
    settings = GenerationSettings(max_length=9, min_length=2, temperature=0)
    sampler = of(settings, 0, 4, [0], np.array([False, True, False, True]))
    # at first neither the end nor an excluded token, then no end yet, then the end; 4 is never known
    assert [sampler.draw(values) for _ in range(3)] == [2, 1, 0]
