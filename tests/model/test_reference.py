"""The model in float64 against the equations written out in tests/reference, forward and gradient."""

import pytest
import torch

from fanformer.model.modeling_fanformer import (
    CoLALinear,
    FANformerAttention,
    FANformerMLP,
    FANformerResidual,
    FANformerRMSNorm,
    FANLayer,
    FANProjection,
    apply_rotary,
    default_rope_frequencies,
    eager_attention_forward,
)
from tests.reference import fanformer_float64 as reference
from tests.tiny_models import FULL_RANK, PAPERS_COLA, TUNED, every_rank

# Both sides are float64 (eps 2e-16) and differ in the order of sums only; the largest difference seen is about 1e-13.
TOLERANCE = {"atol": 1e-10, "rtol": 1e-10}

SWITCHES = [
    {},
    TUNED,
    {"fan_placement": "ffn"},
    {"fan_placement": "ffn", "down_rank": None},
    {"fan_placement": "ffn", "fan_multiple": 4},
    {"fan_multiple": 1},
    {"fan_multiple": 4},
    {"fan_ratio": 0.4},
    {"fan_placement": "layer"},
    {"fan_placement": "layer", "fan_ratio": 0.25},
    {"fan_placement": "none"},
    {"fan_ratio": 0.0},
    {"fan_ratio": 0.5},
    FULL_RANK,
    every_rank(16),
    every_rank(5),
    {"gate_up_rank": None, "down_rank": None},
    {"qkv_rank": None, "o_rank": None},
    {"o_rank": None},
    {"down_rank": None},
    {"qkv_rank": None, "o_rank": None, "fan_placement": "none", "gate_up_rank": 5},
    {"cola_input": "separate"},
    {"cola_input": "separate", "fan_placement": "ffn"},
    {"fan_placement": "layer", "qkv_rank": 5},
    {"cola_norm": False},
    {"writer_activation": "silu"},
    {**PAPERS_COLA, "qkv_rank": None, "o_rank": None},
    PAPERS_COLA,
    {"cola_activation": "silu"},
    {"cola_activation": "gelu"},
    {"cola_activation": "linear"},
    {"writer_activation": "gelu"},
    {"writer_activation": "linear", "down_rank": 7},
    {"projection_bias": False},
    {"hidden_act": "gelu"},
    {"hidden_act": "linear"},
    {"norm_placement": "hybrid-star"},
    {"norm_placement": "hybrid"},
    {"norm_placement": "pre"},
    {"qkv_norm": "qkv"},
    {"qkv_norm": "none"},
    {"gated_residual": False},
    {"gate_initial": -2.0},
    {"tie_word_embeddings": True},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    {"num_key_value_heads": 1},
    {"num_key_value_heads": 4},
    {**FULL_RANK, "fan_placement": "layer", "norm_placement": "pre", "qkv_norm": "none"},
    {"fan_placement": "none", "qkv_rank": 5, "projection_bias": False, "norm_placement": "hybrid"},
    {
        **FULL_RANK,
        "gated_residual": False,
        "projection_bias": False,
        "norm_placement": "pre",
    },
    {"fan_placement": "layer", "cola_activation": "gelu", "hidden_act": "linear", "norm_placement": "hybrid"},
]


def name(fields):
    return "-".join(f"{key}={value}" for key, value in fields.items()) or "default"


def in_float64(model):
    """Move a model to float64, its rotary frequencies to their float64 values."""
    model = model.double()
    theta = model.config.rope_parameters["rope_theta"]
    frequencies = reference.rope_frequencies(model.config.head_dim, theta)
    model.model.rotary_emb.frequencies = lambda config, device: (frequencies, 1.0)
    return model


@pytest.mark.parametrize("length", [1, 7, 33])
@pytest.mark.parametrize("fields", SWITCHES, ids=name)
def test_logits_and_gradients_equal_the_equations(tiny_model, token_ids, fields, length):
    model = in_float64(tiny_model(**fields))
    input_ids = token_ids(2, length)
    weight = torch.randn(2, length, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    logits = model(input_ids).logits
    (logits * weight).sum().backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}

    state = {key: tensor.detach().requires_grad_() for key, tensor in model.named_parameters()}
    expected = reference.logits(state, model.config, input_ids)
    (expected * weight).sum().backward()

    torch.testing.assert_close(logits, expected, **TOLERANCE)
    for key, tensor in state.items():
        torch.testing.assert_close(gradients[key], tensor.grad, **TOLERANCE, msg=lambda text, key=key: f"{key}: {text}")
        # With one position there is nothing to weigh, so queries, keys and their norms have no influence.
        if length > 1 and tensor.numel():
            assert tensor.grad.abs().max() > 0, f"{key} has no influence: the comparison would miss it"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def randomised(module):
    module = module.double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def gradcheck(module, *inputs):
    """Compare analytic with numerical gradients, for the inputs and for every parameter."""
    parameters = tuple(module.parameters())
    assert torch.autograd.gradcheck(lambda *_: module(*inputs), (*inputs, *parameters), fast_mode=False)


def test_rms_norm_equals_its_equation():
    norm = randomised(FANformerRMSNorm(5, 1e-2))
    x = randn(3, 5)
    torch.testing.assert_close(norm(x), reference.rms_norm(x, norm.weight, 1e-2), **TOLERANCE)
    gradcheck(norm, x)


def test_rms_norm_of_bf16_is_computed_in_float32():
    norm = FANformerRMSNorm(512, 1e-5).to(torch.bfloat16)
    x = torch.randn(4, 512).to(torch.bfloat16)
    expected = reference.rms_norm(x.double(), norm.weight.double(), 1e-5)
    assert norm(x).dtype == torch.bfloat16
    # One rounding to 8 bits of mantissa at the end, and no more: half a unit in the last place is 2^-9.
    torch.testing.assert_close(norm(x).double(), expected, rtol=2**-8, atol=0)


@pytest.mark.parametrize("theta", [10000.0, 500.0])
def test_rotary_frequencies_equal_their_equation(tiny_config, theta):
    config = tiny_config(rope_parameters={"rope_type": "default", "rope_theta": theta})
    frequencies, scale = default_rope_frequencies(config, torch.device("cpu"))
    expected = reference.rope_frequencies(16, theta)
    torch.testing.assert_close(frequencies.double(), expected, rtol=1e-6, atol=0)  # float32
    assert scale == 1.0


def test_rotary_equals_its_equation():
    x = randn(1, 7, 1, 6)
    angles = torch.arange(7, dtype=torch.float64)[:, None] * reference.rope_frequencies(6, 100.0)
    cos, sin = angles.cos()[None, :, None], angles.sin()[None, :, None]
    torch.testing.assert_close(apply_rotary(x, cos, sin)[0, :, 0], reference.rope(x[0, :, 0], 100.0), **TOLERANCE)
    assert torch.autograd.gradcheck(lambda t: apply_rotary(t, cos, sin), (x,))


@pytest.mark.parametrize("activation", ["silu", "gelu", "linear", "residual"])
def test_cola_linear_equals_its_equation(tiny_config, activation):
    config = tiny_config(writer_activation=activation, fan_placement="ffn", fan_ratio=0.4, fan_multiple=1)
    linear = randomised(CoLALinear(config, 5, 4, rank=6, fan=True))
    x = randn(2, 5)
    weights = linear.input.factor.weight, linear.output.weight, linear.output.bias
    assert linear.input.factor.weight.shape == (6 - 2, 5)  # int(0.4 * 6)
    expected = reference.cola(x, *weights, activation, periodic=2)
    torch.testing.assert_close(linear(x), expected, **TOLERANCE)
    gradcheck(linear, x)


def test_fan_projection_equals_its_equation():
    projection = randomised(FANProjection(3, 10, periodic=2, bias=True, gain=1.0))
    u, v = randn(2, 3), randn(2, 3)
    p = reference.affine(u, projection.periodic.weight)
    g = reference.affine(v, projection.linear.weight, projection.linear.bias)
    assert p.shape[-1] == 2
    torch.testing.assert_close(projection(u, v), reference.fan(p, g), **TOLERANCE)
    gradcheck(projection, u, v)


def test_fan_layer_equals_its_equation():
    layer = randomised(FANLayer(7, periodic=2))
    x = randn(3, 7)
    expected = reference.fan_layer(x, layer.projection.weight, layer.projection.bias, 2)
    torch.testing.assert_close(layer(x), expected, **TOLERANCE)
    gradcheck(layer, x)


def test_gated_residual_equals_its_equation(tiny_config):
    residual = randomised(FANformerResidual(tiny_config(hidden_size=5)))
    x, branch = randn(2, 5), randn(2, 5)
    torch.testing.assert_close(residual(x, branch), reference.gated_residual(x, branch, residual.gate), **TOLERANCE)
    gradcheck(residual, x, branch)


def test_swiglu_equals_its_equation(tiny_config):
    config = tiny_config(hidden_size=4, intermediate_size=6, **every_rank(2))
    mlp = randomised(FANformerMLP(config))
    z = randn(1, 2, 4)
    expected = reference.swiglu(z, reference.Layer(dict(mlp.named_parameters()), ""), config)
    torch.testing.assert_close(mlp(z), expected, **TOLERANCE)
    gradcheck(mlp, z)


def test_eager_attention_equals_its_equation():
    q, k, v = randn(1, 4, 3, 2), randn(1, 2, 3, 2), randn(1, 2, 3, 2)
    mask = torch.full((3, 3), float("-inf"), dtype=torch.float64).triu(1)[None, None]

    def ours(*qkv):
        return eager_attention_forward(torch.nn.Module(), *qkv, mask, scaling=2**-0.5)[0]

    expected = torch.stack([reference.attend(q[0, h], k[0, h // 2], v[0, h // 2]) for h in range(4)], dim=1)
    torch.testing.assert_close(ours(q, k, v)[0], expected, **TOLERANCE)
    assert torch.autograd.gradcheck(ours, (q, k, v))


def test_attention_equals_its_equation(tiny_config):
    config = tiny_config(hidden_size=6, num_attention_heads=4, num_key_value_heads=2, head_dim=4, fan_ratio=0.2)
    config._attn_implementation = "eager"
    attention = randomised(FANformerAttention(config, layer_idx=0))
    x = randn(1, 3, 6)
    angles = torch.arange(3, dtype=torch.float64)[:, None] * reference.rope_frequencies(4, 10000.0)
    position_embeddings = angles.cos()[None, :, None], angles.sin()[None, :, None]
    mask = torch.full((3, 3), float("-inf"), dtype=torch.float64).triu(1)[None, None]

    expected = reference.attention(x[0], reference.Layer(dict(attention.named_parameters()), ""), config)
    torch.testing.assert_close(attention(x, position_embeddings, mask)[0][0], expected, **TOLERANCE)
    parameters = tuple(attention.parameters())
    assert torch.autograd.gradcheck(
        lambda *_: attention(x, position_embeddings, mask)[0], (x, *parameters), fast_mode=True
    )
