"""Training a recurrent depth: the law of its steps, rates, exact resumes, and plain models that go on as recurrent."""

import shutil
from collections import Counter

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fanformer.errors import ConfigError
from fanformer.loading import load_model
from fanformer.model import FANformerConfig, FANformerForCausalLM
from fanformer.training.configuration import load_preset, resolve
from fanformer.training.depth import DepthLaw, core_parameters, flattest
from fanformer.training.folder import read_records
from fanformer.training.optimizers import create_optimizer, inner_optimizers
from tests.training.conftest import TINY_MODEL
from tests.training.test_resume import forget_after
from tests.training.test_run import figures, same_weights

PARTS = {"num_hidden_layers": 3, "prelude_layers": 1, "core_layers": 1, "coda_layers": 1}
RECURRENT = {f"model.{name}": value for name, value in PARTS.items()}


def test_the_law_draws_1_to_8_with_mean_4_and_small_numbers_often_enough():
    probabilities = flattest(8, 4.0)
    assert len(probabilities) == 8
    assert sum(probabilities) == pytest.approx(1, abs=1e-12)
    assert sum(count * share for count, share in enumerate(probabilities, 1)) == pytest.approx(4, abs=1e-9)
    assert min(probabilities[:2]) >= 0.1
    assert min(probabilities) > 1 / 12
    law = DepthLaw(3, 0.45, 4, probabilities)
    assert {law.steps(step, 0.4499) for step in range(50)} == {1}
    drawn = Counter(law.steps(step, 0.45) for step in range(4000))
    for count, share in enumerate(probabilities, 1):  # five standard deviations of a share of 4,000
        assert drawn[count] / 4000 == pytest.approx(share, abs=5 * (share / 4000) ** 0.5)


@pytest.mark.parametrize(("largest", "mean"), [(2, 1), (4, 2), (8, 8), (3, 2.5)])
def test_every_mean_within_the_range_is_met(largest, mean):
    assert sum(n * share for n, share in enumerate(flattest(largest, mean), 1)) == pytest.approx(mean, abs=1e-6)


def test_steps_are_a_function_of_seed_and_step():
    law, other = (DepthLaw(seed, 0.0, 4, flattest(8, 4)) for seed in (0, 1))
    drawn = [law.steps(step, 0.5) for step in range(40)]
    assert drawn == [law.steps(step, 0.9) for step in range(40)]
    assert drawn != [other.steps(step, 0.5) for step in range(40)]


def test_a_law_without_room_above_the_mean_says_that_it_draws_no_other():
    assert (
        DepthLaw(0, 0.5, 4, flattest(4, 4)).in_words() == "recurrent depth: one step for 50% of the run, then 4 steps"
    )
    assert DepthLaw(0, 0.0, 4, flattest(5, 4)).in_words() == "recurrent depth: 1 to 5 steps, 4 on average"


def test_a_run_begins_with_one_step_then_draws_and_says_so(run):
    result, notebook = run(max_steps=8, eval_steps=2, log_steps=1, one_step_fraction=0.5, **RECURRENT)
    assert "recurrent depth: one step for 50% of the run, then 1 to 8 steps, 4 on average" in notebook.notes
    content = yaml.safe_load((result.folder / "run.yaml").read_text())
    law = content["recurrent_depth"]
    assert law["one_step_fraction"] == 0.5
    assert law["probabilities"] == list(flattest(8, 4))
    measured = {record["step"]: record["num_steps"] for record in read_records(result.folder) if "val_loss" in record}
    assert measured == {2: 1, 4: 1, 6: 4, 8: 4}
    assert load_model(result.folder).model.depth.num_steps == 4


def test_a_plain_run_has_no_law(run):
    result, _ = run(max_steps=2)
    assert "recurrent_depth" not in yaml.safe_load((result.folder / "run.yaml").read_text())
    assert not any("num_steps" in record for record in read_records(result.folder))


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.ci)])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(run, optimizer):
    # the checkpoint after 2 steps lies before the bridge was ever used, that after 5 behind it
    fields = {"max_steps": 7, "save_steps": 1, "log_steps": 1, "keep_last": 9, "optimizer": optimizer, **RECURRENT}
    fields |= {"one_step_fraction": 0.45, "core_learning_rate_scale": 0.5, "eval_steps": 2}
    straight, _ = run("straight", **fields)
    broken, _ = run("broken", **fields)
    for last in (2, 5):
        forget_after(broken.folder, last)
        resumed, _ = run("broken", **fields, resume=True)
        assert figures(resumed.folder) == figures(straight.folder)
        assert same_weights(resumed.folder, straight.folder)


def test_blocks_that_are_computed_again_give_the_same_run(run):
    fields = {"max_steps": 5, "log_steps": 1, "one_step_fraction": 0.2, **RECURRENT}
    kept, _ = run("kept", **fields)
    again, _ = run("again", **fields, recompute="block")
    assert figures(kept.folder) == figures(again.folder)


def plain_folder(run):
    result, _ = run("plain", max_steps=3, **{"model.num_hidden_layers": 3})
    return result.folder


def test_a_plain_folder_goes_on_as_recurrent_and_is_itself_before_training(run, run_config):
    plain = plain_folder(run)
    fields = {"init_from": str(plain), "learning_rate": 1e-9, "max_steps": 2, "one_step_fraction": 1.0}
    config = run_config("on", **fields, **RECURRENT)
    from fanformer.training.run import train

    result = train(config)
    model, before = load_model(result.folder), load_model(plain)
    ids = torch.arange(24)[None]
    assert model.config.recurrence.mean_steps == 4
    with torch.no_grad():
        found, expected = model(ids, num_steps=1).logits, before(ids).logits
    # two steps at a rate of 1e-9 move no weight by more than some 1e-8
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    weights = load_file(result.folder / "model.safetensors")
    assert torch.equal(weights["model.bridge.scale"], torch.ones(32))
    again = config.replace(resume=True, max_steps=3)
    assert train(again).step == 3
    # what has learnt to use its depth goes on with all of it
    further = train(run_config("further", init_from=str(result.folder), max_steps=2))
    with_preset = train(run_config("preset", init_from=str(result.folder), max_steps=2, **RECURRENT))
    for folder in (further.folder, with_preset.folder):
        law = yaml.safe_load((folder / "run.yaml").read_text())["recurrent_depth"]
        assert law["one_step_fraction"] == 0.0
    shutil.rmtree(result.folder)  # a run that goes on knows its own law
    assert train(run_config("preset", init_from=str(result.folder), max_steps=3, resume=True, **RECURRENT)).step == 3


def test_a_depth_that_does_not_fit_the_folder_is_refused(run, run_config):
    from fanformer.training.run import train

    plain = plain_folder(run)
    deeper = RECURRENT | {"model.num_hidden_layers": 4, "model.core_layers": 2}
    with pytest.raises(ConfigError, match=r"does not fit .*: `prelude_layers`, .* must add up .* \(1, 2, 1\) and 3:"):
        train(run_config("deeper", init_from=str(plain), max_steps=1, **deeper))
    recurrent = train(run_config("on", init_from=str(plain), max_steps=1, **RECURRENT)).folder
    other = RECURRENT | {"model.mean_recurrence": 3}
    with pytest.raises(
        ConfigError, match="has a recurrent depth of its own, and preset nano another: leave the preset"
    ):
        train(run_config("other", init_from=str(recurrent), max_steps=1, **other))


@pytest.mark.ci
def test_a_folder_of_other_layers_than_the_preset_goes_on_with_parts_of_its_own(run, corpus, tmp_path):
    from fanformer.training.configuration import resolve_run
    from fanformer.training.run import train

    plain, _ = run("plain", max_steps=2, **{"model.num_hidden_layers": 4})
    asked = {"preset": "nano-recurrent", "init_from": str(plain.folder), "data": str(corpus), "max_steps": 2}
    asked |= {"output_dir": str(tmp_path / "on"), "batch_size": 2, "sequence_length": 16, "eval_tokens": 64}
    asked |= {"device": "cpu", "precision": "float32", "compile": "off", "sample_prompt": ""}
    with pytest.raises(ConfigError, match=r"got \(1, 1, 1\) and 4: .*\(others by --set model\.prelude_layers=N"):
        train(resolve_run(None, asked))
    parts = {"model.prelude_layers": 1, "model.core_layers": 2, "model.coda_layers": 1, "model.injection": "concat"}
    folder = train(resolve_run(None, asked | parts)).folder
    recurrence = load_model(folder).config.recurrence
    assert ([len(part) for part in recurrence[:3]], recurrence.bridge) == ([1, 2, 1], "concat")
    assert train(resolve_run(None, {"output_dir": str(folder), "resume": True, "max_steps": 3})).step == 3


def test_only_the_core_learns_at_its_own_rate():
    torch.manual_seed(0)
    model = FANformerForCausalLM(FANformerConfig(**{**TINY_MODEL, **PARTS}))
    core = core_parameters(model)
    assert core == {id(parameter) for parameter in model.model.layers[1].parameters()}
    for kind in ("adamw", "muon"):
        config = resolve("nano", overrides={"optimizer": kind, "core_learning_rate_scale": 0.5}).optimizer
        plain = resolve("nano", overrides={"optimizer": kind}).optimizer
        rates = [
            {
                id(parameter): group["lr"]
                for part in inner_optimizers(create_optimizer(model, one))
                for group in part.param_groups
                for parameter in group["params"]
            }
            for one in (config, plain)
        ]
        assert {id(parameter) for parameter in model.parameters()} == rates[0].keys()
        for parameter, rate in rates[0].items():
            assert rate == pytest.approx(rates[1][parameter] * (0.5 if parameter in core else 1.0))


@pytest.mark.parametrize("name", ["one_step_fraction", "core_learning_rate_scale"])
def test_a_plain_model_refuses_what_has_no_effect(run, name):
    with pytest.raises(ConfigError, match=f"`{name}` needs a model with recurrent depth, got 0.5 for a plain one"):
        run(**{name: 0.5})


@pytest.mark.parametrize(("name", "base", "third"), [("nano-recurrent", "nano", 1), ("92m-recurrent", "92m", 4)])
def test_recurrent_presets_are_their_base_and_the_bridge(name, base, third):
    models = []
    for preset in (name, base):
        with torch.device("meta"):
            models.append(FANformerForCausalLM(FANformerConfig(**load_preset(preset).model)))
    recurrence = models[0].config.recurrence
    assert [len(part) for part in recurrence[:3]] == [third] * 3
    assert (recurrence.mean_steps, recurrence.largest_steps) == (4, 8)
    bridge = sum(parameter.numel() for parameter in models[0].model.bridge.parameters())
    assert bridge == 2 * models[0].config.hidden_size
    assert models[0].num_parameters() == models[1].num_parameters() + bridge
    runs = [load_preset(one).run for one in (name, base)]
    assert runs[0].items() >= runs[1].items()
