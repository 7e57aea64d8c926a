import pickle

import numpy as np
import pytest
import torch

from fanformer.data.packing import IGNORED_LABEL, PackedRows
from fanformer.data.preparation.prepare import TokenStream
from fanformer.errors import ConfigError, DataError

LENGTHS = [5, 1, 40, 2, 17, 1, 1, 90, 33]


def make_stream(end_id, lengths=LENGTHS):
    """Start is 0 and end is `end_id`; token 10 + n stands for place n of its document."""
    tokens = []
    for length in lengths:
        tokens += [0, *range(10, 10 + length)] + ([end_id] if end_id else [])
    if not end_id:
        tokens.append(0)
    return TokenStream(np.array(tokens, dtype=np.uint16), 0, end_id, num_documents=len(lengths), num_bytes=0)


STREAMS = pytest.mark.parametrize("stream", [make_stream(0), make_stream(1)], ids=["one token", "two tokens"])
ROW_LENGTHS = pytest.mark.parametrize("length", [1, 2, 7, 16, 64])


def concatenated(rows, key):
    return torch.cat([rows[i][key] for i in range(len(rows))]).numpy()


@STREAMS
@ROW_LENGTHS
def test_rows_reconstruct_the_stream(stream, length):
    rows = PackedRows(stream, length)
    used = len(rows) * length
    assert used > len(stream.tokens) - 1 - length
    assert np.array_equal(concatenated(rows, "input_ids"), stream.tokens[:used])
    labels = concatenated(rows, "labels")
    following = stream.tokens[1 : used + 1].astype(np.int64)
    kept = labels != IGNORED_LABEL
    assert np.array_equal(labels[kept], following[kept])
    assert rows.num_labels == kept.sum()
    assert rows.tokens_per_row == length


@STREAMS
def test_label_never_belongs_to_another_document(stream):
    rows = PackedRows(stream, 8)
    document = np.cumsum(stream.tokens == stream.start_id)
    inputs, labels = concatenated(rows, "input_ids"), concatenated(rows, "labels")
    for place, (token, label) in enumerate(zip(inputs, labels, strict=True)):
        same = document[place] == document[place + 1]
        if stream.start_id == stream.end_id:
            assert label == stream.tokens[place + 1]
            assert same or label == stream.end_id
        else:
            assert (label == IGNORED_LABEL) == (token == stream.end_id) == (not same)


@STREAMS
@ROW_LENGTHS
def test_positions_restart_at_every_row_and_every_document(stream, length):
    rows = PackedRows(stream, length)
    for index in range(len(rows)):
        row, expected = rows[index], []
        for token in row["input_ids"].tolist():
            expected.append(0 if token == stream.start_id or not expected else expected[-1] + 1)
        assert row["position_ids"].tolist() == expected


@STREAMS
@ROW_LENGTHS
def test_evaluation_rows_predict_every_token_exactly_once(stream, length):
    rows = PackedRows(stream, length, keep_partial=True)
    labels = concatenated(rows, "labels")
    following = stream.tokens[1:].astype(np.int64)
    crossing = (following == stream.start_id) & (stream.start_id != stream.end_id)
    assert np.array_equal(labels[: len(following)], np.where(crossing, IGNORED_LABEL, following))
    assert (labels[len(following) :] == IGNORED_LABEL).all()
    assert rows.num_labels == (labels != IGNORED_LABEL).sum() == (~crossing).sum()
    assert rows.fraction_used == 1.0
    last = rows[len(rows) - 1]
    assert all(values.shape == (length,) and values.dtype == torch.int64 for values in last.values())
    assert 0 <= last["position_ids"].min() <= last["position_ids"].max() < length
    assert last["input_ids"].max() <= stream.tokens.max()


@STREAMS
def test_fraction_used_counts_only_the_last_partial_row_as_lost(stream):
    rows = PackedRows(stream, 64)
    every = PackedRows(stream, 64, keep_partial=True).num_labels
    assert rows.fraction_used == rows.num_labels / every
    assert 1 - 64 / every < rows.fraction_used < 1
    assert PackedRows(stream, 1).fraction_used == 1.0


def test_rows_are_int64_and_do_not_share_memory_with_the_stream():
    stream = make_stream(1)
    before = stream.tokens.copy()
    row = PackedRows(stream, 16)[1]
    assert list(row) == ["input_ids", "labels", "position_ids"]
    assert all(value.dtype == torch.int64 and value.shape == (16,) for value in row.values())
    for value in row.values():
        value.fill_(9)
    assert np.array_equal(stream.tokens, before)


def test_row_outside_is_refused():
    for rows in (PackedRows(make_stream(0), 16), PackedRows(make_stream(0), 16, keep_partial=True)):
        for index in (-1, len(rows)):
            with pytest.raises(IndexError, match=rf"row must be in \[0, {len(rows)}\), got {index}"):
                rows[index]


def test_data_shorter_than_one_row_is_refused():
    stream = make_stream(0, [10])
    assert len(PackedRows(stream, 11)) == 1
    with pytest.raises(
        DataError, match=r"data holds 12 tokens, and one row needs 13: use a smaller `--sequence-length`"
    ):
        PackedRows(stream, 12)
    assert len(PackedRows(stream, 1000, keep_partial=True)) == 1
    empty = TokenStream(np.array([0], dtype=np.uint16), 0, 0, 0, 0)
    with pytest.raises(DataError, match=r"data holds 1 tokens, and one row needs 2"):
        PackedRows(empty, 8, keep_partial=True)
    with pytest.raises(ConfigError, match=r"`sequence_length` must be at least 1, got 0"):
        PackedRows(stream, 0)


def test_packed_documents_are_kept_apart_by_the_model(tiny_model):
    """The labels and positions of a row give each document the loss it has alone."""
    model = tiny_model()
    stream = make_stream(0, [5, 9, 1, 30])
    row = {key: value[None] for key, value in PackedRows(stream, 64, keep_partial=True)[0].items()}
    with torch.no_grad():
        logits = model(input_ids=row["input_ids"], position_ids=row["position_ids"], use_cache=False).logits
        packed = torch.nn.functional.cross_entropy(logits[0], row["labels"][0], reduction="sum", ignore_index=-100)
        alone = 0.0
        for length in (5, 9, 1, 30):
            document = torch.tensor([[0, *range(10, 10 + length), 0]])
            logits = model(input_ids=document[:, :-1], use_cache=False).logits
            alone += torch.nn.functional.cross_entropy(logits[0], document[0, 1:], reduction="sum")
    # float32 sums of 49 terms in another order
    assert packed.item() == pytest.approx(alone.item(), rel=1e-5)


def test_rows_can_be_sent_to_a_worker():
    rows = pickle.loads(pickle.dumps(PackedRows(make_stream(0), 16)))
    assert torch.equal(rows[1]["labels"], PackedRows(make_stream(0), 16)[1]["labels"])
