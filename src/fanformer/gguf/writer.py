"""Writes a GGUF file: header, then tensors one after the other, never all of them in memory.

Source: the GGUF specification, version 3 (docs/gguf.md of ggml).
"""

import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fanformer.gguf.blocks import BlockType, Bytes
from fanformer.gguf.file import ARRAY, DEFAULT_ALIGNMENT, MAGIC, SCALARS, STRING, VERSION

Value = tuple[int, Any]
"""GGUF's number of a type, and a value of it; an array's value is (type of its entries, entries)."""


def write_gguf(
    path: Path,
    metadata: Mapping[str, Value],
    tensors: Sequence[tuple[str, tuple[int, ...], BlockType]],
    content: Iterable[Bytes],
) -> None:
    """Write a file; `staging.staged` is for one that is to appear as a whole.

    Args:
        path: the file.
        metadata: type and value by key.
        tensors: name, shape (row length last) and type of each.
        content: the bytes of each, in the same order; asked for one by one.
    """
    with path.open("wb") as stream:
        stream.write(_header(metadata, tensors))
        for (name, shape, kind), raw in zip(tensors, content, strict=True):
            stream.write(bytes(-stream.tell() % DEFAULT_ALIGNMENT))
            assert raw.nbytes == kind.num_bytes(shape), name
            stream.write(raw.data)
        stream.write(bytes(-stream.tell() % DEFAULT_ALIGNMENT))


def _header(metadata: Mapping[str, Value], tensors: Sequence[tuple[str, tuple[int, ...], BlockType]]) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, (kind, value) in metadata.items():
        parts += [_text(key), struct.pack("<I", kind), _value(kind, value)]
    offset = 0
    for name, shape, block in tensors:
        parts += [_text(name), struct.pack("<I", len(shape)), struct.pack(f"<{len(shape)}Q", *reversed(shape))]
        parts.append(struct.pack("<IQ", block.number, offset))
        offset += -(-block.num_bytes(shape) // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT
    header = b"".join(parts)
    return header + bytes(-len(header) % DEFAULT_ALIGNMENT)


def _text(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def _value(kind: int, value: Any) -> bytes:
    if kind == STRING:
        return _text(value)
    if kind == ARRAY:
        entry, items = value
        return struct.pack("<IQ", entry, len(items)) + b"".join(_value(entry, item) for item in items)
    return struct.pack("<" + SCALARS[kind], value)
