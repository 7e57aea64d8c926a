"""`fanformer info`: the figures add up, and the words say what the model is."""

import json

import pytest

from fanformer.cli.info import fanformer_words
from fanformer.model import FANformerConfig
from fanformer.model.footprint import footprint
from tests.multimodal_files import save_with_towers
from tests.tiny_models import FULL_RANK, PAPERS_COLA, TUNED

VARIANTS = [
    {},
    TUNED,
    {"fan_placement": "layer", **FULL_RANK},
    PAPERS_COLA,
    {"gate_up_rank": None, "down_rank": None, "gate_initial": -2.0},
    {"qkv_rank": None, "o_rank": None, "tie_word_embeddings": True},
    {"num_hidden_layers": 4, "prelude_layers": 1, "core_layers": 2, "coda_layers": 1},
    {"prelude_layers": 0, "core_layers": 1, "coda_layers": 1, "injection": "concat", "mean_recurrence": 3},
]


def record(command, *words):
    outcome = command("info", *words, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    return json.loads(outcome.out)


def test_92m_has_its_exact_count(command):
    assert record(command, "92m")["parameters"]["total"] == 92_230_144


def test_parts_of_a_layer_are_those_of_the_sum_in_the_design(command):
    parameters = record(command, "92m")["parameters"]
    assert parameters["layer_parts"] == {
        "qkv_input": 196_992,
        "q": 504_896,
        "k": 252_448,
        "v": 252_448,
        "o": 524_800,
        "gate_up_input": 131_328,
        "gate": 526_336,
        "up": 526_336,
        "down": 573_952,
        "norms": 384 + 512,
        "gates": 1024,
    }
    assert parameters["parts"]["embedding"] == parameters["parts"]["head"] == 25_165_824
    assert parameters["without_embeddings"] == 92_230_144 - 2 * 25_165_824


@pytest.mark.parametrize("preset", ["nano", "nano-recurrent", "92m", "92m-tuned", "1b"])
def test_parts_of_every_preset_add_up_to_its_total(command, preset):
    parameters = record(command, preset)["parameters"]
    assert sum(parameters["parts"].values()) == parameters["total"] == parameters["trainable"]


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_parts_of_every_variant_add_up_to_the_models_parameters(tiny_config, fields):
    from fanformer.model import FANformerForCausalLM

    config = tiny_config(**fields)
    counted = footprint(config)
    assert sum(counted.parts.values()) == counted.total == FANformerForCausalLM(config).num_parameters()


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_operations_are_those_that_a_forward_pass_does(tiny_config, fields):
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from fanformer.model import FANformerForCausalLM

    config = tiny_config(**fields)
    model = FANformerForCausalLM(config).eval()
    length = config.max_position_embeddings
    model.set_attn_implementation("eager")  # its two products over all T x T pairs are what the counter sees
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.long), use_cache=False)
    assert footprint(config).forward_operations == counter.get_total_flops() / length


def test_cache_is_as_large_as_said(loaded):
    import torch

    with torch.no_grad():
        cache = loaded.model(torch.zeros(1, 7, dtype=torch.long), use_cache=True).past_key_values
    held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert 7 * footprint(loaded.model.config).cache_bytes_per_token["float32"] == held


def test_saved_model_shows_its_own_vocabulary(command, saved_model):
    assert record(command, saved_model)["config"]["vocab_size"] == 320
    assert "320 tokens, a vector of 64 each" in command("info", saved_model).out


def test_words_say_what_p_and_the_rank_are(command):
    text = " ".join(command("info", "92m").out.split())
    for words in (
        "92,230,144 parameters",
        "512 -> 384: the first CoLA factor of Q, K and V, rank 384, with RMSNorm and silu",
        "384 -> 1536: FAN, P = 224 numbers p give 224 cos(p) and 224 sin(p), the other 1088 are linear; "
        "12 heads of 128",
        "1536 -> 256 -> 512: CoLA, rank 256, with x + silu(x); back from the heads",
        "512 -> 256: the first CoLA factor of gate and up, rank 256, with RMSNorm and silu",
        "2048 -> 224 -> 512: CoLA, rank 224, with x + silu(x); back to the width",
        "6 heads, each for 2 query heads (GQA)",
        "start at g = 0.0",
        "351.8 MiB / 175.9 MiB",
    ):
        assert words in text, words
    text = " ".join(command("info", "92m-tuned").out.split())
    assert "the first CoLA factor of gate and up, rank 384, with RMSNorm and FAN: P = 57 numbers p give" in text
    assert "1536 -> 512; back from the heads" in text
    text = " ".join(command("info", "1b").out.split())
    assert "2048 -> 2048 before Q, K and V: 512 cos, 512 sin, 1024 linear" in text
    assert "CoLA" not in text


def test_words_say_which_layers_are_low_rank():
    words = fanformer_words(FANformerConfig(qkv_rank=None, o_rank=None, fan_placement="ffn", fan_multiple=1))
    assert words["qkv_input"] == ""
    assert words["q"].startswith("512 -> 1536;")
    assert "CoLA" not in words["o"]
    assert "the first CoLA factor of gate and up, rank 256" in words["gate_up_input"]
    assert words["down"].startswith("2048 -> 224 -> 512: CoLA, rank 224, with FAN: P = 33")
    assert "the other 158 x + silu(x);" in words["down"]
    words = fanformer_words(FANformerConfig(writer_activation="silu"))
    assert words["o"].startswith("1536 -> 256 -> 512: CoLA, rank 256, with silu;")
    fields = {"gate_up_rank": None, "down_rank": None, "cola_input": "separate", "fan_placement": "none"}
    words = fanformer_words(FANformerConfig(**fields, writer_activation="linear"))
    assert words["gate_up_input"] == ""
    assert "the 3 first CoLA factors of Q, K and V, rank 384, with RMSNorm and silu" in words["qkv_input"]
    assert words["o"].startswith("1536 -> 256 -> 512: CoLA, rank 256, with linear;")


def test_model_of_another_kind_is_counted_too(command, tmp_path):
    from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2
    )
    config.save_pretrained(tmp_path)
    assert record(command, tmp_path)["parameters"]["total"] == LlamaForCausalLM(config).num_parameters()
    GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2).save_pretrained(tmp_path)
    assert record(command, tmp_path)["parameters"]["parts"]["other"] > 0
    assert command("info", tmp_path).code == 0


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
        ("MptConfig", {"d_model": 32, "n_layers": 2, "n_heads": 4}),
    ],
    ids=["bloom", "mpt"],
)
def test_a_model_that_says_no_longest_sequence_is_counted_at_2048_tokens(command, tmp_path, name, fields):
    import transformers

    getattr(transformers, name)(vocab_size=50, **fields).save_pretrained(tmp_path)
    found = record(command, tmp_path)
    assert found["flops_per_token"]["sequence_length"] == 2048
    assert found["memory_bytes"]["cache_per_token"] == {"float32": 4 * 2 * 2 * 32, "bfloat16": 2 * 2 * 2 * 32}
    assert command("info", tmp_path).code == 0


def test_a_model_without_attention_has_no_cache_and_none_of_its_operations(command, tmp_path):
    from transformers import MambaConfig

    config = MambaConfig(vocab_size=50, hidden_size=32, state_size=4, num_hidden_layers=2)
    config.save_pretrained(tmp_path)
    counted = footprint(config)
    assert (counted.attention_operations, counted.forward_operations) == (0, 2 * counted.matrix_weights)
    assert record(command, tmp_path)["memory_bytes"]["cache_at_full_length"] == {"float32": 0, "bfloat16": 0}
    assert command("info", tmp_path).code == 0


def test_a_model_that_sees_and_hears_is_counted_with_its_towers(command, saved_model, tmp_path):
    from fanformer.generation.media_model import load_media_model

    folder = save_with_towers(saved_model, tmp_path / "towers")
    base, ours = (record(command, one) for one in (saved_model, folder))
    parts = ours["parameters"]["parts"]
    whole = load_media_model(folder, "cpu").model
    assert sum(parts.values()) == ours["parameters"]["total"] == whole.num_parameters()
    assert {name: parts[name] for name in base["parameters"]["parts"]} == base["parameters"]["parts"]
    assert parts["adapters"] == sum(one.numel() for name, one in whole.named_parameters() if ".lora_" in name)
    assert set(parts) - set(base["parameters"]["parts"]) == {"vision_tower", "audio_tower", "projectors", "adapters"}
    assert ours["parameters"]["layer_parts"] == base["parameters"]["layer_parts"]
    assert ours["flops_per_token"] == base["flops_per_token"]  # of text
    text = " ".join(command("info", folder).out.split())
    assert "16 x 16 pixels in, 4 tokens of a picture out" in text
    assert "sound in, 25 tokens a second out" in text
    assert "LoRA of rank 2 for the rows that show something" in text


def test_unknown_preset_names_the_nearest(command):
    assert command("info", "nanoo").refusal() == "error: no preset or folder 'nanoo': did you mean `nano`?"
    assert "no model folder" in command("info", "runs/nowhere").refusal()
