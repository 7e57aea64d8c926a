"""Drawing tokens in numpy: the tokens that may be drawn, and how often, are those of generation.py."""

import dataclasses

import numpy as np
import pytest
import torch

from fanformer.errors import CheckpointError
from fanformer.generation.settings import GenerationSettings
from fanformer.gguf.sampling import Sampler, most_likely, nucleus

PLAIN = GenerationSettings(max_length=10, min_length=0, top_k=0, top_p=1.0, temperature=1.0)


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
    sampler = Sampler(PLAIN, 7, 4, [])
    draws = np.array([sampler.draw(values) for _ in range(4000)])
    shares = np.bincount(draws, minlength=4) / 4000
    expected = np.exp(values) / np.exp(values).sum()
    # 4 standard errors of a share of 4000 draws are at most 4 * 0.5 / sqrt(4000) = 0.032
    np.testing.assert_allclose(shares, expected, atol=0.032)
    assert shares[3] == 0


def test_seed_reproduces_and_no_global_state_is_touched():
    before = np.random.get_state()[1].copy()
    texts = [[Sampler(PLAIN, seed, 50, []).draw(logits(seed=step)) for step in range(10)] for seed in (1, 1, 2)]
    streams = [Sampler(PLAIN, seed, 50, []) for seed in (1, 1, 2)]
    long = [[stream.draw(logits(seed=step)) for step in range(20)] for stream in streams]
    assert texts[0] == texts[1]
    assert long[0] == long[1] != long[2]
    np.testing.assert_array_equal(before, np.random.get_state()[1])


def test_temperature_0_and_top_k_1_take_the_most_likely():
    for settings in (dataclasses.replace(PLAIN, temperature=0.0), dataclasses.replace(PLAIN, top_k=1)):
        for seed in range(5):
            assert Sampler(settings, 3, 50, []).draw(logits(seed=seed)) == logits(seed=seed).argmax()


@pytest.mark.parametrize("temperature", [1e-320, 1e-45, 1e-42, 1e-38, 1e-37, 1e-30, 1e-10])
def test_temperatures_that_logits_overflow_by_take_the_most_likely(temperature):
    settings = dataclasses.replace(PLAIN, temperature=temperature, top_p=0.85)
    for seed in range(20):
        assert Sampler(settings, 3, 50, []).draw(logits(seed=seed)) == logits(seed=seed).argmax()


def test_high_temperatures_draw_nothing_that_is_excluded():
    values = np.array([0.0, 1.0, -np.inf, -np.inf], dtype=np.float32)
    sampler = Sampler(dataclasses.replace(PLAIN, temperature=1e38), 3, 4, [])
    assert {sampler.draw(values) for _ in range(100)} == {0, 1}


def test_end_unknown_and_excluded_tokens_are_not_drawn():
    values = np.array([9.0, 8.0, 7.0, 6.0, 99.0], dtype=np.float32)
    settings = GenerationSettings(max_length=9, min_length=2, temperature=0)
    sampler = Sampler(settings, 0, 4, [0], excluded_first=np.array([False, True, False, True]))
    # at first neither the end nor an excluded token, then no end yet, then the end; 4 is never known
    assert [sampler.draw(values) for _ in range(3)] == [2, 1, 0]


def test_values_that_are_no_numbers_are_refused():
    with pytest.raises(CheckpointError, match=r"the model computes values that are no numbers"):
        Sampler(PLAIN, 0, 3, []).draw(np.array([0, np.nan, 1], dtype=np.float32))
