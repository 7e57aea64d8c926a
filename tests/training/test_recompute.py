import contextlib
import logging

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from fanformer.errors import ConfigError
from fanformer.model import FANformerConfig, FANformerForCausalLM
from fanformer.training.recompute import set_recompute
from tests.tiny_models import TUNED, every_rank
from tests.training.conftest import TINY_MODEL

CHOICES = ("none", "low-rank", "block")
FIRST_FACTORS = ((32, 22), (32, 16), (32, 14), (48, 20))  # of Q, K and V; O; gate and up; down
SEPARATE = {"cola_input": "separate", **every_rank(12), "fan_placement": "none"}


class Products(TorchDispatchMode):
    """Keeps the shape of the second factor of every matrix product."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        if operation in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.shapes.append(tuple(arguments[-1].shape))
        return operation(*arguments, **(keywords or {}))


def build(**fields):
    torch.manual_seed(0)
    model = FANformerForCausalLM(FANformerConfig(**{**TINY_MODEL, **fields})).train()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)  # branches that start at 0 would hide most gradients
    return model


def step(model, compiled=False):
    """Return the loss, all gradients, and the shapes of the products of the backward pass."""
    products = Products()
    if compiled:
        for layer in model.model.layers:
            layer.compile(fullgraph=True)
    ids = torch.randint(320, (2, 32), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)  # of dropout
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    with contextlib.nullcontext() if compiled else products:  # compiled code does not show its operations
        loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters()], products.shapes


@pytest.mark.parametrize("fields", [{}, TUNED, SEPARATE], ids=["default", "tuned", "separate"])
@pytest.mark.parametrize("choice", CHOICES[1:])
def test_recomputing_gives_the_same_bits(choice, fields):
    model = build(**fields)
    set_recompute(model, choice)
    loss, gradients, _ = step(model)
    expected_loss, expected, _ = step(build(**fields))
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients, expected, strict=True))


def test_low_rank_computes_all_but_the_first_factors_again():
    shapes = {}
    for choice in CHOICES:
        model = build(dropout=0.0)
        set_recompute(model, choice)
        shapes[choice] = step(model)[2]
    backward = len(shapes["none"])
    # products of a block: four first factors; p and g of Q, K and V; O; gate, up, down
    layers, factors, forward = 2, 4, 4 + 6 + 1 + 3
    counts = {choice: [found.count(shape) for shape in FIRST_FACTORS] for choice, found in shapes.items()}
    assert [after - before for after, before in zip(counts["block"], counts["none"], strict=True)] == [layers] * factors
    assert counts["low-rank"] == counts["none"]
    assert len(shapes["block"]) - backward <= forward * layers
    assert len(shapes["block"]) - len(shapes["low-rank"]) == factors * layers
    assert len(shapes["low-rank"]) - backward >= (forward - factors - 2) * layers


@pytest.mark.slow
@pytest.mark.parametrize("choice", CHOICES[1:])
def test_compiled_blocks_recompute_too(choice, caplog):
    model = build(dropout=0.0)
    set_recompute(model, choice)
    loss, gradients, _ = step(model, compiled=True)
    expected_loss, expected, _ = step(build(dropout=0.0))
    torch.testing.assert_close(loss, expected_loss)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_other_models_recompute_whole_blocks_only():
    fields = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**fields, num_attention_heads=2, num_key_value_heads=1))
    with pytest.raises(ConfigError, match="`recompute` low-rank needs CoLA linears, got a model of full rank"):
        set_recompute(model, "low-rank")
    set_recompute(model, "block")
    assert model.model.layers[0].gradient_checkpointing
