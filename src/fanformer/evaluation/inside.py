"""What a model's own parts do on a text: open gates, turns of Fourier channels and their frequencies, attention."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fanformer.errors import ConfigError
from fanformer.model.modeling_fanformer import (
    CoLAInput,
    FANformerResidual,
    FANLayer,
    FANProjection,
    apply_rotary,
)

BINS = 16
"""Frequencies of a spectrum, from 0 to half a cycle per token."""
_LOW, _MIDDLE, _HIGH = 0.1, 0.5, 0.9

Range = tuple[float, float, float]
"""The tenth, the half and the nine tenths of values, in their order."""


@dataclass(frozen=True)
class LayerInside:
    """What one block does on a text.

    Attributes:
        gates: openness in [0, 1] of the gates over their channels, by branch: `attention` and `feed_forward`.
        channels: Fourier channels.
        turns: radians that the phase of a channel spreads over the text (standard deviation), over the channels; what
            stays far below 1 hardly leaves the straight part of its sine. None where there are no channels.
        spectrum: (BINS,), share of the power of the channels' cosines along the text at each frequency, without their
            mean; empty where there are no channels.
    """

    gates: dict[str, Range]
    channels: int
    turns: Range | None
    spectrum: list[float]


def has_inside(model: nn.Module) -> bool:
    """Return whether a model has gates or Fourier channels to look at."""
    return any(_is_seen(module) for module in model.modules())


def look_inside(model: PreTrainedModel, ids: list[int]) -> list[LayerInside]:
    """Return what each block does on a text.

    Others may compute with the model meanwhile: only what this thread computes is seen. A recurrent depth takes a
    single step.

    Args:
        model: a FANformer in evaluation mode.
        ids: T token ids, at least 2.

    Raises:
        ConfigError: if the model has neither gates nor Fourier channels, or the text is too short.
    """
    if not has_inside(model):
        raise ConfigError(
            f"a look inside needs gates or Fourier channels, got a {model.config.model_type} model without: "
            "name a FANformer."
        )
    if len(ids) < 2:
        raise ConfigError(f"a look inside needs at least 2 tokens, got {len(ids)}: give a longer text.")
    blocks: Any = model.get_decoder().layers
    phases: list[list[Tensor]] = [[] for _ in blocks]
    with ExitStack() as stack, torch.inference_mode():
        for block, found in zip(blocks, phases, strict=True):
            stack.enter_context(_phases_to(block, found))
        _read(model, ids)
        return [_describe(block, found) for block, found in zip(blocks, phases, strict=True)]


def attention_maps(model: PreTrainedModel, ids: list[int], layer: int) -> list[list[list[float]]]:
    """Return how the heads of one block spread their attention over a text, computed in the way of `look_inside`.

    Args:
        model: a FANformer in evaluation mode.
        ids: T token ids.
        layer: index of the block.

    Returns:
        For each head and each token the weights of that token and those before it: H lists of T, the first of 1 weight.

    Raises:
        ConfigError: if there is no such block.
    """
    blocks: Any = model.get_decoder().layers
    if not 0 <= layer < len(blocks):
        raise ConfigError(f"`layer` must be in [0, {len(blocks)}), got {layer}: the model has {len(blocks)} blocks.")
    attention = blocks[layer].self_attn
    thread, found = threading.get_ident(), dict[str, Any]()

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            if threading.get_ident() == thread:
                found[name] = output[0]  # (T, heads, K)

        return hook

    def note_positions(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        if threading.get_ident() == thread:
            found["positions"] = named["position_embeddings"]

    with ExitStack() as stack, torch.inference_mode():
        stack.callback(attention.q_norm.register_forward_hook(note("q")).remove)
        stack.callback(attention.k_norm.register_forward_hook(note("k")).remove)
        stack.callback(attention.register_forward_pre_hook(note_positions, with_kwargs=True).remove)
        _read(model, ids)
        q, k = (apply_rotary(found[name][None].float(), *found["positions"])[0] for name in ("q", "k"))
        k = k.repeat_interleave(attention.num_key_value_groups, dim=1)  # (T, H, K)
        scores = torch.einsum("thk,shk->hts", q, k) * attention.scaling
        future = torch.ones(len(ids), len(ids), dtype=torch.bool, device=scores.device).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)  # (H, T, T)
    return [[row[: index + 1] for index, row in enumerate(head)] for head in weights.tolist()]


def _read(model: PreTrainedModel, ids: list[int]) -> None:
    """Run the blocks over a text, those of a recurrent depth once."""
    decoder: Any = model.get_decoder()
    once = {} if getattr(decoder.config, "recurrence", None) is None else {"num_steps": 1}
    decoder(input_ids=torch.tensor([ids], device=model.device), use_cache=False, **once)


def _is_seen(module: nn.Module) -> bool:
    is_gate = isinstance(module, FANformerResidual) and module.gate is not None
    is_periodic = isinstance(module, CoLAInput) and module.factor is not None and bool(module.periodic)
    return is_gate or is_periodic or isinstance(module, FANLayer | FANProjection)


@contextmanager
def _phases_to(block: nn.Module, found: list[Tensor]) -> Iterator[None]:
    """Let a block put the phases of its channels, (T, P) each, into `found` while the block runs in this thread."""
    thread = threading.get_ident()

    def heard(read: Callable[[Any], list[Tensor]]) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if threading.get_ident() == thread:
                found.extend(phase[0].float() for phase in read(output))

        return hook

    with ExitStack() as stack:
        for module, read in _readers(block):
            handle = module.register_forward_hook(heard(read))
            stack.callback(handle.remove)
        yield


def _readers(block: nn.Module) -> list[tuple[nn.Module, Callable[[Any], list[Tensor]]]]:
    """Return the modules of a block by whose outputs its phases are known, and how.

    The projections of attention may be computed together with others, beside their modules: their common input is not.
    """
    attention: Any = block.self_attn
    readers: list[tuple[nn.Module, Callable[[Any], list[Tensor]]]] = []
    if isinstance(attention.q_proj, FANProjection):
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)

        def of_projections(inputs: tuple[Tensor, ...]) -> list[Tensor]:
            given = inputs[:: attention.readers]  # of each projection, which has so many, the first
            return [one.periodic(u) for one, u in zip(projections, given, strict=True)]

        readers.append((attention.qkv_input, of_projections))
    for module in block.modules():
        if isinstance(module, FANLayer):
            readers.append((module.projection, partial(_first, module.periodic_width)))
        elif isinstance(module, CoLAInput) and module.factor is not None and module.periodic:
            readers.append((module.norm, partial(_first, module.periodic)))
    return readers


def _first(width: int, output: Tensor) -> list[Tensor]:
    """Return the first channels of an output (B, T, ..., channels), those of all parts in a row: (B, T, P)."""
    return [output[..., :width].flatten(2)]


def _describe(block: nn.Module, phases: list[Tensor]) -> LayerInside:
    """Return what a block does, given its phases, (T, P) each."""
    gates = {
        name: _range(residual.gate.sigmoid())
        for name, residual in _residuals(block).items()
        if residual.gate is not None
    }
    if not phases:
        return LayerInside(gates, 0, None, [])
    phase = torch.cat(phases, dim=-1)  # (T, P)
    waves = phase.cos() - phase.cos().mean(0)
    length = max(len(waves), 4 * BINS)  # zeros behind a short text, so that every bin has a frequency
    power = torch.fft.rfft(waves, n=length, dim=0).abs().square().sum(-1)  # (length // 2 + 1,)
    places = torch.linspace(0, BINS - 1e-6, len(power), device=power.device).long()
    binned = torch.zeros(BINS, device=power.device).index_add(0, places, power)
    spectrum = (binned / binned.sum().clamp_min(1e-12)).tolist()
    return LayerInside(gates, phase.shape[1], _range(phase.std(0)), spectrum)


def _residuals(block: nn.Module) -> dict[str, Any]:
    """Return the sums at which a block's branches end, in their order: attention, then the FFN."""
    residuals = [module for module in block.modules() if isinstance(module, FANformerResidual)]
    return dict(zip(("attention", "feed_forward"), residuals, strict=True))


def _range(values: Tensor) -> Range:
    """Return the range of values (N,)."""
    points = torch.tensor((_LOW, _MIDDLE, _HIGH), device=values.device)
    low, middle, high = values.float().quantile(points).tolist()
    return low, middle, high
