import re

import pytest
import yaml

from fanformer.errors import ConfigError
from fanformer.training.configuration import (
    load_preset,
    parse_count,
    parse_duration,
    parse_setting,
    preset_names,
    resolve,
    resolve_run,
)
from fanformer.training.fields import FIELDS, MachineConfig, RunConfig


def test_every_preset_resolves_and_gives_a_valid_model():
    from fanformer.model import FANformerConfig

    assert preset_names() == ["1b", "92m", "92m-recurrent", "92m-tuned", "nano", "nano-recurrent"]
    for name in preset_names():
        config = resolve(name)
        assert config.preset == name
        FANformerConfig(**config.model)


def test_a_run_from_before_each_kind_of_layer_had_a_rank_keeps_its_model(tmp_path):
    """Its preset means another model now; what it was is in the part that says what was built."""
    from fanformer.model import FANformerConfig

    words = {"cola_rank_ratio": 0.75, "cola_rank": None, "cola_layers": "readers", "fan_placement": "ffn"}
    built = {**words, "intermediate_size": 896, "hidden_size": 512, "model_type": "fanformer", "dtype": "float32"}
    run = {"configuration": {"preset": "92m", "model": {"dropout": 0.0}, "seed": 3}, "model": built}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(run))
    config = resolve(config_file=file, overrides={"model.fan_ratio": 0.2})
    assert (config.preset, config.seed) == ("92m", 3)
    model = FANformerConfig(**config.model)
    assert (model.qkv_rank, model.o_rank, model.intermediate_size, model.fan_multiple) == (384, None, 896, 1)
    assert (model.dropout, model.fan_ratio) == (0.0, 0.2)


def test_later_sources_win_over_earlier_ones(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("batch_size: 5\nseed: 7\nmodel: {fan_ratio: 0.2, num_hidden_layers: 3}\n")
    config = resolve("nano", file, {"seed": 8, "model.fan_ratio": 0.25})
    assert (config.batch.batch_size, config.seed) == (5, 8)
    assert config.model["fan_ratio"] == 0.25
    assert config.model["num_hidden_layers"] == 3
    assert config.model["hidden_size"] == load_preset("nano").model["hidden_size"]


def test_a_length_that_is_given_replaces_the_preset_s_own():
    assert resolve("nano").length.max_time == 300
    assert resolve("nano", overrides={"max_steps": 3}).length.max_time is None
    both = resolve("nano", overrides={"max_steps": 3, "max_time": 60.0})
    assert (both.length.max_steps, both.length.max_time) == (3, 60.0)


def test_a_resolved_configuration_written_to_yaml_resolves_to_itself(tmp_path):
    import yaml

    config = resolve("nano", overrides={"model.fan_ratio": 0.1, "max_steps": 3})
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"configuration": config.to_dict(), "versions": {}}))
    assert resolve(config_file=file) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"lerning_rate": 1.0},
            "`lerning_rate` is not a field of the run configuration: did you mean `learning_rate`?",
        ),
        ({"preset": "nanoo"}, "preset must be one that exists, got 'nanoo': did you mean `nano`?"),
        ({"seed": "x"}, "`seed` must be int, got 'x'."),
        ({"resume": 1}, "`resume` must be bool, got 1."),
        ({"batch_size": True}, "`batch_size` must be int, got True."),
        ({"optimizer": "sgd"}, "`optimizer` must be one of adamw, muon, got 'sgd'."),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0."),
        ({"max_steps": 0}, "`max_steps` must be above 0, got 0."),
        ({"learning_rate": 0.0}, "`learning_rate` must be above 0, got 0.0."),
        ({"beta2": 1.0}, "`beta2` must be in [0, 1), got 1.0."),
        ({"muon_momentum": -0.1}, "`muon_momentum` must be in [0, 1), got -0.1."),
        ({"max_grad_norm": -1.0}, "`max_grad_norm` must be at least 0, got -1.0."),
        ({"weight_decay": -0.1}, "`weight_decay` must be at least 0, got -0.1."),
        ({"max_rollbacks": -1}, "`max_rollbacks` must be at least 0, got -1."),
        ({"held_out_fraction": 1.0}, "`held_out_fraction` must be between 0 and 1, got 1.0."),
        ({"warmup_fraction": 0.7, "decay_fraction": 0.7}, "must add up to at most 1, got 0.7 and 0.7"),
        ({"max_steps": 3, "tokens": 5}, "the length of a run is set once, got max_steps and tokens"),
        ({"batch_size": 6, "micro_batch_size": 4}, "must be a multiple of `micro_batch_size`, got 6 and 4"),
        ({"resume": True, "overwrite": True}, "`resume` and `overwrite` exclude each other"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_bad_settings_are_named_with_what_was_expected(overrides, message):
    with pytest.raises(ConfigError) as caught:
        resolve("nano", overrides=overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_broken_configuration_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match="configuration file not found: /"):
        resolve(config_file=tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    with pytest.raises(ConfigError, match="is not YAML"):
        resolve(config_file=broken)
    broken.write_text("- 1\n")
    with pytest.raises(ConfigError, match="must hold a mapping of fields to values, got list"):
        resolve(config_file=broken)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("5m", 300), ("2h30m", 9000), ("1d", 86400), ("1.5s", 1.5)]
)
def test_durations_are_read(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "count"), [("500000", 500_000), ("500k", 500_000), ("3M", 3_000_000), ("2B", 2 * 10**9)]
)
def test_counts_are_read(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "soon", "5x", "-3m"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ConfigError, match="a duration must look like"):
        parse_duration(text)


def test_what_is_no_count_is_refused():
    with pytest.raises(ConfigError, match="a count must look like"):
        parse_count("many")


def test_settings_are_yaml_and_plain_exponents_are_numbers():
    assert parse_setting("learning_rate=1e-3") == ("learning_rate", 0.001)
    assert parse_setting("model.o_rank=null") == ("model.o_rank", None)
    assert parse_setting("data=a=b.txt") == ("data", "a=b.txt")
    with pytest.raises(ConfigError, match="a setting must be key=value, got 'x'"):
        parse_setting("x")


@pytest.mark.parametrize("value", ["Q: why? A:", "@x", "[", "2026-13-45"])
def test_a_setting_that_is_not_yaml_is_named(value):
    with pytest.raises(ConfigError, match=r"the value of `sample_prompt` must be YAML, got '.*': put quotes around it"):
        parse_setting(f"sample_prompt={value}")


@pytest.mark.parametrize("source", ["file", "setting"])
def test_a_file_and_a_setting_are_read_as_flags_are(tmp_path, source):
    written = {"tokens": "3M", "max_time": "5m", "learning_rate": "3e-4", "compile": "on"}
    if source == "file":
        (tmp_path / "c.yaml").write_text("".join(f"{name}: {value}\n" for name, value in written.items()))
        config = resolve(config_file=tmp_path / "c.yaml")
    else:
        config = resolve(overrides=dict(parse_setting(f"{name}={value}") for name, value in written.items()))
    assert (config.length.tokens, config.length.max_time) == (3_000_000, 300.0)
    assert (config.optimizer.learning_rate, config.machine.compile) == (3e-4, "on")
    with pytest.raises(ConfigError, match="a count must look like 500000, 500k, 3M or 2B, got 'many'"):
        resolve(overrides={"tokens": "many"})


def test_every_field_says_what_it_is():
    assert all(field.metadata["help"] for field in FIELDS.values())


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", -1), ("seed", 2**33), ("epochs", float("nan")), ("epochs", float("inf")), ("learning_rate", float("inf")),
     ("learning_rate", float("nan")), ("max_time", float("inf")), ("epochs", 1e300), ("max_steps", 10**30)],
)  # fmt: skip
def test_numbers_that_no_run_can_have_are_refused(name, value):
    with pytest.raises(ConfigError, match=rf"`{name}` must be .*, got {re.escape(str(value))}\."):
        resolve("nano", overrides={name: value})


@pytest.mark.parametrize(
    ("before", "given", "after"),
    [
        ({"tokens": 5000}, {"max_steps": 7}, {"max_steps": 7}),
        ({"max_steps": 7}, {"epochs": 2.0}, {"epochs": 2.0}),
        ({"max_steps": 7, "max_time": 60.0}, {"tokens": 5000}, {"tokens": 5000, "max_time": 60.0}),
        ({"max_time": 60.0}, {"max_steps": 7}, {"max_steps": 7}),
        ({"max_steps": 7}, {"max_time": 60.0}, {"max_steps": 7, "max_time": 60.0}),
        ({"max_steps": 7}, {"max_steps": None, "max_time": 60.0}, {"max_time": 60.0}),
        ({"max_steps": 7}, {"max_steps": 9}, {"max_steps": 9}),
        ({"max_steps": 7}, {}, {"max_steps": 7}),
    ],
)
def test_a_length_of_another_kind_replaces_that_of_the_file(tmp_path, before, given, after):
    config = resolve("nano", overrides=before)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"configuration": config.to_dict()}))
    again = resolve(config_file=tmp_path / "run.yaml", overrides=given)
    lengths = ("max_steps", "tokens", "epochs", "max_time")
    assert {name: getattr(again.length, name) for name in lengths if getattr(again.length, name) is not None} == after


@pytest.mark.parametrize("content", ["configuration: {}", "configuration: 3", "configuration: [a]", "{1: 2}"])
def test_a_file_without_fields_is_refused(tmp_path, content):
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"`configuration` of .*run\.yaml must be a mapping of fields"):
        resolve(config_file=tmp_path / "run.yaml")


def test_weights_to_start_from_leave_out_the_preset_s_tokenizer(tmp_path):
    assert resolve("92m").corpus.tokenizer is not None
    assert resolve("92m", overrides={"init_from": str(tmp_path)}).corpus.tokenizer is None
    assert resolve("92m", overrides={"init_from": str(tmp_path), "tokenizer": "mine"}).corpus.tokenizer == "mine"


def test_a_plain_folder_takes_a_depth_beside_init_from_and_no_other_field_of_a_model():
    parts = {"model.prelude_layers": 2, "model.core_layers": 2, "model.coda_layers": 2, "model.injection": "add"}
    asked = {"preset": "nano-recurrent", "init_from": "box", **parts}
    model = resolve_run(None, asked).model
    assert [model[name.removeprefix("model.")] for name in parts] == [2, 2, 2, "add"]
    with pytest.raises(ConfigError, match=r"`model\.hidden_size` does not apply beside `init_from`, got 8"):
        resolve_run(None, asked | {"model.hidden_size": 8})


def test_a_model_in_a_file_is_refused_beside_init_from_as_a_setting_is(tmp_path):
    file, asked = tmp_path / "c.yaml", {"init_from": "box"}
    file.write_text("init_from: box\nmodel: {dropout: 0.1}\n")
    for given in ((file, {}), (None, {**asked, "model": {"dropout": 0.1}}), (None, {**asked, "model.dropout": 0.1})):
        with pytest.raises(ConfigError, match=r"`model\.dropout` does not apply beside `init_from`, got 0\.1"):
            resolve_run(*given)
    run = {"configuration": resolve_run(None, {"model.dropout": 0.1}).to_dict()}
    file.write_text(yaml.safe_dump(run))  # what a run was made of, its preset's fields among them: a recipe
    assert resolve_run(file, asked).init_from == "box"


def test_what_one_command_was_told_is_not_told_to_the_next(tmp_path):
    """A run that was begun with --overwrite goes on; one that took other data once refuses them the next time."""
    config = resolve("nano", overrides={"overwrite": True, "allow_changed_data": True, "output_dir": "here"})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"configuration": config.to_dict()}))
    again = resolve(config_file=tmp_path / "run.yaml", overrides={"resume": True})
    again = again.output
    assert (again.overwrite, again.allow_changed_data, again.output_dir) == (False, False, "here")


def test_a_run_is_told_by_flat_names_that_no_two_groups_share():
    config = resolve("92m-tuned", overrides={"max_steps": 3, "threads": 2})
    own = ("preset", "model", "init_from", "lora_rank", "dpo_beta", "seed")
    flat = [name for group, value in vars(config).items() if group not in own for name in vars(value)]
    assert sorted([*flat, *own]) == sorted(FIELDS)
    assert RunConfig.from_fields(config.to_dict()) == config
    assert config.replace(threads=None).machine == MachineConfig()
    with pytest.raises(ConfigError, match=r"`thread` is not a field .*: did you mean `threads`"):
        config.replace(thread=3)
    with pytest.raises(ConfigError, match="`threads` must be above 0, got 0"):
        MachineConfig(threads=0)


def test_a_vocab_size_asks_for_a_tokenizer_in_place_of_the_presets():
    assert resolve("92m").corpus.tokenizer == "HuggingFaceTB/SmolLM2-135M"
    assert resolve("92m", overrides={"vocab_size": 8192}).corpus.tokenizer is None
    both = resolve("92m", overrides={"vocab_size": 8192, "tokenizer": "runs/other"})
    assert both.corpus.tokenizer == "runs/other"  # which the run refuses
