"""The published implementations' weights give the authors' own logits; what cannot be converted is refused in words."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from fanformer.model import FANformerForCausalLM
from fanformer.model.configuration_fanformer import FANformerConfig
from fanformer.model.convert_published import PUBLISHED_FORMATS, convert
from fanformer.model.modeling_fanformer import CoLAInput, FANProjection

GOLDEN = {
    "fanformer-olmo": "fanformer_reference_tiny",
    "cola": "cola_reference_tiny",
    "hybridnorm-olmo": "hybridnorm_reference_tiny",
}


def files(golden_files, published_format):
    stem = GOLDEN[published_format]
    return golden_files / f"{stem}.weights.safetensors", golden_files / f"{stem}.config.json"


def golden_io(golden_files, published_format):
    return load_file(golden_files / f"{GOLDEN[published_format]}.io.safetensors")


@torch.no_grad()
def relative_error(model, io):
    """Return the largest difference from the authors' logits, in standard deviations of these."""
    return ((model(io["input_ids"]).logits - io["logits"]).abs().max() / io["logits"].std()).item()


@pytest.mark.parametrize("published_format", GOLDEN)
def test_published_weights_give_the_authors_logits(golden_files, published_format):
    model = convert(*files(golden_files, published_format), published_format)
    assert relative_error(model, golden_io(golden_files, published_format)) < 1e-5


@pytest.mark.parametrize("published_format", GOLDEN)
def test_converted_model_survives_saving(golden_files, tmp_path, published_format):
    model = convert(*files(golden_files, published_format), published_format)
    model.save_pretrained(tmp_path)
    loaded = FANformerForCausalLM.from_pretrained(tmp_path)
    io = golden_io(golden_files, published_format)
    with torch.no_grad():
        assert torch.equal(loaded(io["input_ids"]).logits, model(io["input_ids"]).logits)
    assert relative_error(loaded, io) < 1e-5


@pytest.mark.parametrize("published_format", GOLDEN)
def test_every_published_weight_matters(golden_files, tmp_path, published_format):
    weights, config = files(golden_files, published_format)
    io = golden_io(golden_files, published_format)
    tensors = load_file(weights)
    for name in tensors:
        path = tmp_path / "changed.safetensors"
        save_file({**tensors, name: tensors[name] + 0.5 * torch.rand_like(tensors[name])}, path)
        assert relative_error(convert(path, config, published_format), io) > 1e-4, f"{name} has no influence"


def test_fan_projection_equals_the_golden_file(golden_files):
    golden = load_file(golden_files / "cola_fan_projection.safetensors")
    config = FANformerConfig(cola_input="separate", fan_multiple=1)
    factors = CoLAInput(config, 24, rank=6, readers=2, activation="gelu")
    projection = FANProjection(6, 40, config.periodic_width(40), bias=True, gain=1.0)
    factors.load_state_dict({"factor.weight": torch.cat((golden["A_p.weight"], golden["A_np.weight"]))})
    projection.load_state_dict(
        {
            "periodic.weight": golden["B_p.weight"],
            "linear.weight": golden["B_np.weight"],
            "linear.bias": golden["B_np.bias"],
        }
    )
    with torch.no_grad():
        output = projection(*factors(golden["x"]))
    assert ((output - golden["y"]).abs().max() / golden["y"].std()).item() < 1e-5


# What follows needs no golden file: a CoLA and an OLMo checkpoint of the right names and shapes, made here.

COLA = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "rank": 3,
    "only_lr_act": False,
}
OLMO = {
    "d_model": 16,
    "n_heads": 2,
    "n_layers": 1,
    "mlp_hidden_size": 48,
    "weight_tying": True,
    "rope": True,
    "include_bias": False,
    "layer_norm_type": "rms",
    "residual_dropout": 0.0,
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "vocab_size": 31,
    "embedding_size": 32,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "use_ATF": True,
    "p_ratio": 0.25,
}
HYBRIDNORM = {
    **{key: value for key, value in OLMO.items() if key not in ("use_ATF", "p_ratio")},
    "n_kv_heads": 1,
    "weight_tying": False,
    "use_query_norm": True,
    "use_key_norm": True,
    "use_value_norm": True,
    "attn_norm": False,
    "ffn_norm": True,
    "attn_residual_after_norm": False,
    "ffn_residual_after_norm": True,
}
OPTIONS = {"fanformer-olmo": OLMO, "cola": COLA, "hybridnorm-olmo": HYBRIDNORM}


def cola_shapes():
    attention = {f"self_attn.{part}_proj": (16, 16) for part in "qkvo"}
    mlp = {"mlp.gate_proj": (16, 24), "mlp.up_proj": (16, 24), "mlp.down_proj": (24, 16)}
    shapes = {"model.embed_tokens.weight": (32, 16), "lm_head.weight": (32, 16), "model.norm.weight": (16,)}
    for name, (rows, columns) in {**attention, **mlp}.items():
        shapes[f"model.layers.0.{name}.cola_a"] = (rows, 3)
        shapes[f"model.layers.0.{name}.cola_b"] = (3, columns)
    for name in ("input_layernorm", "post_attention_layernorm"):
        shapes[f"model.layers.0.{name}.weight"] = (16,)
    return shapes


def olmo_shapes(block):
    block = {"attn_out.weight": (16, 16), "ff_norm.weight": (16,), "ff_proj.weight": (48, 16), **block}
    block["ff_out.weight"] = (16, 24)
    shapes = {f"transformer.blocks.0.{name}": shape for name, shape in block.items()}
    return {**shapes, "transformer.wte.weight": (32, 16), "transformer.ln_f.weight": (16,)}


SHAPES = {
    "cola": cola_shapes(),
    "fanformer-olmo": olmo_shapes(
        {
            "attn_norm.weight": (16,),
            "att_proj.linear.weight": (48, 16),
            "att_proj.fanlayer.input_linear.weight": (12, 16),
            "att_proj.fanlayer.input_linear.bias": (12,),
        }
    ),
    "hybridnorm-olmo": {
        **olmo_shapes({"att_proj.weight": (32, 16), **{f"{part}_norm.weight": (8,) for part in "qkv"}}),
        "transformer.ff_out.weight": (32, 16),
    },
}


@pytest.fixture
def published(tmp_path):
    """Write a published checkpoint of random weights; return its two paths."""

    def make(published_format, options=None, drop=(), add=(), dtype=torch.float32, **changed_shapes):
        shapes = {**SHAPES[published_format], **changed_shapes}
        tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items() if name not in drop}
        tensors |= {name: torch.randn(2).to(dtype) for name in add}
        weights, config = tmp_path / "weights.safetensors", tmp_path / "config.json"
        save_file(tensors, weights)
        options = {**OPTIONS[published_format], **(options or {})}
        config.write_text(json.dumps({key: value for key, value in options.items() if value != "ABSENT"}))
        return weights, config

    return make


def refusal(arguments):
    """Return the message of the refusal, which is one line."""
    with pytest.raises(ValueError) as error:
        convert(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("published_format", PUBLISHED_FORMATS)
def test_made_up_checkpoint_converts(published, published_format):
    model = convert(*published(published_format), published_format)
    assert model(torch.arange(5)[None]).logits.shape == (1, 5, 32)
    assert not model.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_keep_their_dtype(published, dtype):
    weights, config = published("cola", dtype=dtype)
    model = convert(weights, config, "cola")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.equal(model.lm_head.weight, load_file(weights)["lm_head.weight"])


def test_missing_p_ratio_is_read_from_the_weights(published):
    model = convert(*published("fanformer-olmo", {"p_ratio": "ABSENT"}), "fanformer-olmo")
    assert model.config.fan_ratio == 0.25
    odd = {
        "transformer.blocks.0.att_proj.fanlayer.input_linear.weight": (13, 16),
        "transformer.blocks.0.att_proj.fanlayer.input_linear.bias": (13,),
    }
    model = convert(*published("fanformer-olmo", {"p_ratio": "ABSENT"}, **odd), "fanformer-olmo")
    assert model.config.periodic_width(16) == 3


FAN_LAYER = [name for name in SHAPES["fanformer-olmo"] if ".fanlayer." in name]
PUBLISHED_1B = {
    **dict.fromkeys(("mlp_hidden_size", "use_ATF", "p_ratio"), "ABSENT"),
    "mlp_ratio": 3,
    "alibi": False,
    "flash_attention": True,
    "attention_layer_norm": False,
    "multi_query_attention": False,
    "block_type": "sequential",
    "layer_norm_with_affine": True,
    "layer_norm_eps": 1e-6,
    "bias_for_layer_norm": False,
    "attention_layer_norm_with_affine": False,
    "activation_type": "swiglu",
    "max_sequence_length": 2048,
    "init_device": "cuda",
    "init_fn": "mitchell",
}
"""What the `model:` of the authors' FANformer-1B-pretrain.yaml says, in other sizes."""


def test_the_options_of_the_published_1b_configuration_convert(published):
    config = convert(*published("fanformer-olmo", PUBLISHED_1B), "fanformer-olmo").config
    assert (config.intermediate_size, config.fan_ratio, config.max_position_embeddings) == (24, 0.25, 2048)


@pytest.mark.parametrize("published_format", ["fanformer-olmo", "hybridnorm-olmo"])
@pytest.mark.parametrize("given", ["ABSENT", None])
def test_the_ffn_is_four_times_as_wide_where_no_option_says_it(published, published_format, given):
    wide = {"transformer.blocks.0.ff_proj.weight": (64, 16), "transformer.blocks.0.ff_out.weight": (16, 32)}
    options = {"mlp_hidden_size": given}
    assert convert(*published(published_format, options, **wide), published_format).config.intermediate_size == 32


@pytest.mark.parametrize(("given", "rows"), [("ABSENT", 50_304), (None, 31)], ids=str)
def test_an_embedding_size_that_is_absent_is_the_published_default_and_null_the_vocabulary(published, given, rows):
    shape = {"transformer.wte.weight": (rows, 16)}
    model = convert(*published("fanformer-olmo", {"embedding_size": given}, **shape), "fanformer-olmo")
    assert model.config.vocab_size == rows


def test_weights_without_a_fan_layer_are_refused_where_no_option_says_it(published):
    message = refusal((*published("fanformer-olmo", {"use_ATF": "ABSENT"}, drop=FAN_LAYER), "fanformer-olmo"))
    assert "config option `use_ATF` must be True, got False (the published default)" in message


@pytest.mark.parametrize("published_format", ["fanformer-olmo", "hybridnorm-olmo"])
def test_a_hugging_face_folder_of_the_published_code_is_the_same_model(published, published_format):
    weights, config = published(published_format)
    expected = convert(weights, config, published_format).state_dict()
    save_file({f"model.{name}": tensor for name, tensor in load_file(weights).items()}, weights)
    own = {"architectures": ["OLMoForCausalLM"], "auto_map": {"AutoConfig": "configuration_olmo.OLMoConfig"}}
    own |= {"model_type": "olmo", "torch_dtype": "float32", "transformers_version": "4.36.2", "use_cache": True}
    config.write_text(json.dumps({**json.loads(config.read_text()), **own}))
    found = convert(weights, config, published_format).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_names_of_a_tied_cola_which_all_begin_with_model_stay_as_they_are(published):
    arguments = published("cola", {"tie_word_embeddings": True}, drop=["lm_head.weight"])
    assert all(name.startswith("model.") for name in load_file(arguments[0]))
    assert convert(*arguments, "cola").config.tie_word_embeddings


def test_missing_only_lr_act_means_that_swiglu_has_no_activation(published):
    assert convert(*published("cola"), "cola").config.hidden_act == "silu"
    config = convert(*published("cola", {"only_lr_act": "ABSENT"}), "cola").config
    assert (config.hidden_act, config.cola_activation, config.writer_activation) == ("linear", "silu", "silu")


def test_unknown_format_names_the_nearest(published):
    message = refusal((*published("cola"), "fanformer-olma"))
    assert message == "`format` must be a published format, got `fanformer-olma`: did you mean `fanformer-olmo`?"
    assert "expected one of: cola, fanformer-olmo, hybridnorm-olmo." in refusal((*published("cola"), "gguf"))


def test_missing_and_unexpected_parameters_are_named(published):
    weights, config = published("cola", drop=["model.norm.weight"], add=["model.nrom.weight", "x"])
    message = refusal((weights, config, "cola"))
    assert "do not fit the format and config: missing `model.norm.weight`; unexpected `" in message
    assert "`model.nrom.weight`" in message
    assert "`x`" in message


def test_wrong_shape_is_named(published):
    arguments = published("cola", **{"model.layers.0.mlp.up_proj.cola_b": (3, 25)})
    message = refusal((*arguments, "cola"))
    assert message == (
        "parameter `model.layers.0.mlp.up_proj.cola_b` has the wrong shape: got (3, 25), expected (3, 24)."
    )


@pytest.mark.parametrize(
    ("published_format", "options", "message"),
    [
        ("fanformer-olmo", {"alibi": True}, "`alibi` must be False, got True"),
        ("fanformer-olmo", {"layer_norm_type": "default"}, "`layer_norm_type` must be 'rms', got 'default'"),
        ("fanformer-olmo", {"block_type": "fanformer"}, "`block_type` must be 'sequential', got 'fanformer'"),
        ("fanformer-olmo", {"activation_type": "gelu"}, "`activation_type` must be 'swiglu', got 'gelu'"),
        ("fanformer-olmo", {"include_bias": True}, "`include_bias` must be False, got True"),
        (
            "fanformer-olmo",
            {"include_bias": "ABSENT"},
            "`include_bias` must be False, got True (the published default)",
        ),
        ("fanformer-olmo", {"bias_for_layer_norm": True}, "`bias_for_layer_norm` must be False, got True"),
        ("fanformer-olmo", {"use_ATF": False}, "`use_ATF` must be True, got False"),
        ("fanformer-olmo", {"rope": "ABSENT"}, "`rope` must be True, got False (the published default)"),
        ("fanformer-olmo", {"clip_qkv": 8.0}, "`clip_qkv` must be None, got 8.0"),
        ("fanformer-olmo", {"attention_activation": "gelu"}, "`attention_activation` must be None, got 'gelu'"),
        ("fanformer-olmo", {"embedding_dropout": 0.1}, "`embedding_dropout` must be 0.0, got 0.1"),
        ("fanformer-olmo", {"d_model": "16"}, "`d_model` must be given as int, got '16'."),
        ("fanformer-olmo", {"d_model": "ABSENT"}, "`d_model` must be given as int, got nothing."),
        ("fanformer-olmo", {"n_layers": True}, "`n_layers` must be given as int, got True."),
        ("fanformer-olmo", {"n_heads": 3}, "`d_model` must be a multiple of `n_heads`, got 16 and 3."),
        (
            "fanformer-olmo",
            {"mlp_hidden_size": 47},
            "`mlp_hidden_size` must be even (up and gate in one matrix), got 47.",
        ),
        ("fanformer-olmo", {"p_ratio": 0.7}, "the options do not make a model: "),
        ("fanformer-olmo", {"p_ratoi": 0.2}, "`p_ratoi` is not one that is converted: did you mean `p_ratio`?"),
        ("hybridnorm-olmo", {"attn_norm": True}, "`attn_norm` must be False, got True"),
        ("hybridnorm-olmo", {"use_value_norm": "ABSENT"}, "`use_value_norm` must be True, got None"),
        ("hybridnorm-olmo", {"norm_pos_special_config": {"0": {}}}, "`norm_pos_special_config` must be None, got {'0'"),
        ("hybridnorm-olmo", {"p_ratio": 0.25}, "`p_ratio` is not one that is converted"),
        ("cola", {"attention_bias": True}, "`attention_bias` must be False, got True"),
        ("cola", {"rope_scaling": {"factor": 2}}, "`rope_scaling` must be None, got {'factor': 2}"),
        ("cola", {"hidden_act": "relu"}, "the options do not make a model: "),
        (
            "cola",
            {"num_attention_heads": 3},
            "`hidden_size` must be a multiple of `num_attention_heads`, got 16 and 3.",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 20 else None,
)
def test_option_that_is_not_converted_is_refused(published, published_format, options, message):
    assert message in refusal((*published(published_format, options), published_format))


def test_file_that_is_not_safetensors_is_refused(published, tmp_path):
    _, config = published("cola")
    pickled = tmp_path / "weights.bin"
    torch.save({"x": torch.zeros(2)}, pickled)
    assert f"`weights` must be a safetensors file, got {pickled}: " in refusal((pickled, config, "cola"))
    absent = tmp_path / "absent.safetensors"
    assert f"`weights` must be a safetensors file, got {absent}: " in refusal((absent, config, "cola"))


def test_weights_of_no_single_floating_dtype_are_refused(published, tmp_path):
    _, config = published("cola")
    path = tmp_path / "mixed.safetensors"
    save_file({"a": torch.zeros(2), "b": torch.zeros(2).to(torch.bfloat16)}, path)
    assert refusal((path, config, "cola")) == (
        "`weights` must hold tensors of one floating dtype, got bfloat16, float32."
    )
    save_file({"a": torch.zeros(2, dtype=torch.int64)}, path)
    assert "got int64." in refusal((path, config, "cola"))


def test_config_that_is_not_a_json_object_is_refused(published, tmp_path):
    weights, config = published("cola")
    config.write_text("{")
    assert re.match(r"`config` must be a readable JSON file, got .*config\.json: ", refusal((weights, config, "cola")))
    config.write_text("[1]")
    assert "`config` must hold a JSON object, got list in " in refusal((weights, config, "cola"))
    absent = tmp_path / "absent.json"
    assert f"`config` must be a readable JSON file, got {absent}: " in refusal((weights, absent, "cola"))
