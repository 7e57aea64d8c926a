"""How much a model prefers chosen answers to rejected ones, and the loss that teaches it to: DPO."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from fanformer.data.conversations.rows import ConversationRows
from fanformer.data.packing import IGNORED_LABEL
from fanformer.evaluation.loss import Share
from fanformer.evaluation.statistics import ratio_stderr

_CHUNK_LOGITS = 1 << 26
"""Logits that are there at a time, 256 MiB in float32."""
_ALONE = Share()


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
    return losses_of_margins(dpo_margins(policy, reference, beta)).mean()


def losses_of_margins(margins: Tensor) -> Tensor:
    """Return -log sigmoid of each margin, (N,) like them, in nats."""
    return -F.logsigmoid(margins)


def numbers_of_pairs(document_ids: Tensor) -> Tensor:
    """Return how many pairs each row holds, (B,), from the `document_ids` of rows of preferences, (B, T)."""
    return document_ids.amax(-1) // 2 + 1


def pair_log_probabilities(
    hidden: Tensor, head: Tensor, labels: Tensor, document_ids: Tensor, most_pairs: int
) -> Tensor:
    """Return the log-probability in nats of both answers of every pair, each as `document_log_probabilities` has it.

    Args:
        hidden: (B, T, D), what the LM head reads at each place.
        head: (V, D), its weight.
        labels: (B, T) int64, shifted already.
        document_ids: (B, T) int64, as `ConversationRows` gives them.
        most_pairs: P, pairs that a row may hold.

    Returns:
        (B, P, 2), chosen and rejected; 0 where a row has no such pair.
    """
    numbers = _answer_numbers(document_ids, most_pairs)
    flat = document_log_probabilities(
        hidden.flatten(0, 1), head, labels.flatten(), numbers.flatten(), 2 * most_pairs * len(labels)
    )
    return flat.view(len(labels), most_pairs, 2)


def _answer_numbers(document_ids: Tensor, most_pairs: int) -> Tensor:
    """Return `document_ids` (B, T) as numbers that no two rows share."""
    rows = torch.arange(len(document_ids), device=document_ids.device)[:, None]
    return document_ids.clamp(min=0) + 2 * most_pairs * rows


def _of_whole_logits(model: PreTrainedModel, batch: Mapping[str, Tensor], most_pairs: int) -> Tensor:
    """Return the same as `pair_log_probabilities` from what the model itself gives, which may be spread over processes.

    Logits are asked for where a row of the batch has a label.
    """
    places = torch.nonzero((batch["labels"] != IGNORED_LABEL).any(0))[:, 0]
    output = model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, logits_to_keep=places
    )
    labels, logits = batch["labels"][:, places], output.logits.float()  # (B, n) and (B, n, V)
    counted = labels != IGNORED_LABEL
    chosen = logits.gather(-1, labels.where(counted, 0)[..., None])[..., 0] - logits.logsumexp(-1)
    numbers = _answer_numbers(batch["document_ids"], most_pairs)[:, places]
    sums = torch.zeros(2 * most_pairs * len(labels), device=logits.device)
    return sums.index_add(0, numbers[counted], chosen[counted]).view(-1, most_pairs, 2)


@dataclass(frozen=True)
class PreferenceFigures:
    """How much a model prefers chosen answers to rejected ones, by pairs.

    Attributes:
        loss: DPO's, nats per pair.
        margin: mean of beta times what the chosen answer gained on the rejected one, in nats, since the reference.
        accuracy: share of the pairs whose margin is above 0.
        pairs: how many they are.
        tokens: of the rows that were read, prompts and filler among them.
        loss_stderr: standard error of `loss`, pairs being independent samples; None where there is one.
    """

    loss: float
    margin: float
    accuracy: float
    pairs: int
    tokens: int
    loss_stderr: float | None = None

    @classmethod
    def of(cls, margins: Tensor, tokens: int) -> "PreferenceFigures":
        """Return the figures of margins, (N,)."""
        wide = margins.double()
        losses = losses_of_margins(wide)
        return cls(
            loss=float(losses.mean()),
            margin=float(wide.mean()),
            accuracy=float((wide > 0).double().mean()),
            pairs=len(wide),
            tokens=tokens,
            loss_stderr=ratio_stderr(losses.numpy(), np.ones(len(wide))),
        )

    def to_dict(self) -> dict[str, float | int | None]:
        """Return the figures by name."""
        return asdict(self)

    def record(self) -> dict[str, float]:
        """Return what metrics.jsonl holds."""
        error = {} if self.loss_stderr is None else {"val_loss_stderr": self.loss_stderr}
        return {"val_loss": self.loss, **error, "val_margin": self.margin, "val_accuracy": self.accuracy}

    def told(self) -> str:
        """Return them as a line for people."""
        return (
            f"held-out loss {self.loss:.4f} nats per pair, margin {self.margin:.4f}, the chosen answer ahead in "
            f"{self.accuracy:.1%} of {self.pairs:,} pairs"
        )


@torch.no_grad()
def measure_pairs(
    model: PreTrainedModel,
    rows: ConversationRows,
    indices: Sequence[int],
    batch_size: int,
    autocast_dtype: torch.dtype | None = None,
    share: Share = _ALONE,
    between_batches: Callable[[], None] | None = None,
) -> Tensor:
    """Return the log-probabilities in nats of the pairs of rows, by a model that does not learn meanwhile.

    Args:
        model: a causal language model; its training mode is restored.
        rows: of preferences.
        indices: of the rows.
        batch_size: rows per forward pass; the last one is filled up with repetitions that do not count.
        autocast_dtype: dtype for matrix products, or None for the weights' own.
        share: which batches this process does.
        between_batches: called before every batch; may raise to end the measurement.

    Returns:
        (N, 2) float32 on the CPU, chosen and rejected, for all examples of `rows` in their order; 0 for those of other
        rows.
    """
    was_training = model.training
    model.eval()
    device = model.device
    autocast = (
        torch.autocast(device.type, dtype=autocast_dtype) if autocast_dtype is not None else contextlib.nullcontext()
    )
    found = torch.zeros(rows.num_examples, 2)
    with autocast, torch.compiler.set_stance("force_eager"):  # compiled blocks would be compiled once more
        for start in range(0, len(indices), batch_size * share.count):
            if between_batches is not None:
                between_batches()
            mine = start + share.rank * batch_size
            chosen = list(indices[mine : mine + batch_size])
            batch = rows.batch(chosen + list(indices[:1]) * (batch_size - len(chosen)))
            placed = {name: values.to(device) for name, values in batch.items()}
            values = _of_whole_logits(model, placed, rows.most_examples)
            for row, index in enumerate(chosen):
                examples = rows.examples_of(index)
                found[examples] = values[row, : len(examples)].float().cpu()
    model.train(was_training)
    return torch.tensor(share.sum(found.flatten().tolist()), dtype=torch.float32).view(-1, 2)
