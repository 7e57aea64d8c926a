"""Causal attention in blocks of queries for compiled training on a CPU: half the products, written as large ones.

torch's CPU kernel takes 1.4 to 1.7 times as long for rows of 512 and 1,024 tokens with packed documents: with a mask it
multiplies what the mask leaves out, and its backward pass runs at a third of the rate of a large product.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

_BLOCK = 64
_SHORTEST, _LONGEST = 257, 1024
"""Rows that gain: shorter ones do not; for longer ones the weights kept for the backward pass, H T^2 / 2 numbers a row,
are too many."""

_BLOCKED = "blocked_sdpa"


def blocked_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attend causally; each block of queries only to the keys up to its end.

    Evaluation, short and long rows and code that is not compiled are left to SDPA, which is as fast there or needs less
    memory.

    Args:
        module: the attention layer.
        query: (B, H, T, K).
        key: (B, G, T, K), G a divisor of H.
        value: (B, G, T, K).
        attention_mask: (B or 1, 1, T, T), true where a query attends to a key, nowhere ahead of itself; or None.
        **options: as `transformers` gives them to an attention function.

    Returns:
        (B, T, H, K), and None for the weights.
    """
    batch, heads, length, width = query.shape
    trained = torch.compiler.is_compiling() and torch.is_grad_enabled()
    square = key.shape[2] == length and _SHORTEST <= length <= _LONGEST
    plain = not options.get("dropout") and (attention_mask is None or attention_mask.dtype == torch.bool)
    if not (trained and square and plain and query.device.type == "cpu"):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    groups = key.shape[1]
    if attention_mask is None:
        attention_mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    query = query.view(batch, groups, heads // groups, length, width) * options["scaling"]
    blocks = []
    for start in range(0, length, _BLOCK):
        end = min(start + _BLOCK, length)
        rows = query[:, :, :, start:end].flatten(2, 3)  # (B, G, H/G * block, K)
        scores = rows @ key[:, :, :end].transpose(-1, -2)  # (B, G, H/G * block, end)
        scores = scores.unflatten(2, (-1, end - start))  # (B, G, H/G, block, end)
        attends = attention_mask[:, :, None, start:end, :end]
        weights = scores.where(attends, torch.finfo(scores.dtype).min).softmax(-1)
        output = weights.flatten(2, 3) @ value[:, :, :end]  # (B, G, H/G * block, K)
        blocks.append(output.unflatten(2, (-1, end - start)))
    return torch.cat(blocks, dim=3).flatten(1, 2).transpose(1, 2).contiguous(), None


AttentionInterface.register(_BLOCKED, blocked_sdpa)
ALL_MASK_ATTENTION_FUNCTIONS.register(_BLOCKED, sdpa_mask)


def attend_in_blocks(model: PreTrainedModel) -> None:
    """Let a model that attends by SDPA do so in blocks where it is trained, compiled, on a CPU."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(_BLOCKED)
