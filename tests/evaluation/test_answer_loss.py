"""The loss on held-out answers: each counted once, questions and filler never."""

import math

import numpy as np
import pytest
import torch

from fanformer.data.conversations.chat_tokens import add_chat_tokens
from fanformer.data.conversations.instructions import make_instructions
from fanformer.data.conversations.rows import ConversationRows, tokenize_examples
from fanformer.evaluation.loss import Share, answer_loss
from fanformer.evaluation.statistics import ratio_stderr


@pytest.fixture(scope="module")
def examples():
    return [item.example for item in make_instructions(24, 0, held_out=True)]


def packed(prepared, examples, length=192):
    documents = tokenize_examples(prepared.chatml, examples, length, pytest.fail).documents
    return ConversationRows(documents, length, prepared.tokenizer.pad_token_id)


@torch.no_grad()
def alone(model, chatml, example):
    """Surprise of the learnt tokens of one conversation by itself, and their number."""
    encoded = chatml.encode(example.messages, example.given)
    logits = model(torch.tensor([encoded.ids])).logits[0].double().log_softmax(-1)
    learnt = [place for place, trained in enumerate(encoded.trained) if trained]
    return -sum(float(logits[place - 1, encoded.ids[place]]) for place in learnt), len(learnt)


@pytest.mark.parametrize("kind", ["fanformer", "gpt2"])
def test_every_answer_counts_once_with_its_own_bytes(make_model, tiny_tokenizer, examples, kind):
    model = make_model(kind, positions=256).eval()
    prepared = add_chat_tokens(model, tiny_tokenizer)
    rows = packed(prepared, examples)
    assert len(rows) > 2
    found = answer_loss(model, rows, batch_size=2)
    measured = np.array([alone(model, prepared.chatml, example) for example in examples])
    nats, tokens = measured.T
    num_bytes = [len(example.messages[-1].content.encode()) for example in examples]
    assert (found.tokens, found.documents, found.bytes) == (tokens.sum(), len(examples), sum(num_bytes))
    assert found.loss == pytest.approx(nats.sum() / tokens.sum(), rel=1e-5)  # float32 logits, other masks
    assert found.bits_per_byte == pytest.approx(nats.sum() / math.log(2) / sum(num_bytes), rel=1e-5)
    assert found.loss_stderr == pytest.approx(ratio_stderr(nats, tokens), rel=1e-3)


def test_processes_share_the_work_and_a_sample_is_some_whole_rows(make_model, tiny_tokenizer, examples):
    model = make_model("fanformer", positions=256).eval()
    prepared = add_chat_tokens(model, tiny_tokenizer)
    rows = packed(prepared, examples)
    whole = answer_loss(model, rows, batch_size=2)
    collected = []

    def collect(sums):
        collected.append(sums)
        return sums

    for rank in range(2):
        answer_loss(model, rows, 1, share=Share(rank, 2, collect))
    together = [sum(pair) for pair in zip(*collected, strict=True)]
    third = len(together) // 3
    assert sum(together[third : 2 * third]) == whole.tokens
    assert sum(together[:third]) / 2**24 == pytest.approx(whole.loss * whole.tokens, rel=1e-5)
    some = answer_loss(model, rows, batch_size=2, max_tokens=2 * 192)
    assert 0 < some.documents < whole.documents
