"""Rows of a fixed length cut from a token stream: nothing padded, nothing dropped but the last partial row."""

from collections.abc import Mapping

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

    def __init__(self, stream: TokenStream, sequence_length: int, *, keep_partial: bool = False) -> None:
        """Count the rows.

        Args:
            stream: the tokens.
            sequence_length: T, tokens per row.
            keep_partial: whether the last partial row is one too, so that every token of the stream is predicted
                exactly once, for an exact loss: it is filled up with start tokens, each a document of its own, whose
                labels are IGNORED_LABEL.

        Raises:
            ConfigError: if `sequence_length` is not positive.
            DataError: if the stream is shorter than one row, or has no label at all where partial rows are kept.
        """
        if sequence_length < 1:
            raise ConfigError(f"`sequence_length` must be at least 1, got {sequence_length}")
        needed = 2 if keep_partial else sequence_length + 1
        if len(stream.tokens) < needed:
            raise DataError(
                f"data holds {len(stream.tokens)} tokens, and one row needs {needed}: "
                "use a smaller `--sequence-length` or more data"
            )
        self._stream = stream
        self.tokens_per_row = sequence_length
        num_labels = len(stream.tokens) - 1
        self._num_rows = (num_labels + (sequence_length - 1 if keep_partial else 0)) // sequence_length

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._num_rows

    @property
    def start_id(self) -> int:
        """The token that opens every document."""
        return self._stream.start_id

    def document_starts(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return where documents begin in rows of this: (B, T) bool.

        Args:
            batch: `input_ids` among them, (B, T).
        """
        return batch["input_ids"] == self.start_id

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
        length, start_id = self.tokens_per_row, self._stream.start_id
        tokens = np.asarray(self._stream.tokens[index * length : (index + 1) * length + 1])
        inputs = np.full(length, start_id, dtype=np.int64)
        labels = np.full(length, IGNORED_LABEL, dtype=np.int64)
        inputs[: len(tokens) - 1], labels[: len(tokens) - 1] = tokens[:-1], tokens[1:]
        if start_id != self._stream.end_id:
            labels[labels == start_id] = IGNORED_LABEL
        index_in_row = np.arange(length)
        document_start = np.maximum.accumulate(np.where(inputs == start_id, index_in_row, 0))
        return {
            "input_ids": torch.from_numpy(inputs),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(index_in_row - document_start),
        }

    def batch(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """Return several rows, each tensor (B, T) int64."""
        rows = [self[index] for index in indices]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _ignored(stream: TokenStream, labels: np.ndarray) -> int:
    """Count the labels that would cross into another document."""
    return int(np.count_nonzero(labels == stream.start_id)) if stream.start_id != stream.end_id else 0


def _predictable(stream: TokenStream) -> int:
    crossings = stream.num_documents - 1 if stream.start_id != stream.end_id else 0
    return len(stream.tokens) - 1 - crossings
