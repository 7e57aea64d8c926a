"""Pairs of answers as what a run trains on: the loss is DPO's, against what the base gives both."""

import dataclasses
from typing import Any

from transformers import PreTrainedModel

from fanformer.data.conversations.rows import ConversationRows
from fanformer.evaluation.loss import every_nth
from fanformer.evaluation.preferences import PreferenceFigures, dpo_margins, measure_pairs
from fanformer.training.configuration import PREFERENCES
from fanformer.training.conversation_corpus import open_conversations
from fanformer.training.corpus import Corpus, Opening
from fanformer.training.events import Start
from fanformer.training.pair_loss import PairLoss, ReferencedRows
from fanformer.training.references import set_references


def preference_corpus(opening: Opening) -> Corpus:
    """Open pairs of answers: every row of `data` that is one, and `eval_data` or a part of `data` to measure on.

    Raises:
        ConfigError, DataError, CheckpointError: as `open_conversations`.
    """
    config = opening.config
    beta = config.dpo_beta or float(PREFERENCES["dpo_beta"])
    opened = open_conversations(opening, preference=True)
    rows, held_out = ReferencedRows(opened.rows), ReferencedRows(opened.held_out)

    def prepare(start: Start) -> None:
        splits = {"train": rows, "held_out": held_out}
        set_references(config.folder, splits, opened.description["fingerprint"], opened.load_base, start)

    def measure(
        model: PreTrainedModel, batch_size: int, max_tokens: int | None = None, **options: Any
    ) -> PreferenceFigures:
        return _figures(model, held_out, beta, batch_size, max_tokens, **options)

    used = f"{opened.rows.num_examples:,} pairs, {opened.rows.num_labels:,} tokens of answers"
    corpus = opened.corpus(rows, PairLoss(beta), used, measure)
    return dataclasses.replace(corpus, prepare=prepare, description={**opened.description, "dpo_beta": beta})


def _figures(
    model: PreTrainedModel,
    held_out: ReferencedRows,
    beta: float,
    batch_size: int,
    max_tokens: int | None,
    **options: Any,
) -> PreferenceFigures:
    """Return the figures of all rows, or of some of about `max_tokens`; others as `measure_pairs` takes them."""
    rows: ConversationRows = held_out.rows
    indices = every_nth(len(rows), len(rows) if max_tokens is None else max_tokens // rows.tokens_per_row)
    policy = measure_pairs(model, rows, indices, batch_size, **options)
    examples = [example for index in indices for example in rows.examples_of(index)]
    margins = dpo_margins(policy[examples], held_out.reference[examples], beta)
    return PreferenceFigures.of(margins, len(indices) * rows.tokens_per_row)
