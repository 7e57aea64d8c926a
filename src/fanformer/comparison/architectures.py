"""Architectures by name: FANformer in any configuration, and what it is compared with, at any size.

An architecture is written `NAME[@SIZE][:FIELD=VALUE,...]`: `fanformer@2m`, `llama@nano`,
`fanformer@1m:fan_ratio=0.25,qkv_rank=16`, or the path of a model folder or config.json of any causal language model.
SIZE counts parameters without embedding and head (`2m`, `500k`), or names an architecture whose count is taken over
(`llama@fanformer`; a name that is a count, such as `92m`, is the count).
"""

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml
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

from fanformer.errors import ConfigError, did_you_mean, refuse_unknown
from fanformer.loading import load_config
from fanformer.model import FANformerConfig, FANformerForCausalLM
from fanformer.model.configuration_fanformer import RANKS
from fanformer.model.footprint import Footprint, footprint
from fanformer.training.configuration import load_preset, parse_count, preset_names
from fanformer.training.depth import OF_DEPTH

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
_FFN_STEPS = (8, 2)
"""Multiples of intermediate_size: the second where the first is too coarse to meet a small size."""
_RANK_STEPS = {True: (32, 16), False: (16, 8)}
"""The same for ranks, from a width of 256 on and below."""
_RANK_WIDTH = 256
_LARGE = 8_000_000
"""Parameters without embeddings from which heads are 64 wide, else 32."""
_DEPTH_ANCHOR = (6, 2_000_000)
"""Layers at a size; depth grows as its cube root, as width then does too."""
_SIZE_TOLERANCE = 0.01
_USUAL = 0.5
"""How far, as a share, FFN or ranks may be from their usual size before finer steps of them are looked at."""
_MOST = 2.0
"""Largest share of the usual ranks that is looked at."""


@dataclass(frozen=True)
class Family:
    """A kind of architecture.

    Attributes:
        config_type: its configuration class.
        fields: that make it what it is, on top of the class's defaults.
        shape: of the published model; what a name without SIZE gives.
        ffn_ratio: intermediate_size over hidden_size that scaled shapes keep near to.
        key_value_share: query heads for each key-value head in scaled shapes, at least.
        width_of: family whose hidden_size scaled shapes take over where it fits, so that embeddings are equal too.
        ranks: fields that hold a rank, with its share of hidden_size in scaled shapes.
        ranks_fit: whether it is the ranks that make up a size, intermediate_size being `ffn_ratio` times the width, or
            intermediate_size, the ranks being their shares of the width.
        recipe: fields of RunConfig with which it learns language, where they are not the preset's.
        block: number of what is built; raised with every change of its defaults or of its initialisation. Trainings of
            another number are not taken for those of this one; docs/experiments.md says what each number was.
    """

    config_type: type[PreTrainedConfig]
    fields: Mapping[str, Any]
    shape: Mapping[str, Any]
    ffn_ratio: float
    key_value_share: int
    width_of: str | None = None
    ranks: Mapping[str, float] = field(default_factory=dict)
    ranks_fit: bool = False
    recipe: Mapping[str, Any] = field(default_factory=dict)
    block: int = 2

    def ranks_at(self, fields: Mapping[str, Any]) -> dict[str, int]:
        """Return the ranks at a width, without those that are given."""
        given = self.ranks.keys() & fields.keys()
        return {name: max(1, int(self.ranks[name] * fields["hidden_size"])) for name in self.ranks if name not in given}


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
        ConfigError: if the name, a field or the size is wrong; the nearest name is offered.
    """
    head, colon, settings = spec.partition(":")
    if Path(head).exists() or "/" in head:
        if colon:
            raise ConfigError(f"an architecture read from a file takes no fields, got {spec!r}: edit its config.json.")
        config = load_config(head)
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
        fields[key.strip()] = yaml.safe_load(value)
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
            found = _fitted(family, {**fields, **shape}, size, finer)
            if math.isinf(found.share):
                continue
            if found.share == 0:
                break
            shape |= found.fields
            count = without_embeddings(family.config_type(**{**fields, **shape}))
            distance = abs(found.share - 1)
            if abs(count / size - 1) <= _SIZE_TOLERANCE and (best is None or distance < best[0]):
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


class _Fitted(NamedTuple):
    """Fields that bring a shape to a size.

    Attributes:
        fields: their values.
        share: of what is usual; infinite where even the most is too small, 0 where even the least is too large.
    """

    fields: dict[str, int]
    share: float


_TOO_SMALL, _TOO_LARGE = _Fitted({}, float("inf")), _Fitted({}, 0.0)


def _fitted(family: Family, fields: dict[str, Any], size: int, finer: bool) -> _Fitted:
    """Return intermediate_size and ranks that are not given, so that the size is met as nearly as may be."""
    width = fields["hidden_size"]
    free = {name: share * width for name, share in family.ranks.items() if name not in fields}
    if family.ranks_fit and free:
        ffn = {} if "intermediate_size" in fields else {"intermediate_size": round(family.ffn_ratio * width)}
        found = _fitting_ranks(family, {**fields, **ffn}, size, _RANK_STEPS[width >= _RANK_WIDTH][finer], free)
        return found._replace(fields={**found.fields, **ffn})
    ranks = family.ranks_at(fields)
    if "intermediate_size" in fields:
        return _Fitted(ranks, fields["intermediate_size"] / width / family.ffn_ratio)
    wide = _fitting_ffn(family, {**fields, **ranks}, size, _FFN_STEPS[finer])
    if not wide:
        return _TOO_SMALL if wide is None else _TOO_LARGE
    return _Fitted({**ranks, "intermediate_size": wide}, wide / width / family.ffn_ratio)


def _fitting_ranks(family: Family, fields: dict[str, Any], size: int, step: int, usual: Mapping[str, float]) -> _Fitted:
    """Return multiples of `step` near one and the same share of the `usual` ranks that come near to the size."""

    def count(ranks: Mapping[str, int]) -> int:
        return without_embeddings(family.config_type(**{**fields, **ranks}))

    least = dict.fromkeys(usual, step)
    base = count(least)
    costs = {name: count({**least, name: 2 * step}) - base for name in usual}  # every step costs the same

    def total(steps: Mapping[str, int]) -> int:
        return base + sum((steps[name] - 1) * cost for name, cost in costs.items())

    def at(share: float) -> dict[str, int]:
        return {name: max(1, round(share * rank / step)) for name, rank in usual.items()}

    if base > (1 + _SIZE_TOLERANCE) * size:
        return _TOO_LARGE
    if total(at(_MOST)) < (1 - _SIZE_TOLERANCE) * size:
        return _TOO_SMALL
    shares = [_MOST * part / 128 for part in range(1, 129)]
    share = min(shares, key=lambda candidate: abs(total(at(candidate)) - size))
    middle, wanted = at(share), {name: share * rank / step for name, rank in usual.items()}
    beside = [
        dict(zip(usual, steps, strict=True))
        for steps in itertools.product(*([max(1, n - 1), n, n + 1] for n in middle.values()))
    ]

    def misfit(steps: Mapping[str, int]) -> tuple[float, float]:
        off = abs(total(steps) / size - 1)
        return max(0.0, off - 0.75 * _SIZE_TOLERANCE), sum(abs(steps[name] / wanted[name] - 1) for name in usual)

    best = min(beside, key=misfit)
    return _Fitted({name: n * step for name, n in best.items()}, sum(best.values()) * step / sum(usual.values()))


def _fitting_ffn(family: Family, fields: dict[str, Any], size: int, step: int) -> int | None:
    """Return the intermediate_size, a multiple of `step`, that comes nearest to the size.

    None where even the largest is too small; 0 where the blocks are too large without an FFN.
    """
    counted: dict[int, int] = {}

    def count(steps: int) -> int:
        if steps not in counted:
            config = family.config_type(**{**fields, "intermediate_size": steps * step})
            counted[steps] = without_embeddings(config)
        return counted[steps]

    low, high = 1, 8 * fields["hidden_size"] // step
    if count(low) > size:
        return 0
    if count(high) < (1 - _SIZE_TOLERANCE) * size:
        return None
    while high - low > 1:
        # nearly a straight line: where it meets the size, but never an end again
        guess = low + round((high - low) * (size - count(low)) / (count(high) - count(low)))
        middle = min(max(guess, low + 1), high - 1)
        low, high = (middle, high) if count(middle) <= size else (low, middle)
        if high - low > 1:  # the other end stays far off where the line bends
            beside = min(low + 1, high - 1) if low == middle else max(high - 1, low + 1)
            low, high = (beside, high) if count(beside) <= size else (low, beside)
    nearest = min((low, high), key=lambda steps: abs(count(steps) - size))
    return nearest * step
