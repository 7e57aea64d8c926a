"""The equations of FANformer, written out one by one in float64: slow, literal, and the law for the model.

Each function is one equation. Matrices act as y = W x. Nothing here comes from the model's code but the names under
which a state dict holds the matrices.
"""

import math

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """w_i x_i / sqrt(mean_j x_j^2 + eps)."""
    mean_square = (x * x).sum(-1, keepdim=True) / x.shape[-1]
    return weight * x / torch.sqrt(mean_square + eps)


def silu(x: Tensor) -> Tensor:
    """x / (1 + e^-x)."""
    return x / (1 + torch.exp(-x))


def gelu(x: Tensor) -> Tensor:
    """x Phi(x), Phi the normal distribution function."""
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def identity(x: Tensor) -> Tensor:
    """x."""
    return x


def residual(x: Tensor) -> Tensor:
    """x + x / (1 + e^-x)."""
    return x + silu(x)


ACTIVATIONS = {"silu": silu, "gelu": gelu, "linear": identity, "residual": residual}


def affine(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """W x + b."""
    y = torch.einsum("oi,...i->...o", weight, x)
    return y if bias is None else y + bias


def cola(
    x: Tensor,
    w_a: Tensor | None,
    w_b: Tensor,
    bias: Tensor | None,
    activation: str,
    norm: Tensor | None = None,
    eps: float = 0.0,
    periodic: int = 0,
) -> Tensor:
    """W_b [cos(p) || sin(p) || act(g)] + b, [p || g] = W_a x or Norm(W_a x); without W_a, at full rank, W_b x + b."""
    if w_a is None:
        return affine(x, w_b, bias)
    inner = affine(x, w_a) if norm is None else rms_norm(affine(x, w_a), norm, eps)
    return affine(fan(inner[..., :periodic], ACTIVATIONS[activation](inner[..., periodic:])), w_b, bias)


def fan(p: Tensor, g: Tensor) -> Tensor:
    """[cos(p) || sin(p) || g]."""
    return torch.cat([torch.cos(p), torch.sin(p), g], dim=-1)


def periodic_width(channels: int, config) -> int:
    """P: of the multiples of m up to half the channels, the one nearest to p * channels; int(p * channels) at m = 1.

    m is the largest power of two up to `fan_multiple` that divides the channels and is neither above p * channels nor
    above (1 - 2p) * channels, unless this is 0.
    """
    share = config.fan_ratio * channels
    limit = min(config.fan_multiple, share, channels - 2 * share or share)
    powers = [2**i for i in range(1, 20) if 2**i <= limit and channels % 2**i == 0]
    if not powers:
        return int(share)
    return min(range(0, channels // 2 + 1, powers[-1]), key=lambda width: (abs(width - share), width))


def fan_layer(x: Tensor, weight: Tensor, bias: Tensor, periodic: int) -> Tensor:
    """FANLayer': [cos(W_p x + B_p) || sin(W_p x + B_p) || W_g x + B_g], W_p of P rows."""
    p = affine(x, weight[:periodic], bias[:periodic])
    g = affine(x, weight[periodic:], bias[periodic:])
    return fan(p, g)


def rope_frequencies(head_dim: int, theta: float) -> Tensor:
    """theta^(-2i/K) for i in [0, K/2)."""
    return torch.tensor([theta ** (-2 * i / head_dim) for i in range(head_dim // 2)], dtype=torch.float64)


def rope(x: Tensor, theta: float) -> Tensor:
    """Turn channels (i, i + K/2) of x (T, K) at position t by the angle t theta^(-2i/K)."""
    length, width = x.shape
    angle = torch.arange(length, dtype=torch.float64)[:, None] * rope_frequencies(width, theta)[None, :]
    first, second = x[:, : width // 2], x[:, width // 2 :]
    turned_first = first * torch.cos(angle) - second * torch.sin(angle)
    turned_second = first * torch.sin(angle) + second * torch.cos(angle)
    return torch.cat([turned_first, turned_second], dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v, each position seeing itself and those before it; all (T, K)."""
    scores = torch.einsum("tc,sc->ts", q, k) / math.sqrt(q.shape[-1])
    seen = torch.tril(torch.ones_like(scores)).bool()
    weights = torch.exp(scores - scores.detach().max(-1, keepdim=True).values) * seen
    weights = weights / weights.sum(-1, keepdim=True)
    return torch.einsum("ts,sc->tc", weights, v)


class Layer:
    """The parameters of one part of the state dict, by the end of their names."""

    def __init__(self, state: dict[str, Tensor], prefix: str) -> None:
        self.state, self.prefix = state, prefix

    def __getitem__(self, name: str) -> Tensor:
        return self.state[self.prefix + name]

    def get(self, name: str) -> Tensor | None:
        """Return a parameter, or None where the configuration has none."""
        return self.state.get(self.prefix + name)


def branch_output(x: Tensor, layer: Layer, name: str, rank: int | None, branch: str, config) -> Tensor:
    """The CoLA linear that ends a branch, stored as two factors, or at full rank as one matrix."""
    if rank is None:
        return affine(x, layer[f"{name}.weight"], layer.get(f"{name}.bias"))
    w_a, w_b = layer[f"{name}.input.factor.weight"], layer[f"{name}.output.weight"]
    bias = layer.get(f"{name}.output.bias")
    return cola(x, w_a, w_b, bias, config.writer_activation, periodic=between(w_b, branch, config))


def between(w_b: Tensor, branch: str, config) -> int:
    """P between two factors, of the R channels that W_b reads."""
    return periodic_width(w_b.shape[1], config) if config.fan_placement == branch else 0


def first_factors(layer: Layer, name: str, readers: int, config) -> list[Tensor]:
    """W_a of each reader of one input: stored one above the other, or one for all."""
    stored = layer[f"{name}.factor.weight"]
    return [stored] * readers if config.cola_input == "shared" else list(stored.chunk(readers))


def projections(x: Tensor, layer: Layer, config) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K and V (T, heads * head width): FAN projections or CoLA linears, their W_a stored one above the other."""
    act, norm, eps = config.cola_activation, layer.get("qkv_input.norm.weight"), config.rms_norm_eps
    count = 6 if config.fan_placement == "projection" else 3
    factors = [None] * count
    if config.qkv_rank is not None:
        factors = first_factors(layer, "qkv_input", count, config)
    result = []
    for name in ("q_proj", "k_proj", "v_proj"):
        if config.fan_placement == "projection":
            p = cola(x, factors.pop(0), layer[f"{name}.periodic.weight"], None, act, norm, eps)
            bias = layer.get(f"{name}.linear.bias")
            result.append(fan(p, cola(x, factors.pop(0), layer[f"{name}.linear.weight"], bias, act, norm, eps)))
        else:
            w_b, bias = layer[f"{name}.weight"], layer.get(f"{name}.bias")
            result.append(cola(x, factors.pop(0), w_b, bias, act, norm, eps, between(w_b, "attention", config)))
    return tuple(result)


def attention(x: Tensor, layer: Layer, config) -> Tensor:
    """ATF of x (T, D), one query head at a time."""
    width, theta, eps = config.head_dim, config.rope_parameters["rope_theta"], config.rms_norm_eps
    if config.fan_placement == "layer":
        parts = layer["fan_layer.projection.weight"], layer["fan_layer.projection.bias"]
        x = fan_layer(x, *parts, periodic_width(x.shape[-1], config))
    q_all, k_all, v_all = projections(x, layer, config)
    outputs = []
    for head in range(config.num_attention_heads):
        group = head // (config.num_attention_heads // config.num_key_value_heads)
        q = q_all[:, head * width : (head + 1) * width]
        k = k_all[:, group * width : (group + 1) * width]
        v = v_all[:, group * width : (group + 1) * width]
        if config.qkv_norm == "qkv":
            q = rms_norm(q, layer["q_norm.weight"], eps)
            k = rms_norm(k, layer["k_norm.weight"], eps)
            v = rms_norm(v, layer["v_norm.weight"], eps)
        outputs.append(attend(rope(q, theta), rope(k, theta), v))
    return branch_output(torch.cat(outputs, dim=-1), layer, "o_proj", config.o_rank, "attention", config)


def swiglu(z: Tensor, layer: Layer, config) -> Tensor:
    """W_down(act(W_gate z) * W_up z), gate and up CoLA linears, and down where the configuration says so."""
    gate_a, up_a = None, None
    if config.gate_up_rank is not None:
        gate_a, up_a = first_factors(layer, "gate_up_input", 2, config)
    act, norm, eps = config.cola_activation, layer.get("gate_up_input.norm.weight"), config.rms_norm_eps
    periodic = between(layer["gate_proj.weight"], "ffn", config)
    gate = cola(z, gate_a, layer["gate_proj.weight"], layer.get("gate_proj.bias"), act, norm, eps, periodic)
    up = cola(z, up_a, layer["up_proj.weight"], layer.get("up_proj.bias"), act, norm, eps, periodic)
    product = ACTIVATIONS[config.hidden_act](gate) * up
    return branch_output(product, layer, "down_proj", config.down_rank, "ffn", config)


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    """x + sigmoid(g) * branch, or x + branch without a gate."""
    return x + branch if gate is None else x + branch / (1 + torch.exp(-gate))


def block(x: Tensor, index: int, state: dict[str, Tensor], config) -> Tensor:
    """h = Norm(x) or x;  y = x + ATF(h);  z = Norm(y);  x' = z + FFN(z), or y + FFN(z) in pre-norm; sums gated."""
    prefix, eps = f"model.layers.{index}.", config.rms_norm_eps
    layer = Layer(state, prefix)
    norm_attention = {"pre": True, "hybrid": False, "hybrid-star": index == 0}[config.norm_placement]
    h = rms_norm(x, layer["input_layernorm.weight"], eps) if norm_attention else x
    attended = attention(h, Layer(state, prefix + "self_attn."), config)
    y = gated_residual(x, attended, layer.get("attention_residual.gate"))
    z = rms_norm(y, layer["post_attention_layernorm.weight"], eps)
    kept = y if config.norm_placement == "pre" else z
    return gated_residual(kept, swiglu(z, Layer(state, prefix + "mlp."), config), layer.get("mlp_residual.gate"))


def bridge(h: Tensor, e: Tensor, state: dict[str, Tensor], config) -> Tensor:
    """a h + Norm(e), a = 1 in "add"; W [h || Norm(e)] in "concat"."""
    normed = rms_norm(e, state["model.bridge.norm_weight"], config.rms_norm_eps)
    if config.injection == "concat":
        return affine(torch.cat([h, normed], dim=-1), state["model.bridge.linear.weight"])
    return (h if config.injection == "add" else state["model.bridge.scale"] * h) + normed


def blocks(x: Tensor, first: int, last: int, state: dict[str, Tensor], config) -> Tensor:
    """Blocks `first` to `last` - 1, one after the other."""
    for index in range(first, last):
        x = block(x, index, state, config)
    return x


def decoder(x: Tensor, state: dict[str, Tensor], config, num_steps: int) -> Tensor:
    """All blocks, the core's num_steps times: h_1 = core(e), h_s = core(bridge(h_(s-1), e)), e the prelude's output."""
    if config.core_layers is None:
        return blocks(x, 0, config.num_hidden_layers, state, config)
    first, last = config.prelude_layers, config.prelude_layers + config.core_layers
    e = blocks(x, 0, first, state, config)
    h = blocks(e, first, last, state, config)
    for _ in range(num_steps - 1):
        h = blocks(bridge(h, e, state, config), first, last, state, config)
    return blocks(h, last, config.num_hidden_layers, state, config)


def logits(state: dict[str, Tensor], config, input_ids: Tensor, num_steps: int = 1) -> Tensor:
    """Return float64 logits (B, T, V) of `input_ids` (B, T), one row at a time."""
    embedding = state["model.embed_tokens.weight"]
    head = embedding if config.tie_word_embeddings else state["lm_head.weight"]
    rows = []
    for row in input_ids:
        x = decoder(embedding[row], state, config, num_steps)
        rows.append(affine(rms_norm(x, state["model.norm.weight"], config.rms_norm_eps), head))
    return torch.stack(rows)
