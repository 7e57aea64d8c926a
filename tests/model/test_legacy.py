"""Configurations from before each kind of layer had a rank of its own give the model that they gave then."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from transformers import AutoConfig

from fanformer.model import FANformerConfig, FANformerForCausalLM


@pytest.fixture(scope="module")
def legacy(repository):
    return repository / "tests/legacy"


def counts(config):
    with torch.device("meta"):
        model = FANformerForCausalLM(config)
    return {name: parameter.numel() for name, parameter in model.named_parameters()}


def total(counts, *parts):
    return sum(count for name, count in counts.items() if any(part in name for part in parts))


def test_a_folder_from_before_gives_the_logits_of_that_time(legacy):
    io = load_file(legacy / "io.safetensors")
    model = FANformerForCausalLM.from_pretrained(legacy / "folder", dtype="float32").eval()
    with torch.no_grad():
        # The same arithmetic; another machine's products may sum in another order. Logits are of size 10.
        torch.testing.assert_close(model(io["input_ids"]).logits, io["logits"], atol=2e-5, rtol=1e-5)


def test_a_folder_from_before_is_saved_in_the_words_of_today(legacy, tmp_path):
    config = AutoConfig.from_pretrained(legacy / "folder", trust_remote_code=False)
    assert type(config) is FANformerConfig
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert not {"cola_rank", "cola_rank_ratio", "cola_layers"} & written.keys()
    assert (written["qkv_rank"], written["o_rank"], written["gate_up_rank"], written["down_rank"]) == (
        24,
        None,
        24,
        None,
    )
    assert (written["fan_placement"], written["fan_multiple"], written["intermediate_size"]) == ("ffn", 1, 48)
    assert FANformerConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()


def test_what_a_configuration_from_before_leaves_out_has_the_default_of_that_time():
    config = FANformerConfig(cola_layers="readers")
    assert (config.fan_placement, config.intermediate_size, config.qkv_rank) == ("ffn", 896, 384)
    assert sum(counts(config).values()) == 92_158_804  # the default then


def test_cola_layers_left_the_other_layers_at_full_rank():
    writers = {"full": {"o": 786_944, "down": 459_264}}
    # W_a of 384 rows, then W_b with its bias.
    writers["low"] = {"o": 384 * 1536 + 385 * 512, "down": 384 * 896 + 385 * 512}
    attention = {"low": 196_608 + 591_360 + 2 * 295_680, "full": (512 + 1) * (1536 + 2 * 768)}
    ffn = {"low": 196_608 + 2 * 344_960, "full": 2 * (512 + 1) * 896}
    for chosen, (reads, o, gates, down) in {
        "readers": ("low", "full", "low", "full"),
        "all": ("low", "low", "low", "low"),
        "attention": ("low", "low", "full", "full"),
        "ffn": ("full", "full", "low", "low"),
    }.items():
        config = FANformerConfig(cola_layers=chosen, cola_norm=False, fan_placement="none")
        layer = {name: count for name, count in counts(config).items() if "layers.1." in name}
        assert total(layer, "qkv_input", "q_proj", "k_proj", "v_proj") == attention[reads], chosen
        assert total(layer, "o_proj") == writers[o]["o"], chosen
        assert total(layer, "gate_up_input", "gate_proj", "up_proj") == ffn[gates], chosen
        assert total(layer, "down_proj") == writers[down]["down"], chosen


@pytest.mark.parametrize(
    ("fields", "ranks"),
    [
        ({"cola_rank_ratio": 0.25}, (128, None, 128, None)),
        ({"cola_rank_ratio": 0.25, "hidden_size": 63}, (15, None, 15, None)),
        ({"cola_rank_ratio": 0.001}, (1, None, 1, None)),
        ({"cola_rank": 5, "cola_layers": "all", "cola_norm": False}, (5, 5, 5, 5)),
        (
            {
                "cola_rank": 5,
                "cola_rank_ratio": None,
                "cola_layers": "ffn",
                "fan_placement": "none",
                "cola_norm": False,
            },
            (None, None, 5, 5),
        ),
        ({"cola_rank_ratio": None, "fan_placement": "none"}, (None, None, None, None)),
    ],
    ids=str,
)
def test_the_rank_from_before_is_that_of_the_layers_it_was_for(fields, ranks):
    config = FANformerConfig(**fields)
    assert (config.qkv_rank, config.o_rank, config.gate_up_rank, config.down_rank) == ranks
    assert config.fan_multiple == 1


def test_layers_that_write_had_the_form_of_those_that_read():
    config = FANformerConfig(cola_layers="all", cola_activation="gelu", cola_norm=False)
    assert config.writer_activation == "gelu"
    config = FANformerConfig(cola_layers="readers", cola_activation="gelu", cola_norm=False)
    assert config.writer_activation == "residual"  # there are none: the default
    config = FANformerConfig(cola_layers="all", cola_norm=False)
    assert config.writer_activation == "silu"  # the default of that time
    with pytest.raises(ValueError, match="`writer_norm` True was deleted"):
        FANformerConfig(cola_layers="all")  # had a norm between the factors of O and down, too


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"cola_rank": 5, "o_rank": 256},  # its default: given is given
            "`cola_rank` and `o_rank` exclude each other: qkv_rank, o_rank, gate_up_rank, down_rank replace "
            "cola_rank_ratio, cola_rank, cola_layers.",
        ),
        (
            {"cola_layers": "all", "writer_activation": "silu"},
            "`cola_layers` and `writer_activation` exclude each other",
        ),
        ({"cola_rank_ratio": 0.5, "fan_multiple": 16}, "`cola_rank_ratio` and `fan_multiple` exclude each other"),
        ({"cola_layers": "mlp"}, "`cola_layers` must be one of readers, all, attention, ffn, got 'mlp'."),
    ],
    ids=str,
)
def test_fields_from_before_and_from_today_exclude_each_other(fields, message):
    with pytest.raises(ValueError) as error:
        FANformerConfig(**fields)
    assert message in str(error.value)


def test_a_rank_from_before_is_checked_as_one_of_today():
    with pytest.raises(StrictDataclassError, match="`qkv_rank` must be at least 1 or None, got 0"):
        FANformerConfig(cola_rank=0)
