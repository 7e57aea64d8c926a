"""Attention in blocks gives SDPA's outputs and gradients, where it is used and where it steps aside."""

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fanformer.training import attention as training_attention
from fanformer.training.attention import attend_in_blocks, blocked_sdpa

LENGTH = 300  # no multiple of a block


def inputs(heads=6, groups=2, length=LENGTH):
    torch.manual_seed(0)
    shapes = ((2, heads, length, 16), (2, groups, length, 16), (2, groups, length, 16))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def packed_mask(length=LENGTH):
    """Return the mask of packed documents, one ending within a block, one of a single token."""
    starts = torch.zeros(2, length, dtype=torch.bool)
    starts[0, [70, 71, 200]] = True
    documents = starts.cumsum(-1)
    return (documents[:, None, :, None] == documents[:, None, None, :]) & torch.ones(length, length).bool().tril()


def attention(heads=6, groups=2):
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = heads // groups, True
    return module


def with_gradients(attend, arguments, mask, module):
    output, weights = attend(module, *arguments, mask, scaling=0.25)
    assert weights is None
    signs = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return [output, *torch.autograd.grad((output * signs).sum(), arguments)]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("groups", [2, 6])
def test_outputs_and_gradients_are_those_of_sdpa(packed, groups):
    mask, module = packed_mask() if packed else None, attention(groups=groups)
    expected = with_gradients(sdpa_attention_forward, inputs(groups=groups), mask, module)
    compiled = torch.compile(blocked_sdpa, dynamic=False, fullgraph=True, backend="aot_eager")
    found = with_gradients(compiled, inputs(groups=groups), mask, module)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("case", ["blocked", "short", "evaluation", "not compiled"])
def test_what_does_not_gain_is_left_to_sdpa(monkeypatch, case):
    calls = []

    def counted(*arguments, **options):
        calls.append(case)
        return sdpa_attention_forward(*arguments, **options)

    monkeypatch.setattr(training_attention, "sdpa_attention_forward", counted)
    attend = torch.compile(blocked_sdpa, dynamic=False, backend="eager") if case != "not compiled" else blocked_sdpa
    length = 256 if case == "short" else LENGTH
    with torch.set_grad_enabled(case != "evaluation"):
        attend(attention(), *inputs(length=length), packed_mask()[..., :length, :length], scaling=0.25)
    assert calls == ([] if case == "blocked" else [case])


def test_only_sdpa_is_replaced(tiny_model):
    model = tiny_model()
    attend_in_blocks(model)
    assert model.config._attn_implementation == "blocked_sdpa"
    assert "blocked" not in str(model.config.to_dict())
    model.set_attn_implementation("eager")
    attend_in_blocks(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.ci
def test_a_compiled_model_trains_as_an_eager_one(tiny_model, token_ids):
    ids, positions = token_ids(2, LENGTH), torch.arange(LENGTH).expand(2, -1).clone()
    positions[0, 70:] -= 70

    def gradients(compiled):
        model = tiny_model(max_position_embeddings=LENGTH).train()
        if compiled:
            attend_in_blocks(model)
            for layer in model.model.layers:
                layer.compile(fullgraph=True, backend="aot_eager")
        model(input_ids=ids, labels=ids, position_ids=positions, use_cache=False).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    expected, found = gradients(False), gradients(True)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-3, msg=name)
