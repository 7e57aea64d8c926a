"""The number of parameters, added up part by part from the numbers of the design, not from the code."""

import pytest
import torch
import yaml

from fanformer.model import FANformerConfig, FANformerForCausalLM


def parameters_of(config):
    with torch.device("meta"):
        model = FANformerForCausalLM(config)
    return {name: parameter.numel() for name, parameter in model.named_parameters()}


def total(counts, *parts):
    return sum(count for name, count in counts.items() if any(part in name for part in parts))


def test_default_configuration_is_the_one_of_the_design():
    config = FANformerConfig()
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (49152, 512, 896)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (12, 6, 128)
    assert (config.num_hidden_layers, config.max_position_embeddings) == (12, 1024)
    assert (config.dropout, config.attention_dropout) == (0.1, 0.0)
    assert (config.fan_ratio, config.cola_rank_ratio, config.cola_rank) == (0.15, 0.75, None)
    assert (config.rms_norm_eps, config.rope_parameters["rope_theta"]) == (1e-5, 10000.0)
    assert config.tie_word_embeddings is False


def test_default_model_has_92158804_parameters_part_by_part():
    counts = parameters_of(FANformerConfig())
    assert counts["model.embed_tokens.weight"] == 49152 * 512 == 25_165_824
    assert counts["lm_head.weight"] == 25_165_824
    assert counts["model.norm.weight"] == 512

    for index in range(12):
        layer = {name: count for name, count in counts.items() if f"layers.{index}." in name}
        # One W_a for Q, K and V, and its norm.
        assert total(layer, "qkv_input") == 384 * 512 + 384 == 196_992
        assert total(layer, "q_proj") == (384 + 1) * 1536 == 591_360
        assert total(layer, "k_proj") == (384 + 1) * 768 == 295_680
        assert total(layer, "v_proj") == 295_680
        assert total(layer, "o_proj") == 1536 * 512 + 512 == 786_944
        # One W_a for gate and up, and its norm: 57 numbers p and 384 - 2 * 57 others make 384 channels.
        assert total(layer, "gate_up_input") == (384 - 57) * 512 + 384 - 57 == 167_751
        assert total(layer, "gate_proj") == (384 + 1) * 896 == 344_960
        assert total(layer, "up_proj") == 344_960
        assert total(layer, "down_proj") == 896 * 512 + 512 == 459_264
        assert total(layer, "q_norm", "k_norm", "v_norm") == 384
        assert total(layer, "post_attention_layernorm") == 512
        assert total(layer, "gate") - total(layer, "gate_") == 1_024
        assert total(layer, "input_layernorm") == (512 if index == 0 else 0)
        block = 196_992 + 167_751 + 591_360 + 2 * 295_680 + 786_944 + 2 * 344_960 + 459_264 + 384 + 512 + 1_024
        assert sum(layer.values()) == block + (512 if index == 0 else 0)

    assert sum(counts.values()) == 25_165_824 + 25_165_824 + 12 * 3_485_511 + 512 + 512 == 92_158_804


def test_separate_factors_without_norms_are_the_papers_cola_linears():
    # Rank 128, each of six first factors 128 x 512 (p and g of Q, K and V), and those of gate and up likewise.
    fields = {"cola_input": "separate", "cola_norm": False, "cola_layers": "all", "cola_rank": 128}
    fields |= {"fan_placement": "projection", "intermediate_size": 2048}
    layer = {name: n for name, n in parameters_of(FANformerConfig(**fields)).items() if "layers.1." in name}
    assert total(layer, "qkv_input") == 6 * 65_536
    assert 2 * 65_536 + total(layer, "q_proj") == 299_316
    assert total(layer, "o_proj") == 128 * 1536 + 512 * 128 + 512
    assert total(layer, "gate_up_input") == 2 * 65_536
    assert 65_536 + total(layer, "up_proj") == 329_728
    assert total(layer, "down_proj") == 128 * 2048 + 512 * 128 + 512


def test_cola_layers_leaves_the_other_layers_at_full_rank():
    writers = {"full": {"o": 786_944, "down": 459_264}}
    # W_a of 384 rows with its norm, then W_b with its bias.
    writers["low"] = {"o": 384 * (1536 + 1) + 385 * 512, "down": 384 * (896 + 1) + 385 * 512}
    attention = {"low": 196_992 + 591_360 + 2 * 295_680, "full": (512 + 1) * (1536 + 2 * 768)}
    ffn = {"low": 196_992 + 2 * 344_960, "full": 2 * (512 + 1) * 896}
    for chosen, (reads, o, gates, down) in {
        "readers": ("low", "full", "low", "full"),
        "all": ("low", "low", "low", "low"),
        "attention": ("low", "low", "full", "full"),
        "ffn": ("full", "full", "low", "low"),
    }.items():
        counts = parameters_of(FANformerConfig(cola_layers=chosen, fan_placement="none"))
        layer = {name: count for name, count in counts.items() if "layers.1." in name}
        assert total(layer, "qkv_input", "q_proj", "k_proj", "v_proj") == attention[reads], chosen
        assert total(layer, "o_proj") == writers[o]["o"], chosen
        assert total(layer, "gate_up_input", "gate_proj", "up_proj") == ffn[gates], chosen
        assert total(layer, "down_proj") == writers[down]["down"], chosen


def test_gate_initial_moves_no_count():
    assert parameters_of(FANformerConfig(gate_initial=-4.0)) == parameters_of(FANformerConfig())


def test_default_model_has_31_percent_fewer_parameters_than_smollm2():
    fewer = 1 - 92_158_804 / 134_515_008
    assert fewer == pytest.approx(0.315, abs=0.001)


def test_preset_1b_has_the_papers_shape_and_count(repository):
    preset = yaml.safe_load((repository / "src/fanformer/training/presets/1b.yaml").read_text())
    counts = parameters_of(FANformerConfig(**preset["model"]))
    assert "lm_head.weight" not in counts  # tied
    assert counts["model.embed_tokens.weight"] == 50_304 * 2048 == 103_022_592

    layer = {name: count for name, count in counts.items() if "layers.15." in name}
    # int(0.25 * 2048) = 512 channels become cos and sin, so 2048 - 512 rows are computed, with a bias on all of them.
    assert total(layer, "fan_layer") == 1536 * 2048 + 1536 == 3_147_264
    assert total(layer, "q_proj", "k_proj", "v_proj") == 3 * 2048 * 2048 == 12_582_912
    assert total(layer, "o_proj") == 2048 * 2048 == 4_194_304
    assert total(layer, "gate_proj", "up_proj", "down_proj") == 3 * 2048 * 8192 == 50_331_648
    assert total(layer, "layernorm") == 2 * 2048
    assert sum(layer.values()) == 3_147_264 + 12_582_912 + 4_194_304 + 50_331_648 + 4_096 == 70_260_224

    without_embedding = sum(counts.values()) - 103_022_592
    assert without_embedding == 16 * 70_260_224 + 2048 == 1_124_165_632
    assert round(without_embedding / 1e9, 1) == 1.1  # "1.1B non-embedding", says the published README
