"""What a run does with a causal language model of `transformers` that is not a FANformer, tried out on a few tokens."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from fanformer.errors import ConfigError
from fanformer.evaluation.loss import OURS, keeps_documents_apart

_TRIED_TOKENS = 8
_TOLERANCE = 1e-4
"""Of the largest logit; what a scale, a cap or a bias changes is much more."""


def blocks(model: PreTrainedModel) -> Sequence[nn.Module]:
    """Return the blocks of a model, which are compiled one by one; none where they are not its trunk's `layers`."""
    found = getattr(model.base_model, "layers", None)
    return list(found) if isinstance(found, nn.ModuleList) else []


def why_uncompiled(model: PreTrainedModel) -> str | None:
    """Return why a model is not compiled, None where it can be."""
    return None if blocks(model) else f"a {model.config.model_type} has no list of blocks to compile"


@torch.no_grad()
def has_plain_head(model: PreTrainedModel) -> bool:
    """Return whether the logits are products of the trunk's hidden states with the LM head and nothing else.

    A loss that is computed from these two, in parts or at some places only, is the model's own just then. Scaled or
    capped logits (Granite, Cohere, Gemma 2) and a head with a bias (Phi) are none.
    """
    if model.config.model_type in OURS:
        return True
    head, was_training = model.get_output_embeddings(), model.training
    if head is None:
        return False
    ids = torch.arange(_TRIED_TOKENS, device=model.device).remainder(model.config.vocab_size)[None]
    model.eval()
    logits = model(input_ids=ids, use_cache=False).logits.float()
    hidden = model.base_model(input_ids=ids, use_cache=False)[0]
    model.train(was_training)
    product = (hidden @ head.weight.t().to(hidden.dtype)).float()
    return product.shape == logits.shape and bool((product - logits).abs().max() <= _TOLERANCE * logits.abs().max())


def check_answers(model: PreTrainedModel, base: str, *, preference: bool) -> None:
    """Refuse a base that cannot be tuned on packed conversations.

    Args:
        model: the base.
        base: what it is called.
        preference: whether pairs of answers are learnt, from the hidden states at some places.

    Raises:
        ConfigError: if conversations of one row would see each other, or its logits are not its head's products.
    """
    if not keeps_documents_apart(model.eval()):
        raise ConfigError(
            f"{base} is a {model.config.model_type}, in which the conversations of a packed row see each other: tune "
            "it with a program that does not pack, or take another base."
        )
    if preference and not has_plain_head(model):
        raise ConfigError(
            f"{base} is a {model.config.model_type}, whose logits are more than its LM head's products, which "
            "`--preferences` needs: tune it on answers, or take another base."
        )
