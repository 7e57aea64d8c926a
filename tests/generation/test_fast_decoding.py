"""The fast way of decoding gives the plain way's numbers, and leaves a model as it was."""

import pytest
import torch
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fanformer.generation.fast_decoding import FewRowsLinear, fast_decoding, grouped_sdpa
from fanformer.machine.compiling import compiled_decoding, fixed_cache


def linear(bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(48, 72, bias=bias).to(dtype)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 9, 15, 16, 31, 32, 33])
@pytest.mark.parametrize("bias", [True, False])
def test_products_with_few_rows_are_those_of_a_linear_layer(rows, bias):
    plain, x = linear(bias), torch.randn(rows, 48)
    expected = plain.double()(x.double())
    fast = plain.float()
    fast.__class__ = FewRowsLinear
    with torch.no_grad():
        torch.testing.assert_close(fast(x).double(), expected, atol=2e-6, rtol=2e-6)
        assert fast(x[None]).shape == (1, rows, 72)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_single_row_is_a_sum_in_float32(dtype):
    plain, x = linear(dtype=dtype), torch.randn(1, 1, 48).to(dtype)
    expected = plain.double()(x.double())
    fast = plain.to(dtype)
    fast.__class__ = FewRowsLinear
    with torch.no_grad():
        found = torch.compile(fast, dynamic=False)(x)
    assert found.dtype == dtype
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


def test_training_and_other_dtypes_take_the_plain_way():
    x = torch.randn(2, 48)
    for dtype, grad in ((torch.float32, True), (torch.bfloat16, False), (torch.float64, False)):
        plain = linear(dtype=dtype)
        fast = linear(dtype=dtype)
        fast.__class__ = FewRowsLinear
        with torch.set_grad_enabled(grad):
            assert torch.equal(plain(x.to(dtype)), fast(x.to(dtype)))


@pytest.mark.parametrize("mask", ["boolean", "additive", "none"])
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("groups", [2, 6])
def test_grouped_attention_is_that_of_transformers(mask, length, groups):
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 6, length, 16), torch.randn(2, groups, 9, 16), torch.randn(2, groups, 9, 16)
    kept = torch.rand(2, 1, length, 9) < 0.6
    kept[..., 0] = True
    additive = torch.zeros(kept.shape).masked_fill(~kept, torch.finfo(torch.float32).min)
    chosen = {"boolean": kept, "additive": additive, "none": None}[mask]
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = 6 // groups, True
    expected, _ = sdpa_attention_forward(module, query, key, value, chosen, scaling=0.25)
    found, weights = grouped_sdpa(module, query, key, value, chosen, scaling=0.25)
    assert weights is None
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_a_model_is_as_it_was_afterwards(tiny_model):
    model = tiny_model()
    kinds = [type(module) for module in model.modules()]

    def fail_within():
        with fast_decoding(model):
            assert any(type(module) is FewRowsLinear for module in model.modules())
            assert model.config._attn_implementation == "grouped_sdpa"
            raise KeyError

    with pytest.raises(KeyError):
        fail_within()
    assert [type(module) for module in model.modules()] == kinds
    assert model.config._attn_implementation == "sdpa"


def test_other_attention_stays(tiny_model):
    model = tiny_model()
    model.set_attn_implementation("eager")
    with fast_decoding(model):
        assert model.config._attn_implementation == "eager"


def small_llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=2, **sizes, initializer_range=0.2)).eval()


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.ci)])
@pytest.mark.parametrize("architecture", ["fanformer", "llama"])
def test_logits_while_decoding_are_the_plain_ones(tiny_model, token_ids, architecture, compiled):
    model = tiny_model() if architecture == "fanformer" else small_llama()
    ids = token_ids(2, 7)
    present = torch.ones_like(ids)
    present[0, :3] = 0  # padded on the left

    def continue_by(options, cache=None):
        settings = GenerationConfig(
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
            disable_compile=not options,
            **options,
        )
        with torch.inference_mode():
            return model.generate(ids, attention_mask=present, generation_config=settings, past_key_values=cache)

    plain = continue_by({})
    with fast_decoding(model):
        fast = continue_by(*((compiled_decoding("cpu"), fixed_cache(model, 32)) if compiled else ({},)))
    assert torch.equal(plain.sequences, fast.sequences)
    for expected, found in zip(plain.logits, fast.logits, strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
