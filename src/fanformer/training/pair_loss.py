"""The loss of preferences, as a run's step takes it: rows that bring what the base gives their answers, and DPO."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from fanformer.data.conversations.rows import ConversationRows
from fanformer.evaluation.preferences import dpo_margins, losses_of_margins, numbers_of_pairs, pair_log_probabilities


class ReferencedRows:
    """Rows of preferences with `reference`, what the base gives the two answers of each pair.

    Attributes:
        rows: the rows.
        reference: (N, 2) float32, log-probabilities in nats of the chosen and the rejected answer of each example.
    """

    digested = ConversationRows.digested

    def __init__(self, rows: ConversationRows) -> None:
        """Take rows; `reference` is zero until somebody sets it."""
        self.rows = rows
        self.reference = torch.zeros(rows.num_examples, 2)

    def __len__(self) -> int:
        """Return how many rows there are."""
        return len(self.rows)

    def batch(self, indices: list[int]) -> dict[str, Tensor]:
        """Return several rows: what `ConversationRows.batch` gives, and `reference`, (B, P, 2), 0 where no pair is."""
        reference = torch.zeros(len(indices), self.rows.most_examples, 2)
        for place, index in enumerate(indices):
            examples = self.rows.examples_of(index)
            reference[place, : len(examples)] = self.reference[examples]
        return {**self.rows.batch(indices), "reference": reference}


@dataclass
class PairOutput(CausalLMOutputWithPast):
    """What a forward pass on preferences gives.

    Attributes:
        figures: (2,), this batch's share of the step's mean margin and accuracy.
    """

    figures: Tensor | None = None


class PairLoss:
    """DPO's loss (arXiv:2305.18290, eq. 7), a mean over all pairs of a step, with its margin and accuracy."""

    figures = ("margin", "accuracy")

    def __init__(self, beta: float) -> None:
        """Take beta, how strongly leaving the reference counts, above 0."""
        self.beta = beta

    def install(self, model: PreTrainedModel, compile_options: Mapping[str, Any] | None) -> None:
        """Let the model compute it where a batch has `reference`, without dropout, as the reference was measured.

        Args:
            model: a causal language model of `transformers` whose logits are its LM head's products (`check_answers`).
            compile_options: are not used: logits are there at learnt places only.
        """
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 0.0
        plain: Callable[..., CausalLMOutputWithPast] = model.forward

        @wraps(plain)  # `generate` reads its signature
        def forward(*arguments: Any, **inputs: Any) -> CausalLMOutputWithPast:
            if "reference" not in inputs:
                return plain(*arguments, **inputs)
            reference, documents = inputs.pop("reference"), inputs.pop("document_ids")
            labels, count = inputs.pop("labels"), inputs.pop("num_items_in_batch")
            inputs.pop("shift_labels", None)
            hidden = model.base_model(*arguments, **inputs).last_hidden_state
            most = reference.shape[1]
            policy = pair_log_probabilities(hidden, model.get_output_embeddings().weight, labels, documents, most)
            there = torch.arange(most, device=documents.device) < numbers_of_pairs(documents)[:, None]  # (B, P)
            margins = dpo_margins(policy[there], reference[there], self.beta)
            ahead = (margins > 0).to(margins.dtype)
            figures = torch.stack((margins.detach().sum(), ahead.sum())) / count
            return PairOutput(loss=losses_of_margins(margins).sum() / count, figures=figures)

        model.forward = forward

    def count(self, batch: Mapping[str, Tensor]) -> int:
        """Return how many pairs a batch has."""
        return int(numbers_of_pairs(batch["document_ids"]).sum())
