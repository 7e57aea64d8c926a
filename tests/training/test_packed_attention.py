"""Which attention a run takes, and that attention by the documents' bounds is that by their mask."""

import pytest
import torch
import torch.nn.functional as F

from fanformer.errors import ConfigError, DependencyError
from fanformer.training import attention
from fanformer.training.attention import choose_attention, document_bounds

POSITIONS = torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7]])


def flash_of_documents(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    """What torch's varlen_attn computes on CUDA, spelt out."""
    assert cu_seq_q.dtype == torch.int32
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert window_size == (-1, 0)
    outputs = []
    for begin, end in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
        assert 0 < end - begin <= min(max_q, max_k)
        one = [tensor[begin:end].transpose(0, 1)[None] for tensor in (query, key, value)]
        output = F.scaled_dot_product_attention(*one, is_causal=True, scale=scale, enable_gqa=enable_gqa)
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


def test_bounds_are_where_documents_begin_and_the_last_ends(tiny_model):
    model = tiny_model()
    assert document_bounds(model, POSITIONS) == {}
    model.set_attn_implementation("varlen")
    bounds = document_bounds(model, POSITIONS)
    assert bounds["cu_seq_lens_q"].tolist() == [0, 3, 4, 8, 16]
    assert bounds["cu_seq_lens_q"].dtype == torch.int32
    assert bounds["max_length_q"] == bounds["max_length_k"] == 8


@pytest.mark.parametrize(("autocast", "grouped"), [(False, True), (True, True), (False, False)])
def test_attention_by_bounds_is_attention_by_mask(tiny_model, token_ids, monkeypatch, autocast, grouped):
    monkeypatch.setattr(attention, "varlen_attn", flash_of_documents)
    if not grouped:
        monkeypatch.setattr(attention, "_VARLEN_KNOWS", {"window_size", "scale"})
    ids = token_ids(2, 8)

    def outcome(implementation):
        model = tiny_model().train()
        model.set_attn_implementation(implementation)
        batch = {"input_ids": ids, "position_ids": POSITIONS, **document_bounds(model, POSITIONS)}
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            outputs = model(**batch, labels=ids, use_cache=False)
        outputs.loss.backward()
        return outputs.logits, {name: parameter.grad for name, parameter in model.named_parameters()}

    (expected, wanted), (found, gradients) = outcome("sdpa"), outcome("varlen")
    tolerance = {"atol": 5e-2, "rtol": 5e-2} if autocast else {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(found, expected, **tolerance)
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, **tolerance, msg=name)


def test_without_bounds_the_mask_counts(tiny_model, token_ids):
    model, ids = tiny_model(), token_ids(2, 8)
    expected = model(input_ids=ids, position_ids=POSITIONS).logits
    model.set_attn_implementation("varlen")
    assert torch.equal(model(input_ids=ids, position_ids=POSITIONS).logits, expected)


@pytest.mark.parametrize(
    ("device", "precision", "compiled", "expected"),
    [
        ("cpu", "float32", True, "blocked_sdpa"),
        ("cpu", "float32", False, "sdpa"),
        ("cuda", "bfloat16", True, "flex_attention"),
        ("cuda", "bfloat16", False, "sdpa"),
        ("cuda", "float32", True, "sdpa"),
    ],
)
def test_auto_takes_what_is_fastest_in_compiled_code(tiny_model, device, precision, compiled, expected):
    model = tiny_model()
    choose_attention(model, "auto", device, precision, compiled)
    assert model.config._attn_implementation == expected


@pytest.mark.parametrize("fields", [{"attention_dropout": 0.1}, {"head_dim": 24}, {"head_dim": 8}])
def test_auto_takes_flex_attention_only_where_it_runs(tiny_model, fields):
    model = tiny_model(**fields)
    assert choose_attention(model, "auto", "cuda", "bfloat16", True) == "torch's default"
    assert model.config._attn_implementation == "sdpa"


def test_what_is_asked_for_is_taken(tiny_model, monkeypatch):
    monkeypatch.setattr(attention, "varlen_attn", flash_of_documents)
    for wanted, expected in (("sdpa", "sdpa"), ("flex_attention", "flex_attention"), ("varlen", "varlen")):
        model = tiny_model()
        assert choose_attention(model, wanted, "cuda", "bfloat16", True) == "as asked"
        assert model.config._attn_implementation == expected
    model = tiny_model()
    choose_attention(model, "sdpa", "cpu", "float32", True)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("wanted", ["varlen", "flash_attention_2", "flex_attention"])
def test_what_cannot_run_is_refused(tiny_model, wanted, monkeypatch):
    with pytest.raises(ConfigError, match=f"`attention` {wanted} needs CUDA, got device cpu: use auto or sdpa"):
        choose_attention(tiny_model(), wanted, "cpu", "bfloat16", True)
    if wanted != "flex_attention":
        with pytest.raises(ConfigError, match="needs bfloat16, got precision float32"):
            choose_attention(tiny_model(), wanted, "cuda", "float32", True)


def test_what_is_not_installed_is_named(tiny_model, monkeypatch):
    with pytest.raises(DependencyError, match="`attention` flash_attention_2 is not installed: "):
        choose_attention(tiny_model(), "flash_attention_2", "cuda", "bfloat16", True)
    monkeypatch.setattr(attention, "_VARLEN_KNOWS", {"is_causal"})
    with pytest.raises(DependencyError, match=r"`attention` varlen needs torch 2\.11 or later, got "):
        choose_attention(tiny_model(), "varlen", "cuda", "bfloat16", True)


def test_torchs_function_takes_what_it_is_given():
    assert attention.varlen_attn is not None, "torch 2.13 is pinned"
    import inspect

    inspect.signature(attention.varlen_attn).bind(1, 2, 3, 4, 5, 6, 7, scale=1.0, window_size=(-1, 0), enable_gqa=True)
