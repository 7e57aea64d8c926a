"""How GGUF stores numbers: the types that we write and read, and what their blocks stand for; needs numpy only.

Source: ggml's block layouts (ggml-common.h) and their dequantization (ggml-quants.c), version 0.15.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class BlockType:
    """A number format: `block_bytes` bytes stand for `block_elements` consecutive numbers of a row."""

    name: str
    number: int
    """What GGUF calls it."""
    block_elements: int
    block_bytes: int
    file_type: int
    """What `general.file_type` calls a file whose matrices are mostly of this type (llama.cpp's LLAMA_FTYPE)."""

    @property
    def bits_per_weight(self) -> float:
        """Bits that a number takes, its share of the block's scales included."""
        return 8 * self.block_bytes / self.block_elements

    def row_bytes(self, row_length: int) -> int:
        """Return the bytes of a row of `row_length` numbers, which must be whole blocks."""
        assert row_length % self.block_elements == 0, (row_length, self.name)
        return row_length // self.block_elements * self.block_bytes

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of a tensor of a shape, the row length last."""
        return math.prod(shape[:-1]) * self.row_bytes(shape[-1])


TYPES = {
    item.name: item
    for item in (
        BlockType("f32", 0, 1, 4, 0),
        BlockType("f16", 1, 1, 2, 1),
        BlockType("bf16", 30, 1, 2, 32),
        BlockType("q8_0", 8, 32, 34, 7),
        BlockType("q4_0", 2, 32, 18, 2),
        BlockType("iq4_nl", 20, 32, 18, 25),
        BlockType("q4_k", 12, 256, 144, 15),
        BlockType("q5_k", 13, 256, 176, 17),
        BlockType("q6_k", 14, 256, 210, 18),
    )
}
"""Every type that we write and read, by name."""

BY_NUMBER = {item.number: item for item in TYPES.values()}


def dequantize(raw: Bytes, kind: BlockType, shape: tuple[int, ...]) -> Floats:
    """Return the numbers that `raw` stands for.

    Args:
        raw: (N,) uint8, the bytes of a tensor as in the file.
        kind: its type.
        shape: its shape, the row length last.
    """
    if kind.name == "f32":
        return raw.view("<f4").astype(np.float32).reshape(shape)
    if kind.name == "f16":
        return raw.view("<f2").astype(np.float32).reshape(shape)
    if kind.name == "bf16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is for the caller to refuse
        return _DECODERS[kind.name](raw.reshape(-1, kind.block_bytes)).reshape(shape)


def _half(blocks: Bytes, start: int) -> Floats:
    """Return the float16 at byte `start` of every block, (blocks, 1)."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: Bytes) -> NDArray[np.uint8]:
    """Return the low halves of the bytes, then the high halves, along the last axis."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _q8_0(blocks: Bytes) -> Floats:
    return blocks[:, 2:].view(np.int8).astype(np.float32) * _half(blocks, 0)


def _q4_0(blocks: Bytes) -> Floats:
    return (_nibbles(blocks[:, 2:]).astype(np.float32) - 8) * _half(blocks, 0)


# the 16 numbers that a half byte of IQ4_NL stands for
_IQ4_NL = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32)


def _iq4_nl(blocks: Bytes) -> Floats:
    return _IQ4_NL[_nibbles(blocks[:, 2:])] * _half(blocks, 0)


def _scales_and_minima(packed: Bytes) -> tuple[Floats, Floats]:
    """Return the eight 6-bit scales and minima, each (blocks, 8, 1), of the 12 bytes that hold both."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6) << 4], axis=1)
    minima = np.concatenate([second & 63, (third >> 4) | (second >> 6) << 4], axis=1)
    return scales.astype(np.float32)[..., None], minima.astype(np.float32)[..., None]


def _scaled(blocks: Bytes, numbers: NDArray[np.uint8]) -> Floats:
    """Return d scale q - dmin minimum for `numbers` (blocks, 8, 32)."""
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    d, dmin = _half(blocks, 0)[..., None], _half(blocks, 2)[..., None]
    return (d * scales) * numbers.astype(np.float32) - dmin * minima


def _low_halves(packed: Bytes) -> NDArray[np.uint8]:
    """Return (blocks, 8, 32) of 128 bytes: each 32 of them hold two runs of 32 numbers, low and high."""
    return _nibbles(packed.reshape(-1, 4, 32)).reshape(-1, 8, 32)


def _q4_k(blocks: Bytes) -> Floats:
    return _scaled(blocks, _low_halves(blocks[:, 16:]))


def _q5_k(blocks: Bytes) -> Floats:
    high = np.unpackbits(blocks[:, 16:48, None], axis=2, bitorder="little")  # (blocks, 32, 8)
    return _scaled(blocks, _low_halves(blocks[:, 48:]) | high.swapaxes(1, 2) << np.uint8(4))


def _q6_k(blocks: Bytes) -> Floats:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3
    numbers = (low | high << 4).astype(np.float32).reshape(-1, 16, 16) - 32
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32)[..., None]
    return (_half(blocks, 208)[..., None] * scales) * numbers


_DECODERS: dict[str, Callable[[Bytes], Floats]] = {
    decoder.__name__.removeprefix("_"): decoder for decoder in (_q8_0, _q4_0, _iq4_nl, _q4_k, _q5_k, _q6_k)
}
