"""Decoding in fewer bytes and fewer passes, all with the numbers of the plain way up to rounding.

Few rows pass over the weights once; attention copies no keys; and the matrices that read one input are one: Q, K and V
with their Fourier parts, gate and up. A decoded token is a few small products, and each costs the time of calling it.
The weights stay the model's own, under their own names: they are laid out one after another in memory, and the product
reads them as one matrix. It holds within `fast_decoding` only: a model's own arithmetic is what its file says.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from fanformer.model.modeling_fanformer import FANformerAttention, FANformerMLP, FANProjection

_GROUPED = "grouped_sdpa"
_JOINED = "_joined_product"  # attribute of a layer: not a module of it, so that its state has no weight twice
_FEW_ROWS = 32
"""Up to so many rows the product is turned round; beyond, both ways are about equally fast."""


class FewRowsLinear(nn.Linear):
    """A linear layer that computes W x^T instead of x W^T for few rows on the CPU, which reads W up to 3 times as fast.

    A library's product has kernels for some numbers of rows and a slow way for those between, hence the padding. In
    compiled code a single row is a sum over W * x, which the compiler makes one pass with what surrounds it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` (..., in_features) to (..., out_features)."""
        rows = x.shape[:-1].numel()
        summed = rows == 1 and torch.compiler.is_compiling()
        turned = rows <= _FEW_ROWS and x.dtype == torch.float32
        if x.device.type != "cpu" or torch.is_grad_enabled() or not (summed or turned):
            return super().forward(x)
        flat = x.reshape(rows, self.in_features)
        if summed:
            y = (self.weight.float() * flat.float()).sum(-1)[None].to(x.dtype)  # (1, out)
        else:
            y = (self.weight @ F.pad(flat, (0, 0, 0, _padded(rows) - rows)).t())[:, :rows].t()  # (rows, out)
        if self.bias is not None:
            y = y + self.bias
        return y.reshape(*x.shape[:-1], self.out_features)


@functools.cache
def _with_few_rows(kind: Any) -> Any:
    """Return the class that computes as `kind`, a class of linear layers, with the product of `FewRowsLinear`."""
    return FewRowsLinear if kind is nn.Linear else type(f"FewRows{kind.__name__}", (kind, FewRowsLinear), {})


def is_plain(module: nn.Module) -> bool:
    """Return whether `module` computes as its class says: a linear layer whose weight no quantizer has packed."""
    kind = type(module) in (nn.Linear, FewRowsLinear)
    return kind and "weight" in module._parameters and "forward" not in vars(module)


def _padded(rows: int) -> int:
    """Return the number of rows, at least `rows`, with which the product is fastest."""
    if rows in (1, 3):
        return rows + 1
    return 16 if 8 < rows < 16 else rows


class JoinedAttention(FANformerAttention):
    """Attention whose Q, K and V are one product, and their cosines and sines taken at once."""

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Do what `FANformerAttention.project` does."""
        if torch.compiler.is_compiling():
            return super().project(hidden_states)
        if self.fan_layer is not None:
            hidden_states = self.fan_layer(hidden_states)
        together = getattr(self, _JOINED)(self.qkv_input(hidden_states)[0])
        projections = (self.q_proj, self.k_proj, self.v_proj)
        if not isinstance(self.q_proj, FANProjection):
            q, k, v = together.split([projection.out_features for projection in projections], dim=-1)
            return q, k, v
        periods = [projection.periodic.out_features for projection in projections]
        p, *linear = together.split([sum(periods), *(one.linear.out_features for one in projections)], dim=-1)
        cos, sin = p.cos().split(periods, dim=-1), p.sin().split(periods, dim=-1)
        parts = [part for parts in zip(cos, sin, linear, strict=True) for part in parts]
        widths = [2 * periodic + one.shape[-1] for periodic, one in zip(periods, linear, strict=True)]
        q, k, v = torch.cat(parts, dim=-1).split(widths, dim=-1)
        return q, k, v


class JoinedMLP(FANformerMLP):
    """FFN whose gate and up are one product."""

    def project(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Do what `FANformerMLP.project` does."""
        if torch.compiler.is_compiling():
            return super().project(z)
        gate, up = getattr(self, _JOINED)(self.gate_up_input(z)[0]).chunk(2, dim=-1)
        return gate, up


@contextmanager
def joined_products(model: nn.Module) -> Iterator[None]:
    """Let the layers of a FANformer that can compute what reads one input as one product, within the `with` block.

    Left as they are: layers whose readers have inputs of their own (`cola_input="separate"`), and those where a reader
    is no plain `nn.Linear`, has a hook or another dtype or device than the rest, as with LoRA, quantized weights or
    offloading. The first time moves the weights in memory; the layers' parameters are views of the joined matrix then,
    under the same names and with the same values, and stay so.
    """
    layers: list[tuple[nn.Module, type[nn.Module]]] = []
    try:
        for layer in list(model.modules()):
            if type(layer) is FANformerAttention and layer.qkv_input.count == 1:
                projections = (layer.q_proj, layer.k_proj, layer.v_proj)
                if isinstance(layer.q_proj, FANProjection):
                    readers = [*(one.periodic for one in projections), *(one.linear for one in projections)]
                else:
                    readers = list(projections)
                joined_kind: type[nn.Module] = JoinedAttention
            elif type(layer) is FANformerMLP and layer.gate_up_input.count == 1:
                readers, joined_kind = [layer.gate_proj, layer.up_proj], JoinedMLP
            else:
                continue
            product = joined(readers)
            if product is not None:
                layers.append((layer, type(layer)))
                object.__setattr__(layer, _JOINED, product)
                layer.__class__ = joined_kind
        yield
    finally:
        for layer, kind in layers:
            layer.__class__ = kind
            object.__delattr__(layer, _JOINED)


def joined(readers: Sequence[nn.Module]) -> nn.Linear | None:
    """Return the layers that read one input as one, of the same weights in memory; None where they cannot be."""
    plain = [one for one in readers if is_plain(one) and not (one._forward_hooks or one._forward_pre_hooks)]
    if len(plain) < len(readers) or len({(one.weight.dtype, one.weight.device, one.in_features) for one in plain}) > 1:
        return None
    if plain[0].weight.is_meta or any(type(one.weight.data) is not torch.Tensor for one in plain):  # spread by FSDP2
        return None
    with torch.inference_mode(False), torch.no_grad():  # what is trained later must not be an inference tensor
        weight = _side_by_side([reader.weight for reader in plain])
        bias = None
        if any(reader.bias is not None for reader in plain):
            biases = [weight.new_zeros(one.out_features) if one.bias is None else one.bias for one in plain]
            bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    with torch.device("meta"):
        product = FewRowsLinear(plain[0].in_features, len(weight), bias=bias is not None)
    product.weight, product.bias = nn.Parameter(weight, requires_grad=False), bias
    return product


def _side_by_side(weights: list[nn.Parameter]) -> Tensor:
    """Return the rows of all in one matrix whose memory they share, moving them there unless they are there."""
    first, width, rows = weights[0], weights[0].shape[1], sum(len(weight) for weight in weights)
    ends = itertools.accumulate((weight.numel() for weight in weights), initial=first.storage_offset())
    places = [(weight.untyped_storage().data_ptr(), weight.storage_offset()) for weight in weights]
    wanted = [(first.untyped_storage().data_ptr(), at) for at in list(ends)[:-1]]
    if places == wanted and all(weight.is_contiguous() for weight in weights):
        return first.detach().as_strided((rows, width), (width, 1))
    matrix = torch.cat([weight.detach() for weight in weights])
    for weight, part in zip(weights, matrix.split([len(weight) for weight in weights]), strict=True):
        weight.data = part
    return matrix


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
    # beside plain layers a model's with towers, which add the adapters of some rows to a plain product
    found = [module for module in model.modules() if is_plain(module) or hasattr(module, "lora_scale")]
    slow = [module for module in found if not isinstance(module, FewRowsLinear)]
    linears: list[tuple[nn.Module, Any]] = [(module, type(module)) for module in slow]
    if attention == "sdpa":
        model.set_attn_implementation(_GROUPED)
    for module, kind in linears:
        module.__class__ = _with_few_rows(kind)
    try:
        with joined_products(model) if join else nullcontext():
            yield
    finally:
        for module, kind in linears:
            module.__class__ = kind
        if attention == "sdpa":
            model.set_attn_implementation(attention)
