"""Decoding in fewer bytes and fewer passes: fewer products, with few rows on a CPU, attention without repeated keys.

All give the numbers of the plain way up to rounding, and hold only within `fast_decoding`: a model's own arithmetic is
what its file says.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from fanformer.generation.products import FewRowsLinear, is_plain, joined_products

_GROUPED = "grouped_sdpa"


def grouped_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attend by SDPA; for one position the queries that share a key are rows of one product, so no key is copied.

    transformers repeats keys and values for every query head in compiled code with a mask, which all of a static
    cache's is.

    Args:
        module: the attention layer.
        query: (B, H, T, K).
        key: (B, G, S, K), G a divisor of H.
        value: (B, G, S, K).
        attention_mask: (B or 1, 1, T, S), boolean or additive, or None.
        **options: as `transformers` gives them to an attention function.

    Returns:
        (B, T, H, K), and None for the weights.
    """
    batch, heads, length, width = query.shape
    groups = key.shape[1]
    plain = all(options.get(name) is None for name in ("position_bias", "softcap", "s_aux", "cache"))
    if attention_mask is None or attention_mask.shape[1] != 1 or length != 1 or groups == heads or not plain:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    packed = query.reshape(batch, groups, heads // groups, width)
    output = F.scaled_dot_product_attention(
        packed, key, value, attn_mask=attention_mask, dropout_p=options.get("dropout", 0.0), scale=options["scaling"]
    )  # (B, G, H / G, K)
    return output.reshape(batch, 1, heads, -1), None


AttentionInterface.register(_GROUPED, grouped_sdpa)
ALL_MASK_ATTENTION_FUNCTIONS.register(_GROUPED, sdpa_mask)


@contextmanager
def fast_decoding(model: PreTrainedModel, join: bool = True) -> Iterator[None]:
    """Let `model` decode the fast way within the `with` block; its classes and values are as before afterwards.

    Only plain linear layers and SDPA attention have a fast way; quantized layers and other attention keep theirs.

    Args:
        model: to decode with.
        join: whether what reads one input is one product, for which weights are moved in memory (`joined_products`);
            not in the middle of a training, whose sums must not depend on when it was resumed.
    """
    attention = model.config._attn_implementation
    linears = [module for module in model.modules() if is_plain(module)]
    if attention == "sdpa":
        model.set_attn_implementation(_GROUPED)
    for module in linears:
        module.__class__ = FewRowsLinear
    try:
        with joined_products(model) if join else nullcontext():
            yield
    finally:
        for module in linears:
            module.__class__ = nn.Linear
        if attention == "sdpa":
            model.set_attn_implementation(attention)
