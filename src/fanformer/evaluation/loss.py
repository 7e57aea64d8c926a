"""Held-out loss, perplexity and bits per byte with their standard errors, every token predicted exactly once."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, TypedDict, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fanformer.data.multimodal import MEDIA_INPUTS
from fanformer.data.packing import IGNORED_LABEL, PackedRows, places_of_text
from fanformer.data.prepared import TokenStream
from fanformer.data.token_files import lay_out
from fanformer.data.tokenizer import encode_documents
from fanformer.errors import DataError, NotANumberError
from fanformer.evaluation.statistics import ratio_stderr

if TYPE_CHECKING:
    from fanformer.data.conversations.rows import ConversationRows

LONGEST_DEFAULT_CONTEXT = 2048
"""Tokens of context above which a model's own longest context is no longer the default."""
_UNITS_PER_NAT = 1 << 24
"""Surprise is summed in such units: whole numbers, whose float64 sums are exact, in any order, up to 2^29 nats."""


OURS = ("fanformer", "fanformer_multimodal")
"""Types of models of which it is known what others are tried out for."""


@dataclass(frozen=True)
class HeldOutLoss:
    """Loss on documents; standard errors take them for independent samples, and are None where fewer than two are.

    Attributes:
        loss: nats per predicted token.
        perplexity: exp(loss).
        bits_per_byte: bits to code the text, over its length in UTF-8 bytes; comparable across tokenizers.
        tokens: predicted tokens, the end of each document among them.
        bytes: UTF-8 bytes that these tokens stand for.
        documents: documents with a predicted token.
        loss_stderr: standard error of `loss`.
        perplexity_stderr: standard error of `perplexity`, to first order.
        bits_per_byte_stderr: standard error of `bits_per_byte`; None also where documents' bytes are not known.
        exact: share of the documents that greedy decoding would write, each token being the likeliest; of answers only.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    documents: int
    loss_stderr: float | None = None
    perplexity_stderr: float | None = None
    bits_per_byte_stderr: float | None = None
    exact: float | None = None

    def to_dict(self) -> dict[str, float | int | None]:
        """Return the figures by name."""
        return asdict(self)

    def record(self) -> dict[str, float]:
        """Return what metrics.jsonl holds; one document gives no standard error."""
        error = {} if self.loss_stderr is None else {"val_loss_stderr": self.loss_stderr}
        exact = {} if self.exact is None else {"val_exact": self.exact}
        return {"val_loss": self.loss, **error, "val_bits_per_byte": self.bits_per_byte, **exact}

    def told(self) -> str:
        """Return loss and bits per byte as a line for people."""
        exact = "" if self.exact is None else f", {self.exact:.2%} of {self.documents:,} answers to the letter"
        return f"held-out loss {self.loss:.4f} nats per token, {self.bits_per_byte:.4f} bits per byte{exact}"


@dataclass(frozen=True)
class DocumentSums:
    """What a model said about documents, one number for each.

    Attributes:
        nats: (N,) float64, surprise.
        tokens: (N,) int64, predicted tokens.
        bytes: (N,) int64, UTF-8 bytes.
    """

    nats: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray

    @classmethod
    def join(cls, parts: Iterable["DocumentSums"]) -> "DocumentSums":
        """Return the documents of all parts as one."""
        nats, tokens, num_bytes = zip(*((part.nats, part.tokens, part.bytes) for part in parts), strict=True)
        return cls(np.concatenate(nats), np.concatenate(tokens), np.concatenate(num_bytes))

    def select(self, chosen: np.ndarray) -> "DocumentSums":
        """Return the documents where `chosen` (N,) is True."""
        return DocumentSums(self.nats[chosen], self.tokens[chosen], self.bytes[chosen])

    def figures(self) -> HeldOutLoss:
        """Return the loss over all these documents."""
        return summarize(self.nats, self.tokens, int(self.bytes.sum()), self.bytes)


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


class Passes(TypedDict, total=False):
    """How an evaluation goes through its rows.

    Attributes:
        autocast_dtype: dtype for matrix products, or None, the default, for the weights' own.
        share: which batches this process does; default: all.
        between_batches: called before every batch; may raise to end the evaluation.
    """

    autocast_dtype: torch.dtype | None
    share: Share
    between_batches: Callable[[], None] | None


def summarize(
    nats: np.ndarray, tokens: np.ndarray, num_bytes: int, document_bytes: np.ndarray | None = None
) -> HeldOutLoss:
    """Return the figures of documents.

    Args:
        nats: (N,) surprise of each document.
        tokens: (N,) predicted tokens of each.
        num_bytes: UTF-8 bytes that the tokens of all stand for.
        document_bytes: (N,) the same by document, where that is known.
    """
    total_nats, total_tokens = float(nats.sum()), int(tokens.sum())
    loss = total_nats / total_tokens
    perplexity = math.exp(loss) if loss < 700 else math.inf
    loss_stderr = ratio_stderr(nats, tokens)
    return HeldOutLoss(
        loss=loss,
        perplexity=perplexity,
        bits_per_byte=total_nats / math.log(2) / num_bytes,
        tokens=total_tokens,
        bytes=num_bytes,
        documents=int(np.count_nonzero(tokens)),
        loss_stderr=loss_stderr,
        perplexity_stderr=None if loss_stderr is None else perplexity * loss_stderr,
        bits_per_byte_stderr=None if document_bytes is None else ratio_stderr(nats / math.log(2), document_bytes),
    )


def every_nth(count: int, wanted: int) -> list[int]:
    """Return at most `wanted` of the indices below `count`, evenly spread and always the same ones."""
    wanted = max(1, min(count, wanted))
    return [index * count // wanted for index in range(wanted)]


@torch.no_grad()
def keeps_documents_apart(model: PreTrainedModel) -> bool:
    """Return whether position ids that restart within a row hide what stands before from what follows.

    For a model that is not a FANformer this is tried out on rows of 16 tokens: the logits of the second of two
    documents must be the same after another first one, and in a row of its own.
    """
    if model.config.model_type in OURS:
        return True
    length = 8
    ids = torch.arange(1, 2 * length + 1, device=model.device).remainder(model.config.vocab_size).repeat(2, 1)
    ids[1, :length] = ids[1, :length].flip(0)
    positions = torch.arange(length, device=model.device).repeat(2).repeat(2, 1)
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits.float()
    # what leaks is many times larger than the rounding of the narrowest format
    tolerance = 1e-5 if model.dtype == torch.float32 else 1e-2
    alone = model(input_ids=ids[:, length:], position_ids=positions[:, length:], use_cache=False).logits.float()
    # the same second document twice, and a third time in a row of its own
    differences = torch.stack([logits[0, length:] - logits[1, length:], logits[0, length:] - alone[0]])
    return bool(differences.abs().max() <= tolerance * logits.abs().max())


def _separate(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give every piece of a document in packed rows a row of its own, filled up on its right.

    Args:
        batch: `input_ids`, `position_ids`, `labels` and `documents`, each (B, T).
    """
    pieces: dict[str, list[Tensor]] = {name: [] for name in batch}
    fills = {"labels": IGNORED_LABEL}
    for row, positions in enumerate(batch["position_ids"]):
        starts = [*torch.nonzero(positions == 0).flatten().tolist(), len(positions)]
        for start, stop in itertools.pairwise(starts):
            if (batch["labels"][row, start:stop] != IGNORED_LABEL).any():
                for name, values in batch.items():
                    pieces[name].append(values[row, start:stop])
    pad = torch.nn.utils.rnn.pad_sequence
    return {name: pad(items, batch_first=True, padding_value=fills.get(name, 0)) for name, items in pieces.items()}


def _surprise(model: PreTrainedModel, batch: dict[str, Tensor], packed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return surprise, document number and whether another token is likelier, each (N,), of every predicted label."""
    batch_size = len(batch["input_ids"])
    media = {name: batch.pop(name) for name in MEDIA_INPUTS if name in batch}  # of all rows, which are then one part
    given = batch if packed else _separate(batch)
    found: list[Tensor] = []
    for start in range(0, len(given["input_ids"]), batch_size):
        part = {name: values[start : start + batch_size] for name, values in given.items()}
        positions = {"position_ids": part["position_ids"]} if packed else {}
        counts = part["labels"].flatten() != IGNORED_LABEL
        with places_of_text(counts.view(part["labels"].shape)):
            logits = model(input_ids=part["input_ids"], use_cache=False, **positions, **media).logits  # (B, T, V)
        nats = F.cross_entropy(
            logits.flatten(0, 1).float(), part["labels"].flatten(), ignore_index=IGNORED_LABEL, reduction="none"
        )
        wrong = logits.argmax(-1).flatten() != part["labels"].flatten()
        kept = (nats, part["documents"].flatten(), wrong)
        found.append(torch.stack([values[counts].double() for values in kept]).cpu())
    values = torch.cat(found, dim=1)
    return values[0], values[1].long(), values[2]


@torch.no_grad()
def surprise_by_document(
    model: PreTrainedModel,
    rows: "PackedRows | ConversationRows",
    documents_before: np.ndarray,
    indices: list[int],
    batch_size: int,
    num_documents: int,
    autocast_dtype: torch.dtype | None = None,
    share: Share = Share(),  # frozen
    between_batches: Callable[[], None] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sum the surprise of the labels of the given rows, document by document.

    Batches always have `batch_size` rows, the last one filled up with repetitions that do not count, so that the
    result does not depend on how the rows divide. Every process does as many of them.

    Args:
        model: a causal language model; its training mode is restored.
        rows: rows of a stream or of conversations, with labels that are shifted already, IGNORED_LABEL where nothing
            is predicted.
        documents_before: for every row, how many documents start before it.
        indices: which rows.
        batch_size: rows per forward pass.
        num_documents: N, documents of the stream.
        autocast_dtype: dtype for matrix products, or None for the weights' own.
        share: which batches this process does.
        between_batches: called before every batch; may raise to end the evaluation.

    Returns:
        Nats (N,), number of predicted tokens (N,), and of those that another one is likelier than (N,), of every
        document, of all processes together.
    """
    was_training = model.training
    model.eval()
    device = model.device
    sums = torch.zeros(3, num_documents, dtype=torch.float64)
    autocast = (
        torch.autocast(device.type, dtype=autocast_dtype) if autocast_dtype is not None else contextlib.nullcontext()
    )
    # The compiled blocks of a training run would be compiled once more for evaluation.
    with autocast, torch.compiler.set_stance("force_eager"):
        packed = keeps_documents_apart(model)
        for start in range(0, len(indices), batch_size * share.count):
            if between_batches is not None:
                between_batches()
            mine = start + share.rank * batch_size
            chosen = indices[mine : mine + batch_size]
            padded = chosen + indices[:1] * (batch_size - len(chosen))
            batch = rows.batch(padded)
            before = torch.from_numpy(documents_before[padded])[:, None]
            batch["documents"] = before + rows.document_starts(batch).cumsum(1) - 1
            batch["labels"][len(chosen) :] = IGNORED_LABEL
            if not packed and not (batch["labels"] != IGNORED_LABEL).any():
                continue
            nats, documents, wrong = _surprise(
                model, {name: values.to(device) for name, values in batch.items()}, packed
            )
            sums[0].index_add_(0, documents, torch.round(nats * _UNITS_PER_NAT))
            sums[1].index_add_(0, documents, torch.ones_like(nats))
            sums[2].index_add_(0, documents, wrong)
    model.train(was_training)
    every = np.array(share.sum(sums.flatten().tolist())).reshape(3, num_documents)
    return every[0] / _UNITS_PER_NAT, every[1].astype(np.int64), every[2].astype(np.int64)


def _documents_before_rows(stream: TokenStream, rows: PackedRows) -> np.ndarray:
    """Return for every row how many documents start before it: (rows,) int64."""
    length = rows.tokens_per_row
    starts = [
        int(np.count_nonzero(np.asarray(stream.tokens[row * length : (row + 1) * length]) == stream.start_id))
        for row in range(len(rows))
    ]
    return np.cumsum([0, *starts[:-1]])


def _measure(
    model: PreTrainedModel,
    stream: TokenStream,
    sequence_length: int,
    batch_size: int,
    max_tokens: int | None = None,
    **passes: Unpack[Passes],
) -> tuple[np.ndarray, np.ndarray, float]:
    """Return nats and tokens of every document, and which share of the text they are; arguments as held_out_loss."""
    rows = PackedRows(stream, sequence_length, keep_partial=True)
    wanted = len(rows) if max_tokens is None else max_tokens // sequence_length
    indices = every_nth(len(rows), wanted)
    before = _documents_before_rows(stream, rows)
    nats, tokens, _ = surprise_by_document(model, rows, before, indices, batch_size, stream.num_documents, **passes)
    return nats, tokens, len(indices) / len(rows)  # of the text, in equal rows but for the last


def held_out_loss(
    model: PreTrainedModel,
    stream: TokenStream,
    sequence_length: int,
    batch_size: int,
    max_tokens: int | None = None,
    **passes: Unpack[Passes],
) -> HeldOutLoss:
    """Measure the loss on a stream of documents, packed into rows of `sequence_length`.

    Args:
        model: a causal language model.
        stream: the documents' tokens.
        sequence_length: longest context a token is predicted from.
        batch_size: rows per forward pass.
        max_tokens: measure on about this many tokens, evenly spread rows of the stream; None is all of them.
        **passes: as `Passes` has them.
    """
    nats, tokens, measured = _measure(model, stream, sequence_length, batch_size, max_tokens, **passes)
    num_bytes = stream.num_bytes if measured == 1 else max(1, round(stream.num_bytes * measured))
    return summarize(nats, tokens, num_bytes)


def answer_loss(
    model: PreTrainedModel,
    rows: "ConversationRows",
    batch_size: int,
    max_tokens: int | None = None,
    **passes: Unpack[Passes],
) -> HeldOutLoss:
    """Measure the loss on answers and the tokens that end them, given the questions; bytes are those of the answers.

    Args:
        model: a causal language model.
        rows: conversations.
        batch_size: rows per forward pass.
        max_tokens: measure on rows of about this many tokens, evenly spread, questions among them; None is all.
        **passes: as `Passes` has them.
    """
    in_rows = rows.document_bytes()
    before = np.cumsum([0, *map(len, in_rows)])
    indices = every_nth(len(rows), len(rows) if max_tokens is None else max_tokens // rows.tokens_per_row)
    nats, tokens, wrong = surprise_by_document(model, rows, before[:-1], indices, batch_size, int(before[-1]), **passes)
    measured = tokens > 0
    num_bytes = np.array(list(itertools.chain.from_iterable(in_rows)), dtype=np.int64)[measured]
    figures = summarize(nats[measured], tokens[measured], int(num_bytes.sum()), num_bytes)
    return replace(figures, exact=float(np.mean(wrong[measured] == 0)))


def default_sequence_length(model: PreTrainedModel) -> int:
    """Return the longest context that texts are measured with where none is given."""
    return min(LONGEST_DEFAULT_CONTEXT, int(getattr(model.config, "max_position_embeddings", LONGEST_DEFAULT_CONTEXT)))


def evaluate_documents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    sequence_length: int | None = None,
    batch_size: int = 8,
) -> DocumentSums:
    """Measure what a model makes of texts, each a document of its own.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        texts: the documents.
        sequence_length: longest context a token is predicted from; default: `default_sequence_length`.
        batch_size: rows per forward pass.

    Raises:
        DataError: if there is no text.
        NotANumberError: if the model's loss is none.
    """
    documents = list(texts)
    num_bytes = np.array([len(text.encode("utf-8", "surrogatepass")) for text in documents], dtype=np.int64)
    if num_bytes.sum() == 0:
        raise DataError("there is no text to evaluate: got 0 bytes.")
    from fanformer.data.conversations.chat_tokens import document_ends

    start, end = document_ends(tokenizer)
    ids = [np.array(document, dtype=np.uint32) for document in encode_documents(tokenizer, documents)]
    tokens = lay_out(ids, start, end, np.dtype(np.uint32), close=True)
    stream = TokenStream(tokens, start, end, len(documents), int(num_bytes.sum()))
    # a short text needs no row as long as the model's context, and no more rows than it fills
    length = min(sequence_length or default_sequence_length(model), len(tokens) - 1)
    rows = math.ceil((len(tokens) - 1) / length)
    nats, predicted, _ = _measure(model, stream, length, min(batch_size, rows))
    if np.isnan(nats).any():
        raise NotANumberError
    return DocumentSums(nats, predicted, num_bytes)
