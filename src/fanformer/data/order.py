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
