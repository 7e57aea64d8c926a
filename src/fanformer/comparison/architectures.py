"""Architectures by name: FANformer in any configuration, and what it is compared with, at any size.

An architecture is written `NAME[@SIZE][:FIELD=VALUE,...]`: `fanformer@2m`, `llama@nano`,
`fanformer@1m:fan_ratio=0.25,qkv_rank=16`, or the path of a model folder or config.json of any causal language model.
SIZE counts parameters without embedding and head (`2m`, `500k`), or names an architecture whose count is taken over
(`llama@fanformer`; a name that is a count, such as `92m`, is the count).
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers import initialization as init

from fanformer.comparison.fitting import SIZE_TOLERANCE, Family, fitted
from fanformer.errors import ConfigError, FANformerError, did_you_mean, refuse_unknown
from fanformer.loading import load_config
from fanformer.model import FANformerConfig, FANformerForCausalLM
from fanformer.model.configuration_fanformer import RANKS
from fanformer.model.footprint import Footprint, footprint
from fanformer.training.configuration import load_preset, parse_count, preset_names
from fanformer.training.depth import OF_DEPTH
from fanformer.training.folder import fingerprint

_FULL_RANK = dict.fromkeys(RANKS)
_PLAIN = {
    "fan_placement": "none",
    "projection_bias": False,
    "norm_placement": "pre",
    "qkv_norm": "none",
    "gated_residual": False,
}
SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
}
"""Fields of LlamaConfig of HuggingFaceTB/SmolLM2-135M, the model that ours is measured against."""
_DEFAULT = FANformerConfig()
_WIDTH_STEP = 32
_LARGE = 8_000_000
"""Parameters without embeddings from which heads are 64 wide, else 32."""
_DEPTH_ANCHOR = (6, 2_000_000)
"""Layers at a size; depth grows as its cube root, as width then does too."""
_USUAL = 0.5
"""How far, as a share, FFN or ranks may be from their usual size before finer steps of them are looked at."""


def _like_smollm2(config_type: type[PreTrainedConfig], fields: Mapping[str, Any], ranks: Mapping[str, float]) -> Family:
    return Family(config_type, fields, SMOLLM2_135M, ffn_ratio=8 / 3, key_value_share=3, ranks=ranks)


FAMILIES: dict[str, Family] = {
    # the default: FAN in Q, K and V, all seven layers low-rank, HybridNorm*, gates
    "fanformer": Family(
        FANformerConfig,
        {"dropout": 0.0},
        {},
        _DEFAULT.intermediate_size / _DEFAULT.hidden_size,
        2,
        "llama",
        {name: getattr(_DEFAULT, name) / _DEFAULT.hidden_size for name in RANKS},
        ranks_fit=True,
        recipe={"muon_factor_scale": load_preset("nano").run["muon_factor_scale"]},
        block=6,
    ),
    # the block of 92m-tuned: FAN between the factors of gate and up, O and down full rank
    "fanformer-tuned": Family(
        FANformerConfig,
        {"dropout": 0.0, "fan_placement": "ffn", "fan_multiple": 1, "o_rank": None, "down_rank": None},
        load_preset("92m-tuned").model,
        8 / 3,
        2,
        "llama",
        {"qkv_rank": 0.75, "gate_up_rank": 0.75},
        block=3,  # the default's when it was the default
    ),
    # arXiv:2502.21309: one full-rank FANLayer' before Q, K, V; pre-norm
    "fanformer-paper": Family(
        FANformerConfig,
        {**_PLAIN, **_FULL_RANK, "dropout": 0.0, "fan_placement": "layer", "fan_ratio": 0.25, "fan_multiple": 1},
        load_preset("1b").model,
        4.0,
        1,
    ),
    # HF Llama, SmolLM2-135M's shape; the same with QK-norm: HF Qwen3
    "llama": _like_smollm2(LlamaConfig, {}, {}),
    "llama-qk-norm": _like_smollm2(Qwen3Config, {}, {}),
    # the same with CoLA linears of rank D / 4 (arXiv:2502.10940)
    "cola-llama": _like_smollm2(
        FANformerConfig,
        {**_PLAIN, "dropout": 0.0, "cola_input": "separate", "cola_norm": False, "writer_activation": "silu"},
        dict.fromkeys(RANKS, 0.25),
    ),
    # the same with HybridNorm* (arXiv:2503.04598)
    "hybridnorm-llama": _like_smollm2(
        FANformerConfig,
        {**_PLAIN, **_FULL_RANK, "dropout": 0.0, "norm_placement": "hybrid-star", "qkv_norm": "qkv"},
        {},
    ),
}


@dataclass(frozen=True)
class Architecture:
    """An architecture that was asked for.

    Attributes:
        spec: how it was written.
        family: its name in FAMILIES, the name of a preset, or "file".
        fields: of its configuration, without what the data decide (vocabulary, special tokens).
        config_type: its configuration class.
        initialisation: "scaled" (see `initialise_scaled`), "library" (the class's own), or "own" for FANformer classes.
    """

    spec: str
    family: str
    fields: Mapping[str, Any] = field(hash=False)
    config_type: type[PreTrainedConfig]
    initialisation: str

    def config(self, needed: Mapping[str, Any] | None = None) -> PreTrainedConfig:
        """Return the configuration.

        Args:
            needed: fields that the data decide: `vocab_size`, `max_position_embeddings`, special tokens.
        """
        return self.config_type(**{**self.fields, **(needed or {})})

    def build(self, needed: Mapping[str, Any]) -> PreTrainedModel:
        """Return the model with fresh weights; arguments as in `config`."""
        config = self.config(needed)
        if isinstance(config, FANformerConfig):
            return FANformerForCausalLM(config)
        kinds = {LlamaConfig: LlamaForCausalLM, Qwen3Config: Qwen3ForCausalLM}
        model: PreTrainedModel = (
            kinds[self.config_type](config)
            if self.config_type in kinds
            else AutoModelForCausalLM.from_config(config, dtype="float32")
        )
        if self.initialisation == "scaled":
            initialise_scaled(model)
        return model

    def count(self, needed: Mapping[str, Any] | None = None) -> Footprint:
        """Return parameters and operations per token; arguments as in `config`."""
        return footprint(self.config(needed))

    @property
    def block(self) -> int:
        """The number of what its family builds; 1 where a file or another library chooses fields or initialisation."""
        return 1 if self._named is None else self._named.block

    @property
    def digest(self) -> str:
        """A hash of what its file says, which may change under the same path; empty where it is read from none."""
        if self.family != "file":
            return ""
        fields = {name: value for name, value in self.fields.items() if name != "transformers_version"}
        return fingerprint([self.config_type.__name__, fields])

    @property
    def is_recurrent(self) -> bool:
        """Whether it has a recurrent depth."""
        return getattr(self.config(), "recurrence", None) is not None

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The fields of RunConfig that its family, or of a recurrent depth its preset, sets beside the comparison's."""
        own = load_preset(self.family).run if self.is_recurrent and self.family in preset_names() else {}
        depth = {name: own[name] for name in OF_DEPTH if name in own}
        return depth if self._named is None else {**self._named.recipe, **depth}

    def applying(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return those of a comparison's fields of RunConfig that have an effect on this architecture."""
        return {name: value for name, value in settings.items() if self.is_recurrent or name not in OF_DEPTH}

    @property
    def _named(self) -> Family | None:
        if self.family == "file" or self.initialisation == "library":
            return None
        name = "fanformer-tuned" if self.family == "92m-tuned" else self.family
        return FAMILIES.get(name, FAMILIES["fanformer"])  # the other presets are of the default block


def initialise_scaled(model: PreTrainedModel) -> None:
    """Give a Llama the initialisation that serves it best of those tried (docs/experiments.md).

    Matrices get standard deviation 1 / sqrt(inputs), those that end a branch are 0, the head gets 0.01, an untied
    embedding 1; a tied one 1 / sqrt(D), as SmolLM2's.
    """
    config = model.config
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            std = config.hidden_size**-0.5 if config.tie_word_embeddings else 1.0
            init.normal_(module.weight, std=std)
        elif name == "lm_head":
            if not config.tie_word_embeddings:
                init.normal_(module.weight, std=0.01)
        elif isinstance(module, nn.Linear):
            ends_branch = name.endswith(("o_proj", "down_proj"))
            init.normal_(module.weight, std=0.0 if ends_branch else module.in_features**-0.5)


def family_and_size(spec: str) -> tuple[str, str]:
    """Split an architecture into what it is and its size, "" where it names none."""
    head, colon, fields = spec.partition(":")
    name, _, size = head.partition("@")
    return name + colon + fields, size


def architecture(spec: str) -> Architecture:
    """Return the architecture that `spec` names, its shape chosen where a size is given.

    Raises:
        CheckpointError: if it names a file that holds none.
        ConfigError: if the name, a field or the size is wrong; the nearest name is offered.
    """
    try:
        return _architecture(spec)
    except FANformerError:
        raise
    # of the configuration's own checks, values of a wrong type, and sizes below 1, for which torch has no tensor
    except (StrictDataclassError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        reason = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
        raise ConfigError(f"architecture {spec!r} cannot be built: {' '.join(str(reason).split())}") from error


def _architecture(spec: str) -> Architecture:
    head, colon, settings = spec.partition(":")
    if Path(head).exists() or "/" in head:
        if colon:
            raise ConfigError(f"an architecture read from a file takes no fields, got {spec!r}: edit its config.json.")
        path = Path(head)
        config = load_config(path.parent if path.name == "config.json" else path)
        return Architecture(spec, "file", config.to_dict(), type(config), "own")
    name, at, size = head.partition("@")
    given = _parse_fields(spec, settings) if colon else {}
    choice = given.pop("initialisation", None)
    if name in preset_names():
        if at:
            raise ConfigError(f"preset {name} has its size, got {spec!r}: use fanformer@{size}.")
        family, fields = FAMILIES["fanformer"], {"dropout": 0.0, **load_preset(name).model}
    elif name in FAMILIES:
        family = FAMILIES[name]
        fields = dict(family.fields)
        if not at:
            fields = {**family.shape, **fields}
    else:
        raise ConfigError(f"no architecture {name!r}: {did_you_mean(name, [*FAMILIES, *preset_names()])}")
    refuse_unknown(given, family.config_type.__dataclass_fields__, f"a field of {name}")
    fields |= given
    if at:
        fields |= _shape(name, _parse_size(spec, size), _frozen(fields))
    elif family.shape and name in FAMILIES:
        fields |= family.ranks_at(fields)
    own = issubclass(family.config_type, FANformerConfig)
    if choice is not None and (own or choice not in ("scaled", "library")):
        expected = "no choice: FANformer classes have their own" if own else "scaled or library"
        raise ConfigError(f"`initialisation` of {name} must be {expected}, got {choice!r}.")
    made = Architecture(spec, name, fields, family.config_type, "own" if own else choice or "scaled")
    made.config()  # refuses what does not fit together
    return made


def _parse_fields(spec: str, settings: str) -> dict[str, Any]:
    fields = {}
    for part in settings.split(","):
        key, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(f"a field of an architecture must be NAME=VALUE, got {part!r} in {spec!r}.")
        try:
            fields[key.strip()] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError) as error:  # ValueError: of a date that does not exist
            raise ConfigError(
                f"the value of `{key.strip()}` must be YAML without a comma, got {value!r} in {spec!r}: write a "
                "config.json and name its folder for what needs more."
            ) from error
    return fields


def _parse_size(spec: str, text: str) -> int:
    """Return the parameters without embeddings that a size asks for."""
    if re.fullmatch(r"[\d._]+[kKmMbB]?", text):
        size = parse_count(text)
        if size < 20_000:
            raise ConfigError(f"the size of an architecture must be at least 20k parameters, got {text!r} in {spec!r}.")
        return size
    if "@" in text or text not in (*FAMILIES, *preset_names()):
        names = did_you_mean(text, [*FAMILIES, *preset_names()])
        raise ConfigError(f"a size must be a count such as 2m, or the name of an architecture, got {text!r}: {names}")
    return without_embeddings(architecture(text).config())


def without_embeddings(config: PreTrainedConfig) -> int:
    """Return the parameters of a model of `config` without embedding and head."""
    return footprint(config).without_embeddings


def _frozen(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, sort_keys=True)


@lru_cache(maxsize=256)
def _shape(name: str, size: int, frozen_fields: str) -> dict[str, Any]:
    """Return the fields that give `name` its size: depth by the cube root, then width, FFN or ranks as is usual.

    Fields that were given stay as they are.

    Raises:
        ConfigError: if no shape comes within a hundredth of the size.
    """
    family, fields = FAMILIES[name], json.loads(frozen_fields)
    layers_then, size_then = _DEPTH_ANCHOR
    layers = fields.get("num_hidden_layers") or max(2, round(layers_then * (size / size_then) ** (1 / 3)))
    head_dim = fields.get("head_dim") or (64 if size >= _LARGE else 32)
    step = max(_WIDTH_STEP, head_dim)
    widths: Sequence[int] = [fields["hidden_size"]] if "hidden_size" in fields else range(step, 4096, step)
    if family.width_of and "hidden_size" not in fields:
        theirs = _shape(family.width_of, size, _frozen(FAMILIES[family.width_of].fields))["hidden_size"]
        try:
            return _shape(name, size, _frozen({**fields, "hidden_size": theirs}))
        except ConfigError:
            pass  # the parts that were asked for leave no room for an FFN at that width
    best: tuple[float, dict[str, Any]] | None = None
    for finer in (False, True):
        for width in widths:
            heads = fields.get("num_attention_heads") or max(1, width // head_dim)
            key_value_heads = fields.get("num_key_value_heads") or _key_value_heads(heads, family)
            if heads > 2 * family.key_value_share * key_value_heads:
                continue  # a number of heads with few divisors
            shape: dict[str, Any] = {
                "num_hidden_layers": layers,
                "hidden_size": width,
                "head_dim": head_dim,
                "num_attention_heads": heads,
                "num_key_value_heads": key_value_heads,
                "tie_word_embeddings": fields.get("tie_word_embeddings", False),
            }
            found = fitted(family, {**fields, **shape}, size, finer)
            if math.isinf(found.share):
                continue
            if found.share == 0:
                break
            shape |= found.fields
            count = without_embeddings(family.config_type(**{**fields, **shape}))
            distance = abs(found.share - 1)
            if abs(count / size - 1) <= SIZE_TOLERANCE and (best is None or distance < best[0]):
                best = (distance, shape)
            if best is not None and found.share < 1:
                break  # the wider, the smaller the share: from here on it only goes away from the usual one
        if best is not None and best[0] < _USUAL:
            break
    if best is None:
        raise ConfigError(f"no shape of {name} has {size:,} parameters without embeddings: give fewer fields.")
    return best[1]


def _key_value_heads(heads: int, family: Family) -> int:
    most = max(1, heads // family.key_value_share)
    return max(count for count in range(1, most + 1) if heads % count == 0)
