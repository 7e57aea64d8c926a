"""The loss without the logits of a whole batch: a few rows at a time, their gradients at once.

At 16 x 1,024 tokens and 49,152 words the logits take 3 GiB in float32, and cross entropy holds them two or three times;
in parts of 256 MiB they cost what one part costs. The products are the same.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from fanformer.data.packing import IGNORED_LABEL

WHOLE_BYTES = 2**30
"""Logits of a batch that take no more than this in float32 are computed as a whole."""

_PART_BYTES = 2**28


class _ChunkedCrossEntropy(torch.autograd.Function):
    """scale * sum of cross entropy of x W^T; the gradients are made in the forward pass, when the logits are there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, scale: float, rows: int) -> Tensor:
        """Take `x` (N, D), `weight` (V, D) and `labels` (N,), `rows` of them at a time; products in x's dtype."""
        narrow, wide = weight.to(x.dtype), torch.promote_types(x.dtype, torch.float32)
        wanted = any(ctx.needs_input_grad)
        parts, loss = [], x.new_zeros((), dtype=wide)
        weight_gradient = torch.zeros_like(weight) if wanted else None
        for some, targets in zip(x.split(rows), labels.split(rows), strict=True):
            counted = targets != IGNORED_LABEL
            index = targets.where(counted, 0)[:, None]
            logits = (some @ narrow.t()).to(wide)  # (rows, V)
            whole = logits.logsumexp(-1, keepdim=True)
            loss += ((whole - logits.gather(-1, index))[:, 0] * counted).sum()
            if weight_gradient is None:
                continue
            slope = (logits - whole).exp_()
            slope.scatter_add_(-1, index, -torch.ones_like(whole))
            slope = slope.mul_(counted[:, None].to(wide) * scale).to(x.dtype)
            parts.append(slope @ narrow)
            weight_gradient += slope.t() @ some
        if weight_gradient is not None:
            ctx.save_for_backward(torch.cat(parts), weight_gradient)
        return loss * scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Scale what the forward pass made."""
        of_x, of_weight = ctx.saved_tensors
        return of_x * gradient.to(of_x.dtype), of_weight * gradient.to(of_weight.dtype), None, None, None


def chunked_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, count: float, rows: int | None = None) -> Tensor:
    """Return the cross entropy of softmax(x W^T) summed over the labels that count, over `count`, in float32 or wider.

    Second derivatives are not there.

    Args:
        x: (N, D), the hidden states; under autocast the products have its dtype.
        weight: (V, D), the LM head.
        labels: (N,) int64, -100 where nothing is predicted.
        count: what the sum is divided by.
        rows: positions at a time; default so many as make 256 MiB of float32 logits.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    rows = rows or max(1, _PART_BYTES // (4 * weight.shape[0]))
    with torch.autocast(x.device.type, enabled=False):
        loss: Tensor = _ChunkedCrossEntropy.apply(x, weight, labels, 1.0 / count, rows)
    return loss


def skip_logits(model: PreTrainedModel) -> None:
    """Let `model` compute a batch's loss in parts, and return no logits, where the logits would take over 1 GiB.

    That is so where it is called with `shift_labels` and `num_items_in_batch`, as in training; all else is as it was.

    Args:
        model: a causal language model of `transformers` whose logits are its LM head's outputs, without a bias.
    """
    plain: Callable[..., CausalLMOutputWithPast] = model.forward

    @wraps(plain)  # `generate` reads its signature
    def forward(*arguments: Any, **inputs: Any) -> CausalLMOutputWithPast:
        labels, count = inputs.get("shift_labels"), inputs.get("num_items_in_batch")
        if labels is None or count is None or 4 * labels.numel() * model.lm_head.weight.shape[0] <= WHOLE_BYTES:
            return plain(*arguments, **inputs)
        for name in ("labels", "shift_labels", "num_items_in_batch"):
            inputs.pop(name, None)
        hidden = model.model(*arguments, **inputs).last_hidden_state
        loss = chunked_cross_entropy(hidden.flatten(0, -2), model.lm_head.weight, labels.flatten(), count)
        return CausalLMOutputWithPast(loss=loss)

    model.forward = forward
