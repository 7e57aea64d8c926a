"""Rows of a fixed length cut from a token stream, nothing padded, only a last partial row dropped; and their order."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
import torch
from torch.utils.data import Dataset

from fanformer.data.prepared import TokenStream
from fanformer.errors import ConfigError, DataError

IGNORED_LABEL = -100
PLACES_OF_TEXT: ContextVar[torch.Tensor | None] = ContextVar("places_of_text", default=None)
"""Where the batch at hand holds text, (B, T) bool, for whoever counts what a model does with it; None is everywhere."""


@contextmanager
def places_of_text(places: torch.Tensor) -> Iterator[None]:
    """Say for the `with` block which places of a batch, (B, T) bool, do not only fill up rows or batches."""
    before = PLACES_OF_TEXT.set(places)
    try:
        yield
    finally:
        PLACES_OF_TEXT.reset(before)


class StepCount:
    """How many steps of a recurrent depth the tokens of some calls took."""

    def __init__(self) -> None:
        self.tokens = self.steps = 0

    @property
    def mean(self) -> float | None:
        """Steps a token, None where none took a number of its own."""
        return self.steps / self.tokens if self.tokens else None

    def add(self, tokens: int, steps: int) -> None:
        """Count these tokens and their steps, those of a call that an earlier process made too."""
        self.tokens += tokens
        self.steps += steps


STEPS_TAKEN: ContextVar[StepCount | None] = ContextVar("steps_taken", default=None)
"""Counts the steps of the calls at hand, where someone wants to know."""


class PackedRows(Dataset[dict[str, torch.Tensor]]):
    """Row i holds tokens [i T, i T + T) of a stream, T = sequence_length, with the token after each as its label.

    `labels` are shifted already: `labels[t]` is what follows `input_ids[t]`. `position_ids` begin at 0 in every row
    and at every start token, so that a model that derives its mask from them keeps documents apart. Where the end
    token is another than the start token, what follows an end token is the next document: that label is
    IGNORED_LABEL. Where they are one, the token after a document's last is its end, and stays.
    """

    digested = ("input_ids",)
    """What tells two rows apart; the labels follow from it."""

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


# The order of rows is a pure function of seed, epoch and index, so that any resume reproduces it: a Feistel network
# permutes the integers below a power of four; an image that is not below the length is permuted again until it is
# (cycle walking), which leaves a permutation of the integers below the length.
_ROUNDS = 8
_SMALLEST_HALF_BITS = 3


def _round_keys(seed: int, epoch: int) -> np.ndarray:
    digest = hashlib.blake2b(f"{seed},{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _mix(values: np.ndarray) -> np.ndarray:
    """Spread every bit over all 64, by the finalizer of SplitMix64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _feistel(values: np.ndarray, keys: np.ndarray, half_bits: int) -> np.ndarray:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << shift) | right


def rows_at(seed: int, epoch: int, indices: np.ndarray, length: int) -> np.ndarray:
    """Return the rows that an epoch visits at these indices.

    Args:
        seed: any integer.
        epoch: any integer.
        indices: integers in [0, length).
        length: number of rows.

    Returns:
        As many int64 in [0, length); different indices give different rows.
    """
    half_bits = max(_SMALLEST_HALF_BITS, ((length - 1).bit_length() + 1) // 2)
    keys = _round_keys(seed, epoch)
    rows = _feistel(np.asarray(indices).astype(np.uint64), keys, half_bits)
    outside = np.flatnonzero(rows >= length)
    while outside.size:
        rows[outside] = _feistel(rows[outside], keys, half_bits)
        outside = outside[rows[outside] >= length]
    return rows.astype(np.int64)


def rows_of_run(seed: int, places: np.ndarray, length: int) -> np.ndarray:
    """Return the rows at these places of a run, which takes epoch after epoch.

    Step n of a run takes the places n * batch_size and on, whatever the number of processes.

    Args:
        seed: any integer.
        places: integers from 0 on, in any order.
        length: number of rows in the data.

    Returns:
        As many int64 in [0, length).

    Raises:
        ValueError: if `length` is not positive or a place is negative.
    """
    places = np.asarray(places, dtype=np.int64)
    if length < 1 or (places.size and places.min() < 0):
        raise ValueError(f"`length` must be positive and `places` not negative, got {length} and {places.min()}")
    epochs, indices = np.divmod(places, length)
    rows = np.empty(len(places), dtype=np.int64)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        rows[chosen] = rows_at(seed, int(epoch), indices[chosen], length)
    return rows
