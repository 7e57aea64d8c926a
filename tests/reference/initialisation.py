"""What each parameter starts as, by its name: the table of the design, with the gains integrated numerically."""

import math

import torch

from tests.reference.fanformer_float64 import ACTIVATIONS, between


def mean_square(activation: str) -> float:
    """E[act(x)^2] for a standard normal x, integrated over [-12, 12]."""
    x = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    density = torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    return torch.trapezoid(ACTIVATIONS[activation](x) ** 2 * density, x).item()


def expected_start(name: str, shape: torch.Size, config) -> tuple[float, float]:
    """Return mean and standard deviation of the parameter `name` before training."""
    if "norm" in name:
        return 1.0, 0.0
    if name.endswith("residual.gate"):
        return config.gate_initial, 0.0
    if len(shape) == 1:  # biases
        return 0.0, 0.0
    if name == "lm_head.weight":
        return 0.0, config.initializer_range
    if name == "model.embed_tokens.weight":
        return 0.0, config.initializer_range if config.tie_word_embeddings else config.embedding_initializer_range
    std = shape[1] ** -0.5
    first_factor = name.endswith("factor.weight") or "fan_layer" in name
    if first_factor:
        return 0.0, std
    if "o_proj" in name or "down_proj" in name:
        return 0.0, 0.0
    branch = "attention" if "self_attn" in name else "ffn"
    rank = {"attention": config.qkv_rank, "ffn": config.gate_up_rank}[branch]
    if rank is not None:
        periodic = between(torch.empty(shape), branch, config)
        square = (periodic + (rank - 2 * periodic) * mean_square(config.cola_activation)) / rank
        std /= math.sqrt(square)
    return 0.0, std


def assert_starts_as_expected(name: str, parameter: torch.Tensor, config) -> None:
    """Compare a parameter's mean and standard deviation with the table, within 5 standard errors."""
    mean, std = expected_start(name, parameter.shape, config)
    if std == 0.0:
        assert torch.equal(parameter, torch.full_like(parameter, mean)), f"{name} is not all {mean}"
        return
    count = parameter.numel()
    found_mean, found_std = parameter.double().mean().item(), parameter.double().std().item()
    assert abs(found_mean - mean) < 5 * std / math.sqrt(count), f"{name}: mean {found_mean}, expected {mean}"
    assert abs(found_std - std) < 5 * std / math.sqrt(2 * count), f"{name}: std {found_std}, expected {std}"
