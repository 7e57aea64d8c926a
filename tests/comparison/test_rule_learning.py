import dataclasses
import json

import pytest
import torch

from fanformer.comparison.rule_learning import RECIPES, RuleSettings, rule_settings, train_rule
from fanformer.comparison.rule_score import score
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


def test_small_rule_is_learned_in_seconds_and_the_curve_says_so(addition, build):
    points = []
    settings = RuleSettings(max_steps=200, batch_size=48, learning_rate=0.01, records=4)
    result = train_rule(addition, build(addition), settings, lambda point, progress: points.append((point, progress)))
    assert result.score.train.greedy == 1.0
    assert result.score.train.answers == 48
    assert [point.step for point in result.curve] == [50, 100, 150, 200]
    assert [progress for _, progress in points] == [0.25, 0.5, 0.75, 1.0]
    assert [point for point, _ in points] == result.curve
    assert result.curve[-1].loss < 0.1 < result.curve[0].loss
    assert result.curve[-1].train_accuracy == 1.0
    assert result.curve[-1].test_accuracy == result.score.test.greedy
    assert (result.steps, result.reached_end, result.model_type) == (200, True, "fanformer")
    assert result.examples_per_second == pytest.approx(200 * 48 / result.seconds)


def test_same_seed_gives_the_same_weights_bit_for_bit_and_another_does_not(addition, build):
    weights = {}
    for run, seed in (("first", 3), ("again", 3), ("other", 4)):
        model = build(addition, dropout=0.1)
        torch.manual_seed(hash(run) % 1000)  # the caller's generator must not matter
        train_rule(addition, model, RuleSettings(max_steps=5, batch_size=20, seed=seed, optimizer="muon"))
        weights[run] = model.state_dict()
    assert all(torch.equal(weights["first"][name], weights["again"][name]) for name in weights["first"])
    assert any(not torch.equal(weights["first"][name], weights["other"][name]) for name in weights["first"])


def test_training_any_causal_model_of_transformers_counts_its_blocks(addition):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, **model_fields(addition), tie_word_embeddings=True))
    result = train_rule(addition, model, RuleSettings(epochs=2, batch_size=16))
    assert (result.model_type, result.steps) == ("llama", 6)
    assert result.block_parameters == 4 * 32 * 32 + 3 * 32 * 48 + 3 * 32
    assert result.parameters == result.block_parameters + 9 * 32
    assert not model.training


def test_result_survives_json_and_its_score_is_that_of_the_weights(addition, build):
    model = build(addition)
    result = train_rule(addition, model, RuleSettings(max_steps=3, batch_size=16))
    again = json.loads(json.dumps(result.to_dict()))
    assert again["curve"] == [dataclasses.asdict(point) for point in result.curve]
    assert create_task(again["task"].pop("name"), **again["task"]) == addition
    assert score(model, addition) == result.score


def test_time_ends_a_training_and_the_result_says_so(addition, build):
    result = train_rule(addition, build(addition), RuleSettings(max_steps=10**6, max_seconds=0.3, batch_size=16))
    assert not result.reached_end
    assert 0 < result.steps < 10**6
    result = train_rule(addition, build(addition), RuleSettings(max_seconds=0.3, batch_size=16, records=3))
    assert result.reached_end
    assert len(result.curve) == 3
    assert result.curve[-1].learning_rate < 1e-3 < result.curve[0].learning_rate


def test_loss_that_is_not_finite_ends_training_in_one_line(addition, build):
    model = build(addition)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("inf"))
    with pytest.raises(DivergenceError) as caught:
        train_rule(addition, model, RuleSettings(max_steps=3, batch_size=16, learning_rate=0.5))
    assert str(caught.value) == (
        "the loss of step 1 of the rule modular-addition is nan with a gradient norm of nan: both must stay finite; "
        "use a lower learning_rate than 0.5."
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (RuleSettings, "the length of a training must be given, got none: set max_steps, epochs or max_seconds."),
        (
            lambda: RuleSettings(max_steps=5, epochs=1.0),
            "the length of a run is set once, got max_steps and epochs: keep one of them.",
        ),
        (lambda: RuleSettings(max_steps=5, learning_rate=-1.0), "`learning_rate` must be above 0, got -1.0."),
        (
            lambda: RuleSettings(max_steps=5, records=0),
            "`records` must be at least 1, got 0: the last step is always recorded.",
        ),
        (
            lambda: rule_settings(create_task("periodic"), learning_rates=1.0),
            "`learning_rates` is not a setting of rule learning: did you mean `learning_rate`?",
        ),
    ],
    ids=["no length", "two lengths", "rate", "records", "unknown"],
)
def test_wrong_setting_is_refused_in_one_line(make, message):
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value) == message


def test_model_that_is_too_small_for_the_task_is_refused(build):
    small, large = create_task("modular-addition", modulus=7, hole_side=1), create_task("periodic")
    with pytest.raises(ConfigError) as caught:
        train_rule(large, build(small), RuleSettings(max_steps=1))
    assert str(caught.value) == (
        "`vocab_size` of the model must be at least 32 for the rule periodic, got 9: build it with model_fields(task)."
    )


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipe_gives_way_to_fields_that_are_given(name):
    task = create_task(name)
    recipe = rule_settings(task)
    assert all(getattr(recipe, key) == value for key, value in RECIPES[name].items())
    shorter = rule_settings(task, max_steps=7, learning_rate=0.5)
    assert (shorter.max_steps, shorter.max_seconds, shorter.learning_rate) == (7, None, 0.5)
    assert rule_settings(task, max_seconds=60.0).max_steps is None
