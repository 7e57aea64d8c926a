"""The configuration: what it refuses and in which words, and what survives config.json."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from fanformer.model import FANformerConfig, FANformerForCausalLM


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("hidden_sise", "hidden_size"), ("fan_ration", "fan_ratio"), ("num_layers", "num_hidden_layers")],
)
def test_unknown_key_names_the_nearest_field(key, nearest):
    with pytest.raises(ValueError, match=f"`{key}` is not a field of FANformerConfig: did you mean `{nearest}`?"):
        FANformerConfig(**{key: 3})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"fan_ratio": 0.7},
            "`fan_ratio` must be in [0, 0.5], got 0.7: cos and sin each take this share of the output.",
        ),
        ({"fan_ratio": -0.1}, "`fan_ratio` must be in [0, 0.5], got -0.1"),
        ({"fan_ratio": float("nan")}, "`fan_ratio` must be in [0, 0.5], got nan"),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 5},
            "`num_attention_heads` must be a multiple of `num_key_value_heads`, got 12 and 5: "
            "each key-value head serves the same number of query heads.",
        ),
        ({"head_dim": 15}, "`head_dim` must be even, got 15: RoPE turns pairs of channels."),
        (
            {"gate_up_rank": None, "fan_placement": "ffn"},
            "`fan_placement` 'ffn' needs a low-rank gate and up, got full rank: set `gate_up_rank`, or "
            "`fan_placement` to projection, layer or none.",
        ),
        ({"qkv_rank": 0}, "`qkv_rank` must be at least 1 or None, got 0: None means full rank."),
        ({"o_rank": -1}, "`o_rank` must be at least 1 or None, got -1"),
        ({"gate_up_rank": 0}, "`gate_up_rank` must be at least 1 or None, got 0"),
        ({"down_rank": 0}, "`down_rank` must be at least 1 or None, got 0"),
        ({"fan_multiple": 0}, "`fan_multiple` must be a power of two, got 0: 1 rounds nothing."),
        ({"fan_multiple": 12}, "`fan_multiple` must be a power of two, got 12"),
        (
            {"o_rank": None, "down_rank": None, "writer_activation": "silu"},
            "`writer_activation` must be 'residual' where O and down have full rank, got 'silu': "
            "set `o_rank` or `down_rank`.",
        ),
        ({"dropout": 1.0}, "`dropout` must be in [0, 1), got 1.0."),
        ({"attention_dropout": -0.1}, "`attention_dropout` must be in [0, 1), got -0.1."),
        ({"vocab_size": 0}, "`vocab_size` must be at least 1, got 0."),
        ({"num_hidden_layers": 0}, "`num_hidden_layers` must be at least 1, got 0."),
        ({"hidden_size": -4}, "`hidden_size` must be at least 1, got -4."),
        (
            {"gate_initial": -2.0, "gated_residual": False},
            "`gate_initial` must be 0.0 without gates, got -2.0: set `gated_residual` to true.",
        ),
        (
            {"gate_initial": -16.5},
            "`gate_initial` must be in [-16, 16], got -16.5: further out sigmoid(g) has no slope.",
        ),
        ({"gate_initial": float("nan")}, "`gate_initial` must be in [-16, 16], got nan"),
        ({"rms_norm_eps": 0.0}, "`rms_norm_eps` must be above 0, got 0.0: it keeps RMSNorm finite at 0."),
        ({"initializer_range": -1.0}, "`initializer_range` must be at least 0, got -1.0: it is a standard deviation."),
        ({"pad_token_id": 49152}, "`pad_token_id` must be in [0, vocab_size), got 49152 of 49152"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "`rope_parameters['rope_type']` must be one of default, linear, llama3, yarn, got 'dynamic'",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "`rope_parameters['partial_rotary_factor']` must be 1.0, got 0.5: all channels of a head are turned.",
        ),
    ],
    ids=str,
)
def test_value_out_of_range_is_refused(fields, message):
    with pytest.raises(StrictDataclassError) as error:
        FANformerConfig(**fields)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": "64"}, "Field 'hidden_size' expected int, got str (value: '64')"),
        ({"hidden_size": 1.5}, "Field 'hidden_size' expected int, got float"),
        ({"qkv_rank": True}, "Field 'qkv_rank' expected int, got bool"),
        ({"fan_multiple": 16.0}, "Field 'fan_multiple' expected int, got float"),
        ({"gated_residual": 1}, "Field 'gated_residual' expected bool, got int"),
        ({"gate_initial": "open"}, "Field 'gate_initial' with value 'open' doesn't match any type in"),
        (
            {"fan_placement": "qkv"},
            "Field 'fan_placement' expected one of ('projection', 'layer', 'ffn', 'none'), got qkv",
        ),
        ({"cola_input": "one"}, "Field 'cola_input' expected one of ('shared', 'separate'), got one"),
        ({"cola_norm": 1}, "Field 'cola_norm' expected bool, got int"),
        ({"cola_activation": "half"}, "Field 'cola_activation' expected one of ('silu', 'gelu', 'linear'), got half"),
        (
            {"writer_activation": "relu"},
            "Field 'writer_activation' expected one of ('residual', 'silu', 'gelu', 'linear'), got relu",
        ),
        ({"cola_activation": "relu"}, "Field 'cola_activation' expected one of ('silu', 'gelu', 'linear'), got relu"),
        ({"norm_placement": "post"}, "Field 'norm_placement' expected one of ('hybrid-star', 'hybrid', 'pre')"),
        ({"qkv_norm": True}, "Field 'qkv_norm' expected one of ('qkv', 'none'), got True"),
    ],
    ids=str,
)
def test_value_of_the_wrong_type_is_refused(fields, message):
    with pytest.raises(StrictDataclassError) as error:
        FANformerConfig(**fields)
    assert message in str(error.value)


def test_assigning_the_wrong_type_is_refused():
    config = FANformerConfig()
    with pytest.raises(StrictDataclassError, match="Field 'hidden_size' expected int, got str"):
        config.hidden_size = "64"


# Fields that have an effect only beside others that the long list below has at another value.
@pytest.mark.parametrize(
    "others",
    [
        {},
        {"gated_residual": True, "gate_initial": -1.5},
    ],
    ids=str,
)
def test_every_field_survives_config_json(tmp_path, others):
    fields = {
        "vocab_size": 300,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "max_position_embeddings": 77,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
        "dropout": 0.2,
        "attention_dropout": 0.3,
        "hidden_act": "gelu",
        "fan_placement": "layer",
        "fan_ratio": 0.25,
        "fan_multiple": 4,
        "qkv_rank": None,
        "o_rank": 7,
        "gate_up_rank": 9,
        "down_rank": 11,
        "writer_activation": "gelu",
        "cola_activation": "linear",
        "cola_input": "separate",
        "cola_norm": False,
        "projection_bias": False,
        "norm_placement": "pre",
        "qkv_norm": "none",
        "gated_residual": False,
        "gate_initial": 0.0,
        "tie_word_embeddings": True,
        "initializer_range": 0.03,
        "embedding_initializer_range": 0.7,
        "use_cache": False,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": [3, 4],
    }
    fields |= others
    parts = {"num_hidden_layers": 5, "prelude_layers": 2, "core_layers": 1, "coda_layers": 2}
    fields |= {**parts, "mean_recurrence": 3, "max_recurrence": 5, "injection": "concat"}
    assert set(fields) == set(FANformerConfig.__annotations__)  # none forgotten here
    FANformerConfig(**fields).save_pretrained(tmp_path)
    for loaded in (FANformerConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is FANformerConfig
        assert {name: getattr(loaded, name) for name in fields} == fields


@pytest.mark.parametrize(
    "field",
    [
        {"fan_placement": "attention"},
        {"fan_placement": "both"},
        {"qkv_norm": "qk"},
        {"writer_activation": "half"},
        {"writer_norm": True},
    ],
    ids=str,
)
def test_what_was_deleted_is_refused_with_a_remedy(field):
    ((name, value),) = field.items()
    with pytest.raises(ValueError) as error:
        FANformerConfig(**field)
    assert str(error.value) == (
        f"`{name}` {value!r} was deleted, as docs/experiments.md says: train the model without it."
    )


def test_a_deleted_field_that_was_off_still_loads():
    assert FANformerConfig(writer_norm=False).to_dict() == FANformerConfig().to_dict()


def test_keys_that_transformers_writes_are_accepted(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    written = json.loads(path.read_text())
    assert {"architectures", "auto_map", "dtype", "model_type", "transformers_version"} <= written.keys()
    written |= {
        "quantization_config": {"quant_method": "gptq", "bits": 4},
        "_name_or_path": "somewhere",
        "torch_dtype": "float32",
        "transformers_version": "9.0.0",
        "_attn_implementation_autoset": True,
    }
    path.write_text(json.dumps(written))
    loaded = FANformerConfig.from_pretrained(tmp_path)
    assert loaded.quantization_config == {"quant_method": "gptq", "bits": 4}
    assert loaded.hidden_size == 64


def test_a_typo_in_config_json_is_refused(tiny_config, tmp_path):
    tiny_config().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"fan_ratio"', '"fan_ratoi"'))
    with pytest.raises(ValueError, match="`fan_ratoi` is not a field of FANformerConfig: did you mean `fan_ratio`"):
        FANformerConfig.from_pretrained(tmp_path)


def test_rope_theta_as_a_keyword_goes_where_transformers_keeps_it():
    assert FANformerConfig(rope_theta=500.0).rope_parameters == {"rope_type": "default", "rope_theta": 500.0}


def test_model_refuses_ids_and_embeddings_together(tiny_model, token_ids):
    model = tiny_model()
    input_ids = token_ids(1, 3)
    message = "exactly one of `input_ids` and `inputs_embeds` must be given, got both or neither."
    for inputs in ({}, {"input_ids": input_ids, "inputs_embeds": torch.zeros(1, 3, 64)}):
        with pytest.raises(ValueError, match=message):
            model(**inputs)


def test_flex_attention_refuses_attention_dropout_while_training(tiny_config, token_ids):
    def build(attention_dropout):
        config = tiny_config(attention_dropout=attention_dropout)
        config._attn_implementation = "flex_attention"
        return FANformerForCausalLM(config)

    message = "`attention_dropout` is 0.1, which flex_attention cannot apply: set it to 0 or use attn_implementation="
    with pytest.raises(ValueError, match=message):
        build(0.1).train()(token_ids(1, 3))
    with torch.compiler.set_stance("force_eager"), torch.no_grad():  # flex_attention compiles itself otherwise
        assert build(0.1).eval()(token_ids(1, 3)).logits.isfinite().all()
        assert build(0.0).train()(token_ids(1, 3)).logits.isfinite().all()
