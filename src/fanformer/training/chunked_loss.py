"""The loss without the logits of a whole batch: a few rows at a time, their gradients at once.

At 16 x 1,024 tokens and 49,152 words the logits take 3 GiB in float32, and cross entropy holds them two or three times;
in parts they cost what one part costs. The products are the same. Between them there is a pass over the logits for the
sum and one for the gradient where the parts are compiled, and about ten where they are not.
"""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from fanformer.data.packing import IGNORED_LABEL
from fanformer.training.other_models import has_plain_head

WHOLE_BYTES = 2**30
"""Logits of a batch that take no more than this in float32 are computed as a whole."""

_PART_BYTES = 2**29
"""Logits of a part and their gradient, in the dtype of the products."""

Part = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""What `_part` is, or what torch made of it."""


def _part(x: Tensor, weight: Tensor, labels: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of some rows and scale * its gradient by their logits.

    Args:
        x: (rows, D).
        weight: (V, D) in x's dtype.
        labels: (rows,) int64.
        scale: () in float32 or wider, the dtype of the loss.

    Returns:
        () in scale's dtype, and (rows, V) in x's.
    """
    counted = labels != IGNORED_LABEL
    index = labels.where(counted, 0)[:, None]
    logits = (x @ weight.t()).to(scale.dtype)  # (rows, V)
    whole = logits.logsumexp(-1, keepdim=True)
    loss = ((whole - logits.gather(-1, index))[:, 0] * counted).sum()
    factor = counted[:, None] * scale
    if torch.compiler.is_compiling():  # one pass, where a scatter would be two more
        right = torch.arange(logits.shape[-1], device=x.device) == index
        return loss, (((logits - whole).exp() - right.to(scale.dtype)) * factor).to(x.dtype)
    slope = logits.sub_(whole).exp_()
    slope.scatter_add_(-1, index, -torch.ones_like(whole))
    return loss, slope.mul_(factor).to(x.dtype)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """scale * sum of cross entropy of x W^T; the gradients are made in the forward pass, when the logits are there."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, scale: float | Tensor, rows: int, part: Part
    ) -> Tensor:
        """Take `x` (N, D), `weight` (V, D) and `labels` (N,), `rows` of them at a time; products in x's dtype."""
        narrow, wide = weight.to(x.dtype), torch.promote_types(x.dtype, torch.float32)
        scale = torch.ones((), dtype=wide, device=x.device) * scale
        wanted = any(ctx.needs_input_grad)
        parts, loss = [], x.new_zeros((), dtype=wide)
        weight_gradient = torch.zeros_like(weight) if wanted else None
        for some, targets in zip(x.split(rows), labels.split(rows), strict=True):
            some_loss, slope = part(some, narrow, targets, scale)
            loss += some_loss
            if weight_gradient is not None:
                parts.append(slope @ narrow)
                weight_gradient += slope.t() @ some
        if weight_gradient is not None:
            ctx.save_for_backward(torch.cat(parts), weight_gradient)
        return loss * scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Scale what the forward pass made, which keeps its shape."""
        of_x, of_weight = ctx.saved_tensors
        return of_x * gradient.to(of_x.dtype), of_weight * gradient.to(of_weight.dtype), None, None, None, None


def chunked_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, count: float | Tensor, rows: int | None = None, part: Part = _part
) -> Tensor:
    """Return the cross entropy of softmax(x W^T) summed over the labels that count, over `count`, in float32 or wider.

    Second derivatives are not there.

    Args:
        x: (N, D), the hidden states; under autocast the products have its dtype.
        weight: (V, D), the LM head.
        labels: (N,) int64, -100 where nothing is predicted.
        count: what the sum is divided by.
        rows: positions at a time; default a power of two, so many as make half a GiB of logits and their gradient.
        part: what computes some rows, should that be compiled.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if rows is None:  # a power of two: mostly all parts are equal, and compiled once
        rows = 1 << max(1, _PART_BYTES // (2 * x.itemsize * weight.shape[0])).bit_length() - 1
    with torch.autocast(x.device.type, enabled=False):
        loss: Tensor = _ChunkedCrossEntropy.apply(x, weight, labels, 1.0 / count, rows, part)
    return loss


def skip_logits(model: PreTrainedModel, compile_options: Mapping[str, Any] | None = None) -> None:
    """Let `model` compute a batch's loss in parts, and return no logits, where that pays.

    That is where the logits would take over 1 GiB and, with the parts compiled, at any size. It needs `shift_labels`
    and `num_items_in_batch`, as in training; all else is as it was. A model whose logits are more than its LM head's
    products (`has_plain_head`) computes its loss itself.

    Args:
        model: a causal language model of `transformers`.
        compile_options: arguments of torch.compile for the parts; None leaves them as they are.
    """
    if not has_plain_head(model):
        return
    plain: Callable[..., CausalLMOutputWithPast] = model.forward
    part, limit, head = _part, WHOLE_BYTES, model.get_output_embeddings()
    if compile_options is not None:
        part, limit = torch.compile(_part, fullgraph=True, **compile_options), 0

    @wraps(plain)  # `generate` reads its signature
    def forward(*arguments: Any, **inputs: Any) -> CausalLMOutputWithPast:
        labels, count = inputs.get("shift_labels"), inputs.get("num_items_in_batch")
        if labels is None or count is None or 4 * labels.numel() * head.weight.shape[0] <= limit:
            return plain(*arguments, **inputs)
        for name in ("labels", "shift_labels", "num_items_in_batch"):
            inputs.pop(name, None)
        hidden = model.base_model(*arguments, **inputs).last_hidden_state
        loss = chunked_cross_entropy(hidden.flatten(0, -2), head.weight, labels.flatten(), count, part=part)
        return CausalLMOutputWithPast(loss=loss)

    model.forward = forward


class TokenLoss:
    """The cross entropy of a step's labels, a mean over all that are predicted."""

    figures = ()

    def install(self, model: PreTrainedModel, compile_options: Mapping[str, Any] | None) -> None:
        """Let the model compute it in parts where that pays: `skip_logits`."""
        skip_logits(model, compile_options)

    def count(self, batch: Mapping[str, Tensor]) -> int:
        """Return how many labels a batch has."""
        return int((batch["labels"] != IGNORED_LABEL).sum())
