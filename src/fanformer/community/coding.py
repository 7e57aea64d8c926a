"""Numbers of a tensor as integers of 8 or 4 bits, with a float32 scale for every block of them; in numpy."""

import numpy as np

from fanformer.errors import ConfigError, DataError

BLOCK = 128
"""Numbers that share a scale."""
_LARGEST = {8: 127, 4: 7}
_ZERO = 8
"""What a four-bit code of 0 is stored as; a stored 0 is none."""


def check_bits(bits: int) -> None:
    """Raise ConfigError unless numbers can be coded in so many bits."""
    if type(bits) is not int or bits not in _LARGEST:
        raise ConfigError(f"`bits` must be 8 or 4, got {bits!r}: those are the codes of an update.")


def code_type(bits: int) -> str:
    """Return the type of the codes, as safetensors calls it."""
    return "I8" if bits == 8 else "U8"


def code_count(numbers: int, bits: int) -> int:
    """Return how many bytes hold the codes of so many numbers."""
    return numbers if bits == 8 else (numbers + 1) // 2


def scale_count(numbers: int) -> int:
    """Return how many scales go with so many numbers."""
    return -(-numbers // BLOCK)


def encode(values: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Code numbers to the nearest of 255 or 15 steps of their block's scale.

    Args:
        values: (n,) float32, finite.
        bits: 8 or 4.

    Returns:
        The codes, (n,) int8 or (ceil(n / 2),) uint8 with two in a byte, the first in its lower half; and the scales,
        (ceil(n / BLOCK),) float32.
    """
    largest = _LARGEST[bits]
    blocks = _in_blocks(values)
    scales = (np.abs(blocks).max(axis=1, initial=0) / np.float32(largest)).astype(np.float32)
    divisors = np.where(scales > 0, scales, np.float32(1))[:, None]
    codes = np.clip(np.rint(blocks / divisors), -largest, largest).astype(np.int8).reshape(-1)[: len(values)]
    if bits == 8:
        return codes, scales
    nibbles = np.full(2 * code_count(len(values), 4), _ZERO, dtype=np.uint8)
    nibbles[: len(values)] = (codes + _ZERO).astype(np.uint8)
    return nibbles[0::2] | (nibbles[1::2] << 4), scales


def decode(codes: np.ndarray, scales: np.ndarray, count: int, bits: int) -> np.ndarray:
    """Return the numbers, (count,) float32, of what `encode` made; the same bits on every machine.

    Args:
        codes: as `encode` returns them.
        scales: as `encode` returns them.
        count: of the numbers.
        bits: 8 or 4.
    """
    blocks = _in_blocks((codes if bits == 8 else _nibbles(codes)[:count] - _ZERO).astype(np.float32))
    return (blocks * scales[:, None]).reshape(-1)[:count]


def refuse_codes(name: str, codes: np.ndarray, scales: np.ndarray, count: int, bits: int) -> None:
    """Raise DataError for codes and scales, (n,) each, that `encode` cannot have made.

    Args:
        name: of the tensor, for the message.
        codes: as they came.
        scales: as they came.
        count: of the numbers.
        bits: 8 or 4.
    """
    largest = np.float32(_LARGEST[bits])
    with np.errstate(over="ignore", invalid="ignore"):
        is_number = bool(np.isfinite(scales * largest).all())
    if not is_number:
        raise DataError(f"`{name}` of an update must hold finite numbers, got a scale that is not: it is left out.")
    if bool((scales < 0).any()):
        raise DataError(f"`{name}` of an update must have scales from 0 on, got a negative one: it is left out.")
    if bits == 8:
        wrong = bool((codes == -128).any())
    else:
        nibbles = _nibbles(codes)
        wrong = bool((nibbles == 0).any()) or bool((nibbles[count:] != _ZERO).any())
    if wrong:
        raise DataError(f"`{name}` of an update must hold codes of {bits} bits, got one that is none: it is left out.")


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """Return the halves of bytes in order, (2 n,) int8 in [0, 15]."""
    return np.stack([codes & 15, codes >> 4], axis=1).reshape(-1).astype(np.int8)


def _in_blocks(values: np.ndarray) -> np.ndarray:
    """Return numbers, padded with 0, as (ceil(n / BLOCK), BLOCK)."""
    padded = np.zeros(scale_count(len(values)) * BLOCK, dtype=values.dtype)
    padded[: len(values)] = values
    return padded.reshape(-1, BLOCK)
