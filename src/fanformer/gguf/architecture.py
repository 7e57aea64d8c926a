"""A FANformer's shape and switches in GGUF's words: metadata to architecture and back; neither torch nor transformers.

Keys are llama.cpp's where it has one, and ours below `fanformer.` elsewhere; docs/quantization.md lists them all.
"""

import dataclasses
import math
from collections.abc import Container
from dataclasses import dataclass
from typing import Any, Protocol

from fanformer.errors import CheckpointError
from fanformer.gguf.file import ARCHITECTURE

_LARGEST = 1 << 24
"""Above every width, count or length of a model; keeps products of them far from overflow."""

_CHOICES = {
    "hidden_act": ("silu", "gelu", "linear"),
    "fan_placement": ("projection", "layer", "ffn", "none"),
    "cola_activation": ("silu", "gelu", "linear"),
    "writer_activation": ("silu", "gelu", "linear", "residual"),
    "cola_input": ("shared", "separate"),
    "norm_placement": ("hybrid-star", "hybrid", "pre"),
    "qkv_norm": ("qkv", "none"),
}
_WRITER_NORM = "cola.writer_norm"
"""A switch that was deleted: files that have it must have it off."""
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")

# field -> (key, how it is stored); "count" is an integer from 1 on
_KEYS = {
    "vocab_size": ("vocab_size", "count"),
    "max_position_embeddings": ("context_length", "count"),
    "hidden_size": ("embedding_length", "count"),
    "num_hidden_layers": ("block_count", "count"),
    "intermediate_size": ("feed_forward_length", "count"),
    "num_attention_heads": ("attention.head_count", "count"),
    "num_key_value_heads": ("attention.head_count_kv", "count"),
    "head_dim": ("attention.key_length", "count"),
    "rms_norm_eps": ("attention.layer_norm_rms_epsilon", "float"),
    "hidden_act": ("hidden_activation", "text"),
    "fan_placement": ("fan.placement", "text"),
    "fan_ratio": ("fan.ratio", "double"),
    "fan_multiple": ("fan.multiple", "count"),
    "cola_activation": ("cola.activation", "text"),
    "cola_norm": ("cola.norm", "flag"),
    "writer_activation": ("cola.writer_activation", "text"),
    "cola_input": ("cola.input", "text"),
    "projection_bias": ("projection_bias", "flag"),
    "norm_placement": ("norm_placement", "text"),
    "qkv_norm": ("attention.qkv_norm", "text"),
    "gated_residual": ("gated_residual", "flag"),
}
# the same for what is there only where it has a value
_OPTIONAL_KEYS = {
    "qkv_rank": ("cola.qkv_rank", "count"),
    "o_rank": ("cola.o_rank", "count"),
    "gate_up_rank": ("cola.gate_up_rank", "count"),
    "down_rank": ("cola.down_rank", "count"),
}
# what files hold that were written before each kind of layer had a rank of its own: which layers, and one rank for them
_LAYERS_BEFORE, _RANK_BEFORE, _RATIO_BEFORE = "cola.layers", "cola.rank", "cola.rank_ratio"
_CHOSEN_BEFORE = {
    "readers": ("qkv_rank", "gate_up_rank"),
    "all": tuple(_OPTIONAL_KEYS),
    "attention": ("qkv_rank", "o_rank"),
    "ffn": ("gate_up_rank", "down_rank"),
}
# field of `rope_parameters` -> (key, how it is stored)
_ROPE_KEYS = {
    "rope_theta": ("rope.freq_base", "float"),
    "rope_type": ("rope.scaling.type", "text"),
    "factor": ("rope.scaling.factor", "float"),
    "original_max_position_embeddings": ("rope.scaling.original_context_length", "count"),
    "low_freq_factor": ("rope.scaling.low_freq_factor", "float"),
    "high_freq_factor": ("rope.scaling.high_freq_factor", "float"),
    "attention_factor": ("rope.scaling.attn_factor", "float"),
    "beta_fast": ("rope.scaling.yarn_beta_fast", "float"),
    "beta_slow": ("rope.scaling.yarn_beta_slow", "float"),
    "mscale": ("rope.scaling.yarn_mscale", "float"),
    "mscale_all_dim": ("rope.scaling.yarn_mscale_all_dim", "float"),
    "truncate": ("rope.scaling.yarn_truncate", "flag"),
}
# GGUF's numbers for the types of values
STORED_AS = {"count": 4, "float": 6, "double": 12, "flag": 7, "text": 8}


class Header(Protocol):
    """What an architecture is read from, such as a `GGUFFile`."""

    metadata: dict[str, Any]

    @property
    def tensors(self) -> Container[str]:
        """Names of the tensors."""

    def fail(self, reason: str) -> CheckpointError:
        """Return an error that names the file."""


@dataclass(frozen=True)
class Factors:
    """What stands between the two factors of the CoLA linears that read one input."""

    rank: int
    """R."""
    periodic: int
    """P: how many of the R channels are cosines, and again sines; W_a makes R - P."""
    count: int
    """How many W_a there are, one above the other."""
    activation: str
    norm: bool = False


@dataclass(frozen=True)
class Architecture:
    """What decides the tensors and the arithmetic of a FANformer; fields are those of `FANformerConfig`."""

    vocab_size: int
    max_position_embeddings: int
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    hidden_act: str
    fan_placement: str
    fan_ratio: float
    fan_multiple: int
    cola_activation: str
    cola_norm: bool
    writer_activation: str
    cola_input: str
    projection_bias: bool
    norm_placement: str
    qkv_norm: str
    gated_residual: bool
    tie_word_embeddings: bool
    qkv_rank: int | None
    o_rank: int | None
    gate_up_rank: int | None
    down_rank: int | None
    rope_parameters: dict[str, Any]

    @classmethod
    def from_config(cls, config: Any) -> "Architecture":
        """Return the architecture of a `FANformerConfig`."""
        fields = {item.name: getattr(config, item.name) for item in dataclasses.fields(cls)}
        rope = {name: value for name, value in config.rope_parameters.items() if name in _ROPE_KEYS}
        return cls(**{**fields, "rope_parameters": rope})

    @classmethod
    def from_file(cls, file: Header) -> "Architecture":
        """Return the architecture that a file's metadata and the presence of its head tell.

        Raises:
            CheckpointError: if a key is missing, of the wrong type or out of its range.
        """
        fields = _ranks_before(file) if f"{ARCHITECTURE}.{_LAYERS_BEFORE}" in file.metadata else {}
        fields |= {name: _read(file, key, kind) for name, (key, kind) in _KEYS.items() if name not in fields}
        for name, (key, kind) in _OPTIONAL_KEYS.items():
            present = f"{ARCHITECTURE}.{key}" in file.metadata
            fields.setdefault(name, _read(file, key, kind) if present else None)
        rope = {
            name: _read(file, key, kind)
            for name, (key, kind) in _ROPE_KEYS.items()
            if f"{ARCHITECTURE}.{key}" in file.metadata
        }
        rope.setdefault("rope_type", "default")
        fields["tie_word_embeddings"] = "output.weight" not in file.tensors
        found = cls(**fields, rope_parameters=rope)
        found._check(file)
        return found

    def config_fields(self) -> dict[str, Any]:
        """Return the keyword arguments of `FANformerConfig` for this architecture."""
        return dataclasses.asdict(self)

    def metadata(self) -> dict[str, tuple[int, Any]]:
        """Return key to (type of the value, value), as a file has it."""
        found: dict[str, tuple[int, Any]] = {}
        for name, (key, kind) in {**_KEYS, **_OPTIONAL_KEYS}.items():
            if getattr(self, name) is not None:
                found[f"{ARCHITECTURE}.{key}"] = STORED_AS[kind], getattr(self, name)
        found[f"{ARCHITECTURE}.attention.value_length"] = STORED_AS["count"], self.head_dim
        found[f"{ARCHITECTURE}.rope.dimension_count"] = STORED_AS["count"], self.head_dim
        for name, (key, kind) in _ROPE_KEYS.items():
            value = self.rope_parameters.get(name)
            if value is not None and not (name == "rope_type" and value == "default"):
                found[f"{ARCHITECTURE}.{key}"] = STORED_AS[kind], value
        return found

    def factors(self, part: str) -> Factors | None:
        """Return what is between the factors of attn_qkv, attn_output, ffn_gate_up or ffn_down; None at full rank."""
        rank, readers, writes = {
            "attn_qkv": (self.qkv_rank, 6 if self.fan_placement == "projection" else 3, False),
            "attn_output": (self.o_rank, 1, True),
            "ffn_gate_up": (self.gate_up_rank, 2, False),
            "ffn_down": (self.down_rank, 1, True),
        }[part]
        if rank is None:
            return None
        periodic = self.periodic_width(rank) if self._fan_between_factors(part) else 0
        count = 1 if self.cola_input == "shared" else readers
        form = (self.writer_activation,) if writes else (self.cola_activation, self.cola_norm)
        return Factors(rank, periodic, count, *form)

    def periodic_width(self, channels: int) -> int:
        """Return P of so many channels, rounded as `FANformerConfig.periodic_width` says it."""
        share, multiple = self.fan_ratio * channels, self.fan_multiple
        rest = channels - 2 * share
        while multiple > 1 and (channels % multiple or share < multiple or 0 < rest < multiple):
            multiple //= 2
        return int(share) if multiple == 1 else multiple * math.ceil(share / multiple - 0.5)

    def _fan_between_factors(self, part: str) -> bool:
        return self.fan_placement == "ffn" and part.startswith("ffn")

    def has_attention_norm(self, layer: int) -> bool:
        """Return whether block `layer` has a norm in front of its attention."""
        return self.norm_placement == "pre" or (self.norm_placement == "hybrid-star" and layer == 0)

    def _check(self, file: Header) -> None:
        """Raise CheckpointError where fields contradict each other or are out of range."""
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise file.fail(
                    f"`{_key_of(name)}` must be one of {', '.join(choices)}, got {str(getattr(self, name))[:40]!r}."
                )
        rope_type = self.rope_parameters["rope_type"]
        if rope_type not in _ROPE_TYPES:
            raise file.fail(
                f"`{ARCHITECTURE}.rope.scaling.type` must be one of {', '.join(_ROPE_TYPES)}, got "
                f"{rope_type[:40]!r}: other types are not supported."
            )
        if not self.rope_parameters.get("rope_theta", 0) > 0:
            raise file.fail(f"`{ARCHITECTURE}.rope.freq_base` must be above 0, got {self.rope_parameters}.")
        for name, low, high in (("fan_ratio", 0.0, 0.5), ("rms_norm_eps", 1e-30, 1.0)):
            if not low <= getattr(self, name) <= high:
                raise file.fail(f"`{_key_of(name)}` must be in [{low}, {high}], got {getattr(self, name)}.")
        if self.fan_multiple & (self.fan_multiple - 1):
            raise file.fail(f"`{_key_of('fan_multiple')}` must be a power of two, got {self.fan_multiple}.")
        if file.metadata.get(f"{ARCHITECTURE}.{_WRITER_NORM}", False):
            raise file.fail(f"`{ARCHITECTURE}.{_WRITER_NORM}` must be false, got true: train the model without it.")
        if self.fan_placement == "ffn" and self.gate_up_rank is None:
            raise file.fail(f"`{_key_of('fan_placement')}` 'ffn' needs `{_key_of('gate_up_rank')}`, got full rank.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise file.fail(
                f"`{_key_of('num_attention_heads')}` must be a multiple of `{_key_of('num_key_value_heads')}`, got "
                f"{self.num_attention_heads} and {self.num_key_value_heads}."
            )
        if self.head_dim % 2:
            raise file.fail(f"`{_key_of('head_dim')}` must be even, got {self.head_dim}: RoPE turns pairs of channels.")


def _ranks_before(file: Header) -> dict[str, Any]:
    """Return the fields of today for what files of one rank and a choice of layers hold, and what was fixed then."""
    for key, _ in [*_OPTIONAL_KEYS.values(), _KEYS["fan_multiple"]]:
        if f"{ARCHITECTURE}.{key}" in file.metadata:
            raise file.fail(f"has `{ARCHITECTURE}.{_LAYERS_BEFORE}` and `{ARCHITECTURE}.{key}`, which replaced it.")
    chosen = _read(file, _LAYERS_BEFORE, "text")
    if chosen not in _CHOSEN_BEFORE:
        choices = ", ".join(_CHOSEN_BEFORE)
        raise file.fail(f"`{ARCHITECTURE}.{_LAYERS_BEFORE}` must be one of {choices}, got {chosen[:40]!r}.")
    rank = None
    if f"{ARCHITECTURE}.{_RANK_BEFORE}" in file.metadata:
        rank = _read(file, _RANK_BEFORE, "count")
    elif f"{ARCHITECTURE}.{_RATIO_BEFORE}" in file.metadata:
        ratio = _read(file, _RATIO_BEFORE, "double")
        if not 0 < ratio <= 1:
            raise file.fail(f"`{ARCHITECTURE}.{_RATIO_BEFORE}` must be in (0, 1], got {ratio}.")
        rank = max(1, int(ratio * _read(file, *_KEYS["hidden_size"])))
    found: dict[str, Any] = {name: rank if name in _CHOSEN_BEFORE[chosen] else None for name in _OPTIONAL_KEYS}
    low_rank_writers = rank is not None and chosen != "readers"
    if low_rank_writers and _read(file, *_KEYS["cola_norm"]):
        raise file.fail("has norms between the factors of O and down: train the model without them.")
    activation = _read(file, *_KEYS["cola_activation"]) if low_rank_writers else "residual"
    return found | {"fan_multiple": 1, "writer_activation": activation}


def _key_of(field: str) -> str:
    return f"{ARCHITECTURE}.{({**_KEYS, **_OPTIONAL_KEYS})[field][0]}"


def _read(file: Header, name: str, kind: str) -> Any:
    """Return the value of a key of our architecture, checked to be of its kind."""
    key = f"{ARCHITECTURE}.{name}"
    value = file.metadata.get(key)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "count":
        right = isinstance(value, int) and is_number and 1 <= value <= _LARGEST
    elif kind == "flag":
        right = isinstance(value, bool)
    elif kind == "text":
        right = isinstance(value, str)
    else:
        right = is_number and math.isfinite(value or 0)
    if not right:
        expected = {"count": f"a whole number from 1 to {_LARGEST}", "flag": "true or false", "text": "a text"}
        got = "nothing" if value is None else repr(value)[:40]
        raise file.fail(f"`{key}` must be {expected.get(kind, 'a finite number')}, got {got}.")
    # float32 keeps 7 digits; the shortest decimal of those is what was meant, such as 1e-05
    return shortest(float(value)) if kind == "float" else value  # type: ignore[arg-type]


def shortest(value: float) -> float:
    """Return the number that the fewest decimal digits name among those that round to `value` in float32."""
    import numpy as np

    return float(str(np.float32(value)))
