"""A GGUF file's weights in ggml's memory, those that read the same input as one matrix; needs no torch."""

import itertools
from dataclasses import dataclass

import numpy as np

from fanformer.gguf.architecture import Architecture, Factors, read_factors
from fanformer.gguf.blocks import TYPES, BlockType, Bytes, dequantize
from fanformer.gguf.file import GGUFFile, TensorInfo
from fanformer.gguf.runtime import F32, Memory, Node, Runtime

_BF16 = "bf16"
_Tensors = dict[str, tuple[int, tuple[int, ...]]]
"""ggml type and shape of tensors by name, the row length first."""
_PACKED_ROWS = 8
_CHECKED_AT_ONCE = 1 << 16
"""Numbers that are made of blocks at a time to check them: few, so that checking takes next to no memory."""


@dataclass(frozen=True)
class Matrix:
    """One or several tensors of a file below each other."""

    node: Node
    rows: int
    """How many of the node's are the model's: those after them are 0."""


@dataclass(frozen=True)
class Linear:
    """A linear map: matrices whose outputs follow each other, and the bias of all of them."""

    matrices: tuple[Matrix, ...]
    bias: Node | None
    widths: tuple[int, ...]
    """Outputs of each of the tensors that were joined; 0 for one that the model does not have."""


class Weights:
    """All tensors of a model but the embedding; matrices that read the same input are one, so that one product does.

    Where the processor multiplies faster that way, ggml keeps blocks of eight rows side by side; rows of zeros fill up
    the last eight.

    BF16 becomes F16: ggml would round what it multiplies such matrices with to 8 bits. F16 keeps 11, and holds every
    bfloat16 from 6e-5 to 65504 exactly; what is smaller moves by 3e-8 at most.
    """

    def __init__(self, runtime: Runtime, file: GGUFFile, model: Architecture) -> None:
        """Read the weights.

        Args:
            runtime: where they are kept.
            file: a checked file.
            model: its architecture.

        Raises:
            CheckpointError: if a weight is not finite, or too large for F16 in a file of BF16.
            EngineError: if there is not enough memory.
        """
        self.factors = read_factors(model, file)
        """What is between factors, by the layers that read it, such as attn_qkv; the same in all blocks."""
        groups = _groups(model, file, self.factors)
        vectors = [info for info in file.tensors.values() if len(info.shape) == 1 and not info.name.endswith(".bias")]
        plain: _Tensors = {info.name: (F32, info.shape) for info in vectors}
        plain |= {f"{group.name}.bias": (F32, (sum(group.widths),)) for group in groups if group.biased}
        packed: _Tensors = {}
        for run in [run for group in groups for run in group.runs]:
            kind, length, rows = run.kind.number, run.row_length, run.rows
            full = -(-rows // _PACKED_ROWS) * _PACKED_ROWS
            if run.kind.block_elements > 1 and runtime.packs(kind, (length, full)):
                packed[run.name] = kind, (length, full)
            else:
                plain[run.name] = kind, (length, rows)
        self._memory = Memory(runtime, plain)
        self._packed = Memory(runtime, packed, packed=True) if packed else None
        self.nodes = dict(self._memory.nodes)
        self.num_bytes = self._memory.total_bytes
        if self._packed is not None:
            self.nodes |= self._packed.nodes
            self.num_bytes += self._packed.total_bytes
        self._joined: dict[str, Linear] = {}
        for group in groups:
            self._fill(file, group)
            matrices = tuple(Matrix(self.nodes[run.name], run.rows) for run in group.runs)
            self._joined[group.name] = Linear(matrices, self.nodes.get(f"{group.name}.bias"), group.widths)
        for info in vectors:
            values = file.read_floats(info)
            if info.name.endswith("_residual_gate.weight"):
                with np.errstate(over="ignore"):  # of a very negative gate, which is 0
                    values = (1 / (1 + np.exp(-values))).astype(np.float32)
            self._memory.raw(info.name).view(np.float32)[:] = values

    def linear(self, name: str) -> Linear:
        """Return the matrices of one input by their common name, such as `blk.0.attn_qkv`."""
        return self._joined[name]

    def __contains__(self, name: str) -> bool:
        return name in self._joined or name in self.nodes

    def _fill(self, file: GGUFFile, group: "_Group") -> None:
        for run in group.runs:
            packed = self._packed if self._packed is not None and run.name in self._packed.nodes else None
            target = self._memory.raw(run.name) if packed is None else np.zeros(packed.num_bytes(run.name), np.uint8)
            start = 0
            for info in run.infos:
                count = _stored(info.kind).row_bytes(info.shape[-1]) * info.shape[0]
                _read(file, info, target[start : start + count])
                start += count
            if packed is not None:
                packed.write(run.name, target)
        if group.biased:
            bias, start = self._memory.raw(f"{group.name}.bias").view(np.float32), 0
            for width, name in zip(group.widths, group.names, strict=True):
                if f"{name}.bias" in file.tensors:
                    bias[start : start + width] = file.read_floats(file.tensors[f"{name}.bias"])
                start += width


@dataclass(frozen=True)
class _Run:
    """Tensors of a file that follow each other in a group and have one type: they become one matrix."""

    name: str
    infos: list[TensorInfo]
    kind: BlockType
    """The type in memory."""
    row_length: int
    rows: int


class _Group:
    """Linear layers that read the same input, in the order in which their outputs follow each other."""

    def __init__(self, name: str, names: list[str], file: GGUFFile) -> None:
        self.name, self.names = name, names
        found = [file.tensors.get(f"{item}.weight") for item in names]
        self.widths = tuple(0 if info is None else info.shape[0] for info in found)
        self.biased = any(f"{item}.bias" in file.tensors for item in names)
        self.runs: list[_Run] = []
        for _, run in itertools.groupby((info for info in found if info is not None), lambda info: info.kind.number):
            infos = list(run)
            kind, rows = _stored(infos[0].kind), sum(info.shape[0] for info in infos)
            self.runs.append(_Run(f"{name}/{len(self.runs)}", infos, kind, infos[0].shape[1], rows))


def _stored(kind: BlockType) -> BlockType:
    """Return the type that weights of a file's type have in memory."""
    return TYPES["f16"] if kind.name == _BF16 else kind


def _groups(model: Architecture, file: GGUFFile, factors: dict[str, Factors]) -> list[_Group]:
    """Return every linear layer of the model once, those that read the same input together."""
    # p of Q, K and V first, where there is any, so that one cos and one sin serve all three
    attention = [*(f"attn_{part}_fan" for part in "qkv"), *(f"attn_{part}" for part in "qkv")]
    together = {"attn_qkv": attention, "ffn_gate_up": ["ffn_gate", "ffn_up"]}
    head = "token_embd" if model.tie_word_embeddings else "output"
    groups = [_Group(name, [name], file) for name in (head, "bridge") if f"{name}.weight" in file.tensors]
    for layer in range(model.num_hidden_layers):
        for name in ("attn_fan", "attn_qkv_a", "attn_output_a", "attn_output", "ffn_gate_up_a", "ffn_down_a",
                     "ffn_down"):  # fmt: skip
            if f"blk.{layer}.{name}.weight" in file.tensors:
                groups.append(_Group(f"blk.{layer}.{name}", [f"blk.{layer}.{name}"], file))
        for name, members in together.items():
            names = [f"blk.{layer}.{member}" for member in members]
            if name not in factors or factors[name].count == 1:
                groups.append(_Group(f"blk.{layer}.{name}", names, file))
            else:  # each reader has an input of its own
                groups += [_Group(member, [member], file) for member in names]
    return groups


def _read(file: GGUFFile, info: TensorInfo, target: Bytes) -> None:
    """Copy a matrix, checking piece by piece that all its numbers are finite."""
    if info.kind.name != _BF16:
        file.read_into(info, target)
    else:
        with np.errstate(over="ignore"):
            target.view(np.float16)[:] = file.read_floats(info).ravel().astype(np.float16)
    stored, row_bytes = _stored(info.kind), _stored(info.kind).row_bytes(info.shape[-1])
    rows = max(1, _CHECKED_AT_ONCE // info.shape[-1])
    for start in range(0, info.shape[0], rows):
        raw = target[start * row_bytes : (start + rows) * row_bytes]
        if not np.isfinite(dequantize(raw, stored, (len(raw) // row_bytes, info.shape[-1]))).all():
            reason = "holds values that are not finite"
            if info.kind.name == _BF16:
                reason = "holds values above 65504, which the engine's F16 does not have: write the file as f32"
            raise file.fail(f"tensor `{info.name}` {reason}.")
