"""Who counts in a round and how much: the mean of honest updates, and what false ones can do to it."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch

from fanformer.community.aggregation import Defence, aggregate, as_verdict, is_gate_open
from fanformer.community.updates import Source, Update
from fanformer.errors import ConfigError

LIKE = {"a": (40, 30), "b": (50,)}
SIGNAL = {name: torch.randn(shape, generator=torch.Generator().manual_seed(9)) for name, shape in LIKE.items()}


def update(number, tokens=100, factor=1.0, noise=0.5, **fields):
    generator = torch.Generator().manual_seed(number)
    tensors = {name: factor * (SIGNAL[name] + noise * torch.randn(shape, generator=generator))
               for name, shape in LIKE.items()}  # fmt: skip
    return Update(tensors, 0, "", f"member-{number}", tokens, 3.0, **fields)


def joined(updates, **defence):
    return aggregate(updates, LIKE, Defence(**defence))


def weighted_mean(updates, weights):
    total = sum(weights)
    return {
        name: sum(weight / total * one.tensors[name] for one, weight in zip(updates, weights, strict=True))
        for name in LIKE
    }


def close(one, two):
    return all(torch.allclose(one[name], two[name], atol=1e-6) for name in LIKE)


def test_few_updates_give_the_mean_weighed_by_tokens():
    updates = [update(0, 100), update(1, 150), update(2, 50)]
    found = joined(updates)
    assert close(found.tensors, weighted_mean(updates, [100, 150, 50]))
    assert [verdict.weight for verdict in found.verdicts] == pytest.approx([1 / 3, 1 / 2, 1 / 6])
    assert [verdict.reason for verdict in found.verdicts] == [""] * 3


def test_a_slow_member_weighs_little_and_no_member_can_lie_itself_into_a_majority():
    updates = [update(0, 1000), update(1, 1000), update(2, 100), update(3, 10**9)]
    weights = [verdict.weight for verdict in joined(updates).verdicts]
    assert weights[2] == pytest.approx(weights[0] / 10)
    assert weights[3] == pytest.approx(2 * weights[0])
    assert max(weights) < 0.5


@pytest.mark.parametrize("method", ["multi-krum", "trimmed-mean", "mean"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_dropped_and_the_others_are_joined(method, value):
    updates = [update(number) for number in range(7)]
    honest = joined([one for one in updates if one.member != "member-2"], method=method).tensors
    updates[2].tensors["b"][1] = value
    found = joined(updates, method=method)
    assert (found.verdicts[2].counted, found.verdicts[2].reason) == (False, "not finite")
    assert close(found.tensors, honest)


def test_tensors_that_were_not_asked_for_are_dropped():
    less, other = update(0), update(1)
    del less.tensors["b"]
    other.tensors["a"] = other.tensors["a"].T
    found = joined([less, other, update(2)])
    assert found.verdicts[0].reason == "malformed: 1 tensors, other than the 2 that were asked for"
    assert found.verdicts[1].reason == "malformed: `a` has shape (30, 40), expected (40, 30)"
    assert close(found.tensors, update(2).tensors)
    assert joined([less]).tensors is None
    assert joined([]).tensors is None


@pytest.mark.parametrize("others", [1, 2, 3])
def test_norms_are_clipped_against_the_median_also_of_two(others):
    updates = [*(update(number) for number in range(others)), update(9, factor=100)]
    found = joined(updates)
    norms = [verdict.norm * verdict.scale for verdict in found.verdicts]
    assert norms[-1] <= 2 * max(norms[:-1]) * (1 + 1e-9)
    assert found.verdicts[-1].reason.startswith("clipped: norm ")
    scales = [verdict.scale for verdict in found.verdicts]
    assert scales[:-1] == [1.0] * others
    mine = [{name: scale * one.tensors[name] for name in LIKE} for one, scale in zip(updates, scales, strict=True)]
    assert close(found.tensors, {name: sum(one[name] for one in mine) / len(mine) for name in LIKE})


@pytest.mark.parametrize(
    ("factor", "noise"), [(-1.0, 0.5), (1.0, 9.0), (100.0, 0.5)], ids=["flipped", "noise", "scaled"]
)
def test_multi_krum_drops_the_one_of_five_that_lies_far_from_the_others(factor, noise):
    updates = [update(number) for number in range(5)]
    assert all(verdict.counted for verdict in joined(updates).verdicts)  # nobody stands out
    updates[3] = update(3, factor=factor, noise=noise)
    found = joined(updates)
    assert [verdict.counted for verdict in found.verdicts] == [True, True, True, False, True]
    assert "far from the others: " in found.verdicts[3].reason
    assert close(found.tensors, weighted_mean([one for one in updates if one is not updates[3]], [1] * 4))


def test_multi_krum_without_margin_drops_as_many_as_may_be_false():
    updates = [update(number) for number in range(10)]
    assert sum(not verdict.counted for verdict in joined(updates, krum_margin=0.0).verdicts) == 2
    assert sum(not verdict.counted for verdict in joined(updates, krum_margin=9.0).verdicts) == 0


def test_multi_krum_s_scores_are_those_of_the_paper():
    updates = [update(number, noise=0.2 + 0.3 * number) for number in range(6)]
    flat = np.stack([np.concatenate([one.tensors[name].numpy().ravel() for name in LIKE]) for one in updates])
    distances = ((flat[:, None] - flat[None]) ** 2).sum(-1)
    scores = [np.sort(np.delete(distances[number], number))[: 6 - 1 - 2].sum() for number in range(6)]
    found = joined(updates, krum_margin=0.0, largest_norm=1e9)
    assert [verdict.counted for verdict in found.verdicts].index(False) == int(np.argmax(scores))


def test_the_trimmed_mean_leaves_out_the_ends_of_every_coordinate():
    tokens = [100, 50, 100, 200, 100, 80]
    updates = [update(number, tokens[number]) for number in range(6)]
    found = joined(updates, method="trimmed-mean", largest_norm=1e9)
    for name in LIKE:
        stacked = np.stack([one.tensors[name].numpy().ravel() for one in updates])
        expected = []
        for column in stacked.T:
            kept = np.argsort(column)[1:-1]
            weights = np.array(tokens, dtype=float)[kept]
            expected.append((column[kept] * weights).sum() / weights.sum())
        assert np.allclose(found.tensors[name].numpy().ravel(), expected, atol=1e-6)


def test_four_updates_are_too_few_to_be_told_apart():
    updates = [update(0), update(1), update(2), update(3, factor=-1.0)]
    assert all(verdict.counted for verdict in joined(updates).verdicts)


def test_large_tensors_are_joined_in_pieces(monkeypatch):
    updates = [update(number) for number in range(5)]
    for method in ("multi-krum", "trimmed-mean"):
        whole = joined(updates, method=method).tensors
        monkeypatch.setattr("fanformer.community.aggregation._COORDINATES", 7)
        pieces = joined(updates, method=method).tensors
        monkeypatch.undo()
        assert close(whole, pieces)


def test_a_verdict_is_plain_json_both_ways():
    [verdict] = joined([update(0, sources=(Source("text", "CC0", 9),))]).verdicts
    assert as_verdict(json.loads(json.dumps(asdict(verdict)))) == verdict


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"method": "median"}, "`method` must be one of multi-krum, trimmed-mean, mean, got 'median'"),
        ({"largest_share": 0.5}, r"`largest_share` must be in \[0, 0.5\), got 0.5"),
        ({"largest_norm": 0.5}, "`largest_norm` must be a finite number from 1 on, got 0.5"),
        ({"robust_from": 2}, "`robust_from` must be at least 3"),
    ],
)
def test_a_defence_that_is_none_is_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        Defence(**fields)


def test_the_gate_is_open_for_what_is_not_much_worse_than_the_best():
    assert is_gate_open(3.0, None, 0.05)
    assert is_gate_open(3.1, 3.0, 0.05)
    assert not is_gate_open(3.2, 3.0, 0.05)
    assert not is_gate_open(math.nan, None, 0.05)
    assert not is_gate_open(math.inf, 3.0, 0.05)
