"""What a block keeps for its backward pass: everything, its low-rank activations alone, or only its input."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from fanformer.errors import ConfigError

_PRODUCTS = {torch.ops.aten.mm.default: 1, torch.ops.aten.addmm.default: 2}
"""Matrix products, and the place of the second factor among their arguments."""


def set_recompute(model: PreTrainedModel, choice: str) -> None:
    """Choose what the blocks of `model` keep between forward and backward pass; the gradients stay the same bits.

    Args:
        model: a causal language model of `transformers`; must not be compiled yet.
        choice: "none" keeps everything. "low-rank" keeps W_a x of every CoLA linear, R numbers each, and computes what
            follows from them again, attention included (CoLA-M, arXiv:2502.10940). "block" keeps each block's input.

    Raises:
        ConfigError: if "low-rank" is asked of a model without CoLA linears.
    """
    if choice == "none":
        return
    settings: dict[str, Any] = {"use_reentrant": False}
    if choice == "low-rank":
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, _keeping(_first_factors(model)))
        # torch warns that compiled code may change its inputs in place; no FANformer block does
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    # transformers renamed it
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(settings)


def _first_factors(model: PreTrainedModel) -> frozenset[tuple[int, int]]:
    """Return the shapes (inputs, outputs) of the first factors of the CoLA linears."""
    factors = [module.factor for module in model.modules() if getattr(module, "factor", None) is not None]
    if not factors:
        raise ConfigError(
            "`recompute` low-rank needs CoLA linears, got a model of full rank: use block, or set a rank of the model."
        )
    return frozenset((factor.in_features, factor.out_features) for factor in factors)


def _keeping(shapes: frozenset[tuple[int, int]]) -> Callable[..., CheckpointPolicy]:
    """Return the policy that keeps the outputs of products with matrices of these shapes.

    A full-rank layer that happens to have the same shape is kept too, which costs memory and changes no number.
    """

    def policy(context: Any, operation: Any, *arguments: Any, **keywords: Any) -> CheckpointPolicy:
        place = _PRODUCTS.get(operation)
        if place is not None and tuple(arguments[place].shape) in shapes:
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return policy
