"""Read the published implementations' own files: their option names, parameter names and layouts, mapped to ours.

| format          | implementation                      | what is in the file                                        |
|-----------------|-------------------------------------|------------------------------------------------------------|
| fanformer-olmo  | FANformer, arXiv:2502.21309 (OLMo)  | `att_proj`: FANLayer', then Q, K and V in one matrix       |
| cola            | CoLA, arXiv:2502.10940 (Llama)      | each linear: `cola_a` (in, rank) and `cola_b` (rank, out)  |
| hybridnorm-olmo | HybridNorm, arXiv:2503.04598 (OLMo) | `att_proj`: Q, K and V in one matrix; norms on q, k and v  |

In both OLMo forms `ff_proj` is up and gate in one matrix, in this order. An option that would change the model in a way
ours cannot express is refused; nothing is ignored but options of training and initialisation, and Hugging Face's own.
"""

import difflib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .configuration_fanformer import RANKS, FANformerConfig
from .modeling_fanformer import FANformerForCausalLM

StateDict = dict[str, Tensor]


class PublishedOptions:
    """The options of a published config.json; one that nobody asks for is an error."""

    def __init__(self, path: Path, ignored: Iterable[str]) -> None:
        try:
            options = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"`config` must be a readable JSON file, got {path.absolute()}: {reason}.") from error
        if not isinstance(options, dict):
            raise ValueError(f"`config` must hold a JSON object, got {type(options).__name__} in {path.absolute()}.")
        self.options: dict[str, Any] = options
        self.known = set(ignored)

    def get(self, name: str, kind: type | tuple[type, ...], published_default: Any = None) -> Any:
        """Return an option of type `kind`, or the published code's own default where it is not given or null."""
        self.known.add(name)
        value = self.options.get(name, published_default)
        value = published_default if value is None else value
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join(k.__name__ for k in kinds)
            got = "nothing" if value is None else repr(value)
            raise ValueError(f"config option `{name}` must be given as {expected}, got {got}.")
        return value

    def require(self, name: str, expected: Any, published_default: Any) -> None:
        """Refuse every value but `expected`; an option that is not given has the published code's default."""
        self.known.add(name)
        given = name in self.options
        got = self.options.get(name, published_default)
        booleans = isinstance(got, bool) or isinstance(expected, bool)  # 1 == True, but is no answer to it
        fits = got is expected if booleans else got == expected
        if not fits:
            default = "" if given else " (the published default)"
            raise ValueError(
                f"config option `{name}` must be {expected!r}, got {got!r}{default}: other values are not converted."
            )

    def check_all_known(self) -> None:
        """Refuse options that no reader asked for."""
        for name in self.options:
            if name not in self.known:
                raise ValueError(f"config option `{name}` is not one that is converted: {_nearest(name, self.known)}")


class PublishedWeights:
    """The tensors of a published file, each taken once by name and shape."""

    def __init__(self, path: Path, prefix: str) -> None:
        try:
            self.tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"`weights` must be a safetensors file, got {path.absolute()}: {reason}.") from error
        if all(name.startswith(prefix) for name in self.tensors):
            self.tensors = {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items()}
        dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in self.tensors.values()})
        if len(dtypes) != 1 or not getattr(torch, dtypes[0]).is_floating_point:
            raise ValueError(f"`weights` must hold tensors of one floating dtype, got {', '.join(dtypes) or 'none'}.")
        self.dtype = getattr(torch, dtypes[0])
        self.names = list(self.tensors)
        self.missing: list[str] = []

    def take(self, name: str, *shape: int) -> Tensor:
        """Return the tensor of that name and shape; a missing one is reported by `check_all_taken`."""
        tensor = self.tensors.pop(name, None)
        if tensor is None:
            self.missing.append(name)
            return torch.empty(shape)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"parameter `{name}` has the wrong shape: got {tuple(tensor.shape)}, expected {shape}.")
        return tensor

    def check_all_taken(self) -> None:
        """Refuse a file that lacks a parameter or holds one more than the format has."""
        problems = []
        if self.missing:
            problems.append(f"missing {', '.join(f'`{name}`' for name in self.missing)}")
        if self.tensors:
            problems.append(f"unexpected {', '.join(f'`{name}`' for name in self.tensors)}")
        if problems:
            raise ValueError(f"`weights` do not fit the format and config: {'; '.join(problems)}.")


@dataclass(frozen=True)
class PublishedFormat:
    """How one published implementation's options and parameters are read."""

    configuration: Callable[[PublishedOptions, PublishedWeights], FANformerConfig]
    state_dict: Callable[[FANformerConfig, PublishedWeights], StateDict]
    ignored_options: frozenset[str]
    prefix: str = ""
    """What all names may begin with besides: Hugging Face's wrapper adds it."""


_HUGGING_FACE_OPTIONS = frozenset(
    {
        "_name_or_path", "architectures", "auto_map", "dtype",
        "model_type", "torch_dtype", "transformers_version", "use_cache",
    }
)  # fmt: skip
"""What any config.json of `transformers` may have beside the options of a model."""
_OLMO_IGNORED_OPTIONS = _HUGGING_FACE_OPTIONS | {
    "alibi_bias_max",
    "attention_layer_norm_with_affine",
    "block_group_size",
    "emb_init_std",
    "flash_attention",
    "init_cutoff_factor",
    "init_device",
    "init_fn",
    "init_std",
    "precision",
    "rope_full_precision",
    "scale_emb_init",
}
_COLA_IGNORED_OPTIONS = _HUGGING_FACE_OPTIONS | {"initializer_range", "max_position_embeddings"}
_OLMO_EMBEDDING_SIZE = 50_304
"""Rows of the embedding where `embedding_size` is not given; null means `vocab_size`."""


def _width_and_heads(options: PublishedOptions, width_name: str, heads_name: str) -> tuple[int, int]:
    """Return D and H, refusing heads that do not share the width."""
    width, heads = options.get(width_name, int), options.get(heads_name, int)
    if heads < 1 or width % heads:
        raise ValueError(f"config option `{width_name}` must be a multiple of `{heads_name}`, got {width} and {heads}.")
    return width, heads


def _olmo_fields(options: PublishedOptions) -> dict[str, Any]:
    """Return the fields of ours that both OLMo forms set, after refusing what neither of them can mean here."""
    options.require("rope", True, False)
    options.require("include_bias", False, True)
    options.require("layer_norm_type", "rms", "default")
    options.require("embedding_dropout", 0.0, 0.1)
    for name, only in (
        ("activation_type", "swiglu"),
        ("alibi", False),
        ("attention_activation", None),
        ("attention_layer_norm", False),
        ("block_type", "sequential"),
        ("clip_qkv", None),
        ("embedding_layer_norm", False),
        ("layer_norm_with_affine", True),
        ("norm_after", False),
        ("scale_logits", False),
    ):
        options.require(name, only, only)
    if options.options.get("bias_for_layer_norm") is not None:
        options.require("bias_for_layer_norm", False, False)
    options.known.add("bias_for_layer_norm")

    width, heads = _width_and_heads(options, "d_model", "n_heads")
    fused = options.get("mlp_hidden_size", int, options.get("mlp_ratio", int, 4) * width)
    if fused % 2:
        raise ValueError(f"config option `mlp_hidden_size` must be even (up and gate in one matrix), got {fused}.")
    key_value_heads = 1 if options.get("multi_query_attention", bool, False) else heads
    vocab_size = options.get("vocab_size", int)
    rows = vocab_size if "embedding_size" in options.options else _OLMO_EMBEDDING_SIZE
    return {
        "vocab_size": options.get("embedding_size", int, rows),
        "hidden_size": width,
        "intermediate_size": fused // 2,
        "num_hidden_layers": options.get("n_layers", int),
        "num_attention_heads": heads,
        "num_key_value_heads": options.get("n_kv_heads", int, key_value_heads),
        "head_dim": width // heads,
        "max_position_embeddings": options.get("max_sequence_length", int, 1024),
        "rms_norm_eps": options.get("layer_norm_eps", (int, float), 1e-5),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": float(options.get("rope_theta", (int, float), 10_000)),
        },
        "dropout": options.get("residual_dropout", (int, float), 0.1),
        "attention_dropout": options.get("attention_dropout", (int, float), 0.1),
        "tie_word_embeddings": options.get("weight_tying", bool, True),
        "eos_token_id": options.get("eos_token_id", int),
        "pad_token_id": options.get("pad_token_id", int),
        **dict.fromkeys(RANKS),
        "projection_bias": False,
        "gated_residual": False,
    }


def _fanformer_configuration(options: PublishedOptions, weights: PublishedWeights) -> FANformerConfig:
    # The published 1B configuration leaves out use_ATF, and p_ratio, whose published default changed over time: the
    # weights know both.
    bias = weights.tensors.get("transformer.blocks.0.att_proj.fanlayer.input_linear.bias")
    options.require("use_ATF", True, bias is not None)
    fields = _olmo_fields(options)
    width = fields["hidden_size"]
    periodic = 0 if bias is None else width - bias.shape[0]
    ratio = periodic / width
    if int(ratio * width) != periodic:
        ratio = math.nextafter(ratio, 1.0)
    ratio = options.get("p_ratio", (int, float), ratio)
    return FANformerConfig(
        fan_placement="layer", fan_ratio=ratio, fan_multiple=1, norm_placement="pre", qkv_norm="none", **fields
    )


def _hybridnorm_configuration(options: PublishedOptions, weights: PublishedWeights) -> FANformerConfig:
    for name in ("use_query_norm", "use_key_norm", "use_value_norm", "ffn_norm", "ffn_residual_after_norm"):
        options.require(name, True, None)
    for name in ("attn_norm", "attn_residual_after_norm"):
        options.require(name, False, None)
    options.require("attention_layer_norm_with_affine", True, True)
    options.require("norm_pos_special_config", None, None)
    fields = _olmo_fields(options)
    return FANformerConfig(fan_placement="none", norm_placement="hybrid", qkv_norm="qkv", **fields)


def _cola_configuration(options: PublishedOptions, weights: PublishedWeights) -> FANformerConfig:
    for name, only in (
        ("attention_bias", False),
        ("mlp_bias", False),
        ("pretraining_tp", 1),
        ("rope_scaling", None),
    ):
        options.require(name, only, only)
    width, heads = _width_and_heads(options, "hidden_size", "num_attention_heads")
    activation = options.get("hidden_act", str, "silu")
    between = options.get("lr_act_type", str, activation)
    only_low_rank = options.get("only_lr_act", bool, True)
    fields = {name: options.get(name, int) for name in ("vocab_size", "intermediate_size", "num_hidden_layers")}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        options.known.add(name)
        fields[name] = options.options.get(name)
    return FANformerConfig(
        hidden_size=width,
        num_attention_heads=heads,
        num_key_value_heads=options.get("num_key_value_heads", int, heads),
        head_dim=options.get("head_dim", int, width // heads),
        max_position_embeddings=options.get("max_sequence_length", int, 2048),
        rms_norm_eps=options.get("rms_norm_eps", (int, float), 1e-6),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": float(options.get("rope_theta", (int, float), 10_000)),
        },
        tie_word_embeddings=options.get("tie_word_embeddings", bool, False),
        attention_dropout=options.get("attention_dropout", (int, float), 0.0),
        dropout=0.0,
        **dict.fromkeys(RANKS, options.get("rank", int, width // 4)),
        cola_input="separate",
        cola_norm=False,
        cola_activation=between,
        writer_activation=between,
        hidden_act="linear" if only_low_rank else activation,
        fan_placement="none",
        projection_bias=False,
        norm_placement="pre",
        qkv_norm="none",
        gated_residual=False,
        **fields,
    )


def _olmo_state_dict(config: FANformerConfig, weights: PublishedWeights) -> StateDict:
    """Read both OLMo forms: which parameters there are follows from the configuration."""
    D, F, V, K = config.hidden_size, config.intermediate_size, config.vocab_size, config.head_dim  # noqa: N806
    query_width, key_value_width = config.num_attention_heads * K, config.num_key_value_heads * K
    state = {
        "model.embed_tokens.weight": weights.take("transformer.wte.weight", V, D),
        "model.norm.weight": weights.take("transformer.ln_f.weight", D),
    }
    tied = config.tie_word_embeddings
    state["lm_head.weight"] = (
        state["model.embed_tokens.weight"] if tied else weights.take("transformer.ff_out.weight", V, D)
    )
    for index in range(config.num_hidden_layers):
        theirs, ours = f"transformer.blocks.{index}.", f"model.layers.{index}."
        fused = theirs + "att_proj.weight"
        if config.fan_placement == "layer":
            rows = D - config.periodic_width(D)
            fan_layer = theirs + "att_proj.fanlayer.input_linear."
            state[ours + "self_attn.fan_layer.projection.weight"] = weights.take(fan_layer + "weight", rows, D)
            state[ours + "self_attn.fan_layer.projection.bias"] = weights.take(fan_layer + "bias", rows)
            state[ours + "input_layernorm.weight"] = weights.take(theirs + "attn_norm.weight", D)
            fused = theirs + "att_proj.linear.weight"
        q, k, v = weights.take(fused, query_width + 2 * key_value_width, D).split(
            (query_width, key_value_width, key_value_width)
        )
        for name, matrix in (("q", q), ("k", k), ("v", v)):
            state[f"{ours}self_attn.{name}_proj.weight"] = matrix
            if config.qkv_norm == "qkv":
                state[f"{ours}self_attn.{name}_norm.weight"] = weights.take(f"{theirs}{name}_norm.weight", K)
        state[ours + "self_attn.o_proj.weight"] = weights.take(theirs + "attn_out.weight", D, query_width)
        state[ours + "post_attention_layernorm.weight"] = weights.take(theirs + "ff_norm.weight", D)
        up, gate = weights.take(theirs + "ff_proj.weight", 2 * F, D).chunk(2)
        state[ours + "mlp.up_proj.weight"] = up
        state[ours + "mlp.gate_proj.weight"] = gate
        state[ours + "mlp.down_proj.weight"] = weights.take(theirs + "ff_out.weight", D, F)
    return state


def _cola_state_dict(config: FANformerConfig, weights: PublishedWeights) -> StateDict:
    D, F, V, K = config.hidden_size, config.intermediate_size, config.vocab_size, config.head_dim  # noqa: N806
    query_width, key_value_width = config.num_attention_heads * K, config.num_key_value_heads * K
    rank = config.qkv_rank  # the same for all layers
    assert rank is not None, "the format always has a rank"
    state = {"model.embed_tokens.weight": weights.take("model.embed_tokens.weight", V, D)}
    tied = config.tie_word_embeddings
    state["lm_head.weight"] = state["model.embed_tokens.weight"] if tied else weights.take("lm_head.weight", V, D)
    state["model.norm.weight"] = weights.take("model.norm.weight", D)

    def first_factor(name: str, in_features: int) -> Tensor:
        return weights.take(name + ".cola_a", in_features, rank).T

    def second_factor(name: str, out_features: int) -> Tensor:
        return weights.take(name + ".cola_b", rank, out_features).T

    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}."
        attention, mlp = layer + "self_attn.", layer + "mlp."
        for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            state[layer + name] = weights.take(layer + name, D)
        state[attention + "qkv_input.factor.weight"] = torch.cat(
            [first_factor(attention + name, D) for name in ("q_proj", "k_proj", "v_proj")]
        )
        for name, out_features in (("q_proj", query_width), ("k_proj", key_value_width), ("v_proj", key_value_width)):
            state[f"{attention}{name}.weight"] = second_factor(attention + name, out_features)
        state[mlp + "gate_up_input.factor.weight"] = torch.cat(
            [first_factor(mlp + name, D) for name in ("gate_proj", "up_proj")]
        )
        for name in ("gate_proj", "up_proj"):
            state[f"{mlp}{name}.weight"] = second_factor(mlp + name, F)
        for name, in_features in ((attention + "o_proj", query_width), (mlp + "down_proj", F)):
            state[f"{name}.input.factor.weight"] = first_factor(name, in_features)
            state[f"{name}.output.weight"] = second_factor(name, D)
    return state


PUBLISHED_FORMATS = {
    "fanformer-olmo": PublishedFormat(_fanformer_configuration, _olmo_state_dict, _OLMO_IGNORED_OPTIONS, "model."),
    "cola": PublishedFormat(_cola_configuration, _cola_state_dict, _COLA_IGNORED_OPTIONS),
    "hybridnorm-olmo": PublishedFormat(_hybridnorm_configuration, _olmo_state_dict, _OLMO_IGNORED_OPTIONS, "model."),
}


def convert(weights: Path, config: Path, published_format: str) -> FANformerForCausalLM:
    """Build our model from a published implementation's weights and configuration; it gives the same logits.

    Args:
        weights: safetensors file with the authors' parameter names.
        config: JSON file with the authors' option names.
        published_format: a key of `PUBLISHED_FORMATS`.

    Returns:
        The model in evaluation mode, in the dtype of the file.

    Raises:
        ValueError: if the format is unknown, a file cannot be read, an option or its value is not one that is
            converted, or the parameters do not fit the options.
    """
    if published_format not in PUBLISHED_FORMATS:
        near = _nearest(published_format, PUBLISHED_FORMATS)
        raise ValueError(f"`format` must be a published format, got `{published_format}`: {near}")
    form = PUBLISHED_FORMATS[published_format]
    tensors = PublishedWeights(Path(weights), form.prefix)
    options = PublishedOptions(Path(config), form.ignored_options)
    try:
        ours = form.configuration(options, tensors)
    except StrictDataclassError as error:
        raise ValueError(f"the options do not make a model: {' '.join(str(error).split())}") from error
    options.check_all_known()
    state = form.state_dict(ours, tensors)
    tensors.check_all_taken()
    model = FANformerForCausalLM._from_config(ours, dtype=tensors.dtype)
    model.load_state_dict(state)  # strict: every parameter of ours is set
    return model.eval()


def _nearest(got: str, valid: Iterable[str]) -> str:
    names = sorted(valid)
    near = difflib.get_close_matches(got, names, n=1, cutoff=0.6)
    return f"did you mean `{near[0]}`?" if near else f"expected one of: {', '.join(names)}."
