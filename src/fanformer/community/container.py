"""Tensors and a few words as one safetensors file, read with suspicion: what is not exactly as expected is refused.

Source: the format, github.com/huggingface/safetensors: eight bytes of length, a header in JSON, the tensors. Every
library that reads it reads ours; this reader takes only the one layout that it expects, and so has nothing to trust.
"""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fanformer.errors import DataError

Layout = Mapping[str, tuple[str, Sequence[int]]]
"""Type, as safetensors calls it, and shape of every tensor, in the order of the file."""
_TYPES: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
}
_LENGTH_BYTES = 8
LARGEST_WORDS = 1 << 16
"""Bytes of the words, as JSON within JSON."""


def pack(layout: Layout, arrays: Mapping[str, np.ndarray], words: Mapping[str, Any]) -> bytes:
    """Return the file.

    Args:
        layout: of the tensors.
        arrays: the tensors, of any shape; types are the layout's.
        words: plain JSON.
    """
    header = {"__metadata__": {"fanformer": json.dumps(words)}, **_entries(layout)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    parts = [np.ascontiguousarray(arrays[name], dtype=_TYPES[kind]).tobytes() for name, (kind, _) in layout.items()]
    return b"".join([struct.pack("<Q", len(text)), text, *parts])


def largest(layout: Layout) -> int:
    """Return the bytes that a file of this layout has at most."""
    return _LENGTH_BYTES + _largest_header(layout) + _data_bytes(layout)


def read_words(payload: bytes, largest_header: int) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Read the header of a file.

    Args:
        payload: the file.
        largest_header: bytes that it may have.

    Returns:
        The words, what the header says of tensors, and where these begin.

    Raises:
        DataError: if it is no such header.
    """
    if len(payload) < _LENGTH_BYTES:
        raise DataError(f"a payload must be a safetensors file, got {len(payload)} bytes: it is left out.")
    (length,) = struct.unpack_from("<Q", payload)
    if length > min(largest_header, len(payload) - _LENGTH_BYTES):
        raise DataError(f"the header of a payload must have at most {largest_header:,} bytes, got {length:,}.")
    try:
        header = json.loads(payload[_LENGTH_BYTES : _LENGTH_BYTES + length].decode("utf-8"))
        words = json.loads(header.pop("__metadata__")["fanformer"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"the header of a payload must be JSON with our words ({type(error).__name__}).") from error
    if not isinstance(words, dict):
        raise DataError(f"the words of a payload must be an object, got {type(words).__name__}.")
    return words, header, _LENGTH_BYTES + length


def largest_header(*layouts: Layout) -> int:
    """Return the bytes of the longest header that a file of one of these layouts has."""
    return max(_largest_header(layout) for layout in layouts)


def read_arrays(payload: bytes, header: Mapping[str, Any], begin: int, layout: Layout) -> dict[str, np.ndarray]:
    """Return the tensors of a file, flat and without a copy.

    Args:
        payload: the file.
        header: what it says of tensors.
        begin: where they begin.
        layout: what they must be.

    Raises:
        DataError: if they are not.
    """
    expected = _entries(layout)
    if header != expected:
        missing = [name for name in expected if name not in header]
        unknown = [name for name in header if name not in expected]
        if missing or unknown:
            what = f"`{missing[0]}` is missing" if missing else f"{shown(unknown[0])} is none of them"
            raise DataError(f"a payload must hold the {len(expected)} tensors that were asked for: {what}.")
        name = next(name for name in expected if header[name] != expected[name])
        raise DataError(f"`{name}` of a payload must be {json.dumps(expected[name])}, got {shown(header[name])}.")
    needed = _data_bytes(layout)
    if len(payload) - begin != needed:
        raise DataError(f"the tensors of a payload must have {needed:,} bytes, got {len(payload) - begin:,}.")
    arrays = {}
    for name, (kind, shape) in layout.items():
        arrays[name] = np.frombuffer(payload, _TYPES[kind], math.prod(shape), begin + expected[name]["data_offsets"][0])
    return arrays


def shown(value: Any) -> str:
    """Return a stranger's value for a message: on one line, and short."""
    try:
        return ascii(value[:80] if isinstance(value, str) else value)[:100]
    except RecursionError:
        return "what is nested too deep"


def _entries(layout: Layout) -> dict[str, dict[str, Any]]:
    """Return the header's entries of a layout."""
    entries, place = {}, 0
    for name, (kind, shape) in layout.items():
        end = place + math.prod(shape) * _TYPES[kind].itemsize
        entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [place, end]}
        place = end
    return entries


def _data_bytes(layout: Layout) -> int:
    return sum(math.prod(shape) * _TYPES[kind].itemsize for kind, shape in layout.values())


def _largest_header(layout: Layout) -> int:
    return len(json.dumps(_entries(layout))) + LARGEST_WORDS
