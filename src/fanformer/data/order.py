"""The order of rows in a run, as a pure function of seed, epoch and index, so that any resume reproduces it.

A Feistel network permutes the integers below a power of four; an image that is not below the length is permuted again
until it is (cycle walking), which leaves a permutation of the integers below the length.
"""

import hashlib

import numpy as np

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
