"""Conversations as what a run trains on: the loss is that of answers and their ends, the base learns the template."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fanformer.data.conversations.chat_tokens import ChatTokens, add_chat_tokens, document_ends
from fanformer.data.conversations.chatml import ChatML, chatml_of
from fanformer.data.conversations.examples import Example, Message
from fanformer.data.conversations.reading import read_examples
from fanformer.data.conversations.rows import ConversationRows, TokenizedExamples, tokenize_examples
from fanformer.data.tokenizer import load_tokenizer
from fanformer.errors import ConfigError, DataError
from fanformer.evaluation.loss import HeldOutLoss, answer_loss
from fanformer.generation.settings import GenerationSettings
from fanformer.generation.torch_model import TorchModel
from fanformer.loading import load_config, load_model
from fanformer.loading import load_tokenizer as load_tokenizer_of_model
from fanformer.training.checkpoint import checkpoints
from fanformer.training.chunked_loss import TokenLoss
from fanformer.training.corpus import Corpus, Opening, hold_out
from fanformer.training.events import Loss, Rows
from fanformer.training.fields import RunConfig
from fanformer.training.folder import check_data, fingerprint
from fanformer.training.other_models import check_answers

_OF_TEXT = ("tokenizer", "vocab_size", "max_data_bytes")
"""Fields that say how text is prepared."""


@dataclass(frozen=True)
class _Split:
    """Examples for learning and for measuring.

    Attributes:
        train: what is learnt.
        held_out: what is measured.
        wrong: rows of all files that are no conversations.
    """

    train: Sequence[Example]
    held_out: Sequence[Example]
    wrong: int


@dataclass(frozen=True)
class Conversations:
    """Rows of conversations, ready to be learnt in one way or another.

    Attributes:
        tokenizer: writes them.
        chatml: how.
        new_ids: tokens that the base does not know.
        rows: what is learnt.
        held_out: what is measured.
        description: `data` of run.yaml.
        asked: what the model answers now and then.
        load_base: returns the base, ready for conversations.
    """

    tokenizer: PreTrainedTokenizerBase
    chatml: ChatML
    new_ids: tuple[int, ...]
    rows: ConversationRows
    held_out: ConversationRows
    description: dict[str, Any]
    asked: list[Message]
    load_base: Callable[[], PreTrainedModel]

    def corpus(self, rows: Rows, loss: Loss, used: str, measure: Callable[..., Any]) -> Corpus:
        """Return what a run trains on.

        Args:
            rows: of `self.rows`, with what the loss needs beside.
            loss: what a step learns.
            used: what the rows hold, in words; how full they are is added.
            measure: as `Corpus` has it.
        """
        question = self.chatml.encode(self.asked, prompt=True).ids
        asked = self.asked[-1].content

        def continue_sample(writer: TorchModel, settings: GenerationSettings) -> str:
            return writer.complete_ids(list(question), asked, settings).text

        return Corpus(
            tokenizer=self.tokenizer,
            rows=rows,
            description=self.description,
            used=f"{used}; {self.rows.fraction_filled:.2%} of the places filled",
            measure=measure,
            held_out_tokens=len(self.held_out) * self.held_out.tokens_per_row,
            held_out_sizes={},
            load_base=self.load_base,
            sample_prompt=f"{asked} -> ",
            sample_tokens=len(question),
            continue_sample=continue_sample,
            loss=loss,
            new_ids=self.new_ids,
        )


def answer_corpus(opening: Opening) -> Corpus:
    """Open conversations: every row of `data` that is one, and `eval_data` or a part of `data` to measure on.

    Raises:
        ConfigError, DataError, CheckpointError: as `open_conversations`.
    """
    opened = open_conversations(opening)

    def measure(model: PreTrainedModel, batch_size: int, **options: Any) -> HeldOutLoss:
        return answer_loss(model, opened.held_out, batch_size, **options)

    texts = opened.description["texts"]
    used = f"{opened.rows.num_examples:,} conversations, {opened.rows.num_labels:,} tokens of answers"
    if texts:
        used = (
            f"{opened.rows.num_examples:,} conversations and pieces of plain texts, of which {texts:,} were given, "
            f"{opened.rows.num_labels:,} tokens of answers and texts"
        )
    return opened.corpus(opened.rows, TokenLoss(), used, measure)


def open_conversations(opening: Opening, *, preference: bool = False) -> Conversations:
    """Read the rows of a run and write them as its base's tokens.

    The file is read anew on resume. What tells whether it is the same are the tokens of all rows.

    Args:
        opening: of the run.
        preference: whether every row must have a chosen and a rejected answer, and both are wanted.

    Raises:
        ConfigError: if there is no base to tune, it has no room for the tokens of conversations, or a field of the run
            has no effect here.
        DataError: if the files hold nothing to learn or nothing to measure on.
        CheckpointError: if a run that goes on finds other rows than it began with, or its base is missing.
    """
    config = opening.config
    _check(config)
    tokenizer, chatml, new_ids = _speakers(opening, preference)
    split = _split(config, opening.note, preference)
    length, filler = config.batch.sequence_length, int(tokenizer.pad_token_id)
    train, measured = (
        tokenize_examples(chatml, examples, length, opening.note, preference=preference, ends=document_ends(tokenizer))
        for examples in (split.train, split.held_out)
    )
    rows, held_out = (ConversationRows(part.documents, length, filler) for part in (train, measured))
    digest = fingerprint([rows.fingerprint, held_out.fingerprint])
    if opening.before is not None:
        check_data(opening.before["data"]["fingerprint"], digest, f"the rows of {config.corpus.data}", config)
    return Conversations(
        tokenizer=tokenizer,
        chatml=chatml,
        new_ids=new_ids,
        rows=rows,
        held_out=held_out,
        description=_description(digest, rows, held_out, train, measured, split) | {"new_ids": list(new_ids)},
        asked=_sample(config, [(split.held_out, measured), (split.train, train)]),
        load_base=lambda: _load_base(config)[0],
    )


def _check(config: RunConfig) -> None:
    if config.init_from is None:
        raise ConfigError(
            "`init_from` is needed to learn answers, got none: name the folder of a base model, as in `fanformer "
            "finetune DIR`."
        )
    values = config.to_dict()
    for name in _OF_TEXT:
        if values[name] is not None:
            raise ConfigError(
                f"`{name}` does not apply to conversations, got {values[name]!r}: they are read whole, in the tokens "
                "of the base; leave it out."
            )


def _load_base(config: RunConfig) -> tuple[PreTrainedModel, ChatTokens]:
    """Load the base, ready for conversations."""
    base = str(config.init_from)
    model = load_model(base, device="cpu", dtype="float32")
    tokenizer = load_tokenizer_of_model(base, load_config(base).vocab_size)
    return model, add_chat_tokens(model, tokenizer, grow=True)


def _speakers(opening: Opening, preference: bool) -> tuple[PreTrainedTokenizerBase, ChatML, tuple[int, ...]]:
    """Return the tokenizer, what writes conversations with it, and its new ids: the run's own if it has checkpoints."""
    whole = checkpoints(opening.config.folder) if opening.before is not None else []
    if whole:  # what it began with may be gone since
        tokenizer = load_tokenizer(str(whole[-1]))
        chatml = chatml_of(tokenizer)
        if chatml is not None and opening.before is not None:
            return tokenizer, chatml, tuple(opening.before["data"]["new_ids"])
    model, tokens = _load_base(opening.config)
    check_answers(model, str(opening.config.init_from), preference=preference)
    for line in tokens.notes:
        opening.note(line)
    return tokens.tokenizer, tokens.chatml, tokens.new_ids


def _split(config: RunConfig, note: Callable[[str], None], preference: bool) -> _Split:
    """Read what is learnt and what is measured.

    Raises:
        DataError: if a file holds no conversation, or `data` too few different questions to hold one out.
    """
    read = read_examples(config.corpus.data, note, preference=preference)
    if config.corpus.eval_data is not None:
        other = read_examples(config.corpus.eval_data, note, preference=preference)
        return _Split(read.examples, other.examples, read.wrong + other.wrong)
    keys = [_question_key(example) for example in read.examples]
    return _Split(*hold_out(read.examples, keys, config, "two different questions"), read.wrong)


def _question_key(example: Example) -> str:
    """Return a hash of the first thing that a user says, or of a plain text.

    Rows that share it are held out together or not at all.
    """
    asked = example.text or next(message.content for message in example.messages if message.role == "user")
    return hashlib.blake2b(asked.encode(), digest_size=8).hexdigest()


def _sample(config: RunConfig, parts: Sequence[tuple[Sequence[Example], TokenizedExamples]]) -> list[Message]:
    """Return what the model answers now and then: the sample prompt, else the shortest question.

    Args:
        config: the run.
        parts: examples and their tokens, the held-out ones first; of the first that has a question.

    Raises:
        DataError: if there are plain texts alone.
    """
    prompt = config.evaluation.sample_prompt
    if prompt is not None:
        return [Message("user", prompt)]
    for examples, tokenized in parts:
        asked = [index for index, source in enumerate(tokenized.sources) if examples[source].messages]
        if asked:
            shortest = min(asked, key=lambda index: sum(map(len, tokenized.documents[index])))
            messages = examples[tokenized.sources[shortest]].messages
            last = max(index for index, message in enumerate(messages) if message.role == "user")
            return list(messages[last : last + 1])
    raise DataError(
        f"`data` {config.corpus.data} must hold a conversation, got plain texts: use `fanformer train --init-from`."
    )


def _description(
    digest: str,
    rows: ConversationRows,
    held_out: ConversationRows,
    train: TokenizedExamples,
    measured: TokenizedExamples,
    split: _Split,
) -> dict[str, Any]:
    """Return `data` of run.yaml."""
    counts = {name: getattr(train, name) + getattr(measured, name) for name in ("too_long", "unanswered", "shortened")}
    return {
        "fingerprint": digest,
        "rows": len(rows),
        "fraction_filled": rows.fraction_filled,
        "examples": len(train.documents),
        "answer_tokens": rows.num_labels,
        "held_out_examples": len(measured.documents),
        "held_out_answer_tokens": held_out.num_labels,
        "texts": sum(bool(example.text) for example in (*split.train, *split.held_out)),
        "wrong": split.wrong,
        **counts,
    }
