import json
import math
import sys

import pytest
import torch

from fanformer.comparison.compare import Comparison, Outcome
from fanformer.comparison.entries import write_comparison
from fanformer.comparison.ledger import read_ledger
from fanformer.comparison.rule_learning import rule_config, train_rule
from fanformer.comparison.rule_score import Accuracy, RuleScore, score
from fanformer.comparison.rules import create_task, model_fields
from fanformer.comparison.series import LIMIT, SOURCES, SeriesContinuation, Source
from fanformer.comparison.series_score import Horizon, continue_series
from fanformer.comparison.trial import Result, Trial
from fanformer.errors import ConfigError, DataError, DependencyError

PERIOD = 12
SIZES = {
    "source": "wave",
    "held_out": 84,
    "context": 24,
    "trained_horizon": 12,
    "horizon": 36,
    "num_train_rows": 400,
    "start_every": 5,
}


@pytest.fixture
def wave(monkeypatch):
    """A pure sine of 240 values, 20 periods of 12; returns the values, which a test may change."""
    values = torch.sin(2 * math.pi * (torch.arange(240, dtype=torch.float64) + 0.5) / PERIOD)
    monkeypatch.setitem(SOURCES, "wave", Source(lambda: values, {"period": PERIOD}))
    return values


def test_tokens_stand_for_values_to_half_a_step_and_the_outermost_for_what_lies_beyond(wave):
    task = create_task("series", **SIZES)
    every = torch.arange(task.levels)
    assert torch.equal(task.encode(task.decode(every)), every)
    values = torch.linspace(-LIMIT, LIMIT, 1001, dtype=torch.float64)[:-1]
    assert (task.decode(task.encode(values)) - values).abs().max() <= LIMIT / task.levels + 1e-12  # one rounding
    assert task.encode(torch.tensor([-50.0, 50.0])).tolist() == [0, task.levels - 1]


def test_no_training_row_touches_the_held_out_part_and_no_test_row_the_part_before_it(wave):
    task = create_task("series", **SIZES)
    length = task.train.input_ids.shape[1]
    assert length == 36
    assert 0 <= task.train.keys.min() < task.train.keys.max() == task.first_held_out - length == 240 - 84 - 36
    assert task.test.keys.tolist() == list(range(156, 240 - 60 + 1, 5))
    changed = create_task("series", **SIZES)
    wave[156:] = 7.0
    assert torch.equal(changed.train.input_ids, task.train.input_ids)  # nor do mean and standard deviation know it
    assert not torch.equal(changed.test.input_ids, task.test.input_ids)


def test_rows_are_the_series_at_their_starts_and_those_of_training_scaled_and_shifted(wave):
    task = create_task("series", **SIZES)
    for row, start in zip(task.test.input_ids, task.test.keys.tolist(), strict=True):
        assert torch.equal(row, task.encode(task.values[start : start + 60]))
    for row, start in zip(task.train.input_ids, task.train.keys.tolist(), strict=True):
        pair = torch.stack((task.decode(row), task.values[start : start + 36]))
        assert torch.corrcoef(pair)[0, 1] > 0.999  # what the steps leave of a straight line
    assert len({tuple(row) for row in task.train.input_ids.tolist()}) > 390
    assert torch.equal(task.train.labels[:, :-1], task.train.input_ids[:, 1:])
    assert set(task.train.labels[:, -1].tolist()) == {-100}


def test_skipped_values_are_in_no_row_and_move_the_cut(wave):
    task = create_task("series", **SIZES, skipped=84)
    wave[156:] = math.nan
    assert task.first_held_out == 240 - 2 * 84
    assert task.values.isfinite().all()
    assert int(task.test.keys.max()) + 60 <= 156


def test_naive_forecasts_of_a_sine_err_as_the_formula_says(wave):
    task = create_task("series", **SIZES)
    said, truth = task.baselines(), task.test_values[:, task.context :]
    assert list(said) == ["persistence", "a period ago", "the mean"]
    assert said["the mean"].shape == truth.shape
    assert not said["the mean"].any()
    torch.testing.assert_close(said["a period ago"], truth)  # float64, summed the same way
    size = float(1 / wave[:156].std())
    last = task.test.keys[:, None] + 23 + 0.5  # sin(x + s) - sin(x) = 2 sin(s / 2) cos(x + s / 2)
    steps = torch.arange(1, 37, dtype=torch.float64)
    turn = 2 * math.pi / PERIOD
    expected = 2 * size * (torch.sin(turn * steps / 2) * torch.cos(turn * (last + steps / 2)))
    torch.testing.assert_close(truth - said["persistence"], expected, atol=1e-9, rtol=0)  # sines of large angles


def test_continuation_with_a_cache_is_that_of_reading_everything_again(wave, tiny_model):
    task = create_task("series", **SIZES)
    model = tiny_model(**model_fields(task)).train()
    tokens = task.test.input_ids[:, : task.context]
    said = continue_series(model, task)
    assert model.training
    model.eval()
    for _ in range(task.horizon):
        with torch.no_grad():
            chances = model(tokens).logits[:, -1].softmax(-1)
        below = chances.cumsum(-1)
        median = (below >= 0.5).int().argmax(-1)
        tokens = torch.cat((tokens, median[:, None]), -1)
    assert torch.equal(said, task.decode(tokens[:, task.context :]))


@pytest.mark.ci
def test_model_trained_on_a_sine_beats_persistence_beyond_the_window_a_fresh_one_not(wave, tiny_model, tmp_path):
    task = create_task("series", **SIZES)
    torch.manual_seed(0)
    model = tiny_model(**model_fields(task))
    fresh = score(model, task).horizon
    config = rule_config(task, tmp_path, max_steps=300, batch_size=16, learning_rate=0.005, eval_steps=150)
    result = train_rule(task, model, config)
    learned = result.score.horizon
    naive = learned.beyond(learned.baselines["persistence"])
    assert fresh.beyond(fresh.errors) > 0.7 * naive
    assert learned.beyond(learned.errors) < 0.5 * naive
    stored = json.loads(json.dumps(result.score.to_dict()))
    assert Horizon(**stored["horizon"]) == result.score.horizon
    figures = result.score.figures()
    assert figures["error_beyond_window"] == sum(learned.errors[12:]) / 24
    assert figures["error_within_window"] == sum(learned.errors[:12]) / 12


def test_missing_extra_is_one_line_and_only_when_the_values_are_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "pmdarima", None)
    monkeypatch.delitem(sys.modules, "pmdarima.datasets", raising=False)
    task = create_task("series")
    assert model_fields(task)["vocab_size"] == 100
    with pytest.raises(DependencyError) as caught:
        _ = task.train
    assert str(caught.value) == (
        "the rule series needs the package `pmdarima`, which is not installed: pip install 'fanformer[series]'"
    )


def test_other_values_than_those_that_results_are_of_are_refused(wave, monkeypatch):
    monkeypatch.setitem(SOURCES, "wave", Source(lambda: wave, {"period": PERIOD}, "0123456789ab"))
    with pytest.raises(DataError, match=r"the series wave must be the one whose digest is 0123456789ab, got [0-9a-f]"):
        _ = create_task("series", **SIZES).values


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        (
            {"source": "deman"},
            ConfigError,
            "`source` of the rule series must be one that exists, got 'deman': did you mean `demand`?",
        ),
        (
            {"context": 11},
            ConfigError,
            "`context` of the rule series must be at least 12, the longest period of wave, got 11: a naive forecast "
            "repeats it.",
        ),
        (
            {"horizon": 12},
            ConfigError,
            "`trained_horizon` < `horizon` and `context` + `horizon` <= `held_out` must hold in the rule series, got "
            "12, 12, 24 and 84: a test row lies in the held-out part and is longer than any training row.",
        ),
        (
            {"skipped": 130},
            DataError,
            "the series wave must have at least 36 values before the held-out part, got 26: lower held_out, skipped or "
            "context.",
        ),
        (
            {"levels": 1},
            ConfigError,
            "`levels` of the rule series must be an integer from 2 on, got 1.",
        ),
    ],
    ids=["source", "context", "horizon", "short", "levels"],
)
def test_wrong_series_is_refused_in_one_line(wave, fields, kind, message):
    with pytest.raises(kind) as caught:
        _ = create_task("series", **{**SIZES, **fields}).values
    assert str(caught.value) == message


def test_demand_is_the_series_that_is_described():
    pytest.importorskip("pmdarima")
    task = SeriesContinuation()
    assert len(task.values) == 12 * 7 * 12
    assert float(task.values.abs().max()) < LIMIT
    assert create_task(**task.to_dict()) == task
    truth = task.test_values[:, task.context :]
    errors = {name: round(float((said - truth).abs().mean()), 2) for name, said in task.baselines().items()}
    assert errors == {"persistence": 1.12, "a day ago": 0.46, "a week ago": 0.08, "the mean": 0.85}


def test_the_ledger_keeps_the_errors_of_every_step_over_the_seeds(tmp_path):
    asked = {"architectures": ["fanformer@60k"], "rule": "series", "seeds": [0, 1], "learning_rates": [0.1]}
    comparison, outcomes = Comparison.from_fields(asked), []
    for seed, errors in enumerate(([0.25, 0.25, 0.5], [0.25, 0.75, 1.0])):
        horizon = Horizon(1, errors, {"persistence": [1.0, 2.0, 3.0], "a day ago": [0.5] * 3})
        scored = RuleScore(Accuracy(0.5, 0.5, 9), Accuracy(0.5, 0.5, 9), horizon=horizon)
        figures = {"loss": 1.0, **scored.figures(), "parameters": 9, "parameters_without_embeddings": 8}
        result = Result("finished", "", figures, [{"step": 1, "loss": 1.0}], {"rule": {"score": scored.to_dict()}})
        outcomes.append(Outcome(Trial("fanformer@60k", 0.1, seed, {}), 0, result))
    write_comparison(tmp_path, "hours", "fanformer compare", comparison, outcomes, None)
    (entry,) = read_ledger(tmp_path)
    assert [(point["step"], point["error"]) for point in entry.curve] == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert [(point["low"], point["high"]) for point in entry.curve[:2]] == [(0.25, 0.25), (-2.67655, 3.67655)]
    baselines = {"persistence": [1.0, 2.0, 3.0], "a day ago": [0.5] * 3}
    assert entry.details["horizon"] == {"trained_steps": 1, "baselines": baselines}
    assert entry.result["error_beyond_window"].value == pytest.approx(0.625)
