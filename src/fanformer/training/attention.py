"""How a run attends to packed rows: which backend, where documents begin and end, and blocks of queries on a CPU."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from fanformer.errors import ConfigError, DependencyError

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None

_VARLEN_KNOWS = set() if varlen_attn is None else set(inspect.signature(varlen_attn).parameters)
_VARLEN = "varlen"
_BY_BOUNDS = (_VARLEN, "flash_attention_2", "flash_attention_3")
"""Implementations that are told the documents' bounds instead of a mask."""


def choose_attention(model: PreTrainedModel, wanted: str, device: str, precision: str, compiled: bool) -> str:
    """Set how `model` attends in training.

    Args:
        model: of `transformers`, attending by SDPA.
        wanted: "auto" takes what is fastest in compiled code, and SDPA elsewhere: blocks of queries
            (`blocked_sdpa`) on a CPU, "flex_attention" on CUDA in bfloat16 where it takes the model. "sdpa" takes
            SDPA everywhere. "varlen" (torch's FlashAttention for sequences of their own length), "flash_attention_2"
            and "flash_attention_3" (their packages) and "flex_attention" never multiply what belongs to two documents;
            they need CUDA, all but the last bfloat16.
        device: kind of the run's device.
        precision: of the products.
        compiled: whether the blocks will be compiled.

    Returns:
        Why, in words.

    Raises:
        ConfigError: if what is asked for does not run on this device or in this precision.
        DependencyError: if it is not installed.
    """
    if wanted == "auto":
        if device == "cpu" and compiled:
            attend_in_blocks(model)
            return "in blocks of queries where rows have 257 to 1,024 tokens"
        if device == "cuda" and compiled and precision == "bfloat16" and _flex_takes(model):
            model.set_attn_implementation("flex_attention")
            return "flex_attention, which skips what belongs to two documents"
        return "torch's default"
    if wanted == "sdpa":
        return "as asked"
    if device != "cuda":
        raise ConfigError(f"`attention` {wanted} needs CUDA, got device {device}: use auto or sdpa.")
    if wanted != "flex_attention" and precision != "bfloat16":
        raise ConfigError(f"`attention` {wanted} needs bfloat16, got precision {precision}: set --precision bfloat16.")
    if wanted == "varlen":
        if not {"window_size", "scale"} <= _VARLEN_KNOWS:
            raise DependencyError(f"`attention` varlen needs torch 2.11 or later, got {torch.__version__}: use sdpa.")
        model.set_attn_implementation(_VARLEN)
        return "as asked"
    try:
        model.set_attn_implementation(wanted)
    except ImportError as error:
        raise DependencyError(f"`attention` {wanted} is not installed: {' '.join(str(error).split())[:200]}") from error
    return "as asked"


def _flex_takes(model: PreTrainedModel) -> bool:
    """Return whether flex_attention runs a model: it has no dropout, and wants heads of 16, 32, 64 ... channels."""
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    fits = width >= 16 and width & (width - 1) == 0
    return model._supports_flex_attn and fits and not getattr(config, "attention_dropout", 0.0)


def document_bounds(model: PreTrainedModel, position_ids: Tensor) -> dict[str, Any]:
    """Return what `model`'s attention is told of the packed documents beside their positions; nothing for most.

    Args:
        model: of `transformers`.
        position_ids: (B, T), beginning anew at 0 with every document and row.

    Returns:
        In the names of `transformers`: `cu_seq_lens_q` and `cu_seq_lens_k` (documents + 1,) int32, where each document
        begins in the B T tokens of all rows and where the last one ends, and twice the length of the longest possible.
    """
    if model.config._attn_implementation not in _BY_BOUNDS:
        return {}
    starts = torch.nonzero(position_ids.flatten() == 0).flatten()
    bounds = torch.cat((starts, starts.new_tensor([position_ids.numel()]))).to(torch.int32)
    longest = position_ids.shape[1]  # not of this batch: it is a constant of the compiled code
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend causally within each document; without their bounds, as in evaluation, by SDPA and its mask.

    Args:
        module: the attention layer.
        query: (B, H, T, K).
        key: (B, G, T, K), G a divisor of H.
        value: (B, G, T, K).
        attention_mask: (B or 1, 1, T, S) or None; not used where the bounds are given.
        cu_seq_lens_q: as `document_bounds` gives them, like the next.
        max_length_q: T.
        **options: as `transformers` gives them to an attention function.

    Returns:
        (B, T, H, K), and None for the weights.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    batch, heads, length, _ = query.shape
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    shared = key.shape[1] != heads
    grouped = {"enable_gqa": True} if shared and "enable_gqa" in _VARLEN_KNOWS else {}
    if shared and not grouped:  # torch 2.11
        key, value = (tensor.repeat_interleave(heads // key.shape[1], 1) for tensor in (key, value))
    flat = [tensor.transpose(1, 2).flatten(0, 1).to(dtype) for tensor in (query, key, value)]  # (B T, heads, K)
    output = varlen_attn(
        *flat,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=options["scaling"],
        window_size=(-1, 0),  # causal
        **grouped,
    )  # (B T, H, K)
    return output.view(batch, length, heads, -1), None


_BLOCK = 64
_SHORTEST, _LONGEST = 257, 1024
"""Rows that gain: shorter ones do not; for longer ones the weights kept for the backward pass, H T^2 / 2 numbers a row,
are too many."""

_BLOCKED = "blocked_sdpa"


def blocked_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attend causally, each block of queries only to the keys up to its end: half the products, as large ones.

    torch's CPU kernel takes 1.4 to 1.7 times as long for rows of 512 and 1,024 tokens with packed documents: with a
    mask it multiplies what the mask leaves out, and its backward pass runs at a third of the rate of a large product.

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


for _name, _function in ((_VARLEN, varlen_attention), (_BLOCKED, blocked_sdpa)):
    AttentionInterface.register(_name, _function)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_name, sdpa_mask)


def attend_in_blocks(model: PreTrainedModel) -> None:
    """Let a model that attends by SDPA do so in blocks where it is trained, compiled, on a CPU."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(_BLOCKED)
