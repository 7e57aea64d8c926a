"""The matrices of a FANformer by what they are for, and rounding them in groups: what every integer format rests on."""

from collections import defaultdict

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fanformer.errors import ConfigError
from fanformer.model.footprint import part_of

SMALLEST_GROUP = 16
"""Below this many weights to a scale of 32 bits, the scales take more than half of the room."""


def matrices_by_part(model: PreTrainedModel) -> dict[str, dict[str, nn.Module]]:
    """Return the modules that hold a matrix, by part (as `fanformer info` names them) and by name, in their order.

    Args:
        model: a FANformer. Matrices without a number (P = 0) are left out; a tied head is the embedding.
    """
    found: dict[str, dict[str, nn.Module]] = defaultdict(dict)
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, nn.Embedding)) or not module.weight.numel():
            continue
        if module is model.get_output_embeddings() and model.config.tie_word_embeddings:
            continue
        part = part_of(f"{name}.weight")
        assert part != "other", f"`{name}` is no known matrix of a FANformer"
        found[part][name] = module
    return dict(found)


def fitting_group(in_features: int, wanted: int, smallest: int = SMALLEST_GROUP) -> int | None:
    """Return the size of groups that fill rows of `in_features`: `wanted`, or halved until it does.

    Halves rather than any divisor, since kernels have groups of 128, 64 and 32.

    Returns:
        None where no size down to `smallest` fills the rows.
    """
    size = wanted
    while in_features % size:
        if size % 2 or size // 2 < smallest:
            return None
        size //= 2
    return size


@torch.no_grad()
def fill_intermediate(model: PreTrainedModel, group_size: int, smallest: int = SMALLEST_GROUP) -> str:
    """Let F grow to whole groups, in place, where no group from `smallest` on fills it, without a change of function.

    The added rows of gate and up are zeros with bias 0, so what reaches the added columns of down is 0.

    Returns:
        What was done, for a report; empty where nothing was.
    """
    wide = model.config.intermediate_size
    if fitting_group(wide, group_size, smallest) is not None:
        return ""
    filled = -(-wide // group_size) * group_size
    for layer in model.model.layers:
        mlp = layer.mlp
        mlp.gate_proj = _padded(mlp.gate_proj, rows=filled - wide)
        mlp.up_proj = _padded(mlp.up_proj, rows=filled - wide)
        if isinstance(mlp.down_proj, nn.Linear):
            mlp.down_proj = _padded(mlp.down_proj, columns=filled - wide)
        else:
            mlp.down_proj.input.factor = _padded(mlp.down_proj.input.factor, columns=filled - wide)
    model.config.intermediate_size = filled
    return f"intermediate_size is filled up from {wide} to {filled} with zeros, which fill groups of {group_size}"


def _padded(linear: nn.Linear, rows: int = 0, columns: int = 0) -> nn.Linear:
    """Return the layer with so many more outputs and inputs, all 0."""
    weight = linear.weight
    larger = nn.Linear(weight.shape[1] + columns, weight.shape[0] + rows, linear.bias is not None, dtype=weight.dtype)
    larger.weight.zero_()
    larger.weight[: weight.shape[0], : weight.shape[1]] = weight
    if linear.bias is not None:
        larger.bias.zero_()
        larger.bias[: weight.shape[0]] = linear.bias
    return larger


def round_to_nearest(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """Round `weight` (rows, in_features) to `bits` bits, symmetric, one scale for every group of a row.

    The scale takes the largest absolute value to half a step beyond the largest integer, (2^bits - 1) / 2.

    Returns:
        The values that the integers stand for, in the dtype of `weight`.
    """
    groups = weight.detach().float().unflatten(-1, (-1, group_size))
    steps = 2**bits - 1
    scale = groups.abs().amax(-1, keepdim=True) / (steps / 2)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    integers = (groups / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (integers * scale).flatten(-2).to(weight.dtype)


def check_bits_and_group(bits: int, group_size: int) -> None:
    """Refuse what cannot be packed.

    Raises:
        ConfigError: if `bits` is not 4 or 8, or the group not a power of two from SMALLEST_GROUP on.
    """
    if bits not in (4, 8):
        raise ConfigError(f"`--bits` must be 4 or 8, got {bits}.")
    if group_size < SMALLEST_GROUP or group_size & (group_size - 1):
        raise ConfigError(
            f"`--group-size` must be a power of two from {SMALLEST_GROUP} on, such as 32, 64 or 128, got {group_size}."
        )
