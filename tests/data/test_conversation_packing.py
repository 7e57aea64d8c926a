"""Rows for training on answers: whole conversations, their labels, and what does not fit."""

import itertools
import random

import numpy as np
import pytest
import torch

from fanformer.data.conversations.chat_tokens import add_chat_tokens, document_ends
from fanformer.data.conversations.chatml import END, as_text
from fanformer.data.conversations.display import marked_row
from fanformer.data.conversations.examples import Example, Message
from fanformer.data.conversations.rows import (
    ConversationRows,
    MaskedDocument,
    best_fit,
    masked_document,
    shorten,
    tokenize_examples,
)
from fanformer.data.packing import IGNORED_LABEL
from fanformer.errors import ConfigError, DataError
from tests.saved_models import tiny_tokenizer  # noqa: F401

WORDS = ["the cat", "a mat", "sat", "small things", "def add(a, b):", "speaks", "of"]


def turns(number, words="the cat"):
    said = [Message(("user", "assistant")[index % 2], f"{words} {index}") for index in range(number)]
    return tuple(said)


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(vocab_size=320)


@pytest.fixture(scope="module")
def prepared(model, tiny_tokenizer):  # noqa: F811
    return add_chat_tokens(model, tiny_tokenizer)


@pytest.fixture(scope="module")
def examples():
    """Forty conversations of one to three turns and different lengths."""
    draw = random.Random(0)
    found = []
    for _ in range(40):
        pairs = draw.randint(1, 3)
        said = [" ".join(draw.choices(WORDS, k=draw.randint(1, 2))) for _ in range(2 * pairs)]
        found.append(Example(tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(said))))
    return found


def test_inputs_end_before_the_last_learnt_token(prepared):
    messages = (Message("system", "be small"), *turns(4))
    document = masked_document(prepared.chatml, messages, given=3)
    encoded = prepared.chatml.encode(messages, given=3)
    assert document.ids.tolist() == encoded.ids[: len(document) + 1]
    assert document.ids[-1] == prepared.chatml.end_id
    learnt = document.ids[1:][document.trained]
    assert prepared.tokenizer.decode(learnt) == f"the cat 3{END}"
    assert masked_document(prepared.chatml, messages, given=5) is None


def test_rows_hold_every_conversation_once_with_its_labels(prepared, examples):
    tokenized = tokenize_examples(prepared.chatml, examples, 128, pytest.fail)
    rows = ConversationRows(tokenized.documents, 128, prepared.tokenizer.pad_token_id)
    assert (rows.tokens_per_row, rows.left_out) == (128, 0)
    found, filler = [], 0
    for index in range(len(rows)):
        row = rows[index]
        assert all(value.shape == (128,) and value.dtype == torch.int64 for value in row.values())
        positions = row["position_ids"].tolist()
        starts = [place for place, position in enumerate(positions) if position == 0]
        for start, end in zip(starts, [*starts[1:], 128], strict=True):
            assert positions[start:end] == list(range(end - start))
            ids, labels = row["input_ids"][start:end].tolist(), row["labels"][start:end].tolist()
            if set(labels) == {IGNORED_LABEL}:
                assert set(ids) == {prepared.tokenizer.pad_token_id}
                filler += len(ids)
                continue
            assert labels[-1] == prepared.chatml.end_id
            for token, label in zip(ids[1:], labels, strict=False):
                assert label in (token, IGNORED_LABEL)
            found.append((*ids, labels[-1]))
    assert sorted(found) == sorted(tuple(document.ids.tolist()) for (document,) in tokenized.documents)
    assert rows.num_labels == sum(int((rows[i]["labels"] != IGNORED_LABEL).sum()) for i in range(len(rows)))
    assert rows.num_labels == sum(
        sum(prepared.chatml.encode(example.messages, example.given).trained) for example in examples
    )
    assert rows.fraction_filled == pytest.approx(1 - filler / (128 * len(rows)))
    with pytest.raises(IndexError, match=rf"row must be in \[0, {len(rows)}\), got {len(rows)}"):
        rows[len(rows)]


@torch.no_grad()
def test_packed_loss_is_that_of_each_conversation_alone(prepared, model, examples):
    documents = tokenize_examples(prepared.chatml, examples, 128, pytest.fail).documents
    rows = ConversationRows(documents, 128, prepared.tokenizer.pad_token_id)

    def total(ids, labels, **inputs):
        return float(
            model(ids[None], labels=labels[None], shift_labels=labels[None], num_items_in_batch=1, **inputs).loss
        )

    packed = sum(
        total(row["input_ids"], row["labels"], position_ids=row["position_ids"][None])
        for row in (rows[index] for index in range(len(rows)))
    )
    alone = 0.0
    for (document,) in documents:
        ids = torch.from_numpy(document.ids.astype(np.int64))
        alone += total(ids[:-1], ids[1:].where(torch.from_numpy(document.trained), IGNORED_LABEL))
    assert packed == pytest.approx(alone, rel=1e-5)  # sums of some thousand float32 numbers in another order


def test_plain_texts_are_learnt_whole_as_documents_are_beside_conversations(prepared, examples):
    ends, words = document_ends(prepared.tokenizer), " ".join(WORDS * 12)
    texts = [Example((), text="the cat sat"), Example((), text=f"<|im_end|> {words}")]
    tokenized = tokenize_examples(prepared.chatml, [*examples[:3], *texts], 64, lambda line: None, ends=ends)
    plain = [document for (document,), source in zip(tokenized.documents, tokenized.sources, strict=True) if source > 2]
    assert tokenized.sources[:4] == (0, 1, 2, 3)
    assert all(document.trained.all() and len(document) <= 64 for document in plain)
    whole = [plain[0].ids[0], *(number for document in plain[1:] for number in document.ids[1:])]
    assert plain[0].ids.tolist() == [ends[0], *prepared.chatml.encode_plain("the cat sat"), ends[1]]
    assert whole[1:] == [*prepared.chatml.encode_plain(f"<|im_end|> {words}"), ends[1]]
    assert prepared.chatml.end_id not in whole
    assert sum(document.num_bytes for document in plain[1:]) == len(f"<|im_end|> {words}".encode())
    assert all(before.ids[-1] == after.ids[0] for before, after in itertools.pairwise(plain[1:]))
    rows = ConversationRows(tokenized.documents, 64, prepared.tokenizer.pad_token_id)
    assert rows.num_labels == sum(int(document.trained.sum()) for (document,) in tokenized.documents)


def test_best_fit_fills_rows_and_loses_nothing():
    draw = random.Random(1)
    lengths = [draw.randint(1, 40) for _ in range(500)]
    rows = best_fit(lengths, 64)
    assert sorted(itertools.chain(*rows)) == list(range(500))
    used = [sum(lengths[index] for index in row) for row in rows]
    assert max(used) <= 64
    assert sum(lengths) / (64 * len(rows)) > 0.98
    assert best_fit([3, 5, 2], 5) == [[1], [0, 2]]


def test_equal_conversations_give_equal_rows_and_others_another_fingerprint(prepared, examples):
    def rows(some, length=128):
        return ConversationRows(tokenize_examples(prepared.chatml, some, length, pytest.fail).documents, length, 0)

    first, again = rows(examples), rows(examples)
    assert first.fingerprint == again.fingerprint
    assert all(torch.equal(first[3][name], again[3][name]) for name in first[3])
    long = next(index for index, example in enumerate(examples) if len(example.messages) > 2)
    masked = [*examples[:long], Example(examples[long].messages, 2), *examples[long + 1 :]]
    others = [rows(examples[1:]), rows(examples, 127), rows(masked)]
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == 4


@pytest.mark.parametrize("system", [(), (Message("system", "be small"),)], ids=["no system", "system"])
@pytest.mark.parametrize("given", [0, 5])
def test_over_long_conversations_lose_whole_oldest_turns_and_keep_their_end(prepared, system, given):
    example = Example((*system, *turns(8)), given + len(system) if given else 0)
    whole = len(masked_document(prepared.chatml, example.messages))
    for length in range(whole, 10, -1):
        short = shorten(prepared.chatml, example, length)
        if short is None:
            break
        document = masked_document(prepared.chatml, short.messages, short.given)
        assert len(document) <= length
        assert document.ids[-1] == prepared.chatml.end_id
        lost = len(example.messages) - len(short.messages)
        assert lost % 2 == 0
        assert short.messages == (*system, *example.messages[len(system) + lost :])
        if lost:  # one exchange less would not have fitted
            more = (*system, *example.messages[len(system) + lost - 2 :])
            assert len(masked_document(prepared.chatml, more)) > length
        left = example.messages[max(example.given, lost + len(system)) :]
        learnt = prepared.tokenizer.decode(document.ids[1:][document.trained])
        assert learnt == "".join(f"{one.content}{END}" for one in left if one.role == "assistant")
    tail = example.messages[-2 if not given else -4 :]
    assert len(masked_document(prepared.chatml, (*system, *tail))) == length + 1
    assert shorten(prepared.chatml, example, whole) is example


def pair(number, rejected="no"):
    return Example(turns(2 * number), 2 * number - 1, (Message("assistant", rejected),))


def test_a_pair_is_shortened_until_a_row_holds_both_ends(prepared):
    example = pair(2, "a much longer answer than the chosen one")
    ends = (example.messages, (*example.messages[:3], *example.rejected))
    room = sum(len(masked_document(prepared.chatml, end, 3)) for end in ends)
    assert shorten(prepared.chatml, example, room) is example
    short = shorten(prepared.chatml, example, room - 1)
    assert (short.messages, short.given, short.rejected) == (turns(4)[2:], 1, example.rejected)
    for length in range(20, room + 1):  # as few as must be are dropped
        short = shorten(prepared.chatml, pair(2, example.rejected[0].content), length)
        needed = sum(
            len(masked_document(prepared.chatml, (*turns(4)[2:3], *end), 1))
            for end in (example.messages[3:], example.rejected)
        )
        assert (short is None) == (length < needed)


def test_rows_of_pairs_tell_chosen_from_rejected(prepared):
    examples = [pair(1), pair(2, "never ever"), pair(3)]
    tokenized = tokenize_examples(prepared.chatml, examples, 512, pytest.fail, preference=True)
    rows = ConversationRows(tokenized.documents, 512, 0)
    assert (len(rows), rows.examples_of(0)) == (1, [2, 1, 0])
    row = rows[0]
    for place, number in enumerate(rows.examples_of(0)):
        example = examples[number]
        for part, end in ((0, example.messages[-1:]), (1, example.rejected)):
            here = row["document_ids"] == 2 * place + part
            document = masked_document(prepared.chatml, (*example.messages[: example.given], *end), example.given)
            assert row["input_ids"][here].tolist() == document.ids[:-1].tolist()
            assert row["position_ids"][here].tolist() == list(range(len(document)))
            learnt = [label for label in row["labels"][here].tolist() if label != IGNORED_LABEL]
            assert prepared.tokenizer.decode(learnt) == f"{end[0].content}{END}"
    assert set(row["labels"][row["document_ids"] == -1].tolist()) == {IGNORED_LABEL}
    chosen = tokenize_examples(prepared.chatml, examples, 512, pytest.fail).documents
    assert "document_ids" not in ConversationRows(chosen, 512, 0)[0]


def test_what_does_not_fit_or_teaches_nothing_is_told_and_counted(prepared):
    long = Example((Message("user", "the cat"), Message("assistant", "small things " * 60)), place="a.jsonl:7")
    nothing = Example(turns(2), 2)
    notes = []
    tokenized = tokenize_examples(
        prepared.chatml, [Example(turns(2)), long, nothing, Example(turns(8))], 64, notes.append
    )
    assert tokenized.sources == (0, 3)
    counts = (tokenized.too_long, tokenized.unanswered, tokenized.shortened, tokenized.forgotten)
    assert counts == (1, 1, 1, 8 - 2 * sum(tokenized.documents[1][0].ids == prepared.chatml.start_id) // 2)
    assert notes[0] == "a.jsonl:7: its last question with its answer has more tokens than a row, 64; left out"
    assert notes[1] == "example 3: nothing of it is an answer to learn; left out"
    assert notes[2] == f"1 examples lost their oldest {tokenized.forgotten} messages to fit rows of 64 tokens"
    with pytest.raises(DataError, match=r"none of 1 examples can be learnt from in rows of 64 tokens, 1 are too long"):
        tokenize_examples(prepared.chatml, [long], 64, notes.append)


def test_documents_without_a_label_are_left_out_and_counted():
    silent = MaskedDocument(np.arange(4, dtype=np.int32), np.zeros(3, dtype=bool), 0)
    good = MaskedDocument(np.arange(4, dtype=np.int32), np.array([False, True, True]), 2)
    rows = ConversationRows([[silent], [good], [silent]], 8, 0)
    assert (rows.left_out, len(rows), rows.num_labels) == (2, 1, 2)
    with pytest.raises(DataError, match=r"`examples` must have 1 to 8 tokens with some to learn, got none"):
        ConversationRows([[silent]], 8, 0)
    with pytest.raises(DataError, match=r"`examples` must have 1 to 2 tokens with some to learn, got one of 3"):
        ConversationRows([[good]], 2, 0)
    with pytest.raises(ConfigError, match=r"`sequence_length` must be at least 1, got 0"):
        ConversationRows([[good]], 0, 0)
    with pytest.raises(DataError, match=r"must all have one document or all two, got \{1, 2\}"):
        ConversationRows([[good], [good, good]], 8, 0)


def test_a_shown_row_marks_exactly_what_is_learnt(prepared):
    first = [Message("user", "the cat\x1b[2J\u009b"), Message("assistant", "sat\ndown")]
    documents = [masked_document(prepared.chatml, first), masked_document(prepared.chatml, turns(4), given=2)]
    row = ConversationRows([[document] for document in documents], 160, 0)[0]
    shown = marked_row(prepared.tokenizer, row, colour=False)
    plain = as_text(turns(4)).rstrip("\n").replace(f"the cat 3{END}", f"[[the cat 3{END}]]")
    assert plain in shown
    assert f"<|im_start|>user\nthe cat\\x1b[2J\\x9b{END}\n<|im_start|>assistant\n[[sat\ndown{END}]]" in shown
    assert "tokens are learnt --\n" in shown
    used = sum(map(len, documents))
    assert shown.endswith(f"-- {160 - used} tokens of which nothing is learnt --")
    coloured = marked_row(prepared.tokenizer, row, colour=True)
    assert f"\x1b[1;32mthe cat 3{END}\x1b[0m" in coloured
    assert "\x1b[2J" not in coloured
