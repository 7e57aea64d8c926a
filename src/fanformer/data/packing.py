"""Rows of a fixed length cut from a token stream: nothing padded, nothing dropped but the last partial row."""

import math

import numpy as np
import torch
from torch.utils.data import Dataset

from fanformer.data.prepared import TokenStream
from fanformer.errors import ConfigError, DataError

IGNORED_LABEL = -100


class PackedRows(Dataset[dict[str, torch.Tensor]]):
    """Row i holds tokens [i T, i T + T) of a stream, T = sequence_length, with the token after each as its label.

    `labels` are shifted already: `labels[t]` is what follows `input_ids[t]`. `position_ids` begin at 0 in every row
    and at every start token, so that a model that derives its mask from them keeps documents apart. Where the end
    token is another than the start token, what follows an end token is the next document: that label is
    IGNORED_LABEL. Where they are one, the token after a document's last is its end, and stays.
    """

    def __init__(self, stream: TokenStream, sequence_length: int) -> None:
        """Count the rows.

        Args:
            stream: the tokens.
            sequence_length: T, tokens per row.

        Raises:
            ConfigError: if `sequence_length` is not positive.
            DataError: if the stream is shorter than one row.
        """
        _check_length(stream, sequence_length, needed=sequence_length + 1)
        self._stream = stream
        self.tokens_per_row = sequence_length
        self._num_rows = (len(stream.tokens) - 1) // sequence_length

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._num_rows

    @property
    def start_id(self) -> int:
        """The token that opens every document."""
        return self._stream.start_id

    @property
    def num_labels(self) -> int:
        """Tokens that the rows predict: labels other than IGNORED_LABEL."""
        left_over = self._stream.tokens[self._num_rows * self.tokens_per_row + 1 :]
        return _predictable(self._stream) - (len(left_over) - _ignored(self._stream, left_over))

    @property
    def fraction_used(self) -> float:
        """Share of the stream's predictable tokens that the rows predict; only a last partial row is not used."""
        return self.num_labels / _predictable(self._stream)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return `input_ids`, `labels` and `position_ids` of a row, each (T,) int64."""
        if not 0 <= index < len(self):
            raise IndexError(f"row must be in [0, {len(self)}), got {index}")
        begin = index * self.tokens_per_row
        tokens = np.asarray(self._stream.tokens[begin : begin + self.tokens_per_row + 1]).astype(np.int64)
        return self._row(tokens[:-1], tokens[1:].copy())

    def _row(self, inputs: np.ndarray, labels: np.ndarray) -> dict[str, torch.Tensor]:
        start_id = self._stream.start_id
        if start_id != self._stream.end_id:
            labels[labels == start_id] = IGNORED_LABEL
        index = np.arange(len(inputs))
        document_start = np.maximum.accumulate(np.where(inputs == start_id, index, 0))
        return {
            "input_ids": torch.from_numpy(inputs),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(index - document_start),
        }


class EvaluationRows(PackedRows):
    """PackedRows with the last partial row, so that every token of the stream is predicted exactly once.

    That row is filled up with start tokens, each a document of its own, whose labels are IGNORED_LABEL.
    """

    def __init__(self, stream: TokenStream, sequence_length: int) -> None:
        """Count the rows, the partial one included; raises as PackedRows does, but a single label is enough."""
        _check_length(stream, sequence_length, needed=2)
        self._stream = stream
        self.tokens_per_row = sequence_length
        self._num_rows = math.ceil((len(stream.tokens) - 1) / sequence_length)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return `input_ids`, `labels` and `position_ids` of a row, each (T,) int64."""
        begin, stop = index * self.tokens_per_row, (index + 1) * self.tokens_per_row + 1
        if stop <= len(self._stream.tokens) or not 0 <= index < len(self):
            return super().__getitem__(index)
        tokens = np.asarray(self._stream.tokens[begin:]).astype(np.int64)
        inputs = np.full(self.tokens_per_row, self._stream.start_id, dtype=np.int64)
        labels = np.full(self.tokens_per_row, IGNORED_LABEL, dtype=np.int64)
        inputs[: len(tokens) - 1], labels[: len(tokens) - 1] = tokens[:-1], tokens[1:]
        return self._row(inputs, labels)


def evaluation_rows(stream: TokenStream, sequence_length: int) -> EvaluationRows:
    """Return rows that predict every token of the stream exactly once, for an exact loss and bits per byte.

    Raises:
        ConfigError: if `sequence_length` is not positive.
        DataError: if the stream holds no token to predict.
    """
    return EvaluationRows(stream, sequence_length)


def _check_length(stream: TokenStream, sequence_length: int, needed: int) -> None:
    if sequence_length < 1:
        raise ConfigError(f"`sequence_length` must be at least 1, got {sequence_length}")
    if len(stream.tokens) < needed:
        raise DataError(
            f"data holds {len(stream.tokens)} tokens, and one row needs {needed}: "
            "use a smaller `--sequence-length` or more data"
        )


def _ignored(stream: TokenStream, labels: np.ndarray) -> int:
    """Count the labels that would cross into another document."""
    return int(np.count_nonzero(labels == stream.start_id)) if stream.start_id != stream.end_id else 0


def _predictable(stream: TokenStream) -> int:
    crossings = stream.num_documents - 1 if stream.start_id != stream.end_id else 0
    return len(stream.tokens) - 1 - crossings
