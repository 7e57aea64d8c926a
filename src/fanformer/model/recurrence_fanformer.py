"""Recurrent depth: the core of a FANformer run r times on a latent state, each step with a cache of its own.

h_1 = core(e), h_s = core(bridge(h_{s-1}, e)) for s = 2 ... r, e the prelude's output; the coda reads h_r. So r = 1 is
the plain model. Sources: arXiv:2502.05171 (Huginn); arXiv:2511.07384 (retrofits); the bridge's start is ours.
"""

import copy
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_fanformer import FANformerConfig, Recurrence

Run = Callable[[range, Tensor, Any], Tensor]
"""Runs the blocks of these indices over (B, T, D), with what stands for the cache; returns (B, T, D)."""
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What `transformers` calls a cache of keys and values, in calls and in outputs: `past_key_values` before 5.24."""


def takes_cache(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Let a method that takes `past_key_values` take it as `cache` as well; it raises ValueError where given both."""

    @functools.wraps(forward)
    def by_either_name(self: nn.Module, *args: Any, cache: Cache | None = None, **kwargs: Any) -> Any:
        if cache is not None:
            if kwargs.get("past_key_values") is not None:
                raise ValueError("one of `cache` and `past_key_values` must be given, got both: they are the same.")
            kwargs["past_key_values"] = cache
        return forward(self, *args, **kwargs)

    takes = inspect.signature(forward)
    *named, others = takes.parameters.values()
    assert others.kind is inspect.Parameter.VAR_KEYWORD, "what goes down to the attention backend comes last"
    either = inspect.Parameter("cache", inspect.Parameter.KEYWORD_ONLY, default=None)
    # `generate` refuses keywords that it does not find there
    by_either_name.__signature__ = takes.replace(parameters=[*named, either, others])  # type: ignore[attr-defined]
    return by_either_name


class Depth(NamedTuple):
    """How deep a model with a recurrent depth thinks."""

    num_steps: int | Tensor
    """r, or (B,) int64 with that of every row."""
    exit_threshold: float | None = None
    """A token takes no further step once a step changed its state by less than this share; None takes all."""
    last_step_cache: bool = False
    """Keep keys and values of the last step only: less memory, and another function after the first call."""

    def check_engine(self, options: Mapping[str, Any], recomputes: bool) -> None:
        """Refuse what would drop or overwrite keys and values of a step: then it would be another function.

        Args:
            options: what an engine gives the decoder beside its usual arguments; vLLM and SGLang their layers.
            recomputes: whether blocks keep their inputs alone for the backward pass, for which they go without a cache.

        Raises:
            ValueError: if an engine has one layer of keys and values a block, or blocks recompute under a threshold.
        """
        if "attention_instances" in options and self.largest > 1:
            raise ValueError(
                f"`num_steps` must be 1 in an engine with one layer of keys and values a block, got {self.largest}, "
                "each step with keys and values of its own: `fanformer serve` runs such a model."
            )
        if recomputes and self.exit_threshold is not None:
            raise ValueError(
                f"`exit_threshold` must be None in training with gradient checkpointing, got {self.exit_threshold}: "
                "leave one of them out."
            )

    @property
    def largest(self) -> int:
        """The most steps of any row."""
        return int(self.num_steps.max()) if isinstance(self.num_steps, Tensor) else self.num_steps

    @property
    def is_adaptive(self) -> bool:
        """Whether tokens may take different numbers of steps."""
        return self.exit_threshold is not None or isinstance(self.num_steps, Tensor)

    @classmethod
    def default(cls, config: FANformerConfig) -> "Depth":
        """Return that of a call that names none: the mean that a model is trained with, 1 for a plain one."""
        return cls(1 if config.recurrence is None else config.recurrence.mean_steps)

    def changed(
        self,
        config: FANformerConfig,
        num_steps: int | Tensor | None = None,
        exit_threshold: float | None = None,
        last_step_cache: bool | None = None,
    ) -> "Depth":
        """Return this depth with what is not None in place of its own.

        Args:
            config: of the model that is to think so.
            num_steps: r, or (B,) int64.
            exit_threshold: as the field.
            last_step_cache: as the field.

        Raises:
            ValueError: if the model has no recurrence, the steps are out of range, or the threshold is not above 0.
        """
        given = {"num_steps": num_steps, "exit_threshold": exit_threshold, "last_step_cache": last_step_cache}
        given = {name: value for name, value in given.items() if value is not None}
        recurrence = config.recurrence
        if recurrence is None:
            if given:
                raise ValueError(
                    f"`{min(given)}` needs a model with recurrent depth, got {given[min(given)]} for one whose blocks "
                    "run once: leave it out, or train one with a `-recurrent` preset."
                )
            return self
        depth = self._replace(**given)  # type: ignore[arg-type]
        steps, threshold = depth.num_steps, depth.exit_threshold
        fewest, most = (int(steps.min()), int(steps.max())) if isinstance(steps, Tensor) else (steps, steps)
        if not 1 <= fewest <= most <= recurrence.largest_steps:
            raise ValueError(
                f"`num_steps` must be in [1, {recurrence.largest_steps}], got {fewest if fewest < 1 else most}: "
                "the model's configuration says how large it may be."
            )
        if threshold is not None and not 0 < threshold < math.inf:
            raise ValueError(f"`exit_threshold` must be above 0, got {threshold}: it is a relative change of a state.")
        return depth


class Writer(GenerationMixin):
    """`generate` and what belongs to it; what a recurrent depth cannot do is refused."""

    @classmethod
    def can_generate(cls) -> bool:
        """Whether it has `generate`: transformers looks for GenerationMixin among a model's own bases, else here."""
        return True

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Return what `generate_batch` works with; arguments as in `transformers`.

        Raises:
            ValueError: if the model has a recurrent depth.
        """
        if self.config.recurrence is not None:
            raise ValueError(
                "`generate_batch` pages one layer of keys and values a block, got a model with recurrent depth, which "
                "needs one a step: use `generate`."
            )
        return super().init_continuous_batching(*args, **kwargs)


@dataclass
class FANformerModelOutput(BaseModelOutputWithPast):
    """What the decoder returns; `steps` (B, T) int64 is how many each token took, None where all took the same."""

    steps: Tensor | None = None


@dataclass
class FANformerCausalLMOutput(CausalLMOutputWithPast):
    """What the language model returns; `steps` as in FANformerModelOutput."""

    steps: Tensor | None = None


class FANformerBridge(nn.Module):
    """What the core reads from its second step on: a h + Norm(e) ("mix"; "add" has a = 1) or W [h, Norm(e)] ("concat").

    All are h at initialisation: a = 1 and the norm's weight 0, or W = [1, 0].
    """

    def __init__(self, config: FANformerConfig) -> None:
        super().__init__()
        assert config.recurrence is not None, "a plain model has no bridge"
        self.recurrence = config.recurrence
        self.eps = config.rms_norm_eps
        width, kind = config.hidden_size, self.recurrence.bridge
        # a parameter of its own, not a norm's: transformers initialises only modules that lack some of their own
        self.norm_weight = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.ones(width)) if kind == "mix" else None
        self.linear = nn.Linear(2 * width, width, bias=False) if kind == "concat" else None

    def forward(self, state: Tensor, e: Tensor) -> Tensor:
        """Join the state h and the prelude's output e, both (B, T, D), to (B, T, D)."""
        e = self.norm_weight * F.rms_norm(e, e.shape[-1:], eps=self.eps)
        if self.linear is not None:
            return self.linear(torch.cat((state, e), dim=-1))
        return (state if self.scale is None else self.scale * state) + e

    def initial_values(self) -> dict[str, Tensor]:
        """Return what each parameter starts at, by its name."""
        width = self.norm_weight.shape[0]
        ones, zeros = torch.ones(width), torch.zeros(width)
        if self.linear is not None:
            return {"norm_weight": ones, "linear.weight": torch.eye(width, 2 * width)}
        return {"norm_weight": zeros, **({} if self.scale is None else {"scale": ones})}


class StepCache:
    """The cache as the core's blocks see it in one step: layers of this step, and tokens at rest that keep theirs.

    Keys and values that a token had in its last step stand in those of all later ones, so that what others see of it
    does not depend on how long they think.
    """

    def __init__(self, cache: Cache | None, offset: int, replaces: bool) -> None:
        """Take the cache, by how much this step's layers lie behind the first step's, and whether they replace them."""
        self.cache, self.offset, self.replaces = cache, offset, replaces
        self.resting: Tensor | None = None  # (B, T, 1)
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.now: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values (B, G, T, K) of one block; return those of all positions, (B, G, S, K)."""
        if self.resting is not None and self.before:
            resting = self.resting[:, None]  # (B, 1, T, 1)
            old_key, old_value = self.before[layer_idx]
            key, value = torch.where(resting, old_key, key), torch.where(resting, old_value, value)
        self.now[layer_idx] = key, value
        if self.cache is None:
            return key, value
        if self.replaces:
            self.cache.layers[layer_idx].crop(-key.shape[2])
        return self.cache.update(key, value, layer_idx + self.offset)


def fit_cache(cache: Cache, recurrence: Recurrence, depth: Depth) -> None:
    """Give an empty cache a layer for every block that runs; a plain cache grows in place.

    Raises:
        ValueError: if it holds positions of another depth, or cannot forget the last tokens where that is needed.
    """
    wanted = recurrence.cache_layers(1 if depth.last_step_cache else depth.largest)
    if len(cache.layers) != wanted:
        if cache.get_seq_length() != 0:
            raise ValueError(
                f"the cache is of another depth, got {len(cache.layers)} layers, {depth.largest} steps need {wanted}: "
                "go on with the `num_steps` that it was begun with, or begin a new one."
            )
        first = cache.layers[0] if cache.layers else DynamicLayer()
        cache.layers = [copy.deepcopy(first) for _ in range(wanted)]
    if depth.last_step_cache and any(type(layer) is not DynamicLayer for layer in cache.layers):
        raise ValueError(
            f"`last_step_cache` needs a DynamicCache, got layers of {type(cache.layers[0]).__name__}: they cannot "
            "forget a step."
        )


def think(
    run: Run,
    bridge: FANformerBridge,
    x: Tensor,
    cache: Cache | None,
    depth: Depth,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run prelude, core and coda over embeddings.

    Args:
        run: runs blocks.
        bridge: of the model.
        x: (B, T, D).
        cache: that the blocks extend, or None.
        depth: how many steps, checked.
        mask: the attention mask; where it is (B, S), padding takes one step if tokens differ in theirs.

    Returns:
        The coda's output (B, T, D), and how many steps each token took, (B, T) int64, None where all took the same.

    Raises:
        ValueError: as `fit_cache`.
    """
    recurrence = bridge.recurrence
    if cache is not None:
        fit_cache(cache, recurrence, depth)
    e = run(recurrence.prelude, x, cache)
    if not depth.is_adaptive and not depth.last_step_cache:
        state = run(recurrence.core, e, cache)
        state = deepen(run, bridge, state, e, cache, range(2, depth.largest + 1))
        return run(recurrence.coda, state, cache), None
    resting = torch.zeros((*e.shape[:2], 1), dtype=torch.bool, device=e.device)
    if mask is not None and mask.dim() == 2:
        resting = ~mask[:, -e.shape[1] :, None].bool()
    state, steps = _think_adaptively(run, bridge, e, cache, depth, resting)
    return run(recurrence.coda, state, cache), steps if depth.is_adaptive else None


def deepen(run: Run, bridge: FANformerBridge, state: Tensor, e: Tensor, cache: Cache | None, steps: range) -> Tensor:
    """Take these steps of the core from the state before them; all tensors are (B, T, D), `e` the prelude's output."""
    for step in steps:
        seen = None if cache is None else StepCache(cache, _offset(bridge.recurrence, step), False)
        state = run(bridge.recurrence.core, bridge(state, e), seen)
    return state


def _offset(recurrence: Recurrence, step: int) -> int:
    """Return how far the layers of a step lie behind the first step's, behind which are the coda's."""
    first = recurrence.core.start
    return 0 if step == 1 else recurrence.cache_layers(step - 1) - first


def _think_adaptively(
    run: Run,
    bridge: FANformerBridge,
    e: Tensor,
    cache: Cache | None,
    depth: Depth,
    resting: Tensor,
) -> tuple[Tensor, Tensor]:
    """Do what `think` says between prelude and coda: tokens at rest (B, T, 1) keep state, keys and values."""
    recurrence = bridge.recurrence
    limits = torch.as_tensor(depth.num_steps, device=e.device).expand(e.shape[0])[:, None, None]  # (B, 1, 1)
    seen = StepCache(cache, 0, False)
    state = run(recurrence.core, e, seen)
    steps = torch.ones(e.shape[:2], dtype=torch.int64, device=e.device)
    for step in range(2, depth.largest + 1):
        resting = resting | (limits < step)
        kept = seen.now
        seen = StepCache(cache, 0 if depth.last_step_cache else _offset(recurrence, step), depth.last_step_cache)
        seen.before, seen.resting = kept, resting
        if resting.all():
            if depth.last_step_cache:
                break
            for layer, (key, value) in kept.items():
                seen.update(key, value, layer)
            continue
        new = torch.where(resting, state, run(recurrence.core, bridge(state, e), seen))
        steps += ~resting[..., 0]
        if depth.exit_threshold is not None:
            wide = torch.promote_types(state.dtype, torch.float32)
            change = (new - state).to(wide).norm(dim=-1, keepdim=True)
            resting = resting | (change < depth.exit_threshold * state.to(wide).norm(dim=-1, keepdim=True))
        state = new
    return state, steps


__all__ = [
    "Depth",
    "FANformerBridge",
    "FANformerCausalLMOutput",
    "FANformerModelOutput",
    "deepen",
    "fit_cache",
    "think",
]
