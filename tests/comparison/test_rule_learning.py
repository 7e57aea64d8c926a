import dataclasses
import itertools
import json
import os
import signal
import types

import pytest
import torch

from fanformer.comparison.rule_learning import RECIPES, rule_config, rule_fields, train_rule
from fanformer.comparison.rule_score import accuracy_and_loss, score
from fanformer.comparison.rules import create_task, model_fields
from fanformer.errors import ConfigError, DivergenceError


@pytest.fixture(scope="module")
def addition():
    return create_task("modular-addition", modulus=7, hole_side=1)


@pytest.fixture
def build(tiny_config):
    """Make a model of fresh weights for a task."""

    def make(task, seed=0, **fields):
        from fanformer.model import FANformerForCausalLM

        torch.manual_seed(seed)
        return FANformerForCausalLM(tiny_config(**model_fields(task), **fields))

    return make


@pytest.fixture
def settings(tmp_path):
    """Make the run that trains a task in a folder of its own."""

    def make(task, name="run", **fields):
        return rule_config(task, tmp_path / name, **fields)

    return make


def test_small_rule_is_learned_in_seconds_and_the_curve_says_so(addition, build, settings):
    events = []
    config = settings(addition, max_steps=200, batch_size=48, learning_rate=0.01, eval_steps=50)
    result = train_rule(addition, build(addition), config, events.append)
    assert result.score.train.greedy == 1.0
    assert result.score.train.answers == 48
    assert [point.step for point in result.curve] == [50, 100, 150, 200]
    told = [event for event in events if "test_accuracy" in event.figures]
    assert [event.share for event in told] == [0.25, 0.5, 0.75, 1.0]
    assert [event.figures["test_accuracy"] for event in told] == [point.test_accuracy for point in result.curve]
    assert result.curve[-1].loss < 0.1 < result.curve[0].loss
    assert result.curve[-1].train_accuracy == 1.0
    assert result.curve[-1].test_accuracy == pytest.approx(result.score.test.greedy, abs=1e-6)
    assert (result.steps, result.reached_end, result.model_type) == (200, True, "fanformer")
    assert 0 < result.examples_per_second < 200 * 48 / 0.01


def test_the_curve_s_loss_is_that_of_the_steps_before_it(addition, build, settings):
    """The loss of the first step, before anything is learned, is the mean surprise of the first batch's answers."""
    model = build(addition)
    _, before = accuracy_and_loss(model, addition, addition.train)
    result = train_rule(addition, model, settings(addition, max_steps=1, batch_size=len(addition.train)))
    assert result.curve[0].loss == pytest.approx(before, rel=1e-5)


def test_same_seed_gives_the_same_weights_bit_for_bit_and_another_does_not(addition, build, settings):
    weights = {}
    for run, seed in (("first", 3), ("again", 3), ("other", 4)):
        model = build(addition, dropout=0.1)
        torch.manual_seed(hash(run) % 1000)  # the caller's generator must not matter
        config = settings(addition, run, max_steps=5, batch_size=20, seed=seed, optimizer="muon")
        train_rule(addition, model, config)
        weights[run] = model.state_dict()
    assert all(torch.equal(weights["first"][name], weights["again"][name]) for name in weights["first"])
    assert any(not torch.equal(weights["first"][name], weights["other"][name]) for name in weights["first"])


def test_a_training_that_is_stopped_goes_on_to_the_same_bits(addition, build, settings):
    def stop(event):
        if event.kind == "step" and event.figures["step"] == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    fields = {"max_steps": 12, "batch_size": 20, "optimizer": "muon"}
    whole, parts = build(addition, dropout=0.1), build(addition, dropout=0.1)
    expected = train_rule(addition, whole, settings(addition, "whole", **fields))
    stopped = train_rule(addition, parts, settings(addition, "parts", **fields), stop)
    assert (stopped.stopped_by, stopped.reached_end) == ("SIGTERM", False)
    assert stopped.steps < 12
    again = build(addition, seed=9, dropout=0.1)  # its weights come from the checkpoint
    result = train_rule(addition, again, settings(addition, "parts", resume=True, **fields))
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), again.parameters(), strict=True))
    assert result.score == expected.score
    assert [point.loss for point in result.curve] == [point.loss for point in expected.curve]


def test_training_any_causal_model_of_transformers_counts_its_blocks(addition, settings):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, **model_fields(addition), tie_word_embeddings=True))
    result = train_rule(addition, model, settings(addition, epochs=2, batch_size=16))
    assert (result.model_type, result.steps) == ("llama", 6)
    assert result.block_parameters == 4 * 32 * 32 + 3 * 32 * 48 + 3 * 32
    assert result.parameters == result.block_parameters + 9 * 32
    assert not model.training


def test_result_survives_json_and_its_score_is_that_of_the_weights(addition, build, settings):
    model = build(addition)
    result = train_rule(addition, model, settings(addition, max_steps=3, batch_size=16))
    again = json.loads(json.dumps(result.to_dict()))
    assert again["curve"] == [dataclasses.asdict(point) for point in result.curve]
    assert create_task(again["task"].pop("name"), **again["task"]) == addition
    assert score(model, addition) == result.score


def test_time_ends_a_training_and_the_result_says_so(addition, build, settings, monkeypatch):
    from fanformer.training import schedule

    reads = itertools.count()
    # a clock of its own, which no busy machine holds up: a hundredth of a second passes between two looks at it
    monkeypatch.setattr(schedule, "time", types.SimpleNamespace(monotonic=lambda: next(reads) / 100))
    result = train_rule(addition, build(addition), settings(addition, max_time=3.0, batch_size=16))
    assert result.reached_end
    assert result.curve[-1].learning_rate < 1e-3 < result.curve[0].learning_rate


def test_a_limit_of_time_beside_steps_ends_a_training_before_its_end(addition, build, settings):
    result = train_rule(addition, build(addition), settings(addition, max_steps=10**6, max_time=0.3, batch_size=16))
    assert not result.reached_end
    assert 0 < result.steps < 10**6


def test_loss_that_is_not_finite_ends_training_in_one_line(addition, build, settings):
    model = build(addition)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("inf"))
    config = settings(addition, max_steps=30, batch_size=16, learning_rate=0.5, max_skipped_steps=3)
    with pytest.raises(DivergenceError) as caught:
        train_rule(addition, model, config)
    assert caught.value.reason.startswith("step 3 left out: loss nan, gradient norm nan, not finite in `")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"max_steps": None},
            "the length of a training must be given, got none: set max_steps, epochs, max_time.",
        ),
        (
            {"max_steps": 5, "epochs": 1.0},
            "the length of a run is set once, got max_steps and epochs: keep one of them.",
        ),
        ({"learning_rate": -1.0}, "`learning_rate` must be above 0, got -1.0."),
        ({"eval_steps": 0}, "`eval_steps` must be above 0, got 0."),
        ({"learning_rates": 1.0}, "`learning_rates` is not a setting of rule learning: did you mean `learning_rate`?"),
    ],
    ids=["no length", "two lengths", "rate", "evaluations", "unknown"],
)
def test_wrong_setting_is_refused_in_one_line(fields, message):
    with pytest.raises(ConfigError) as caught:
        rule_config(create_task("periodic"), "nowhere", **fields)
    assert str(caught.value) == message


def test_model_that_is_too_small_for_the_task_is_refused(build, settings):
    small, large = create_task("modular-addition", modulus=7, hole_side=1), create_task("periodic")
    with pytest.raises(ConfigError) as caught:
        train_rule(large, build(small), settings(large, max_steps=1))
    assert str(caught.value) == (
        "`vocab_size` of the model must be at least 32 for the rule periodic, got 9: build it with model_fields(task)."
    )


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipe_gives_way_to_fields_that_are_given(name):
    task = create_task(name)
    recipe = rule_fields(task)
    assert all(recipe[key] == value for key, value in RECIPES[name].items())
    assert recipe["eval_steps"] == recipe["max_steps"] // 20
    shorter = rule_fields(task, max_steps=7, learning_rate=0.5)
    assert (shorter["max_steps"], shorter.get("max_time"), shorter["learning_rate"]) == (7, None, 0.5)
    assert "max_steps" not in rule_fields(task, max_time=60.0)
