"""Held-out loss, perplexity and bits per byte, every token predicted exactly once."""

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fanformer.data.packing import PackedRows, evaluation_rows
from fanformer.data.prepared import TokenStream
from fanformer.data.token_files import lay_out
from fanformer.data.tokenizer import encode_documents, end_token_id, start_token_id
from fanformer.errors import DataError


@dataclass(frozen=True)
class HeldOutLoss:
    """Loss on a stream of documents.

    Attributes:
        loss: nats per predicted token.
        perplexity: exp(loss).
        bits_per_byte: bits to code the text, over its length in UTF-8 bytes; comparable across tokenizers.
        tokens: predicted tokens, the end of each document among them.
        bytes: UTF-8 bytes that these tokens stand for.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int

    def to_dict(self) -> dict[str, float | int]:
        """Return the figures by name."""
        return asdict(self)


@dataclass(frozen=True)
class Share:
    """This process's share of an evaluation that several do together.

    Attributes:
        rank: number of this process.
        count: number of processes.
        sum: returns the sums of numbers over all processes.
    """

    rank: int = 0
    count: int = 1
    sum: Callable[[Sequence[float]], list[float]] = list


def summarize(total_nats: float, tokens: int, num_bytes: int) -> HeldOutLoss:
    """Return the figures for `total_nats` of surprise over `tokens` predictions of `num_bytes` bytes."""
    loss = total_nats / tokens
    return HeldOutLoss(
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        bits_per_byte=total_nats / math.log(2) / num_bytes,
        tokens=tokens,
        bytes=num_bytes,
    )


def every_nth(count: int, wanted: int) -> list[int]:
    """Return at most `wanted` of the indices below `count`, evenly spread and always the same ones."""
    wanted = max(1, min(count, wanted))
    return [index * count // wanted for index in range(wanted)]


@torch.no_grad()
def total_surprise(
    model: PreTrainedModel,
    rows: Dataset[dict[str, Tensor]],
    indices: list[int],
    batch_size: int,
    autocast_dtype: torch.dtype | None = None,
    share: Share = Share(),  # frozen
    between_batches: Callable[[], None] | None = None,
) -> tuple[float, int]:
    """Sum the surprise of the labels of the given rows.

    Batches always have `batch_size` rows, the last one filled up with repetitions that do not count, so that the
    result does not depend on how the rows divide. Every process does as many of them.

    Args:
        model: a causal language model; its training mode is restored.
        rows: items with `input_ids`, `position_ids` and `labels` (already shifted, -100 where nothing is predicted).
        indices: which rows.
        batch_size: rows per forward pass.
        autocast_dtype: dtype for matrix products, or None for the weights' own.
        share: which batches this process does.
        between_batches: called before every batch; may raise to end the evaluation.

    Returns:
        Nats in all, and the number of predicted tokens, of all processes together.
    """
    was_training = model.training
    model.eval()
    device = model.device
    total = torch.zeros((), dtype=torch.float64)
    tokens = 0
    autocast = (
        torch.autocast(device.type, dtype=autocast_dtype) if autocast_dtype is not None else contextlib.nullcontext()
    )
    # The compiled blocks of a training run would be compiled once more for evaluation.
    with autocast, torch.compiler.set_stance("force_eager"):
        for start in range(0, len(indices), batch_size * share.count):
            if between_batches is not None:
                between_batches()
            mine = start + share.rank * batch_size
            chosen = indices[mine : mine + batch_size]
            padded = chosen + indices[:1] * (batch_size - len(chosen))
            items = [rows[index] for index in padded]
            batch = {name: torch.stack([item[name] for item in items]).to(device) for name in items[0]}
            batch["labels"][len(chosen) :] = -100
            logits = model(
                input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
            ).logits  # (B, T, V)
            labels = batch["labels"].flatten()
            surprise = F.cross_entropy(logits.flatten(0, 1).float(), labels, ignore_index=-100, reduction="sum")
            total += surprise.double().cpu()
            tokens += int((labels != -100).sum())
    model.train(was_training)
    nats, tokens_of_all = share.sum([float(total), tokens])
    return nats, int(tokens_of_all)


def held_out_loss(
    model: PreTrainedModel,
    stream: TokenStream,
    sequence_length: int,
    batch_size: int,
    max_tokens: int | None = None,
    autocast_dtype: torch.dtype | None = None,
    share: Share = Share(),  # frozen
    between_batches: Callable[[], None] | None = None,
) -> HeldOutLoss:
    """Measure the loss on a stream of documents, packed into rows of `sequence_length`.

    Args:
        model: a causal language model.
        stream: the documents' tokens.
        sequence_length: longest context a token is predicted from.
        batch_size: rows per forward pass.
        max_tokens: measure on about this many tokens, evenly spread rows of the stream; None is all of them.
        autocast_dtype: dtype for matrix products, or None for the weights' own.
        share: which batches this process does.
        between_batches: called before every batch; may raise to end the evaluation.
    """
    rows: PackedRows = evaluation_rows(stream, sequence_length)
    wanted = len(rows) if max_tokens is None else max_tokens // sequence_length
    indices = every_nth(len(rows), wanted)
    nats, tokens = total_surprise(model, rows, indices, batch_size, autocast_dtype, share, between_batches)
    measured = len(indices) / len(rows)  # of the text, in equal rows but for the last
    num_bytes = stream.num_bytes if len(indices) == len(rows) else max(1, round(stream.num_bytes * measured))
    return summarize(nats, tokens, num_bytes)


def evaluate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    sequence_length: int | None = None,
    batch_size: int = 8,
    autocast_dtype: torch.dtype | None = None,
) -> dict[str, float | int]:
    """Measure loss, perplexity and bits per byte on texts, each a document of its own.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        texts: the documents.
        sequence_length: longest context a token is predicted from; default the model's `max_position_embeddings`.
        batch_size: rows per forward pass.
        autocast_dtype: dtype for matrix products, or None for the weights' own.

    Raises:
        DataError: if there is no text.
    """
    documents = list(texts)
    num_bytes = sum(len(text.encode("utf-8", "surrogatepass")) for text in documents)
    if num_bytes == 0:
        raise DataError("there is no text to evaluate: got 0 bytes.")
    start, end = start_token_id(tokenizer), end_token_id(tokenizer)
    ids = [np.array(document, dtype=np.uint32) for document in encode_documents(tokenizer, documents)]
    tokens = lay_out(ids, start, end, np.dtype(np.uint32), close=True)
    stream = TokenStream(tokens, start, end, len(documents), num_bytes)
    length = sequence_length or int(getattr(model.config, "max_position_embeddings", 1024))
    return held_out_loss(model, stream, length, batch_size, autocast_dtype=autocast_dtype).to_dict()
