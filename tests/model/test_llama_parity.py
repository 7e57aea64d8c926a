"""With every switch off, FANformer is Llama: the same names, and with the same weights the same numbers."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.tiny_models import FULL_RANK

OFF = {
    "fan_placement": "none",
    **FULL_RANK,
    "projection_bias": False,
    "norm_placement": "pre",
    "qkv_norm": "none",
    "gated_residual": False,
}
# float32 sums in another order; logits here are of size 10, and float32 has 7 digits.
TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}


def pair(tiny_model, fields, llama_fields):
    """Make our model with every switch off, and Llama with the same weights."""
    ours = tiny_model(**{**OFF, **fields})
    config = ours.config
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters=dict(config.rope_parameters),
            tie_word_embeddings=config.tie_word_embeddings,
            **llama_fields,
        )
    ).eval()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.parametrize("length", [1, 7, 33])
@pytest.mark.parametrize(
    ("fields", "llama_fields"),
    [
        ({}, {}),
        ({"num_key_value_heads": 1}, {}),
        ({"num_key_value_heads": 4}, {}),
        ({"hidden_size": 63, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 10}, {}),
        ({"tie_word_embeddings": True}, {}),
        ({"projection_bias": True}, {"attention_bias": True, "mlp_bias": True}),
        ({"hidden_act": "gelu"}, {"hidden_act": "gelu"}),
        ({"rms_norm_eps": 1e-2}, {}),
        ({"rope_parameters": LINEAR}, {}),
        ({"rope_parameters": LLAMA3}, {}),
        ({"rope_parameters": YARN}, {}),
    ],
    ids=["default", "mqa", "mha", "odd", "tied", "bias", "gelu", "eps", "linear-rope", "llama3-rope", "yarn"],
)
def test_everything_off_equals_llama_in_logits_and_gradients(tiny_model, token_ids, fields, llama_fields, length):
    ours, theirs = pair(tiny_model, fields, llama_fields)
    input_ids = token_ids(2, length)
    weight = torch.randn(2, length, 256, generator=torch.Generator().manual_seed(3)) / 256

    results = []
    for model in (ours, theirs):
        logits = model(input_ids).logits
        (logits * weight).sum().backward()
        results.append((logits, {name: parameter.grad for name, parameter in model.named_parameters()}))
    (our_logits, our_gradients), (their_logits, their_gradients) = results
    torch.testing.assert_close(our_logits, their_logits, **TOLERANCE)
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in our_gradients.items():
        scale = their_gradients[name].abs().max().item()
        torch.testing.assert_close(gradient, their_gradients[name], atol=1e-5 * scale + 1e-9, rtol=1e-4)


def test_loss_equals_llamas(tiny_model, token_ids):
    ours, theirs = pair(tiny_model, {}, {})
    input_ids = token_ids(2, 17)
    labels = input_ids.masked_fill(input_ids % 5 == 0, -100)
    torch.testing.assert_close(ours(input_ids, labels=labels).loss, theirs(input_ids, labels=labels).loss)


def test_llama_weights_load_from_llamas_folder(tiny_model, token_ids, tmp_path):
    ours, theirs = pair(tiny_model, {}, {})
    theirs.save_pretrained(tmp_path)
    loaded = type(ours).from_pretrained(tmp_path, config=ours.config)
    input_ids = token_ids(1, 9)
    torch.testing.assert_close(loaded(input_ids).logits, theirs(input_ids).logits, **TOLERANCE)
