"""What travels in a round: a base to the members, and from each an update, the tensors of one fragment in few bits.

An update is a pseudo-gradient, the base minus what a member made of it (DiLoCo, arXiv:2311.08105). What
coding loses is kept and added to the next one (error feedback, arXiv:1901.09847); fragments are streaming DiLoCo's
(arXiv:2501.18512). A payload comes from a stranger: reading one gives an update or DataError.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fanformer.community.coding import (
    check_bits,
    code_count,
    code_type,
    decode,
    encode,
    refuse_codes,
    scale_count,
)
from fanformer.community.container import Layout, largest, largest_header, pack, read_arrays, read_words, shown
from fanformer.errors import ConfigError, DataError

Shapes = Mapping[str, Sequence[int]]
"""Shape of every tensor by its name."""
BaseType = Literal["float32", "float16"]
_BASE_TYPES = {"float32": "F32", "float16": "F16"}
_SCALES = "|scales"
_LONGEST_NAME, _MOST_SOURCES = 200, 64
_CHECKSUM = re.compile(r"[0-9a-f]{64}")
_BLOCK_NUMBER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Source:
    """Data that a member trained on in a round.

    Attributes:
        name: of the data, such as "stdlib".
        licence: of the data, "unknown" where the member does not say.
        tokens: trained on.
    """

    name: str
    licence: str
    tokens: int


@dataclass(frozen=True)
class Update:
    """What a member learnt in a round.

    Attributes:
        tensors: float32 pseudo-gradients by name, the base minus the trained weights; those of a decoded update are
            worked out each time they are asked for.
        round: number of the round.
        base: checksum of the weights that it began with.
        member: name.
        tokens: trained on in this round.
        inner_loss: mean training loss of the round, nats per token.
        sources: of the tokens.
        digest: SHA-256 of the coded tensors, the same in a replay; empty before coding.
    """

    tensors: Mapping[str, Tensor]
    round: int
    base: str
    member: str
    tokens: int
    inner_loss: float
    sources: tuple[Source, ...] = ()
    digest: str = ""


@dataclass(frozen=True)
class Limits:
    """What an update may be at most.

    Attributes:
        max_tokens: of the share that was handed out.
        max_bytes: of the payload; None is what the largest proper one has.
    """

    max_tokens: int
    max_bytes: int | None = None


class CodedTensors(Mapping[str, Tensor]):
    """Tensors that stay coded, about a byte a number, and are worked out one at a time."""

    def __init__(self, arrays: Mapping[str, np.ndarray], like: Shapes, bits: int) -> None:
        """Set up.

        Args:
            arrays: codes, and scales, by name.
            like: shapes.
            bits: 8 or 4.
        """
        self._arrays, self._like, self._bits = arrays, like, bits

    def __getitem__(self, name: str) -> Tensor:
        shape = self._like[name]
        values = decode(self._arrays[name], self._arrays[name + _SCALES], math.prod(shape), self._bits)
        return torch.from_numpy(values).view(tuple(shape))

    def __iter__(self) -> Iterator[str]:
        return iter(self._like)

    def __len__(self) -> int:
        return len(self._like)


def shapes_of(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of tensors, of any shape, by name."""
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().to("cpu", torch.float32).contiguous().numpy()


def weights_checksum(weights: Mapping[str, Tensor]) -> str:
    """Return the SHA-256, in hexadecimal, of names, shapes and float32 numbers, in the order of the names.

    Args:
        weights: tensors of any shape.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        array = _array(weights[name]).astype("<f4", copy=False)
        digest.update(f"{name} {list(array.shape)}\n".encode())
        digest.update(array.data if array.size else b"")
    return digest.hexdigest()


def rounded(weights: Mapping[str, Tensor], dtype: BaseType) -> dict[str, Tensor]:
    """Return the float32 weights, of any shape, that come out of `encode_weights` in this type.

    Raises:
        DataError: if one of them has no place in it.
    """
    return {name: _of_type(name, tensor, dtype).to(torch.float32) for name, tensor in weights.items()}


def _of_type(name: str, tensor: Tensor, dtype: BaseType) -> Tensor:
    if dtype not in _BASE_TYPES:
        raise ConfigError(f"`base_dtype` must be one of {', '.join(_BASE_TYPES)}, got {dtype!r}.")
    found = tensor.detach().to("cpu", getattr(torch, dtype))
    if not bool(torch.isfinite(found).all()):
        raise DataError(f"`{name}` of a base must hold finite numbers of {dtype}, got one that is none.")
    return found


def encode_weights(weights: Mapping[str, Tensor], dtype: BaseType = "float32") -> bytes:
    """Return a base as a safetensors file.

    Args:
        weights: float32, of any shape; in float16 they are rounded, as `rounded` does.
        dtype: of the file.

    Raises:
        DataError: if a number is not finite in this type.
    """
    arrays = {name: _of_type(name, weights[name], dtype).contiguous().numpy() for name in sorted(weights)}
    layout = {name: (_BASE_TYPES[dtype], array.shape) for name, array in arrays.items()}
    return pack(layout, arrays, {"dtype": dtype})


def decode_weights(
    payload: bytes, like: Shapes, checksum: str, known: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the base that a payload holds, in float32.

    Args:
        payload: what `encode_weights` made.
        like: shapes that it must have.
        checksum: that it must have.
        known: float32 tensors of these shapes, which the payload may leave out.

    Raises:
        DataError: if it is not that.
    """
    layouts = {name: {one: (kind, like[one]) for one in sorted(like)} for name, kind in _BASE_TYPES.items()}
    words, header, begin = read_words(payload, largest_header(*layouts.values()))
    dtype = words.get("dtype")
    if not isinstance(dtype, str) or dtype not in layouts:
        raise DataError(f"`dtype` of a base must be one of {', '.join(layouts)}, got {shown(dtype)}.")
    kept = {name: tensor for name, tensor in (known or {}).items() if name not in header}
    arrays = read_arrays(
        payload, header, begin, {name: kind for name, kind in layouts[dtype].items() if name not in kept}
    )
    weights = kept | {
        name: torch.from_numpy(array.astype(np.float32)).view(tuple(like[name])) for name, array in arrays.items()
    }
    found = weights_checksum(weights)
    if found != checksum:
        raise DataError(f"a base must have the checksum {checksum[:16]}, got {found[:16]}: fetch it again.")
    return weights


def _layout(like: Shapes, bits: int) -> Layout:
    """Return how the tensors of an update lie in its file: scales first, which so are aligned."""
    sizes = {name: math.prod(like[name]) for name in sorted(like)}
    scales = {name + _SCALES: ("F32", (scale_count(size),)) for name, size in sizes.items()}
    return scales | {name: (code_type(bits), (code_count(size, bits),)) for name, size in sizes.items()}


def largest_payload(like: Shapes) -> int:
    """Return the bytes above which nobody need read on: of a proper update with the most words.

    Args:
        like: shapes of the tensors that are asked for.
    """
    return largest(_layout(like, 8))


def encode_update(update: Update, bits: int = 8) -> bytes:
    """Return an update as a safetensors file: integers of 8 or 4 bits, and a float32 scale for every 128 of them.

    Args:
        update: tensors of any shape.
        bits: 8 or 4.

    Raises:
        ConfigError: if `bits` is another.
        DataError: if a number is not finite, or another field is not what `decode_update` takes.
    """
    check_bits(bits)
    _checked_words({**_words(update), "bits": bits})
    arrays: dict[str, np.ndarray] = {}
    for name, tensor in update.tensors.items():
        values = _array(tensor).reshape(-1)
        if not np.isfinite(values).all():
            raise DataError(f"`{name}` of an update must hold finite numbers, got one that is not: train with less.")
        arrays[name], arrays[name + _SCALES] = encode(values, bits)
    return pack(_layout(shapes_of(update.tensors), bits), arrays, {**_words(update), "bits": bits})


def decode_update(payload: bytes, like: Shapes, limits: Limits) -> Update:
    """Return the update that a payload holds, which nobody has any reason to trust.

    Args:
        payload: from the network.
        like: shapes of the tensors that were asked for; no more and no fewer are taken.
        limits: what it may be at most.

    Raises:
        DataError: in one line, whatever else the payload is.
    """
    fields, header, begin = _read(payload, like, limits.max_bytes)
    bits = fields.pop("bits")
    if fields["tokens"] > limits.max_tokens:
        raise DataError(
            f"`tokens` of an update must be at most {limits.max_tokens:,}, its share, got {fields['tokens']:,}."
        )
    arrays = read_arrays(payload, header, begin, _layout(like, bits))
    for name, shape in like.items():
        refuse_codes(name, arrays[name], arrays[name + _SCALES], math.prod(shape), bits)
    return Update(CodedTensors(arrays, like, bits), digest=_digest(payload, begin), **fields)


@dataclass(frozen=True)
class Label:
    """What a payload says it is, before its tensors are looked at.

    Attributes:
        round: number of the round.
        member: name.
        digest: SHA-256 of the coded tensors.
    """

    round: int
    member: str
    digest: str


def read_label(payload: bytes, like: Shapes) -> Label:
    """Return what a payload says it is.

    Args:
        payload: from the network.
        like: shapes of all tensors, of which it may hold some.

    Raises:
        DataError: if it has no such words, or too many bytes.
    """
    fields, _, begin = _read(payload, like, None)
    return Label(fields["round"], fields["member"], _digest(payload, begin))


def _read(payload: bytes, like: Shapes, max_bytes: int | None) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Return the fields of an update, what its header says of tensors, and where these begin."""
    layouts = [_layout(like, bits) for bits in (8, 4)]
    most = largest(layouts[0]) if max_bytes is None else max_bytes
    if len(payload) > most:
        raise DataError(f"a payload must have at most {most:,} bytes, got {len(payload):,}: it is left out.")
    words, header, begin = read_words(payload, largest_header(*layouts))
    return _checked_words(words), header, begin


def _digest(payload: bytes, begin: int) -> str:
    return hashlib.sha256(memoryview(payload)[begin:]).hexdigest()


def _words(update: Update) -> dict[str, Any]:
    return {
        "round": update.round,
        "base": update.base,
        "member": update.member,
        "tokens": update.tokens,
        "inner_loss": update.inner_loss,
        "sources": [[source.name, source.licence, source.tokens] for source in update.sources],
    }


def _checked_words(words: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of an update, and its `bits`, once all of them are what they must be.

    Raises:
        DataError: naming the first that is not.
    """
    names = ("bits", "round", "base", "member", "tokens", "inner_loss", "sources")
    if sorted(words) != sorted(names):
        raise DataError(f"an update must have the fields {', '.join(names)}, got {shown(sorted(words))}.")
    checks = {
        "bits": ("8 or 4", type(words["bits"]) is int and words["bits"] in (8, 4)),
        "round": ("a whole number from 0 on", _is_count(words["round"])),
        "base": ("a SHA-256 in hexadecimal", isinstance(words["base"], str) and _CHECKSUM.fullmatch(words["base"])),
        "member": (f"a name of at most {_LONGEST_NAME} printable characters", is_name(words["member"])),
        "tokens": ("a whole number from 1 on", _is_count(words["tokens"]) and words["tokens"] > 0),
        "inner_loss": ("a finite number", _is_number(words["inner_loss"])),
        "sources": (f"at most {_MOST_SOURCES} lists of name, licence and tokens", _are_sources(words["sources"])),
    }
    for name, (expected, holds) in checks.items():
        if not holds:
            raise DataError(f"`{name}` of an update must be {expected}, got {shown(words[name])}.")
    sources = tuple(Source(*source) for source in words["sources"])
    claimed = sum(source.tokens for source in sources)
    if claimed > words["tokens"]:
        raise DataError(f"`sources` of an update must have its {words['tokens']:,} tokens at most, got {claimed:,}.")
    return {**words, "sources": sources}


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 53


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -1e9 < value < 1e9


def is_name(value: Any) -> bool:
    """Return whether a value can be the name of a member or of data: printable, neither empty nor long."""
    return isinstance(value, str) and 0 < len(value) <= _LONGEST_NAME and value.isprintable()


def _are_sources(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= _MOST_SOURCES
        and all(isinstance(one, list) and len(one) == 3 for one in value)
        and all(is_name(name) and is_name(licence) and _is_count(tokens) for name, licence, tokens in value)
    )


class ErrorFeedback:
    """What coding lost, to be added to the next update of the same tensors."""

    def __init__(self) -> None:
        self._lost: dict[str, Tensor] = {}

    def encode(self, update: Update, bits: int = 8) -> bytes:
        """Return the coded update together with what was lost before; what is lost now is kept.

        Args:
            update: tensors of any shape; others than those of the last call where fragments take turns.
            bits: 8 or 4.

        Raises:
            DataError: as `encode_update`; what was kept stays.
        """
        full = {name: tensor + self._lost[name] if name in self._lost else tensor for name, tensor in _cpu(update)}
        payload = encode_update(replace(update, tensors=full), bits)
        received = decode_update(payload, shapes_of(full), Limits(update.tokens)).tensors
        self._lost |= {name: tensor - received[name] for name, tensor in full.items()}
        return payload

    def state(self) -> dict[str, Tensor]:
        """Return what to save: float32 tensors by name."""
        return dict(self._lost)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up a saved state, float32 tensors of the updates' shapes by name."""
        self._lost = dict(state)


def _cpu(update: Update) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in update.tensors.items():
        yield name, tensor.detach().to("cpu", torch.float32)


def fragments(like: Shapes, count: int) -> list[list[str]]:
    """Divide tensors into fragments, of which a round sends one.

    Blocks go to the fragments in turn, so that each has early and late ones (strided, arXiv:2501.18512); what belongs
    to no block goes to the smallest, the largest tensor first.

    Args:
        like: shapes.
        count: of fragments; 1 sends everything in every round.

    Returns:
        Names, each in one fragment.

    Raises:
        ConfigError: if there are more fragments than tensors to fill them.
    """
    if count < 1:
        raise ConfigError(f"`fragments` must be at least 1, got {count}.")
    found: list[list[str]] = [[] for _ in range(count)]
    others = []
    for name in sorted(like):
        block = _BLOCK_NUMBER.search(name)
        if block:
            found[int(block[1]) % count].append(name)
        else:
            others.append(name)
    for name in sorted(others, key=lambda one: (-math.prod(like[one]), one)):
        smallest = min(range(count), key=lambda index: sum(math.prod(like[one]) for one in found[index]))
        found[smallest].append(name)
    if not all(found):
        raise ConfigError(f"`fragments` must be at most the blocks of the model, got {count}: ask for fewer.")
    return found
