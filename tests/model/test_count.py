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
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (49152, 512, 2048)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (12, 6, 128)
    assert (config.num_hidden_layers, config.max_position_embeddings) == (12, 1024)
    assert (config.dropout, config.attention_dropout) == (0.1, 0.0)
    assert (config.fan_ratio, config.cola_rank_ratio, config.cola_rank) == (0.15, 0.25, None)
    assert (config.rms_norm_eps, config.rope_parameters["rope_theta"]) == (1e-5, 10000.0)
    assert config.tie_word_embeddings is False


def test_default_model_has_92203744_parameters_part_by_part():
    counts = parameters_of(FANformerConfig())
    assert counts["model.embed_tokens.weight"] == 49152 * 512 == 25_165_824
    assert counts["lm_head.weight"] == 25_165_824
    assert counts["model.norm.weight"] == 512

    for index in range(12):
        layer = {name: count for name, count in counts.items() if f"layers.{index}." in name}
        # W_a of p and g of each of Q, K and V: six matrices of 128 x 512 in one.
        assert total(layer, "qkv_input") == 6 * 65_536
        two_factors = 2 * 65_536
        assert two_factors + total(layer, "q_proj") == 299_316
        assert two_factors + total(layer, "k_proj") == 215_194
        assert two_factors + total(layer, "v_proj") == 215_194
        assert total(layer, "o_proj") == 786_944
        # W_a of gate and up: two matrices of 128 x 512 in one.
        assert total(layer, "gate_up_input") == 2 * 65_536
        assert 65_536 + total(layer, "gate_proj") == 329_728
        assert 65_536 + total(layer, "up_proj") == 329_728
        assert total(layer, "down_proj") == 1_311_232
        assert total(layer, "q_norm", "k_norm", "v_norm") == 384
        assert total(layer, "post_attention_layernorm") == 512
        assert total(layer, "gate") - total(layer, "gate_") == 1_024
        assert total(layer, "input_layernorm") == (512 if index == 0 else 0)
        block = 299_316 + 215_194 + 215_194 + 786_944 + 329_728 + 329_728 + 1_311_232 + 384 + 512 + 1_024
        assert sum(layer.values()) == block + (512 if index == 0 else 0)

    assert sum(counts.values()) == 25_165_824 + 25_165_824 + 12 * 3_489_256 + 512 + 512 == 92_203_744


def test_cola_layers_leaves_the_other_branch_at_full_rank():
    attention = {"all": 299_316 + 2 * 215_194 + 786_944}
    attention["attention"] = attention["all"]
    # 230 numbers p without bias and 1536 - 2 * 230 linear outputs with bias, from all 512 inputs; K and V have half.
    q, k = 512 * 230 + (512 + 1) * 1076, 512 * 115 + (512 + 1) * 538
    attention["ffn"] = q + 2 * k + 512 * 1536 + 512
    ffn = {"all": 2 * 329_728 + 1_311_232}
    ffn["ffn"] = ffn["all"]
    ffn["attention"] = 2 * (2048 * 512 + 2048) + 512 * 2048 + 512
    for chosen in ("all", "attention", "ffn"):
        counts = parameters_of(FANformerConfig(cola_layers=chosen))
        layer = {name: count for name, count in counts.items() if "layers.1." in name}
        assert total(layer, "qkv_input", "q_proj", "k_proj", "v_proj", "o_proj") == attention[chosen]
        assert total(layer, "mlp.") == ffn[chosen]
        assert sum(counts.values()) == 92_203_744 + 12 * (attention[chosen] + ffn[chosen] - 3_487_336)


def test_gate_initial_moves_no_count():
    assert parameters_of(FANformerConfig(gate_initial=-4.0)) == parameters_of(FANformerConfig())


def test_default_model_has_31_percent_fewer_parameters_than_smollm2():
    fewer = 1 - 92_203_744 / 134_515_008
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
