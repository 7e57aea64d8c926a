"""Which type each tensor of a GGUF file gets, and why it is another one than asked for."""

import copy
from dataclasses import dataclass

from fanformer.errors import ConfigError, did_you_mean
from fanformer.gguf.blocks import TYPES, BlockType
from fanformer.gguf.parameters import Parameter, parameters
from fanformer.model import FANformerConfig

OFFERED = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_k", "q5_k", "q6_k")
"""The types that can be asked for; the others only stand in where rows do not fill blocks."""
# What stands in for a type whose blocks a row does not fill. llama.cpp's choice, q5_0 and q5_1, is no type that
# `transformers` reads.
_INSTEAD = {"q4_k": "iq4_nl", "q5_k": "q8_0", "q6_k": "q8_0", "q8_0": "f16", "q4_0": "f16", "iq4_nl": "f16"}
# The head decides every token at once, so files of few bits keep it finer, as llama.cpp does.
_HEAD = {"q4_0": "q6_k", "q4_k": "q6_k", "q5_k": "q6_k"}


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the file to be."""

    spec: Parameter
    kind: BlockType
    note: str
    """Why the type is not the one asked for; empty where it is."""


@dataclass(frozen=True)
class Plan:
    """All tensors of the file to be."""

    config: FANformerConfig
    """As the file will have it: `intermediate_size` may be filled up."""
    tensors: tuple[PlannedTensor, ...]
    notes: tuple[str, ...]
    """What holds for the file as a whole."""


def make_plan(config: FANformerConfig, wanted: str, embedding: str | None = None, head: str | None = None) -> Plan:
    """Choose a type for every tensor.

    Matrices get the type asked for; norms, gates and biases stay float32. Rows that do not fill its blocks take the
    next finer type that fits. Where that makes the file smaller, F is filled up with zeros to whole blocks: the added
    channels of gate and up are 0 for every input, so the function stays the same.

    Args:
        config: of the model.
        wanted: one of OFFERED.
        embedding: type of the embedding; None is `wanted`, or where the head shares it, the head's.
        head: type of the head; None is q6_k where `wanted` has fewer bits, else `wanted`.

    Raises:
        ConfigError: if a type is not offered, or if `head` is asked for where the embedding is the head.
    """
    for option, name in (("type", wanted), ("embedding-type", embedding), ("head-type", head)):
        if name is not None and name not in OFFERED:
            raise ConfigError(f"`--{option}` is {name!r}: {did_you_mean(name, OFFERED)}")
    tied = config.tie_word_embeddings
    if tied and head is not None:
        raise ConfigError(f"`--head-type` is {head}, but the head is the embedding: set `--embedding-type`.")
    head = head or _HEAD.get(wanted, wanted)
    asked = {"token_embd.weight": embedding or (head if tied else wanted), "output.weight": head}
    filled, notes = _fill_up(config, wanted)
    planned = []
    for spec in parameters(filled):
        kind, note = fitting_type(asked.get(spec.name, wanted) if len(spec.shape) > 1 else "f32", spec.shape[-1])
        planned.append(PlannedTensor(spec, kind, note))
    return Plan(filled, tuple(planned), notes)


def fitting_type(wanted: str, row_length: int) -> tuple[BlockType, str]:
    """Return the type that rows of this length get where `wanted` is asked for, and why it is another."""
    name = wanted
    while row_length % TYPES[name].block_elements:
        name = _INSTEAD[name]
    if name == wanted:
        return TYPES[name], ""
    return TYPES[name], f"rows of {row_length} do not fill blocks of {TYPES[wanted].block_elements} ({wanted})"


def _fill_up(config: FANformerConfig, wanted: str) -> tuple[FANformerConfig, tuple[str, ...]]:
    """Return the configuration with the F at which the FFN's matrices take the least space."""
    width = config.intermediate_size
    blocks = sorted({TYPES[wanted].block_elements, 32} if TYPES[wanted].block_elements > 1 else {1})
    options = [width, *(-(-width // block) * block for block in blocks)]

    def bits(size: int) -> float:
        shapes = [item.shape for item in parameters(_changed(config, intermediate_size=size, num_hidden_layers=1))
                  if item.name.startswith("blk.0.ffn") and len(item.shape) > 1]  # fmt: skip
        return sum(rows * length * fitting_type(wanted, length)[0].bits_per_weight for rows, length in shapes)

    best = min(options, key=bits)  # the first of equals: no change without a gain
    if best == width:
        return config, ()
    note = f"intermediate_size {width} is filled up with zeros to {best}, so that rows of ffn_down fill blocks"
    return _changed(config, intermediate_size=best), (note,)


def _changed(config: FANformerConfig, **fields: int) -> FANformerConfig:
    changed = copy.deepcopy(config)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed
