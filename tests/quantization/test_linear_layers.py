"""Parts, groups and rounding, and which scales fold: what GPTQ, AWQ and the scan rest on."""

from pathlib import Path

import pytest
import torch
from torch import nn

from fanformer.model import FANformerConfig, FANformerForCausalLM
from fanformer.quantization.compressed_tensors import foldable_scales
from fanformer.quantization.gptq_v1 import _OUTPUTS
from fanformer.quantization.linear_layers import (
    fill_intermediate,
    fitting_group,
    matrices_by_part,
    round_to_nearest,
)
from fanformer.quantization.quantized_folder import planned_groups
from tests.tiny_models import FULL_RANK, TUNED

VARIANTS = [
    {},
    TUNED,
    {"fan_placement": "ffn", "writer_activation": "silu"},
    {"cola_input": "separate"},
    {"fan_placement": "layer", "norm_placement": "pre", "writer_activation": "silu"},
    {**FULL_RANK, "fan_placement": "none", "norm_placement": "pre", "qkv_norm": "none"},
    {**FULL_RANK, "norm_placement": "hybrid", "projection_bias": False},
    {"tie_word_embeddings": True, "hidden_act": "gelu"},
]


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_every_matrix_has_a_part(tiny_model, fields):
    model = tiny_model(**fields)
    found = [module for modules in matrices_by_part(model).values() for module in modules.values()]
    expected = {id(p): p.numel() for p in model.parameters() if p.ndim == 2 and p.numel()}
    assert {id(module.weight): module.weight.numel() for module in found} == expected
    assert len(found) == len(expected)


@pytest.mark.parametrize(
    ("wanted", "smallest", "outputs", "whole"),
    # the 112 rows of p of K and of V are not so many at a time
    [(128, 16, 1, set()), (32, 32, _OUTPUTS, {"k_proj.periodic", "v_proj.periodic"})],
    ids=["gptq-awq", "gptq-v1"],
)
def test_at_most_a_twentieth_of_the_default_blocks_stays_uncut(wanted, smallest, outputs, whole):
    with torch.device("meta"):
        model = FANformerForCausalLM(FANformerConfig())
    groups = planned_groups(model, wanted, Path("default"), smallest, outputs)
    sizes = {name: parameter.numel() for name, parameter in model.model.layers.named_parameters()}
    cut = sum(sizes[f"{name}.weight".removeprefix("model.layers.")] for name, size in groups.items() if size)
    assert 1 - cut / sum(sizes.values()) <= 0.05
    assert {name.split(".", 4)[4] for name, size in groups.items() if size is None} == whole


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_folded_scales_leave_the_function_as_it_is(tiny_model, token_ids, fields):
    model, ids = tiny_model(**fields), token_ids(2, 16)
    modules, generator = dict(model.named_modules()), torch.Generator().manual_seed(3)
    with torch.no_grad():
        before = model(ids).logits
        folds = foldable_scales(model)
        for source, readers in folds:
            maker = modules[source]
            scale = torch.rand(len(maker.weight), generator=generator) + 0.5
            maker.weight.div_(scale if maker.weight.ndim == 1 else scale[:, None])
            if getattr(maker, "bias", None) is not None:
                maker.bias.div_(scale)
            for name in readers:
                modules[name].weight.mul_(scale)
        after = model(ids).logits
    assert folds
    # float32 rounds each product anew: a few units of 1e-7 of the largest logit
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()
    assert not torch.equal(after, before)


@pytest.mark.parametrize("fields", [{}, TUNED, {"projection_bias": False}], ids=str)
def test_filling_f_up_leaves_the_function_as_it_is(tiny_model, token_ids, fields):
    model, ids = tiny_model(intermediate_size=100, **fields), token_ids(2, 16)
    with torch.no_grad():
        before = model(ids).logits
        note = fill_intermediate(model, 64)
        after = model(ids).logits
    assert note == "intermediate_size is filled up from 100 to 128 with zeros, which fill groups of 64"
    assert model.config.intermediate_size == 128
    assert model.model.layers[0].mlp.gate_proj.weight.shape[0] == 128
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)  # sums over more columns round otherwise
    assert fill_intermediate(model, 64) == ""


def test_groups_are_halved_until_they_fill_rows():
    assert [fitting_group(rows, 64) for rows in (128, 96, 416, 48, 424, 1016)] == [64, 32, 32, 16, None, None]


def test_rounding_is_within_half_a_step_of_each_group():
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    rounded = round_to_nearest(weight, 4, 16)
    scale = weight.unflatten(-1, (-1, 16)).abs().amax(-1, keepdim=True) / 7.5
    error = (rounded - weight).unflatten(-1, (-1, 16)).abs() / scale
    assert float(error.max()) <= 0.5 + 1e-5
    assert all(len(group.unique()) <= 16 for group in rounded.unflatten(-1, (-1, 16)).flatten(0, 1))
    assert torch.equal(round_to_nearest(torch.zeros(2, 16), 4, 16), torch.zeros(2, 16))
    assert (round_to_nearest(weight, 8, 16) - weight).norm() < (rounded - weight).norm() / 10


def test_scan_puts_the_weights_back(loaded, tmp_path):
    import copy

    from fanformer.data.held_out import held_out_stream
    from fanformer.quantization.sensitivity import scan_model

    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 400)
    model = copy.deepcopy(loaded.model)
    stream = held_out_stream(tmp_path, loaded.tokenizer, str(text), 2048)
    scan = scan_model(model, stream, 8, 32, 2048)
    for one, other in zip(model.parameters(), loaded.model.parameters(), strict=True):
        assert torch.equal(one, other)
    coarse = scan_model(model, stream, 4, 32, 2048)
    errors = [(a.relative_error, b.relative_error) for a, b in zip(scan.parts, coarse.parts, strict=True)]
    assert all(0 < fine < rough / 10 for fine, rough in errors)
    assert all(isinstance(module, (nn.Linear, nn.Embedding)) for p in matrices_by_part(model).values()
               for module in p.values())  # fmt: skip
