"""The loss in parts is cross entropy, with its gradients, and models use it for large batches only."""

import pytest
import torch
import torch.nn.functional as F
from transformers import GenerationConfig

from fanformer.training import chunked_loss
from fanformer.training.chunked_loss import chunked_cross_entropy, skip_logits


def numbers(dtype=torch.float64):
    torch.manual_seed(0)
    x = torch.randn(23, 12, dtype=dtype, requires_grad=True)
    weight = torch.randn(41, 12, dtype=dtype, requires_grad=True)
    labels = torch.randint(41, (23,))
    labels[[0, 7, 8, 9, 22]] = -100
    return x, weight, labels


@pytest.mark.parametrize("rows", [1, 4, 23, 100, None])
def test_loss_and_gradients_are_those_of_cross_entropy(rows):
    x, weight, labels = numbers()
    expected = F.cross_entropy(x @ weight.t(), labels, reduction="sum") / 18
    found = chunked_cross_entropy(x, weight, labels, 18, rows)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    wanted = torch.autograd.grad(3 * expected, (x, weight))
    for one, other in zip(torch.autograd.grad(3 * found, (x, weight)), wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


def test_nothing_to_predict_is_a_loss_of_zero():
    x, weight, labels = numbers()
    loss = chunked_cross_entropy(x, weight, torch.full_like(labels, -100), 1, 4)
    loss.backward()
    assert loss == 0
    assert not x.grad.any()
    assert not weight.grad.any()


def test_no_gradient_is_made_where_none_is_wanted():
    x, weight, labels = numbers(torch.float32)
    with torch.no_grad():
        loss = chunked_cross_entropy(x, weight, labels, 18, 4)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, F.cross_entropy(x @ weight.t(), labels, reduction="sum") / 18)


def test_autocast_makes_products_narrow_and_gradients_wide():
    x, weight, labels = numbers(torch.float32)
    exact = torch.autograd.grad(chunked_cross_entropy(x, weight, labels, 18, 4), (x, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = chunked_cross_entropy(x, weight, labels, 18, 4)
    assert loss.dtype == torch.float32
    found = torch.autograd.grad(loss, (x, weight))
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == torch.float32
        assert not torch.equal(one, other)
        torch.testing.assert_close(one, other, atol=3e-3, rtol=3e-2)


@pytest.mark.ci
def test_compiled_parts_are_the_same():
    torch.manual_seed(0)
    x, weight = (torch.randn(shape, requires_grad=True) for shape in ((22, 12), (41, 12)))
    labels = torch.randint(41, (22,))
    labels[[0, 7, 8, 21]] = -100
    part = torch.compile(chunked_loss._part, fullgraph=True, dynamic=False)
    expected = chunked_cross_entropy(x, weight, labels, 18, 8)
    found = chunked_cross_entropy(x, weight, labels, 18, 8, part)
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad(expected, (x, weight))
    for one, other in zip(torch.autograd.grad(found, (x, weight)), wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 1024), (torch.bfloat16, 2048)])
def test_default_parts_are_a_power_of_two(dtype, rows):
    seen = []

    def part(x, weight, labels, scale):
        seen.append(len(x))
        return chunked_loss._part(x, weight, labels, scale)

    x, weight = torch.randn(4096, 2, dtype=dtype), torch.randn(49152, 2, dtype=dtype)
    chunked_cross_entropy(x, weight, torch.zeros(4096, dtype=torch.long), 1, part=part)
    assert seen == [rows] * (4096 // rows)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.ci)])
def test_a_model_trains_the_same_without_logits(tiny_model, token_ids, monkeypatch, compiled):
    ids = token_ids(2, 9)
    batch = {"input_ids": ids, "labels": ids, "shift_labels": ids.roll(-1, 1), "num_items_in_batch": 18}

    def outcome(limit):
        model = tiny_model().train()
        monkeypatch.setattr(chunked_loss, "WHOLE_BYTES", limit)
        skip_logits(model, {"backend": "aot_eager"} if compiled and not limit else None)
        run = torch.compile(model, backend="aot_eager", dynamic=False) if compiled else model
        outputs = run(**batch, use_cache=False)
        outputs.loss.backward()
        return outputs, {name: parameter.grad for name, parameter in model.named_parameters()}

    plain, expected = outcome(2**30)
    parts, found = outcome(0)
    assert plain.logits is not None
    assert parts.logits is None
    torch.testing.assert_close(parts.loss, plain.loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_evaluation_and_text_are_as_before(tiny_model, token_ids, monkeypatch):
    ids = token_ids(2, 9)
    settings = GenerationConfig(max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    model = tiny_model()
    before = model(input_ids=ids, labels=ids), model.generate(ids, generation_config=settings)
    monkeypatch.setattr(chunked_loss, "WHOLE_BYTES", 0)
    skip_logits(model)
    after = model(input_ids=ids, labels=ids), model.generate(ids, generation_config=settings)
    assert torch.equal(before[0].logits, after[0].logits)
    assert torch.equal(before[0].loss, after[0].loss)
    assert torch.equal(before[1], after[1])
