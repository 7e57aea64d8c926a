"""FANformer: a Llama-style decoder with Fourier features, low-rank linear layers, HybridNorm and gated residuals.

Papers: FAN in attention, arXiv:2502.21309 (FANformer); CoLA, arXiv:2502.10940; HybridNorm, arXiv:2503.04598;
GQA, arXiv:2305.13245; RoPE, arXiv:2104.09864; SwiGLU, arXiv:2002.05202; RMSNorm, arXiv:1910.07467.

Shapes: B batch, T query positions, S key positions, D hidden_size, H query heads, G key-value heads, K head_dim,
F intermediate_size, V vocab_size, R CoLA rank, P periodic channels, L layers.

What differs from Llama, each a field of the configuration:
- all seven linear layers of a block are low-rank, W_b u + b with u = act(Norm(W_a x)), each kind with a rank of its
  own, W_a and so u shared by those that read the same input (CoLA, changed);
- Q, K and V are [cos(p), sin(p), g], p and g linear in u (FAN, at low rank);
- Q, K and V get an RMSNorm per head, and only the first attention gets one on its input (HybridNorm*);
- the FFN's residual is taken after its norm (HybridNorm);
- every residual branch is multiplied by sigmoid(g), g learnable (gated residuals);
- a recurrent depth may run the middle blocks several times (recurrence_fanformer.py).
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers import modeling_layers as layers
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs

from .configuration_fanformer import AUTO_MAP, FANformerConfig
from .recurrence_fanformer import (
    CACHE,
    Depth,
    FANformerBridge,
    FANformerCausalLMOutput,
    FANformerModelOutput,
    Writer,
    takes_cache,
    think,
)


class FANformerRMSNorm(nn.Module):
    """y = w * x / sqrt(mean(x^2) + eps), the mean over the last dimension, in float32.

    Source: RMSNorm, arXiv:1910.07467, eq. 4.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` (..., width); the result has the dtype that weight * x has."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


def default_rope_frequencies(config: FANformerConfig, device: torch.device) -> tuple[Tensor, float]:
    """Return (theta^(-2i/K) for i in [0, K/2), scale 1). Source: RoPE, arXiv:2104.09864, section 3.2.2."""
    assert config.rope_parameters is not None, "transformers fills in rope_parameters"
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    return 1.0 / config.rope_parameters["rope_theta"] ** exponent, 1.0


class FANformerRotaryEmbedding(nn.Module):
    """The angles t * frequency_i of every position t, as cosines and sines.

    The K/2 frequencies are computed anew each time: a buffer of them would be lost on the meta device and rounded by a
    cast to bfloat16.
    """

    def __init__(self, config: FANformerConfig) -> None:
        super().__init__()
        assert config.rope_parameters is not None, "transformers fills in rope_parameters"
        self.config = config
        self.frequencies = ROPE_INIT_FUNCTIONS.get(config.rope_parameters["rope_type"], default_rope_frequencies)

    @torch.no_grad()
    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cosines and sines (B, T, 1, K/2) in `dtype` for `position_ids` (B, T), from float32 or wider."""
        frequencies, scale = self.frequencies(self.config, position_ids.device)
        wide = torch.promote_types(dtype, torch.float32)
        angles = position_ids[..., None, None].to(wide) * frequencies.to(wide)  # (B, T, 1, K/2)
        return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of channels (i, i + K/2) of `x` (B, T, heads, K) by its position's angle."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class ResidualSiLU(nn.Module):
    """x + silu(x)."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` to the same shape."""
        return x + F.silu(x)


# What stands between two factors: the module of act, and E[act(x)^2] for a standard normal x.
_ACTIVATIONS: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "silu": (nn.SiLU, 0.35577552),
    "gelu": (nn.GELU, 0.42522148),
    "linear": (nn.Identity, 1.0),
    "residual": (ResidualSiLU, 2.35577552),
}


def scaled_linear(in_features: int, out_features: int, bias: bool, gain: float = 1.0) -> nn.Linear:
    """Return a linear layer whose weights start with standard deviation gain / sqrt(in_features), its bias at 0."""
    linear = nn.Linear(in_features, out_features, bias=bias)
    linear.initializer_std = gain * in_features**-0.5  # read by FANformerPreTrainedModel._init_weights
    return linear


class CoLAInput(nn.Module):
    """What the CoLA linears that read the same x have between their factors: act(g) with g = Norm(W_a x), or W_a x.

    With Fourier features it is [cos(p), sin(p), act(g)], [p, g] = Norm(W_a x): R channels, R - P of W_a. With
    `cola_input` "separate" each of the readers has a W_a of its own, all of them one product; with "shared" they have
    one together. At full rank (rank None) there is no first factor, and each reader gets x itself.

    Sources: CoLA, arXiv:2502.10940; FAN, arXiv:2502.21309, eq. 1.
    """

    def __init__(
        self,
        config: FANformerConfig,
        in_features: int,
        rank: int | None,
        readers: int,
        activation: str,
        norm: bool = False,
        fan: bool = False,
    ) -> None:
        super().__init__()
        self.readers = readers
        self.count = 1 if config.cola_input == "shared" else readers
        self.out_features = in_features if rank is None else rank
        self.gain = 1.0  # for who reads the output
        self.factor: nn.Module | None = None
        self.norm: nn.Module = nn.Identity()
        make, square = _ACTIVATIONS[activation]
        self.activation = make()
        if rank is None:
            return
        self.periodic = config.periodic_width(rank) if fan else 0
        self.channels = rank - self.periodic
        self.factor = scaled_linear(in_features, self.count * self.channels, bias=False)
        if norm:
            self.norm = FANformerRMSNorm(self.channels, config.rms_norm_eps)
        # cos^2 + sin^2 = 1
        self.gain = ((self.periodic + (rank - 2 * self.periodic) * square) / rank) ** -0.5

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return a tensor (..., R) for each reader of `x` (..., in_features)."""
        if self.factor is None:
            return (x,) * self.readers
        hidden = self.norm(self.factor(x).unflatten(-1, (self.count, self.channels)))  # (..., count, R - P)
        if self.periodic:
            p, g = hidden.tensor_split((self.periodic,), dim=-1)
            output = torch.cat((p.cos(), p.sin(), self.activation(g)), dim=-1)
        else:
            output = self.activation(hidden)
        return output.unbind(-2) * (self.readers // self.count)


def readers_input(config: FANformerConfig, rank: int | None, readers: int, fan: bool = False) -> CoLAInput:
    """Return what the layers of a branch that read the residual stream have in common."""
    return CoLAInput(config, config.hidden_size, rank, readers, config.cola_activation, config.cola_norm, fan)


class CoLALinear(nn.Module):
    """y = W_b act(W_a x) + b, which ends a branch; W_b starts at 0. Source: CoLA, arXiv:2502.10940."""

    def __init__(self, config: FANformerConfig, in_features: int, out_features: int, rank: int, fan: bool) -> None:
        super().__init__()
        self.input = CoLAInput(config, in_features, rank, 1, config.writer_activation, fan=fan)
        self.output = scaled_linear(rank, out_features, config.projection_bias, gain=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` (..., in_features) to (..., out_features)."""
        return self.output(*self.input(x))


def branch_output(config: FANformerConfig, in_features: int, rank: int | None, fan: bool = False) -> nn.Module:
    """Return the layer that ends a residual branch, which starts at 0: a CoLA linear, or at full rank a plain one."""
    if rank is None:
        return scaled_linear(in_features, config.hidden_size, config.projection_bias, gain=0.0)
    return CoLALinear(config, in_features, config.hidden_size, rank, fan)


class FANProjection(nn.Module):
    """[cos(p), sin(p), g]: p = W_p u without bias, g = W_g v + b, u and v being act(W_a x) of a CoLA linear each, or x.

    Source: FAN, arXiv:2502.21309, eq. 1, the linear maps low-rank as in CoLA.
    """

    def __init__(self, in_features: int, out_features: int, periodic: int, bias: bool, gain: float) -> None:
        super().__init__()
        self.periodic = scaled_linear(in_features, periodic, False, gain)
        self.linear = scaled_linear(in_features, out_features - 2 * periodic, bias, gain)

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        """Return (..., out_features) for `u` and `v` (..., in_features): P cosines, P sines, then the linear part."""
        p = self.periodic(u)
        return torch.cat((p.cos(), p.sin(), self.linear(v)), dim=-1)


class FANLayer(nn.Module):
    """FANLayer': [cos(p), sin(p), g] with p and g affine in x, D -> D, at full rank.

    Source: FANformer, arXiv:2502.21309, eq. 1 and appendix B (identity activation); the bias on p, too, is that of the
    published code.
    """

    def __init__(self, width: int, periodic: int) -> None:
        super().__init__()
        self.periodic_width = periodic
        self.projection = scaled_linear(width, width - periodic, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` (..., D) to (..., D): P cosines, P sines, then the linear part."""
        p, g = self.projection(x).tensor_split((self.periodic_width,), dim=-1)
        return torch.cat((p.cos(), p.sin(), g), dim=-1)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Softmax attention spelt out: query (B, H, T, K), key and value (B, G, S, K), additive mask (B, 1, T, S).

    Returns:
        (B, T, H, K) and the attention weights (B, H, T, S).
    """
    batch, heads, length, width = query.shape
    grouped = query.view(batch, key.shape[1], -1, length, width)  # (B, G, H/G, T, K)
    scores = grouped @ key.unsqueeze(2).transpose(-1, -2) * scaling  # (B, G, H/G, T, S)
    if attention_mask is not None:
        scores = scores + attention_mask.unsqueeze(2)
    weights = F.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    output = (weights @ value.unsqueeze(2)).view(batch, heads, length, width)
    return output.transpose(1, 2).contiguous(), weights.view(batch, heads, length, -1)


class FANformerAttention(nn.Module):
    """softmax(RoPE(Norm(q)) RoPE(Norm(k))^T / sqrt(K)) Norm(v) W_o, with FAN projections q, k, v and GQA.

    Source: FANformer, arXiv:2502.21309, eq. 2-5 (ATF); HybridNorm, arXiv:2503.04598, eq. 5 (norms on q, k and v).
    """

    def __init__(self, config: FANformerConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = True
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout

        self.fan_layer = None
        if config.fan_placement == "layer":
            self.fan_layer = FANLayer(config.hidden_size, config.periodic_width(config.hidden_size))
        self.readers = 2 if config.fan_placement == "projection" else 1  # CoLA linears in each of Q, K, V
        self.qkv_input = readers_input(config, config.qkv_rank, 3 * self.readers)
        width, gain = self.qkv_input.out_features, self.qkv_input.gain

        def projection(heads: int) -> nn.Module:
            outputs, bias = heads * config.head_dim, config.projection_bias
            if config.fan_placement != "projection":
                return scaled_linear(width, outputs, bias, gain)
            return FANProjection(width, outputs, config.periodic_width(outputs), bias, gain)

        self.q_proj = projection(config.num_attention_heads)
        self.k_proj = projection(config.num_key_value_heads)
        self.v_proj = projection(config.num_key_value_heads)
        attended = config.num_attention_heads * config.head_dim
        self.o_proj = branch_output(config, attended, config.o_rank)

        norm: Callable[[], nn.Module] = nn.Identity
        if config.qkv_norm == "qkv":
            norm = functools.partial(FANformerRMSNorm, config.head_dim, config.rms_norm_eps)
        self.q_norm, self.k_norm, self.v_norm = norm(), norm(), norm()

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q (B, T, H K), k and v (B, T, G K) of `hidden_states` (B, T, D), before their norms."""
        if self.fan_layer is not None:
            hidden_states = self.fan_layer(hidden_states)
        inputs = self.qkv_input(hidden_states)
        n = self.readers
        return self.q_proj(*inputs[:n]), self.k_proj(*inputs[n : 2 * n]), self.v_proj(*inputs[2 * n :])

    @takes_cache
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from every position of `hidden_states` (B, T, D) to itself and the positions before it.

        Args:
            hidden_states: (B, T, D).
            position_embeddings: cosines and sines, each (B, T, 1, K/2).
            attention_mask: what `create_causal_mask` made for the attention backend in use.
            past_key_values: keys and values of earlier positions; this layer's are added.
            **kwargs: what the attention backend takes besides.

        Returns:
            (B, T, D), and the attention weights (B, H, T, S) where the backend gives them.
        """
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = self.project(hidden_states)
        q = self.q_norm(q.view(shape))  # (B, T, H, K)
        k = self.k_norm(k.view(shape))  # (B, T, G, K)
        v = self.v_norm(v.view(shape))  # (B, T, G, K)
        q = apply_rotary(q, *position_embeddings).transpose(1, 2)  # (B, H, T, K)
        k = apply_rotary(k, *position_embeddings).transpose(1, 2)  # (B, G, T, K)
        v = v.transpose(1, 2)  # (B, G, T, K)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)  # (B, G, S, K)

        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(self, q, k, v, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs)
        return self.o_proj(output.reshape(*shape[:-2], -1)), weights


class FANformerMLP(nn.Module):
    """W_down(act(W_gate z) * W_up z), all three CoLA linears. Source: SwiGLU, arXiv:2002.05202, eq. 6."""

    def __init__(self, config: FANformerConfig) -> None:
        super().__init__()
        fan = config.fan_placement == "ffn"
        self.gate_up_input = readers_input(config, config.gate_up_rank, 2, fan)
        width, gain = self.gate_up_input.out_features, self.gate_up_input.gain
        self.gate_proj = scaled_linear(width, config.intermediate_size, config.projection_bias, gain)
        self.up_proj = scaled_linear(width, config.intermediate_size, config.projection_bias, gain)
        self.down_proj = branch_output(config, config.intermediate_size, config.down_rank, fan)
        self.act_fn = ACT2FN[config.hidden_act]

    def project(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return gate and up, each (B, T, F), of `z` (B, T, D)."""
        gate, up = self.gate_up_input(z)
        return self.gate_proj(gate), self.up_proj(up)

    def forward(self, z: Tensor) -> Tensor:
        """Map `z` (B, T, D) to (B, T, D), each position by itself."""
        gate, up = self.project(z)
        return self.down_proj(self.act_fn(gate) * up)


class FANformerResidual(nn.Module):
    """x + sigmoid(g) * dropout(branch), g a learnable vector of width D; without a gate, x + dropout(branch)."""

    def __init__(self, config: FANformerConfig) -> None:
        super().__init__()
        self.initial = float(config.gate_initial)
        self.gate = nn.Parameter(torch.full((config.hidden_size,), self.initial)) if config.gated_residual else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """Add `branch` to `x`, both (B, T, D)."""
        branch = self.dropout(branch)
        return x + branch if self.gate is None else x + self.gate.sigmoid() * branch


class FANformerDecoderLayer(layers.GradientCheckpointingLayer):
    """One block: y = x + attention(h), z = Norm(y), x' = z + FFN(z), both sums gated; h = Norm(x) in the first block.

    Source: HybridNorm, arXiv:2503.04598, eq. 6-7. "hybrid" takes h = x in the first block too; "pre" takes
    h = Norm(x) in every block and x' = y + FFN(z).
    """

    def __init__(self, config: FANformerConfig, layer_idx: int) -> None:
        super().__init__()
        pre_norm = config.norm_placement == "pre"
        norm_attention = pre_norm or (config.norm_placement == "hybrid-star" and layer_idx == 0)
        self.residual_after_norm = not pre_norm
        self.input_layernorm: nn.Module = nn.Identity()
        if norm_attention:
            self.input_layernorm = FANformerRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = FANformerAttention(config, layer_idx)
        self.attention_residual = FANformerResidual(config)
        self.post_attention_layernorm = FANformerRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FANformerMLP(config)
        self.mlp_residual = FANformerResidual(config)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Map `hidden_states` (B, T, D) to (B, T, D); keyword arguments go to the attention."""
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        y = self.attention_residual(hidden_states, attended)
        z = self.post_attention_layernorm(y)
        return self.mlp_residual(z if self.residual_after_norm else y, self.mlp(z))


class FANformerPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation, common to all FANformer models.

    Initialisation, all weights normal with mean 0; a product of unit-variance inputs has unit variance:

    | weight                          | standard deviation                                          |
    |---------------------------------|-------------------------------------------------------------|
    | embedding (untied)              | `embedding_initializer_range`                               |
    | LM head, tied embedding         | `initializer_range`                                         |
    | W_a, and full-rank layers       | 1 / sqrt(inputs)                                            |
    | W_b                             | gain / sqrt(R), gain = 1 / sqrt(E[act(x)^2]), x ~ N(0, 1)   |
    | the last factor of o and down   | 0: every branch starts silent                               |
    | biases; gates; norms            | all 0; all `gate_initial`; all 1                            |
    | bridge of a recurrent depth     | no random numbers: it starts as the identity                |
    """

    config: FANformerConfig
    config_class = FANformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["FANformerDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    # folders of the language model have it, which expects it itself; no other key of its head is
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.weight$"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": FANformerDecoderLayer, "attentions": FANformerAttention}

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear) and hasattr(module, "initializer_std"):
            init.normal_(module.weight, std=module.initializer_std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding) and not self.config.tie_word_embeddings:
            init.normal_(module.weight, std=self.config.embedding_initializer_range)
        elif isinstance(module, FANformerResidual) and module.gate is not None:
            init.constant_(module.gate, module.initial)
        elif isinstance(module, FANformerBridge):
            for name, value in module.initial_values().items():
                init.copy_(module.get_parameter(name), value)
        else:
            super()._init_weights(module)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save weights, configuration and code to a folder; arguments as in `PreTrainedModel.save_pretrained`."""
        self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)


def packed_documents(position_ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """Number the documents of packed rows: a new one starts wherever positions do not go on by 1.

    Positions that `attention_mask` leaves out count as absent, so padding starts no document.

    Args:
        position_ids: (B, T) or (1, T).
        attention_mask: (B, T), 1 for a token and 0 for padding, or None.

    Returns:
        (B, T) int64, or None where every row is one document (not looked for while tracing: always a tensor there).
    """
    index = torch.arange(position_ids.shape[1], device=position_ids.device)
    if attention_mask is None:
        jump = torch.diff(position_ids - index, dim=-1) != 0
        starts = F.pad(jump, (1, 0), value=False)
    else:
        present = attention_mask.bool()
        offset = position_ids - present.cumsum(-1)
        last = torch.where(present, index, -1).cummax(-1).values
        previous = F.pad(last[:, :-1], (1, 0), value=-1)  # the last token before this one, -1 for none
        starts = present & (previous >= 0) & (offset != offset.gather(1, previous.clamp(min=0)))
    if not is_tracing(starts) and not starts.any():
        return None
    return starts.cumsum(-1)


class FANformerModel(FANformerPreTrainedModel):
    """The decoder without its LM head: embedding, L blocks, final norm."""

    def __init__(self, config: FANformerConfig) -> None:
        super().__init__(config)
        # No padding_idx: it would freeze a row, and most tokenizers pad with the start or end token.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(FANformerDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = FANformerRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = FANformerRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.bridge = FANformerBridge(config) if config.recurrence is not None else None
        self.depth = Depth.default(config)  # where a call names none
        self.post_init()

    @takes_cache
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        num_steps: int | Tensor | None = None,
        exit_threshold: float | None = None,
        **kwargs: Any,
    ) -> FANformerModelOutput:
        """Run the decoder over token ids or embeddings.

        Args:
            input_ids: (B, T) int64; exactly one of this and `inputs_embeds`.
            attention_mask: (B, S), 1 for tokens and 0 for padding; or what the attention backend takes, 4-D.
            position_ids: (B, T); default 0, 1, ... after the cached ones. Where they jump within a row that starts
                without cached positions, a new document starts, and documents do not attend to each other.
            past_key_values: cache of earlier positions, extended in place.
            inputs_embeds: (B, T, D).
            use_cache: whether to make a cache where none is given; default from the configuration.
            num_steps: how often a recurrent depth runs its core, for all rows or (B,) for each; default `depth`.
            exit_threshold: relative change of a token's state from which on it takes no further step; default `depth`.
            **kwargs: passed down to the attention backend.

        Raises:
            ValueError: if not exactly one of `input_ids` and `inputs_embeds` is given, if the attention backend cannot
                apply `attention_dropout`, or as `Depth.changed` and `think`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of `input_ids` and `inputs_embeds` must be given, got both or neither.")
        if self.training and self.config.attention_dropout and self.config._attn_implementation == "flex_attention":
            raise ValueError(
                f"`attention_dropout` is {self.config.attention_dropout}, which flex_attention cannot apply: "
                'set it to 0 or use attn_implementation="sdpa".'
            )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)  # (B, T, D)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        positions_given = position_ids is not None
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)
        apart = self._same_document(position_ids, attention_mask, past_key_values) if positions_given else None
        mask = create_causal_mask(self.config, inputs_embeds, attention_mask, past_key_values, and_mask_function=apart)
        rotary = self.rotary_emb(position_ids, inputs_embeds.dtype)
        options = {"attention_mask": mask, "position_ids": position_ids, "use_cache": use_cache, **kwargs}
        run: Callable[..., Tensor] = functools.partial(self.run, position_embeddings=rotary, **options)
        depth = self.depth.changed(self.config, num_steps, exit_threshold)
        if self.bridge is None:
            hidden_states, steps = run(range(len(self.layers)), inputs_embeds, past_key_values), None
        else:
            depth.check_engine(kwargs, recomputes=self.training and self.gradient_checkpointing)
            hidden_states, steps = think(run, self.bridge, inputs_embeds, past_key_values, depth, attention_mask)
        return FANformerModelOutput(self.norm(hidden_states), past_key_values, steps=steps)

    def run(self, blocks: range, x: Tensor, past_key_values: Any, **options: Any) -> Tensor:
        """Run the blocks of these indices over `x` (B, T, D); options go to each. Returns (B, T, D)."""
        for index in blocks:
            x = self.layers[index](x, **{CACHE: past_key_values}, **options)
        return x

    def _same_document(
        self, position_ids: Tensor, attention_mask: Tensor | None, past_key_values: Cache | None
    ) -> Callable | None:
        """Return the mask function that keeps packed documents apart, or None where there is nothing to keep apart."""
        length = position_ids.shape[1]
        if length == 1 or (attention_mask is not None and attention_mask.shape[1:] != (length,)):
            return None  # one token continues its document; a 4-D mask already says everything
        keys = length
        if past_key_values is not None:
            if past_key_values.get_seq_length() != 0:
                return None  # a later chunk of one long document
            keys = past_key_values.get_mask_sizes(length, 0)[0]
        documents = packed_documents(position_ids, attention_mask)
        if documents is None:
            return None
        key_documents = F.pad(documents, (0, keys - length), value=-1)  # a static cache is longer than the row
        single = documents.shape[0] == 1  # position_ids may be shared by the batch

        def same_document(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            row = batch * 0 if single else batch
            return documents[row, query] == key_documents[row, key]

        return same_document


class FANformerForCausalLM(FANformerPreTrainedModel, Writer):
    """FANformer with an LM head: logits (B, T, V), and the loss where labels are given."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}

    def __init__(self, config: FANformerConfig) -> None:
        super().__init__(config)
        self.model = FANformerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_steps: int | Tensor | None = None,
        exit_threshold: float | None = None,
        **kwargs: Any,
    ) -> FANformerCausalLMOutput:
        """Predict the next token at every position; what is not said here is as in `FANformerModel.forward`.

        `labels` (B, T) int64 are the input ids themselves (they are shifted here), -100 where nothing is predicted. A
        keyword `shift_labels` of the same shape holds labels that are shifted already, and replaces them.
        `logits_to_keep` computes logits for this many last positions only, or for these indices; 0 is all. Other
        keywords are passed down to the attention backend and to the loss.

        Returns:
            `loss` in nats per predicted token (a scalar, where labels are given) and `logits` (B, T, V).
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            num_steps=num_steps,
            exit_threshold=exit_threshold,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        rest = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return FANformerCausalLMOutput(loss=loss, logits=logits, **rest)


class FANformerForSequenceClassification(FANformerPreTrainedModel, layers.GenericForSequenceClassification):
    """The decoder and a linear layer to `num_labels` classes of a text, read at its last token that is no padding."""

    forward = layers.GenericForSequenceClassification.forward

    def __init__(self, config: FANformerConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = FANformerModel(config)
        self.dropout = nn.Dropout(config.dropout)  # what classifies tokens uses it
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class FANformerForTokenClassification(FANformerForSequenceClassification):
    """The same for every token, each of which has read those before it only."""

    forward = layers.GenericForTokenClassification.forward


__all__ = [
    "FANformerForCausalLM",
    "FANformerForSequenceClassification",
    "FANformerForTokenClassification",
    "FANformerModel",
    "FANformerPreTrainedModel",
]
