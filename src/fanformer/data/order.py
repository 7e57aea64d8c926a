"""The order of rows in an epoch, as a pure function of seed, epoch and index, so that any resume reproduces it.

A Feistel network permutes the integers below a power of four; an image that is not below the length is permuted again
until it is (cycle walking), which leaves a permutation of the integers below the length.
"""

import hashlib
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

_ROUNDS = 8
_SMALLEST_HALF_BITS = 3
_BLOCK = 1 << 16


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


def row_at(seed: int, epoch: int, index: int, length: int) -> int:
    """Return the row that an epoch visits at `index`, without building the epoch's order.

    Raises:
        IndexError: if `index` is not in [0, length).
    """
    if not 0 <= index < length:
        raise IndexError(f"`index` must be in [0, {length}), got {index}")
    return int(rows_at(seed, epoch, np.array([index]), length)[0])


def epoch_order(seed: int, epoch: int, length: int) -> np.ndarray:
    """Return all rows in the order of an epoch, a permutation of the integers below `length`."""
    return rows_at(seed, epoch, np.arange(length), length)


class EpochSampler(Sampler[int]):
    """Yield the rows of one epoch per iteration; `set_epoch` moves on to another.

    A run that resumes passes how many rows it has seen in all as `start`: that epoch begins where the run stopped.
    """

    def __init__(self, length: int, seed: int, start: int = 0) -> None:
        """Set up the epoch that `start` falls into.

        Args:
            length: number of rows.
            seed: any integer.
            start: rows already seen, earlier epochs included.

        Raises:
            ValueError: if `length` is not positive or `start` is negative.
        """
        if length < 1 or start < 0:
            raise ValueError(f"`length` must be positive and `start` not negative, got {length} and {start}")
        self._length, self._seed = length, seed
        self._resumed_epoch, self._offset = divmod(start, length)
        self._epoch = self._resumed_epoch

    @property
    def _first(self) -> int:
        return self._offset if self._epoch == self._resumed_epoch else 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Return how many rows an iteration of the current epoch yields."""
        return self._length - self._first

    def __iter__(self) -> Iterator[int]:
        """Yield the rows of the current epoch, without those seen before a resume."""
        for begin in range(self._first, self._length, _BLOCK):
            indices = np.arange(begin, min(begin + _BLOCK, self._length))
            yield from rows_at(self._seed, self._epoch, indices, self._length).tolist()


class RunSampler(Sampler[int]):
    """Yield the rows of a whole run, epoch after epoch, from any point of it.

    Step n of a run takes the rows at places n * batch_size and on, whatever the number of processes, and a run that
    resumes there goes on with the very rows that an uninterrupted one takes.
    """

    def __init__(self, length: int, seed: int, total: int, start: int = 0) -> None:
        """Set up the run.

        Args:
            length: number of rows in the data.
            seed: any integer.
            total: rows that the run takes in all.
            start: rows already taken.

        Raises:
            ValueError: if `length` is not positive, or `start` is not in [0, total].
        """
        if length < 1 or not 0 <= start <= total:
            raise ValueError(f"`length` must be positive and `start` in [0, {total}], got {length} and {start}")
        self._length, self._seed, self._total, self._start = length, seed, total, start

    def __len__(self) -> int:
        """Return how many rows the run takes in all, those before `start` among them."""
        return self._total

    def __iter__(self) -> Iterator[int]:
        """Yield the rows from `start` on."""
        place = self._start
        while place < self._total:
            epoch, index = divmod(place, self._length)
            stop = min(index + _BLOCK, self._length, index + self._total - place)
            yield from rows_at(self._seed, epoch, np.arange(index, stop), self._length).tolist()
            place += stop - index
