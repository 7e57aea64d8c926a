"""Before training the model is a fair guesser, and its signals keep their size through 12 layers."""

import math

import pytest
import torch

from fanformer.model import FANformerConfig, FANformerForCausalLM
from fanformer.model.modeling_fanformer import _ACTIVATIONS, FANformerDecoderLayer, FANProjection
from tests.reference.initialisation import assert_starts_as_expected, mean_square
from tests.tiny_models import FULL_RANK, PAPERS_COLA, TUNED


def measure(config):
    """Return the loss at step 0 and the standard deviations of every p and g, or of Q, K and V, and layer output."""
    torch.manual_seed(0)
    model = FANformerForCausalLM(config).eval()
    deviations = {}
    for name, module in model.named_modules():
        if isinstance(module, FANProjection):
            for part in ("periodic", "linear"):
                getattr(module, part).register_forward_hook(
                    lambda _m, _i, output, key=f"{name}.{part}": deviations.update({key: output.std().item()})
                )
        elif name.endswith(("q_proj", "k_proj", "v_proj")) or isinstance(module, FANformerDecoderLayer):
            module.register_forward_hook(lambda _m, _i, output, key=name: deviations.update({key: output.std().item()}))
    input_ids = torch.randint(0, config.vocab_size, (2, 128))
    with torch.no_grad():
        loss = model(input_ids, labels=input_ids).loss.item()
    return loss, deviations


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"cola_activation": "gelu"},
        {"cola_activation": "linear"},
        {"fan_placement": "ffn"},
        FULL_RANK,
        {"tie_word_embeddings": True},
        {"fan_ratio": 0.25},
        {"cola_input": "separate"},
        {"cola_norm": False},
        {"writer_activation": "silu"},
        PAPERS_COLA,
        {"gate_up_rank": None, "down_rank": None},
        {"fan_placement": "ffn", "fan_multiple": 4},
        {"qkv_rank": None, "o_rank": None},
        {"gate_initial": -2.0},
        {"norm_placement": "hybrid"},
        {"norm_placement": "pre"},
        {"gated_residual": False},
    ],
    ids=str,
)
def test_signals_keep_their_size_and_the_loss_is_that_of_guessing(fields):
    # The default width and depth; a smaller vocabulary saves time and changes neither.
    config = FANformerConfig(vocab_size=4096, dropout=0.0, **fields)
    loss, deviations = measure(config)
    assert abs(loss - math.log(4096)) < 0.1
    assert len(deviations) == 12 * (1 + (6 if config.fan_placement == "projection" else 3))
    outside = {name: round(std, 2) for name, std in deviations.items() if not 0.5 <= std <= 2}
    assert not outside


@pytest.mark.parametrize("activation", _ACTIVATIONS)
def test_mean_square_of_an_activation_is_the_integral_it_claims_to_be(activation):
    assert _ACTIVATIONS[activation][1] == pytest.approx(mean_square(activation), rel=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"cola_activation": "gelu"},
        {"cola_activation": "linear"},
        {"qkv_rank": 8, "gate_up_rank": 12},
        {"cola_activation": "gelu", "fan_ratio": 0.4},
        TUNED,
        FULL_RANK,
        {"fan_placement": "layer"},
        {"fan_placement": "none"},
        {"cola_input": "separate"},
        {"cola_norm": False},
        {"writer_activation": "silu"},
        PAPERS_COLA,
        {"gate_up_rank": None, "down_rank": None},
        {"fan_placement": "ffn", "fan_multiple": 4},
        {"qkv_rank": None, "o_rank": None},
        {"gate_initial": -2.0},
        {"tie_word_embeddings": True},
        {"initializer_range": 0.05, "embedding_initializer_range": 0.5},
        {"norm_placement": "pre", "num_hidden_layers": 3},
    ],
    ids=str,
)
def test_every_parameter_starts_as_the_table_says(tiny_config, fields):
    torch.manual_seed(0)
    model = FANformerForCausalLM(tiny_config(**fields))
    for name, parameter in model.named_parameters():
        assert_starts_as_expected(name, parameter.detach(), model.config)
