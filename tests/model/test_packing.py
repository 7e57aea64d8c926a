"""Documents packed into one row behave as if each were alone, whatever the cache, the mask, the backend, the mode."""

import pytest
import torch
from transformers import DataCollatorWithFlattening, StaticCache

from fanformer.model.modeling_fanformer import packed_documents
from tests.tiny_models import PAPERS_COLA

# Sums over a row and over a document alone go in another order; logits here are of size 10.
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
LENGTHS = (5, 1, 9, 1, 1, 4)
CACHE = [{"use_cache": False}, {"use_cache": True}, {}]


@pytest.fixture(scope="module")
def documents(token_ids):
    return [token_ids(length, seed=10 + index) for index, length in enumerate(LENGTHS)]


def pack(documents):
    """Return token ids and positions (1, T) of one row."""
    positions = [torch.arange(len(document)) for document in documents]
    return torch.cat(documents)[None], torch.cat(positions)[None]


def separately(model, documents):
    """Return the logits (T, V) of the documents, each alone."""
    return torch.cat([model(document[None], use_cache=False).logits[0] for document in documents])


def masks(input_ids):
    return {"no mask": None, "ones": torch.ones_like(input_ids)}


VARIANTS = [
    ({}, "sdpa"),
    ({}, "eager"),
    ({**PAPERS_COLA}, "sdpa"),
]


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def model(request, tiny_model):
    fields, attention = request.param
    model = tiny_model(**fields)
    model.set_attn_implementation(attention)
    return model


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("mask", ["no mask", "ones"])
@pytest.mark.parametrize("cache", CACHE, ids=str)
def test_packed_row_equals_separate_documents(model, documents, cache, mask, training):
    model.train(training)  # dropout is 0
    input_ids, position_ids = pack(documents)
    with torch.no_grad():
        packed = model(input_ids, position_ids=position_ids, attention_mask=masks(input_ids)[mask], **cache).logits[0]
        expected = separately(model, documents)
        leaking = model(input_ids, use_cache=False).logits[0]
    torch.testing.assert_close(packed, expected, **TOLERANCE)
    assert (leaking - expected).abs().max() > 0.1, "the documents would not influence each other anyway"


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("mask", ["no mask", "ones"])
@pytest.mark.parametrize("cache", CACHE, ids=str)
@torch.no_grad()
def test_changing_one_document_changes_no_bit_of_the_others(model, documents, cache, mask, training):
    model.train(training)
    input_ids, position_ids = pack(documents)
    options = {"position_ids": position_ids, "attention_mask": masks(input_ids)[mask], **cache}
    before = model(input_ids, **options).logits[0].split(LENGTHS)
    for changed in range(len(documents)):
        row = [(document + 1) % 256 if index == changed else document for index, document in enumerate(documents)]
        after = model(torch.cat(row)[None], **options).logits[0].split(LENGTHS)
        for index in range(len(documents)):
            assert torch.equal(before[index], after[index]) == (index != changed), f"{changed} changed {index}"


@pytest.mark.parametrize("fields", [{}, {"fan_placement": "layer", "norm_placement": "pre"}], ids=str)
def test_gradients_of_a_packed_row_are_those_of_the_documents(tiny_model, documents, fields):
    model = tiny_model(**fields).train()
    input_ids, position_ids = pack(documents)
    weight = torch.randn(input_ids.shape[1], 256, generator=torch.Generator().manual_seed(2)) / 256

    def gradients(logits):
        model.zero_grad()
        (logits * weight).sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    packed = gradients(model(input_ids, position_ids=position_ids).logits[0])
    expected = gradients(separately(model, documents))
    for name, gradient in packed.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5 * expected[name].abs().max().item(), rtol=1e-4)


def test_loss_of_flattened_documents_is_the_mean_over_all_their_predictions(tiny_model, token_ids):
    model = tiny_model().train()
    documents = [token_ids(length, seed=length) for length in (5, 2, 9)]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=False)([{"input_ids": d.tolist()} for d in documents])
    losses = [model(document[None], labels=document[None]).loss * (len(document) - 1) for document in documents]
    torch.testing.assert_close(model(**batch).loss, sum(losses) / (4 + 1 + 8), **TOLERANCE)


@torch.no_grad()
def test_rows_of_a_batch_have_their_own_boundaries(model, token_ids):
    rows = [[5, 7, 8], [1, 1, 18], [20], [10, 10]]
    documents = [[token_ids(n, seed=31 * i + j) for j, n in enumerate(row)] for i, row in enumerate(rows)]
    packed = [pack(row) for row in documents]
    input_ids, position_ids = (torch.cat(tensors) for tensors in zip(*packed, strict=True))
    logits = model(input_ids, position_ids=position_ids).logits
    for found, row in zip(logits, documents, strict=True):
        torch.testing.assert_close(found, separately(model, row), **TOLERANCE)


@torch.no_grad()
def test_positions_may_be_shared_by_the_batch(model, token_ids):
    rows = [[token_ids(n, seed=31 * i + n) for n in (3, 8, 2)] for i in range(3)]
    input_ids = torch.cat([pack(row)[0] for row in rows])
    logits = model(input_ids, position_ids=pack(rows[0])[1]).logits
    for found, row in zip(logits, rows, strict=True):
        torch.testing.assert_close(found, separately(model, row), **TOLERANCE)


@torch.no_grad()
def test_packed_row_may_end_in_padding(model, documents):
    input_ids, position_ids = pack(documents)
    mask = torch.cat((torch.ones_like(input_ids), torch.zeros(1, 3, dtype=torch.int64)), dim=1)
    input_ids, position_ids = (torch.nn.functional.pad(t, (0, 3)) for t in (input_ids, position_ids))
    logits = model(input_ids, position_ids=position_ids, attention_mask=mask).logits[0, :-3]
    torch.testing.assert_close(logits, separately(model, documents), **TOLERANCE)


@torch.no_grad()
def test_document_continued_from_an_earlier_row_keeps_its_positions(model, token_ids):
    first, second = token_ids(6), token_ids(5, seed=2)
    position_ids = torch.cat((torch.arange(40, 46), torch.arange(5)))[None]
    logits = model(torch.cat((first, second))[None], position_ids=position_ids).logits[0]
    alone = model(first[None], position_ids=torch.arange(40, 46)[None]).logits[0]
    torch.testing.assert_close(logits, torch.cat((alone, separately(model, [second]))), **TOLERANCE)


@torch.no_grad()
def test_static_cache_takes_a_packed_row(model, documents):
    input_ids, position_ids = pack(documents)
    cache = StaticCache(config=model.config, max_cache_len=40)
    logits = model(input_ids, position_ids=position_ids, past_key_values=cache).logits[0]
    torch.testing.assert_close(logits, separately(model, documents), **TOLERANCE)


@torch.no_grad()
def test_flex_attention_keeps_documents_apart(tiny_model, documents):
    model = tiny_model()
    input_ids, position_ids = pack(documents)
    expected = separately(model, documents)
    model.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):  # flex_attention compiles itself otherwise
        for cache in CACHE:
            logits = model(input_ids, position_ids=position_ids, **cache).logits[0]
            torch.testing.assert_close(logits, expected, **TOLERANCE)


@pytest.mark.parametrize(("attention", "cache"), [("sdpa", {"use_cache": False}), ("sdpa", {}), ("eager", {})], ids=str)
@torch.no_grad()
def test_compiled_model_keeps_documents_apart(tiny_model, documents, attention, cache):
    model = tiny_model()
    model.set_attn_implementation(attention)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    input_ids, position_ids = pack(documents)
    logits = compiled(input_ids, position_ids=position_ids, **cache).logits[0]
    torch.testing.assert_close(logits, separately(model, documents), **TOLERANCE)
    # The boundaries are data: other ones need no other program.
    documents = list(reversed(documents))
    input_ids, position_ids = pack(documents)
    with torch.compiler.set_stance("fail_on_recompile"):
        logits = compiled(input_ids, position_ids=position_ids, **cache).logits[0]
    torch.testing.assert_close(logits, separately(model, documents), **TOLERANCE)


def numbers(positions, mask=None):
    result = packed_documents(torch.tensor([positions]), None if mask is None else torch.tensor([mask]))
    return None if result is None else result[0].tolist()


def test_a_document_starts_where_positions_do_not_go_on():
    assert numbers([0, 1, 2, 3]) is None
    assert numbers([7, 8, 9]) is None
    assert numbers([0]) is None
    assert numbers([0, 1, 0, 1, 2, 0]) == [0, 0, 1, 1, 1, 2]
    assert numbers([0, 0, 0]) == [0, 1, 2]
    assert numbers([0, 1, 5, 6]) == [0, 0, 1, 1]
    assert numbers([0, 1, 0, 1], [1, 1, 1, 1]) == [0, 0, 1, 1]


def test_padding_starts_no_document():
    for fill in (0, 1):  # what generate gives to padding, now and earlier
        assert numbers([fill, fill, 0, 1, 2], [0, 0, 1, 1, 1]) is None
        assert numbers([0, 1, 2, fill, fill], [1, 1, 1, 0, 0]) is None
        assert numbers([0, 1, fill, 2, 3], [1, 1, 0, 1, 1]) is None
    assert numbers([0, 0, 1, 0, 1], [0, 1, 1, 1, 1]) == [0, 0, 0, 1, 1]
    assert numbers([0, 1, 2, 0, 1], [0, 0, 0, 0, 0]) is None
