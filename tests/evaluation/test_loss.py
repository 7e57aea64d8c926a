"""Loss on text: packed equals separate for every architecture, bytes are counted, standard errors are right."""

import math

import numpy as np
import pytest
import torch

from fanformer.errors import DataError, NotANumberError
from fanformer.evaluation import loss
from fanformer.evaluation.loss import DocumentSums, evaluate_documents, keeps_documents_apart
from fanformer.evaluation.statistics import ratio, ratio_stderr
from tests.saved_models import SENTENCES

TEXTS = [*SENTENCES, "caf\u00e9 \u2013 na\u00efve \U0001f600", *(sentence * 3 for sentence in SENTENCES), "x"]


def nats_of(model, tokenizer, text):
    """Nats of a text and its end after its start, by a forward pass of its own."""
    ids = torch.tensor([[0, *tokenizer.encode(text, add_special_tokens=False), 0]])
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
    return -float(logits.gather(1, ids[0, 1:, None]).sum())


@pytest.mark.parametrize("kind", ["fanformer", "llama", "gpt2", "qwen3"])
def test_packed_documents_equal_separate_ones(make_model, tiny_tokenizer, kind):
    model = make_model(kind)
    sums = evaluate_documents(model, tiny_tokenizer, TEXTS, sequence_length=128, batch_size=2)
    start = 0
    for text, nats, tokens in zip(TEXTS, sums.nats, sums.tokens, strict=True):
        length = len(tiny_tokenizer.encode(text, add_special_tokens=False)) + 1
        assert tokens == length
        if start // 128 == (start + length - 1) // 128:  # the others are cut at the end of a row
            # float32 sums in other shapes
            assert nats == pytest.approx(nats_of(model, tiny_tokenizer, text), rel=2e-5)
        start += length
    assert start > 128


def test_architecture_that_ignores_restarting_positions_is_given_separate_rows(make_model, tiny_tokenizer, monkeypatch):
    model = make_model("llama")
    packed = evaluate_documents(model, tiny_tokenizer, TEXTS, sequence_length=64).figures().to_dict()
    assert keeps_documents_apart(model)
    forward = model.forward
    # an explicit mask, as an architecture has that derives none from the positions
    monkeypatch.setattr(
        model, "forward", lambda input_ids, **words: forward(input_ids, torch.ones_like(input_ids), **words)
    )
    assert not keeps_documents_apart(model)
    separate = evaluate_documents(model, tiny_tokenizer, TEXTS, sequence_length=64).figures().to_dict()
    assert separate["tokens"] == packed["tokens"]
    assert separate["loss"] == pytest.approx(packed["loss"], rel=1e-5)


@pytest.mark.parametrize("kind", ["bytes", "unigram"])
def test_bits_per_byte_agree_with_an_independent_count(make_model, tiny_tokenizer, kind):
    tokenizer = tiny_tokenizer if kind == "bytes" else unigram_tokenizer()
    model = make_model("fanformer").double()
    result = evaluate_documents(model, tokenizer, TEXTS, sequence_length=128, batch_size=3).figures().to_dict()
    # one document a row, so that none is cut
    alone = [evaluate_documents(model, tokenizer, [text]) for text in TEXTS]
    bits = sum(nats_of(model, tokenizer, text) for text in TEXTS) / math.log(2)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    together = DocumentSums.join(alone).figures()
    assert result["bytes"] == together.bytes == num_bytes
    # losses are computed in float32 from float64 logits
    assert together.bits_per_byte == pytest.approx(bits / num_bytes, rel=1e-6)


def unigram_tokenizer():
    """A tokenizer of another kind: Unigram over words with a visible space, separate start and end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    specials = ["<s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=specials, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(TEXTS * 10, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<s>", unk_token="<unk>")


def test_standard_error_of_a_ratio_is_that_of_repeated_samples():
    generator = np.random.default_rng(0)
    lengths = generator.integers(5, 60, (4000, 200)).astype(float)
    nats = lengths * generator.normal(3, 0.5, lengths.shape)
    ratios = nats.sum(1) / lengths.sum(1)
    errors = [ratio_stderr(above, below) for above, below in zip(nats[:50], lengths[:50], strict=True)]
    # 4,000 samples know their spread to about 1%, and 50 standard errors average to about 1%
    assert np.mean(errors) == pytest.approx(ratios.std(), rel=0.05)
    assert ratio([(2.0, 4.0)]) == (0.5, None)


def test_standard_errors_come_with_every_figure_and_need_two_documents(make_model, tiny_tokenizer):
    model = make_model("fanformer")
    sums = evaluate_documents(model, tiny_tokenizer, TEXTS)
    figures = sums.figures()
    assert figures.documents == len(TEXTS)
    assert figures.loss_stderr == ratio_stderr(sums.nats, sums.tokens)
    assert figures.perplexity_stderr == pytest.approx(figures.perplexity * figures.loss_stderr)
    assert figures.bits_per_byte_stderr == pytest.approx(ratio_stderr(sums.nats, sums.bytes) / math.log(2))
    one = evaluate_documents(model, tiny_tokenizer, TEXTS[:1]).figures().to_dict()
    assert one["loss_stderr"] is one["perplexity_stderr"] is one["bits_per_byte_stderr"] is None


def test_text_shorter_than_a_row_is_measured_and_none_is_refused(make_model, tiny_tokenizer):
    model = make_model("llama")
    result = evaluate_documents(model, tiny_tokenizer, ["x"], sequence_length=128).figures().to_dict()
    assert result["tokens"] == 2
    assert result["loss"] == pytest.approx(nats_of(model, tiny_tokenizer, "x") / 2, rel=1e-5)
    with pytest.raises(DataError, match="there is no text to evaluate: got 0 bytes"):
        evaluate_documents(model, tiny_tokenizer, [""])


def test_a_loss_that_is_no_number_is_refused(make_model, tiny_tokenizer):
    model = make_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(NotANumberError, match="values that are no numbers"):
        evaluate_documents(model, tiny_tokenizer, ["the cat sat"])


def test_processes_that_share_an_evaluation_sum_to_the_same_bits(make_model, tiny_tokenizer):
    model = make_model("fanformer")
    whole = evaluate_documents(model, tiny_tokenizer, TEXTS, sequence_length=16, batch_size=2)

    parts = []
    for rank in range(2):
        held = []
        share = loss.Share(rank, 2, lambda values, held=held: held.append(list(values)) or list(values))
        ids = [np.array(d, np.uint32) for d in loss.encode_documents(tiny_tokenizer, TEXTS)]
        tokens = loss.lay_out(ids, 0, 0, np.dtype(np.uint32), close=True)
        loss.held_out_loss(model, loss.TokenStream(tokens, 0, 0, len(TEXTS), 1), 16, 2, share=share)
        parts.append(np.array(held[0]))
    nats = (parts[0] + parts[1]).reshape(3, -1)[0] / 2**24
    assert np.array_equal(nats, whole.nats)
