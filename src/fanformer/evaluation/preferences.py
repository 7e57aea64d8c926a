"""How much a model prefers chosen answers to rejected ones, and the loss that teaches it to: DPO."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fanformer.data.packing import IGNORED_LABEL

_CHUNK_LOGITS = 1 << 26
"""Logits that are there at a time, 256 MiB in float32."""


def document_log_probabilities(
    hidden: Tensor, head: Tensor, labels: Tensor, document_ids: Tensor, num_documents: int, rows: int | None = None
) -> Tensor:
    """Return the log-probability in nats of the labels of each document, summed, in float32 or wider.

    Logits are computed for the places that have a label only, some rows at a time, and again in the backward pass, so
    that no more of them are ever there.

    Args:
        hidden: (N, D), what the LM head reads at each place.
        head: (V, D), its weight.
        labels: (N,) int64, shifted already; IGNORED_LABEL where nothing is predicted.
        document_ids: (N,) int64, which document each place belongs to; places without a label may have any.
        num_documents: how many documents there are.
        rows: places at a time; None takes as many as make 2^26 logits.

    Returns:
        (num_documents,), 0 for a document without labels.
    """
    counted = labels != IGNORED_LABEL
    hidden, labels, document_ids = hidden[counted], labels[counted], document_ids[counted]
    rows = rows or max(1, _CHUNK_LOGITS // head.shape[0])
    parts = [
        checkpoint(_log_probabilities, some, head, targets, use_reentrant=False)
        for some, targets in zip(hidden.split(rows), labels.split(rows), strict=True)
    ]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    totals = torch.zeros(num_documents, dtype=wide, device=hidden.device)
    return totals.index_add(0, document_ids, torch.cat(parts)) if parts else totals


def _log_probabilities(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Return log softmax(hidden head^T)[label] of each row: `hidden` (n, D), `head` (V, D), `labels` (n,)."""
    logits = hidden @ head.t()
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.gather(-1, labels[:, None])[:, 0] - wide.logsumexp(-1)


def dpo_margins(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Return beta (log pi(y_w) / pi_ref(y_w) - log pi(y_l) / pi_ref(y_l)) of each pair: above 0 where it is learnt.

    Source: DPO, arXiv:2305.18290, eq. 7: the argument of its sigmoid.

    Args:
        policy: (N, 2), log-probability in nats of the chosen and of the rejected answer by the model that learns.
        reference: (N, 2), by the model that it began as.
        beta: how strongly leaving the reference counts, above 0.

    Returns:
        (N,).
    """
    gained = policy - reference
    return beta * (gained[:, 0] - gained[:, 1])


def dpo_loss(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Return the mean over pairs of -log sigmoid of their margin, as a scalar in nats.

    Source: DPO, arXiv:2305.18290, eq. 7.

    Args:
        policy: (N, 2), as in `dpo_margins`, like the next two.
        reference: (N, 2).
        beta: above 0.
    """
    return -F.logsigmoid(dpo_margins(policy, reference, beta)).mean()
