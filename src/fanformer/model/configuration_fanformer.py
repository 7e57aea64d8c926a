"""Configuration of FANformer: every field of the model, its meaning, unit, range and source."""

import difflib
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

# Keys that transformers itself puts beside the fields of a model in config.json.
_FOREIGN_KEYS = frozenset(
    {
        "attn_implementation",
        "auto_map",
        "experts_implementation",
        "is_decoder",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "per_layer_config",
        "quantization_config",
        "rope_scaling",
        "rope_theta",
        "torch_dtype",
    }
)
_STATIC_ROPE_TYPES = ("default", "linear", "llama3", "yarn")

# What a configuration held before each kind of layer had a rank of its own, with the defaults of that time.
_BEFORE_RANKS = {"cola_rank_ratio": 0.75, "cola_rank": None, "cola_layers": "readers"}
_OTHER_DEFAULTS_THEN = {"hidden_size": 512, "intermediate_size": 896, "fan_placement": "ffn"}
RANKS = ("qkv_rank", "o_rank", "gate_up_rank", "down_rank")
"""Fields that hold a rank; all None is full rank everywhere."""
_SINCE_RANKS = (*RANKS, "fan_multiple", "writer_activation")
# cola_layers -> which of RANKS it meant
_CHOSEN_THEN = {
    "readers": ("qkv_rank", "gate_up_rank"),
    "all": RANKS,
    "attention": ("qkv_rank", "o_rank"),
    "ffn": ("gate_up_rank", "down_rank"),
}
# What lost its experiment and was deleted: field -> the values that files may no longer hold
_DELETED: dict[str, tuple[Any, ...]] = {
    "fan_placement": ("attention", "both"),
    "qkv_norm": ("qk",),
    "writer_activation": ("half",),
    "writer_norm": (True,),
}
RECURRENCE = ("prelude_layers", "core_layers", "coda_layers", "mean_recurrence", "max_recurrence", "injection")
"""Fields of the recurrent depth, which a plain model's files leave out."""
# Where a saved folder has the class behind each Auto class; transformers alone names only the class that is saved, and
# vLLM looks for AutoModel.
AUTO_MAP = {
    "AutoConfig": "configuration_fanformer.FANformerConfig",
    "AutoModel": "modeling_fanformer.FANformerModel",
    "AutoModelForCausalLM": "modeling_fanformer.FANformerForCausalLM",
    "AutoModelForSequenceClassification": "modeling_fanformer.FANformerForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_fanformer.FANformerForTokenClassification",
}
_Config = TypeVar("_Config", bound=type)


class Recurrence(NamedTuple):
    """The recurrent depth of a model: which blocks run once, which r times, and how large r may be."""

    prelude: range
    """Indices of the blocks that run before the core."""
    core: range
    """Indices of the blocks that run r times."""
    coda: range
    """Indices of the blocks that run after the core."""
    mean_steps: int
    """r where nothing is said, the mean of training."""
    largest_steps: int
    """The largest r."""
    bridge: str
    """How the core gets the prelude's output from its second step on."""

    def executed(self, num_steps: int) -> list[int]:
        """Return the indices of the blocks in the order in which r steps run them."""
        return [*self.prelude, *list(self.core) * num_steps, *self.coda]

    def cache_layers(self, num_steps: int) -> int:
        """Return how many layers of keys and values r steps have: one for every block that runs."""
        return len(self.executed(num_steps))


def translated(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of today for those of an earlier configuration.

    Fields from before each kind of layer had a rank of its own have `cola_rank_ratio`, `cola_rank` or `cola_layers`;
    what they leave out gets the default of that time, so that the model is the one that was written.

    Raises:
        ValueError: if fields from before stand beside such as replaced them, `cola_layers` is no choice, or a field has
            a value that was deleted.
    """
    found = dict(fields)
    for name, gone in _DELETED.items():
        if found.get(name) in gone:
            raise _deleted(name, found[name])
    found.pop("writer_norm", None)
    before = [name for name in _BEFORE_RANKS if name in found]
    if not before:
        return found
    since = [name for name in _SINCE_RANKS if name in found]
    if since:
        raise ValueError(
            f"`{before[0]}` and `{since[0]}` exclude each other: {', '.join(RANKS)} replace {', '.join(_BEFORE_RANKS)}."
        )
    ratio, absolute, chosen = (found.pop(name, default) for name, default in _BEFORE_RANKS.items())
    found = {**_OTHER_DEFAULTS_THEN, **found}
    if chosen not in _CHOSEN_THEN:
        raise ValueError(f"`cola_layers` must be one of {', '.join(_CHOSEN_THEN)}, got {chosen!r}.")
    rank = absolute
    if rank is None and ratio is not None:
        rank = max(1, int(ratio * found["hidden_size"]))
    found |= {name: rank if name in _CHOSEN_THEN[chosen] else None for name in RANKS}
    found["fan_multiple"] = 1
    if rank is not None and chosen != "readers":  # one form for all layers, then
        if found.get("cola_norm", True):
            raise _deleted("writer_norm", True)
        found["writer_activation"] = found.get("cola_activation", "silu")
    return found


def _deleted(name: str, value: Any) -> ValueError:
    return ValueError(f"`{name}` {value!r} was deleted, as docs/experiments.md says: train the model without it.")


def _reads_files_from_before(config: _Config) -> _Config:
    """Let the class take the fields of files that were written before `translated` had anything to do."""
    given = vars(config)["__init__"]

    @functools.wraps(given)
    def __init__(self: Any, *args: Any, **fields: Any) -> None:  # noqa: N807
        given(self, *args, **translated(fields))

    config.__init__ = __init__  # type: ignore[misc]
    return config


@_reads_files_from_before
@strict
class FANformerConfig(PreTrainedConfig):
    """Configuration of a FANformer; the defaults are the 92M model that the project is defined by.

    Every switch at its "off" value (`fan_placement="none"`, all four ranks None, `projection_bias=False`,
    `norm_placement="pre"`, `qkv_norm="none"`, `gated_residual=False`) gives Llama, parameter names included. Files from
    before there was a rank for each kind of layer load as the models that they were; see `translated`.

    Raises:
        StrictDataclassError: if a field has the wrong type or value, if fields contradict each other, or if a
            keyword is not a field; the message names the field, the value, what was expected and a remedy.
    """

    model_type = "fanformer"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 49152
    """V: number of token ids. The default is the SmolLM2 tokenizer's."""
    hidden_size: int = 512
    """D: width of the residual stream."""
    intermediate_size: int = 2048
    """F: width of the gated product in SwiGLU."""
    num_hidden_layers: int = 12
    """L: number of decoder layers."""
    num_attention_heads: int = 12
    """H: number of query heads."""
    num_key_value_heads: int = 6
    """G: number of key-value heads (GQA, arXiv:2305.13245); must divide `num_attention_heads`."""
    head_dim: int = 128
    """K: width of a head; its own field, since D need not be a multiple of H. Must be even (RoPE turns pairs)."""
    max_position_embeddings: int = 1024
    """Longest sequence, in tokens, that the model is trained for."""
    rms_norm_eps: float | int = 1e-5
    """Added to the mean square in every RMSNorm."""
    rope_parameters: RopeParameters | dict | None = None
    """RoPE (arXiv:2104.09864): `rope_theta` (default 10000.0) and `rope_type` (default, linear, llama3 or yarn)."""
    dropout: float | int = 0.1
    """Dropout on both residual branches while training, in [0, 1)."""
    attention_dropout: float | int = 0.0
    """Dropout on the attention weights while training, in [0, 1); refused by backends that cannot apply it."""
    hidden_act: Literal["silu", "gelu", "linear"] = "silu"
    """Activation of the SwiGLU gate; "linear" drops it, as CoLA does from 350M parameters on."""

    fan_placement: Literal["projection", "layer", "ffn", "none"] = "projection"
    """Where Fourier features enter (FAN, arXiv:2502.21309): "projection" makes each of Q, K and V a FAN projection,
    [cos(p), sin(p), g]; "layer" puts the paper's full-rank FANLayer' (eq. 1) in front of Q, K and V; "ffn" has them
    between the factors of the FFN's CoLA linears, whose R channels are then [cos(p), sin(p), act(g)], and is refused
    where gate and up have none; "none" leaves them out. All but "layer" are ours."""
    fan_ratio: float | int = 0.15
    """Share of the channels given to cos, and again to sin, in [0, 0.5]; the channels are the outputs of a projection,
    the layer's D, or the R between two factors."""
    fan_multiple: int = 16
    """P, the channels given to cos, is the multiple of this that is nearest to `fan_ratio` of the channels, so that the
    rest is one too; a power of two. Where it does not divide the channels, or cos or the rest is to have fewer, its
    half takes its place, and so on; 1 is P = int(fan_ratio * channels), as in the published models. Ours."""
    qkv_rank: int | None = 384
    """R of Q, K and V as CoLA linears (arXiv:2502.10940), at least 1; None is full rank, here and in the next three."""
    o_rank: int | None = 256
    """R of O, the layer that ends the attention branch."""
    gate_up_rank: int | None = 256
    """R of gate and up."""
    down_rank: int | None = 224
    """R of down, the layer that ends the FFN branch."""
    cola_activation: Literal["silu", "gelu", "linear"] = "silu"
    """Activation between the two factors of Q, K, V, gate and up, the layers that read the residual stream; "gelu" is
    the exact (erf) form."""
    cola_norm: bool = True
    """Whether W_a x of these layers gets an RMSNorm over its R channels before the activation. Ours."""
    writer_activation: Literal["residual", "silu", "gelu", "linear"] = "residual"
    """The same for O and down, the layers that write to the stream, without a norm: "residual" is x + silu(x), ours,
    for without a linear path attention does not learn to copy. Refused where O and down have full rank."""
    cola_input: Literal["shared", "separate"] = "shared"
    """Whether CoLA linears that read the same input (Q, K and V, with p and g apart; gate and up) have one W_a
    together, or one each, as in CoLA. Sharing is ours."""
    projection_bias: bool = True
    """Whether the linear layers of attention and FFN carry a bias on their outputs (never on cos and sin)."""
    norm_placement: Literal["hybrid-star", "hybrid", "pre"] = "hybrid-star"
    """HybridNorm (arXiv:2503.04598): "hybrid" has no norm in front of attention and takes the FFN's residual after
    its norm (eq. 6); "hybrid-star" adds a norm in front of the first attention; "pre" is Llama's pre-norm."""
    qkv_norm: Literal["qkv", "none"] = "qkv"
    """Whether Q, K and V get an RMSNorm per head, Q and K before RoPE (HybridNorm, eq. 5)."""
    gated_residual: bool = True
    """Whether each residual branch is multiplied by sigmoid(g), g a learnable vector of width D."""
    gate_initial: float | int = 0.0
    """What every g starts at, in [-16, 16]: 0 starts each branch at half its strength, -4 at 0.018 of it, 4 at 0.982.
    Ours. Refused where `gated_residual` is off."""

    prelude_layers: int | None = None
    """Blocks that run once before the core of a recurrent depth (arXiv:2502.05171); None, like the next two, is a plain
    model. Prelude, core and coda add up to `num_hidden_layers`."""
    core_layers: int | None = None
    """Blocks of the core, which r steps run r times; the first step is the plain model's."""
    coda_layers: int | None = None
    """Blocks that run once after the core."""
    mean_recurrence: int = 4
    """r where nothing is said, and the mean of the r that training draws. Refused without a core, like the next two."""
    max_recurrence: int = 8
    """The largest r."""
    injection: Literal["mix", "add", "concat"] = "mix"
    """What the core reads from its second step on, h the state and e the prelude's output: "mix" is a h + Norm(e), a a
    learnable vector; "add" is h + Norm(e); "concat" is W [h, Norm(e)]. All of them are h at initialisation. Ours."""

    tie_word_embeddings: bool = False
    """Whether the LM head shares the embedding's weight."""
    initializer_range: float | int = 0.01
    """Standard deviation of the LM head (and of the embedding when tied) at initialisation."""
    embedding_initializer_range: float | int = 1.0
    """Standard deviation of the untied embedding at initialisation."""
    use_cache: bool = True
    """Whether a forward pass returns key-value states by default."""
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        fields = type(self).__dataclass_fields__
        for key in kwargs:
            if key not in _FOREIGN_KEYS and not key.startswith("_"):
                near = difflib.get_close_matches(key, fields, n=1, cutoff=0.0)[0]
                raise ValueError(f"`{key}` is not a field of FANformerConfig: did you mean `{near}`?")
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, those of the recurrent depth only where there is one: a plain model's file has none."""
        fields: dict[str, Any] = super().to_dict()
        return fields if self.core_layers else {name: fields[name] for name in fields if name not in RECURRENCE}

    @property
    def recurrence(self) -> Recurrence | None:
        """The recurrent depth in numbers, None for a plain model."""
        if self.core_layers is None or self.prelude_layers is None:
            return None
        first, last = self.prelude_layers, self.prelude_layers + self.core_layers
        parts = range(first), range(first, last), range(last, self.num_hidden_layers)
        return Recurrence(*parts, self.mean_recurrence, self.max_recurrence, self.injection)

    def validate_recurrence(self) -> None:
        """Check that prelude, core and coda are the layers, and that the mean of r is not above the largest."""
        prelude, core, coda = parts = (self.prelude_layers, self.core_layers, self.coda_layers)
        if prelude is None or core is None or coda is None:
            for name in RECURRENCE:
                if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise ValueError(
                        f"`{name}` needs `prelude_layers`, `core_layers` and `coda_layers`, got {getattr(self, name)} "
                        "beside None: set all three, or leave it out."
                    )
        elif prelude < 0 or core < 1 or coda < 0 or prelude + core + coda != self.num_hidden_layers:
            raise ValueError(
                f"`prelude_layers`, `core_layers` and `coda_layers` must add up to `num_hidden_layers`, got {parts} "
                f"and {self.num_hidden_layers}: a core has at least 1, the others at least 0."
            )
        elif not 1 <= self.mean_recurrence <= self.max_recurrence:
            raise ValueError(
                f"`mean_recurrence` must be in [1, max_recurrence], got {self.mean_recurrence} of "
                f"{self.max_recurrence}: it is the r of every call that names none."
            )

    def validate_architecture(self) -> None:
        """Check the rules that join several fields, and the ranges of single ones."""
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.fan_ratio <= 0.5:
            raise ValueError(
                f"`fan_ratio` must be in [0, 0.5], got {self.fan_ratio}: "
                "cos and sin each take this share of the output."
            )
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be in [0, 1), got {getattr(self, name)}.")
        for name in ("initializer_range", "embedding_initializer_range"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}: it is a standard deviation.")
        if not self.rms_norm_eps > 0:
            raise ValueError(f"`rms_norm_eps` must be above 0, got {self.rms_norm_eps}: it keeps RMSNorm finite at 0.")
        if self.fan_multiple < 1 or self.fan_multiple & (self.fan_multiple - 1):
            raise ValueError(f"`fan_multiple` must be a power of two, got {self.fan_multiple}: 1 rounds nothing.")
        for name in RANKS:
            rank = getattr(self, name)
            if rank is not None and rank < 1:
                raise ValueError(f"`{name}` must be at least 1 or None, got {rank}: None means full rank.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                "`num_attention_heads` must be a multiple of `num_key_value_heads`, "
                f"got {self.num_attention_heads} and {self.num_key_value_heads}: "
                "each key-value head serves the same number of query heads."
            )
        if self.head_dim % 2:
            raise ValueError(f"`head_dim` must be even, got {self.head_dim}: RoPE turns pairs of channels.")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"`pad_token_id` must be in [0, vocab_size), got {self.pad_token_id} of {self.vocab_size}: "
                "it is a row of the embedding."
            )
        rope = self.rope_parameters or {}
        rope_type = rope.get("rope_type", "default")
        if rope_type not in _STATIC_ROPE_TYPES:
            raise ValueError(
                f"`rope_parameters['rope_type']` must be one of {', '.join(_STATIC_ROPE_TYPES)}, got {rope_type!r}: "
                "types whose frequencies depend on the sequence at hand are not supported."
            )
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(
                f"`rope_parameters['partial_rotary_factor']` must be 1.0, got {rope['partial_rotary_factor']}: "
                "all channels of a head are turned."
            )

    def validate_switches(self) -> None:
        """Refuse switches that would have no effect beside the others, and gates that cannot learn."""
        if self.fan_placement == "ffn" and self.gate_up_rank is None:
            raise ValueError(
                "`fan_placement` 'ffn' needs a low-rank gate and up, got full rank: set `gate_up_rank`, or "
                "`fan_placement` to projection, layer or none."
            )
        if self.o_rank is None and self.down_rank is None and self.writer_activation != "residual":
            raise ValueError(
                "`writer_activation` must be 'residual' where O and down have full rank, got "
                f"{self.writer_activation!r}: set `o_rank` or `down_rank`."
            )
        if not -16 <= self.gate_initial <= 16:
            raise ValueError(
                f"`gate_initial` must be in [-16, 16], got {self.gate_initial}: further out sigmoid(g) has no slope."
            )
        if self.gate_initial != 0 and not self.gated_residual:
            raise ValueError(
                f"`gate_initial` must be 0.0 without gates, got {self.gate_initial}: set `gated_residual` to true."
            )

    def periodic_width(self, channels: int) -> int:
        """Return P, how many of `channels` are cosines, and again sines; `fan_multiple` says how it is rounded."""
        share, multiple = self.fan_ratio * channels, self.fan_multiple
        rest = channels - 2 * share
        while multiple > 1 and (channels % multiple or share < multiple or 0 < rest < multiple):
            multiple //= 2
        return int(share) if multiple == 1 else multiple * math.ceil(share / multiple - 0.5)


__all__ = ["AUTO_MAP", "RANKS", "RECURRENCE", "FANformerConfig", "Recurrence", "translated"]
