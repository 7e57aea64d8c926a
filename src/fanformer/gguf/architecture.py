"""A FANformer in a GGUF file: its fields, and what its tensors' shapes tell; neither torch nor transformers.

Keys are llama.cpp's where it has one, and ours below `fanformer.` elsewhere; docs/quantization.md lists them all.
Ranks, P, biases, norms and gates are read off the tensors, so that no rule of the model is told again here.
"""

import math
import re
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from fanformer.errors import CheckpointError, ConfigError
from fanformer.gguf.file import ARCHITECTURE, GGUFFile

_LARGEST = 1 << 24
"""Above every width, count or length of a model; keeps products of them far from overflow."""

# field of `FANformerConfig` -> (key, how it is stored); "count" is an integer from 1 on
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
    "cola_activation": ("cola.activation", "text"),
    "cola_norm": ("cola.norm", "flag"),
    "cola_input": ("cola.input", "text"),
    "projection_bias": ("projection_bias", "flag"),
    "norm_placement": ("norm_placement", "text"),
    "qkv_norm": ("attention.qkv_norm", "text"),
    "gated_residual": ("gated_residual", "flag"),
}
# the same for what files lack from before each kind of layer had a rank of its own, and for what took its place
_SINCE_RANKS = {"fan_multiple": ("fan.multiple", "count"), "writer_activation": ("cola.writer_activation", "text")}
_BEFORE_RANKS = {
    "cola_layers": ("cola.layers", "text"),
    "cola_rank": ("cola.rank", "count"),
    "cola_rank_ratio": ("cola.rank_ratio", "double"),
}
# absent at full rank
_RANKS = {name: (f"cola.{name}", "count") for name in ("qkv_rank", "o_rank", "gate_up_rank", "down_rank")}
# absent where blocks run once
_RECURRENCE = {
    "prelude_layers": ("recurrence.prelude_count", "number"),
    "core_layers": ("recurrence.core_count", "count"),
    "coda_layers": ("recurrence.coda_count", "number"),
    "mean_recurrence": ("recurrence.mean_steps", "count"),
    "max_recurrence": ("recurrence.largest_steps", "count"),
    "injection": ("recurrence.injection", "text"),
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
_STORED_AS = {"count": 4, "number": 4, "float": 6, "double": 12, "flag": 7, "text": 8}
# what the engine computes
_CHOICES = {
    "hidden_act": ("silu", "gelu", "linear"),
    "fan_placement": ("projection", "layer", "ffn", "none"),
    "cola_activation": ("silu", "gelu", "linear"),
    "writer_activation": ("silu", "gelu", "linear", "residual"),
    "cola_input": ("shared", "separate"),
    "norm_placement": ("hybrid-star", "hybrid", "pre"),
    "qkv_norm": ("qkv", "none"),
    "injection": ("mix", "add", "concat"),
    "rope_type": ("default", "linear", "llama3", "yarn"),
}


class Architecture(SimpleNamespace):
    """The fields of a `FANformerConfig` that decide the tensors and the arithmetic, as a file has them.

    Files from before each kind of layer had a rank of its own have the fields of that time, which the configuration
    translates.
    """

    @classmethod
    def from_file(cls, file: GGUFFile) -> "Architecture":
        """Return the architecture that a file's `metadata`, and whether its `tensors` have a head, tell.

        Raises:
            CheckpointError: if a key is missing, of the wrong type or out of the range that the engine computes.
        """

        def present(keys: dict[str, tuple[str, str]]) -> dict[str, Any]:
            held = {name: key for name, key in keys.items() if f"{ARCHITECTURE}.{key[0]}" in file.metadata}
            return {name: _read(file, *key) for name, key in held.items()}

        fields = {name: _read(file, *key) for name, key in _KEYS.items()} | present(_BEFORE_RANKS) | present(_RANKS)
        if "cola_layers" in fields:
            fields |= present(_SINCE_RANKS)
        else:
            fields = dict.fromkeys(_RANKS) | fields | {name: _read(file, *key) for name, key in _SINCE_RANKS.items()}
        if present(_RECURRENCE):
            fields |= {name: _read(file, *key) for name, key in _RECURRENCE.items()}
        rope = {"rope_type": "default"} | present(_ROPE_KEYS)
        found = cls(**fields, rope_parameters=rope, tie_word_embeddings="output.weight" not in file.tensors)
        _check(found, file)
        return found

    def parts(self) -> tuple[range, range, range]:
        """Return the blocks of prelude, core and coda; of a plain model all are the core's, which runs once."""
        if not hasattr(self, "core_layers"):
            return range(0), range(self.num_hidden_layers), range(0)
        first, last = self.prelude_layers, self.prelude_layers + self.core_layers
        return range(first), range(first, last), range(last, self.num_hidden_layers)

    def check_steps(self, num_steps: int | None) -> int:
        """Return how often the core runs where `num_steps` is asked for; None is the mean of training.

        Raises:
            ConfigError: if the model has no recurrent depth, or the number is out of range.
        """
        if not hasattr(self, "core_layers"):
            if num_steps is not None:
                raise ConfigError(
                    f"`num_steps` needs a model with recurrent depth, got {num_steps} for one whose blocks run once: "
                    "leave it out."
                )
            return 1
        mean, largest = self.mean_recurrence, self.max_recurrence
        if num_steps is not None and not 1 <= num_steps <= largest:
            raise ConfigError(
                f"`num_steps` must be in [1, {largest}], got {num_steps}: the file says how large it may be."
            )
        return mean if num_steps is None else num_steps

    @property
    def steps(self) -> tuple[int, int] | None:
        """The mean number of steps in training and the largest, None of a plain model."""
        return (self.mean_recurrence, self.max_recurrence) if hasattr(self, "core_layers") else None


def metadata(config: Any) -> dict[str, tuple[int, Any]]:
    """Return key to (type of the value, value), as a file has it, for a `FANformerConfig`."""
    values = {key: getattr(config, name) for name, key in {**_KEYS, **_SINCE_RANKS, **_RANKS}.items()}
    if config.core_layers:
        values |= {key: getattr(config, name) for name, key in _RECURRENCE.items()}
    values |= {("attention.value_length", "count"): config.head_dim, ("rope.dimension_count", "count"): config.head_dim}
    values |= {key: config.rope_parameters.get(name) for name, key in _ROPE_KEYS.items()}
    if config.rope_parameters["rope_type"] == "default":
        del values[_ROPE_KEYS["rope_type"]]
    return {f"{ARCHITECTURE}.{key}": (_STORED_AS[kind], v) for (key, kind), v in values.items() if v is not None}


def _check(model: Architecture, file: GGUFFile) -> None:
    """Raise CheckpointError where the engine could not compute with what the fields say."""
    fields = {**vars(model), **model.rope_parameters}
    known = {**_KEYS, **_SINCE_RANKS, **_RECURRENCE, **_ROPE_KEYS}
    keys = {name: f"{ARCHITECTURE}.{key}" for name, (key, _) in known.items()}
    for name, choices in _CHOICES.items():
        if fields.get(name, choices[0]) not in choices:
            raise file.fail(f"`{keys[name]}` must be one of {', '.join(choices)}, got {fields[name][:40]!r}.")
    if not fields.get("rope_theta", 0) > 0:
        raise file.fail(f"`{keys['rope_theta']}` must be above 0, got {model.rope_parameters}.")
    if fields["rope_type"] != "default" and not fields.get("factor", 0) > 0:
        got = fields.get("factor", "nothing")
        raise file.fail(f"`{keys['factor']}` must be above 0 for RoPE of the type {fields['rope_type']}, got {got}.")
    if not 1e-30 <= model.rms_norm_eps <= 1:
        raise file.fail(f"`{keys['rms_norm_eps']}` must be in [1e-30, 1], got {model.rms_norm_eps}.")
    if model.num_attention_heads % model.num_key_value_heads:
        raise file.fail(
            f"`{keys['num_attention_heads']}` must be a multiple of `{keys['num_key_value_heads']}`, got "
            f"{model.num_attention_heads} and {model.num_key_value_heads}."
        )
    if model.steps is not None:
        counts = [len(part) for part in model.parts()]
        if model.prelude_layers + model.core_layers + model.coda_layers != model.num_hidden_layers:
            raise file.fail(f"`{keys['core_layers']}` must fit the blocks, got {counts} of {model.num_hidden_layers}.")
        if model.mean_recurrence > model.max_recurrence:
            raise file.fail(f"`{keys['mean_recurrence']}` must be at most the largest number of steps, {model.steps}.")
    if model.head_dim % 2:
        raise file.fail(f"`{keys['head_dim']}` must be even, got {model.head_dim}: RoPE turns pairs of channels.")


def _read(file: GGUFFile, name: str, kind: str) -> Any:
    """Return the value of a key of our architecture, checked to be of its kind."""
    key = f"{ARCHITECTURE}.{name}"
    value = file.metadata.get(key)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    right = {
        "count": type(value) is int and 1 <= value <= _LARGEST,
        "number": type(value) is int and 0 <= value <= _LARGEST,
        "flag": isinstance(value, bool),
        "text": isinstance(value, str),
    }
    if not right.get(kind, is_number and math.isfinite(value or 0)):
        whole = {kind: f"a whole number from {first} to {_LARGEST}" for kind, first in (("count", 1), ("number", 0))}
        expected = whole | {"flag": "true or false", "text": "a text"}
        got = "nothing" if value is None else repr(value)[:40]
        raise file.fail(f"`{key}` must be {expected.get(kind, 'a finite number')}, got {got}.")
    # float32 keeps 7 digits; the shortest decimal of those is what was meant, such as 1e-05
    return shortest(float(value)) if kind == "float" else value  # type: ignore[arg-type]


def shortest(value: float) -> float:
    """Return the number that the fewest decimal digits name among those that round to `value` in float32."""
    import numpy as np

    return float(str(np.float32(value)))


def open_model(path: str) -> tuple[GGUFFile, Architecture]:
    """Read and check a file's header, metadata and list of tensors.

    Raises:
        CheckpointError: if anything is not what it must be.
    """
    try:
        file = GGUFFile(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    model = Architecture.from_file(file)
    read_factors(model, file)
    return file, model


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


# What lengths tensors have in common: (outputs, inputs) of a matrix, whose bias has its outputs, or a norm's or gate's
# width. V, D, F and K are the model's, Q is H K; what a group of layers reads is called after the group.
_BLOCK = {
    "attn_norm": "D",
    "attn_fan": "fan D",
    "attn_qkv_a": "attn_qkv_a D",
    "attn_qkv_a_norm": "attn_qkv_a_norm",
    "attn_q_fan": "q_fan attn_qkv",
    "attn_q": "q attn_qkv",
    "attn_k_fan": "k_fan attn_qkv",
    "attn_k": "k attn_qkv",
    "attn_v_fan": "v_fan attn_qkv",
    "attn_v": "v attn_qkv",
    **dict.fromkeys(("attn_q_norm", "attn_k_norm", "attn_v_norm"), "K"),
    "attn_output_a": "attn_output_a Q",
    "attn_output": "D attn_output",
    **dict.fromkeys(("attn_residual_gate", "ffn_norm", "ffn_residual_gate"), "D"),
    "ffn_gate_up_a": "ffn_gate_up_a D",
    "ffn_gate_up_a_norm": "ffn_gate_up_a_norm",
    **dict.fromkeys(("ffn_gate", "ffn_up"), "F ffn_gate_up"),
    "ffn_down_a": "ffn_down_a F",
    "ffn_down": "D ffn_down",
}
_SHAPES = {f"blk.N.{name}": lengths for name, lengths in _BLOCK.items()}
_SHAPES |= {"token_embd": "V D", "output_norm": "D", "output": "V D"}
_SHAPES |= {"bridge_norm": "D", "bridge_scale": "D", "bridge": "D 2D"}
_BRIDGES = {"mix": ("bridge_norm", "bridge_scale"), "add": ("bridge_norm",), "concat": ("bridge_norm", "bridge")}
_NEEDED = ("attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")


def read_factors(model: Architecture, file: GGUFFile) -> dict[str, Factors]:
    """Return the factors of attn_qkv, attn_output, ffn_gate_up and ffn_down, of those that have some.

    Raises:
        CheckpointError: if a tensor is missing, unknown or of a shape that does not fit the others and the metadata, or
            if a norm, gate or bias is not float32.
    """
    # a block count that lies would otherwise make us look for millions of tensors
    if model.num_hidden_layers > len(file.tensors):
        raise file.fail(f"claims {model.num_hidden_layers} blocks, but has {len(file.tensors)} tensors.")
    _check_names(model, file)
    lengths = _read_lengths(model, file)
    heads, found = {"q": model.num_attention_heads, "k": model.num_key_value_heads, "v": model.num_key_value_heads}, {}
    for part, count in heads.items():
        outputs = 2 * lengths.get(f"{part}_fan", 0) + lengths.get(part, 0)
        _require(file, outputs == count * model.head_dim, f"attn_{part}", f"makes {outputs} outputs of {count} heads")
    cosines = lengths["D"] - lengths.get("fan", lengths["D"])
    _require(file, 0 <= 2 * cosines <= lengths["D"], "attn_fan", f"makes {cosines} cosines of {lengths['D']}")
    projection = model.fan_placement == "projection"
    for part, inputs, readers in (("attn_qkv", "D", 6 if projection else 3), ("attn_output", "Q", 1),
                                  ("ffn_gate_up", "D", 2), ("ffn_down", "F", 1)):  # fmt: skip
        rank, rows = lengths[part], lengths.get(f"{part}_a")
        if rows is None:
            _require(file, rank == lengths[inputs], part, f"reads {rank}, expected {lengths[inputs]}")
            continue
        count = 1 if model.cola_input == "shared" else readers
        periodic, left = divmod(count * rank - rows, count)
        most = rank if model.fan_placement == "ffn" and part.startswith("ffn") else 0
        norm = lengths.get(f"{part}_a_norm", rank - periodic)
        fits = not left and 0 <= 2 * periodic <= most and norm == rank - periodic
        _require(file, fits, part, f"reads {rank}, and its first factors have {rows} rows and norms of {norm}")
        reads = model.cola_activation
        found[part] = Factors(
            rank, periodic, count, reads if readers > 1 else getattr(model, "writer_activation", reads)
        )
    return found


def _require(file: GGUFFile, fits: bool, name: str, what: str) -> None:
    if not fits:
        raise file.fail(f"its tensors do not fit its metadata: `{name}` {what}.")


def _check_names(model: Architecture, file: GGUFFile) -> None:
    """Raise CheckpointError if a tensor is missing or unknown: all blocks have those of the first, but for one norm."""
    first = {name.removeprefix("blk.0.") for name in file.tensors if _lengths_of(name) and name.startswith("blk.0.")}
    first = (first | {f"{name}.weight" for name in _NEEDED}) - {"attn_norm.weight"}
    wanted = {f"blk.{layer}.{name}" for layer in range(model.num_hidden_layers) for name in first}
    normed = {"pre": model.num_hidden_layers, "hybrid-star": 1}.get(model.norm_placement, 0)
    wanted |= {f"blk.{layer}.attn_norm.weight" for layer in range(normed)}
    wanted |= {"token_embd.weight", "output_norm.weight"} | (
        {"output.weight"} if not model.tie_word_embeddings else set()
    )
    if model.steps is not None:
        wanted |= {f"{name}.weight" for name in _BRIDGES[model.injection]}
    for verb, names in (("lacks", wanted - file.tensors.keys()), ("has", file.tensors.keys() - wanted)):
        if any(name.endswith(("attn_output_a_norm.weight", "ffn_down_a_norm.weight")) for name in names):
            raise file.fail("has norms between the factors of O and down, which were deleted: train without them.")
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise file.fail(f"its tensors do not fit its metadata: it {verb} `{min(names)}`{more}.")


def _lengths_of(name: str) -> list[str]:
    """Return what the lengths of a tensor are called; none of one that no model has."""
    layer, _, end = re.sub(r"^blk\.\d+\.", "blk.N.", name).rpartition(".")
    lengths = _SHAPES.get(layer, "").split()
    return {"weight": lengths, "bias": lengths[:1] if len(lengths) > 1 else []}.get(end, [])


def _read_lengths(model: Architecture, file: GGUFFile) -> dict[str, int]:
    """Return every length that tensors have in common by its name, checked to be the same in all of them."""
    found = {"V": model.vocab_size, "D": model.hidden_size, "F": model.intermediate_size, "K": model.head_dim}
    found["Q"], found["2D"] = model.num_attention_heads * model.head_dim, 2 * model.hidden_size
    for name, info in file.tensors.items():
        names = _lengths_of(name)
        expected = tuple(found.setdefault(each, got) for each, got in zip(names, info.shape, strict=False))
        if len(names) != len(info.shape) or expected != info.shape:
            _require(file, False, name, f"is {info.shape}, expected {expected}")
        if len(names) == 1 and info.kind.name != "f32":
            raise file.fail(
                f"stores `{name}` as {info.kind.name}, expected f32: norms, gates and biases are never cut."
            )
    return found
