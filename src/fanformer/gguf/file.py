"""A GGUF file's header, read strictly: nothing that it says is believed before it is checked; needs numpy only.

Source: the GGUF specification, version 3 (docs/gguf.md of ggml).
"""

import math
import os
import struct
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fanformer.errors import CheckpointError
from fanformer.gguf.blocks import BY_NUMBER, BlockType, Bytes, Floats, dequantize

MAGIC = b"GGUF"
VERSION = 3
ARCHITECTURE = "fanformer"
SAMPLING = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
}
"""Keys of how the model asks to be drawn from, by the names of `GenerationSettings`."""
DEFAULT_ALIGNMENT = 32
LONGEST_KEY = 65535
LONGEST_TENSOR_NAME = 63
"""ggml keeps 64 bytes for a name, the end mark among them."""
MOST_DIMENSIONS = 4
_LARGEST_ALIGNMENT = 1 << 16
_LARGEST_TENSOR = 1 << 48

STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Numbers of the types of a value that have a fixed size, with their `struct` formats."""
_WIDTHS = {number: struct.calcsize("<" + code) for number, code in SCALARS.items()}
_LEAST_BYTES = {**_WIDTHS, STRING: 8}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a file: where it is, and how its numbers are stored."""

    name: str
    shape: tuple[int, ...]
    """The row length last, as numpy and torch have it; the file has it first."""
    kind: BlockType
    offset: int
    """Of its first byte, from the beginning of the file."""
    num_bytes: int


class Texts(Sequence[str]):
    """An array of texts, kept as bytes: a hundred thousand Python strings would take ten times the memory."""

    def __init__(self, content: bytes, ends: NDArray[np.int64]) -> None:
        """Take the texts.

        Args:
            content: all of them in UTF-8, one behind the other.
            ends: (N) where each of them ends.
        """
        self._content, self._ends = content, ends

    def __len__(self) -> int:
        """Return N."""
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        """Return the text at a place, or a list of those in a slice."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]  # an IndexError beyond the ends
        start = int(self._ends[place - 1]) if place else 0
        return self._content[start : int(self._ends[place])].decode()


class GGUFFile:
    """The header of a GGUF file of our architecture, and its tensors' numbers on demand.

    It is opened once, so that all numbers are of one file even where another takes its name meanwhile.
    """

    def __init__(self, path: str | Path) -> None:
        """Read and check the header; no tensor is read.

        Raises:
            CheckpointError: if the file is not there, truncated, of another format, version or architecture, one part
                of several, or if anything in its header is not what it must be.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise CheckpointError(f"no GGUF file {self.path.absolute()}: expected what `fanformer quantize` wrote.")
        self.metadata: dict[str, Any] = {}
        """Value by key: bool, int, float, str, Texts, or a numpy array."""
        self.tensors: dict[str, TensorInfo] = {}
        self.stream = _open(self.path)
        """The file, to be read by `read_at`; closed when nobody has it any more."""
        with open(self.stream.fileno(), "rb", closefd=False) as header:
            _Header(self, header).read()

    def fail(self, reason: str) -> CheckpointError:
        """Return an error that names the file."""
        return CheckpointError(f"{self.path.absolute()}: {reason}")

    def read_into(self, info: TensorInfo, target: Bytes) -> None:
        """Copy the bytes of a tensor to `target`, (num_bytes,) uint8.

        Raises:
            CheckpointError: if the file has become shorter since its header was read.
        """
        if not read_at(self.stream, info.offset, target):
            raise self.fail(f"ends within tensor `{info.name}`: it is truncated, copy it again.")

    def read_raw(self, info: TensorInfo) -> Bytes:
        """Return the bytes of a tensor, (num_bytes,) uint8; raises as `read_into`."""
        raw = np.empty(info.num_bytes, dtype=np.uint8)
        self.read_into(info, raw)
        return raw

    def read_floats(self, info: TensorInfo) -> Floats:
        """Return the numbers of a tensor as float32, in its shape.

        Raises:
            CheckpointError: if they are not all finite, or as `read_into`.
        """
        values = dequantize(self.read_raw(info), info.kind, info.shape)
        if not np.isfinite(values).all():
            raise self.fail(f"tensor `{info.name}` holds values that are not finite: it is of no use.")
        return values


def _open(path: Path) -> FileIO:
    """Open a file that several read from, and that closes when the last of them is gone."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    stream = FileIO(descriptor, closefd=False)
    weakref.finalize(stream, os.close, descriptor)
    return stream


def read_at(stream: FileIO, offset: int, target: Bytes) -> bool:
    """Fill `target`, (count,) uint8, with the bytes from `offset` on, and return whether there are so many."""
    stream.seek(offset)
    done = 0
    while done < len(target):
        count = stream.readinto(target[done:].data)
        if not count:
            return False
        done += count
    return True


class _Header:
    """Reads a header from the beginning of a file, never more bytes than the file has."""

    def __init__(self, file: GGUFFile, stream: BinaryIO) -> None:
        self._file = file
        self._stream = stream
        self._size = os.fstat(stream.fileno()).st_size
        self._position = 0

    def read(self) -> None:
        """Fill in the file's metadata and tensors."""
        start = self._stream.read(24)
        self._position = len(start)
        if start[:4] != MAGIC:
            raise self._file.fail(f"is no GGUF file: it begins with {start[:4]!r}, expected {MAGIC!r}.")
        if len(start) < 24:
            raise self._file.fail(f"is truncated: {len(start)} bytes; copy it again.")
        version, num_tensors, num_keys = struct.unpack("<IQQ", start[4:])
        if version != VERSION:
            order = " (of a machine with the other byte order)" if version == VERSION << 24 else ""
            raise self._file.fail(f"has GGUF version {version}{order}, expected {VERSION}: write it again.")
        self._check_count("tensors", num_tensors, 33)
        self._check_count("metadata keys", num_keys, 14)
        for _ in range(num_keys):
            self._read_pair()
        self._check_kind()
        declared = [self._read_tensor() for _ in range(num_tensors)]
        self._lay_out(declared)

    def _take(self, count: int, what: str) -> bytes:
        if count > self._size - self._position:
            raise self._file.fail(
                f"is truncated or damaged: {what} takes {count} bytes at {self._position}, of {self._size} in all; "
                "copy it again."
            )
        content = self._stream.read(count)
        if len(content) != count:
            raise self._file.fail(f"became shorter while it was read, at {what}: copy it again.")
        self._position += count
        return content

    def _number(self, code: str, what: str) -> int:
        return int(struct.unpack("<" + code, self._take(struct.calcsize("<" + code), what))[0])

    def _check_count(self, what: str, count: int, least_bytes: int) -> None:
        if count > (self._size - self._position) // least_bytes:
            raise self._file.fail(
                f"is damaged: it claims {count} {what}, more than its {self._size} bytes can hold; copy it again."
            )

    def _text(self, what: str, longest: int | None = None) -> str:
        length = self._number("Q", f"the length of {what}")
        if longest is not None and length > longest:
            raise self._file.fail(f"is damaged: {what} has {length} bytes, at most {longest} are allowed.")
        content = self._take(length, what)
        try:
            return content.decode()
        except UnicodeDecodeError:
            raise self._file.fail(f"is damaged: {what} is not UTF-8: {content[:40]!r}.") from None

    def _read_pair(self) -> None:
        key = self._text("a key", LONGEST_KEY)
        if not key or not key.isascii() or not key.isprintable():
            raise self._file.fail(f"is damaged: {key[:40]!r} is no key.")
        if key in self._file.metadata:
            raise self._file.fail(f"is damaged: it has the key `{key}` twice.")
        kind = self._number("I", f"the type of `{key}`")
        self._file.metadata[key] = self._value(key, kind)

    def _value(self, key: str, kind: int) -> Any:
        if kind == STRING:
            return self._text(f"`{key}`")
        if kind == ARRAY:
            return self._array(key)
        if kind not in SCALARS:
            raise self._file.fail(f"is damaged: `{key}` has the unknown type {kind}.")
        content = self._take(_WIDTHS[kind], f"`{key}`")
        if SCALARS[kind] == "?" and content[0] > 1:
            raise self._file.fail(f"is damaged: `{key}` must be true or false, got {content[0]}.")
        return struct.unpack("<" + SCALARS[kind], content)[0]

    def _array(self, key: str) -> Any:
        kind = self._number("I", f"the type of `{key}`")
        count = self._number("Q", f"the length of `{key}`")
        if kind not in _LEAST_BYTES:
            raise self._file.fail(f"is damaged: `{key}` is an array of the type {kind}, which is none.")
        self._check_count(f"entries of `{key}`", count, _LEAST_BYTES[kind])
        if kind == STRING:
            joined, ends = bytearray(), np.empty(count, dtype=np.int64)
            for index in range(count):
                joined += self._text(f"an entry of `{key}`").encode()
                ends[index] = len(joined)
            return Texts(bytes(joined), ends)
        content = self._take(count * _WIDTHS[kind], f"`{key}`")
        if SCALARS[kind] == "?":
            return np.frombuffer(content, np.uint8) != 0
        return np.frombuffer(content, np.dtype(SCALARS[kind]).newbyteorder("<"))

    def _check_kind(self) -> None:
        """Refuse files that are whole but not ours."""
        name = self._file.metadata.get("general.architecture")
        if name != ARCHITECTURE:
            raise self._file.fail(
                f"holds a model of architecture {str(name)[:40]!r}, expected `{ARCHITECTURE}`: run it with llama.cpp."
            )
        parts = self._file.metadata.get("split.count", 1)
        if parts != 1:
            raise self._file.fail(
                f"is one of {parts} parts of a model, expected a whole one: join them with `llama-gguf-split --merge`."
            )

    def _read_tensor(self) -> tuple[str, tuple[int, ...], BlockType, int]:
        name = self._text("a tensor's name", LONGEST_TENSOR_NAME)
        if not name or not name.isascii() or not name.isprintable():
            raise self._file.fail(f"is damaged: {name!r} is no name of a tensor.")
        rank = self._number("I", f"the dimensions of `{name}`")
        if not 1 <= rank <= MOST_DIMENSIONS:
            raise self._file.fail(f"is damaged: `{name}` has {rank} dimensions, expected 1 to {MOST_DIMENSIONS}.")
        shape = struct.unpack(f"<{rank}Q", self._take(8 * rank, f"the shape of `{name}`"))[::-1]
        if not 0 < math.prod(shape) <= _LARGEST_TENSOR:
            raise self._file.fail(f"is damaged: `{name}` has the shape {shape}.")
        number = self._number("I", f"the type of `{name}`")
        if number not in BY_NUMBER:
            known = ", ".join(item.name for item in BY_NUMBER.values())
            raise self._file.fail(f"stores `{name}` in the ggml type {number}, expected one of {known}.")
        kind = BY_NUMBER[number]
        if shape[-1] % kind.block_elements:
            raise self._file.fail(
                f"is damaged: `{name}` has rows of {shape[-1]} numbers, which blocks of {kind.block_elements} "
                f"({kind.name}) do not fill."
            )
        return name, shape, kind, self._number("Q", f"the place of `{name}`")

    def _lay_out(self, declared: list[tuple[str, tuple[int, ...], BlockType, int]]) -> None:
        """Check that the tensors follow each other without gaps and end where the file does."""
        alignment = self._file.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        valid = isinstance(alignment, int) and 8 <= alignment <= _LARGEST_ALIGNMENT and alignment & (alignment - 1) == 0
        if not valid or isinstance(alignment, bool):
            raise self._file.fail(f"is damaged: `general.alignment` must be a power of two from 8 on, got {alignment}.")
        base = -(-self._position // alignment) * alignment
        expected = end = 0
        for name, shape, kind, offset in declared:
            if name in self._file.tensors:
                raise self._file.fail(f"is damaged: it has the tensor `{name}` twice.")
            if offset != expected:
                raise self._file.fail(f"is damaged: `{name}` is said to begin at {offset}, expected {expected}.")
            num_bytes = kind.num_bytes(shape)
            self._file.tensors[name] = TensorInfo(name, shape, kind, base + offset, num_bytes)
            end = offset + num_bytes
            expected = -(-end // alignment) * alignment
        if not base + end <= self._size <= base + expected:
            what = "truncated" if self._size < base + end else "damaged"
            raise self._file.fail(
                f"is {what}: {self._size} bytes, its header says {base + end} to {base + expected}; copy it again."
            )
