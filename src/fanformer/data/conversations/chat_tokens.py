"""Give a base model what a conversation needs: two control tokens with rows of their own, an end, and a template."""

import copy
import json
import re
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fanformer.data.conversations.chatml import END, START, TEMPLATE, ChatML, chatml_of
from fanformer.data.tokenizer import end_token_id, start_token_id
from fanformer.errors import ConfigError

_RESERVED = re.compile(r"[<\[]\|?(reserved|unused|extra|placeholder|dummy)[a-z_]*\d+\|?[>\]]")
"""Names of tokens that are there to be renamed: those of Llama 3, Gemma, BERT, Qwen, T5 and Phi among them."""


@dataclass(frozen=True)
class ChatTokens:
    """A tokenizer that writes conversations.

    Attributes:
        tokenizer: a copy, with START and END as control tokens, END as the end of a text, and the template.
        chatml: what encodes conversations.
        new_ids: the ids of START and END that had no meaning before; their rows have to be trained.
        notes: what was decided, in lines.
    """

    tokenizer: PreTrainedTokenizerFast
    chatml: ChatML
    new_ids: tuple[int, ...]
    notes: tuple[str, ...]


def add_chat_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, grow: bool = False) -> ChatTokens:
    """Prepare a causal language model and its tokenizer for conversations; the model is changed in place.

    What the tokenizer lacks of START and END takes rows that only fill up the model's vocabulary; where there are none,
    reserved tokens; where there are none either and `grow` allows it, new rows, up to the next multiple of 64. Texts
    end with END from then on, in the tokenizer, the configuration and the generation settings; the padding stays
    another token. The rows of new tokens begin as follows, K being the known tokens:

    | row      | embedding                                  | LM head                                 |
    |----------|--------------------------------------------|-----------------------------------------|
    | START    | that of the token which opens documents    | mean of K: seldom written               |
    | END      | normal, mean and deviation of K's channels | that of the token which ends documents  |

    A tied matrix has a normal row for START, and for END that of the token which ends documents. New rows that only
    fill up are 0. So equal arguments give equal models: an adapter finds the base as its training had it.

    Source: means as rows of new tokens, J. Hewitt, "Initializing New Word Embeddings for Pretrained Language Models",
    2021. They would be too small for an embedding here, whose scale no norm mends before the first sum.

    Args:
        model: with an embedding and an LM head of `vocab_size` rows.
        tokenizer: the one that it was trained with.
        grow: whether the model may get more rows: it is then of another size than the base.

    Raises:
        ConfigError: if the tokenizer has no token to begin or end a text with, or none to pad with beside END, or if
            there is neither an unused row nor a reserved token for START or END, and the model may not grow.
    """
    copied, opens, ends = copy.deepcopy(tokenizer), start_token_id(tokenizer), end_token_id(tokenizer)
    known = max(tokenizer.get_vocab().values()) + 1
    missing = [token for token in (START, END) if tokenizer.backend_tokenizer.token_to_id(token) is None]
    free = model.config.vocab_size - known
    notes = []
    full = len(missing) > free
    reserved = reserved_tokens(tokenizer)[: len(missing)] if full else []
    grows = full and len(reserved) < len(missing)
    if grows and not grow:
        raise ConfigError(
            f"`tokenizer` must leave room for {' and '.join(missing)}, got {known} tokens in a vocabulary of "
            f"{model.config.vocab_size} and {len(reserved)} reserved ones: let the vocabulary grow, or take "
            "a model that was trained with a larger `vocab_size`."
        )
    if reserved and not grows:
        copied = renamed(copied, dict(zip(reserved, missing, strict=True)))
        notes += [f"{new} takes the reserved token {old}" for old, new in zip(reserved, missing, strict=True)]
    _set_special(copied)
    chatml = chatml_of(copied)
    if chatml is None:
        if copied.chat_template is not None:
            notes.append("the tokenizer's chat template, which is not ChatML, is replaced by it")
        copied.chat_template = TEMPLATE
        chatml = chatml_of(copied)
    if chatml is None:
        raise ConfigError(
            f"`tokenizer` must keep {START} and {END} apart from text, got one that does not: take one whose "
            "tokenizer.json lists both as special tokens."
        )
    if grows:
        before = model.config.vocab_size
        model.resize_token_embeddings(known + len(missing), pad_to_multiple_of=64, mean_resizing=False)
        _clear_rows(model, before)
        notes.append(f"the vocabulary grows from {before} to {model.config.vocab_size}")
    rows = {START: chatml.start_id, END: chatml.end_id}
    _begin_rows(model, {token: rows[token] for token in missing}, opens, ends, known)
    set_ends(model, copied)
    return ChatTokens(copied, chatml, tuple(rows[token] for token in missing), tuple(notes))


def set_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Put a tokenizer's ends and padding into a model's settings."""
    model.config.eos_token_id = tokenizer.eos_token_id
    if model.generation_config is not None:
        model.generation_config.eos_token_id = text_ends(tokenizer)
    for settings in (model.config, model.generation_config):
        if settings is not None:
            settings.pad_token_id = tokenizer.pad_token_id


def text_ends(tokenizer: PreTrainedTokenizerFast) -> int | list[int] | None:
    """Return what `generate` is to end a text at: where that is END, the padding too.

    That is mostly what ended the base's documents, and a model that was taught to answer still ends plain text so.
    """
    if _pads_as_documents_ended(tokenizer):
        return [tokenizer.eos_token_id, tokenizer.pad_token_id]
    return tokenizer.eos_token_id


def document_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Return the tokens that open and end a plain text: where a tokenizer's own end is END, the padding ends it."""
    if not _pads_as_documents_ended(tokenizer):
        return start_token_id(tokenizer), end_token_id(tokenizer)
    start, end = tokenizer.bos_token_id, tokenizer.pad_token_id
    return (end if start is None else start), end


def _pads_as_documents_ended(tokenizer: PreTrainedTokenizerBase) -> bool:
    return bool(tokenizer.eos_token == END and tokenizer.pad_token_id not in (None, tokenizer.eos_token_id))


def reserved_tokens(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Return the names of reserved tokens, in the order of their ids."""
    added = json.loads(tokenizer.backend_tokenizer.to_str())["added_tokens"]
    named = {str(token) for token in tokenizer.special_tokens_map.values()}
    return [
        item["content"]
        for item in sorted(added, key=lambda item: item["id"])
        if _RESERVED.fullmatch(item["content"]) and item["content"] not in named
    ]


def renamed(tokenizer: PreTrainedTokenizerFast, names: dict[str, str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer in which tokens have other names, and are special."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    for item in content["added_tokens"]:
        if item["content"] in names:
            item |= {"content": names[item["content"]], "special": True}
    vocabulary = content["model"]["vocab"]
    if not isinstance(vocabulary, dict):
        raise ConfigError(f"`tokenizer` must be byte-level BPE, got {content['model']['type']}: take another model.")
    content["model"]["vocab"] = {names.get(token, token): number for token, number in vocabulary.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        extra_special_tokens=[names.get(str(token), token) for token in tokenizer.extra_special_tokens],
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        clean_up_tokenization_spaces=False,
        chat_template=tokenizer.chat_template,
        **tokenizer.special_tokens_map,
    )


def _set_special(tokenizer: PreTrainedTokenizerFast) -> None:
    """Make START and END special, END the end of a text, and another token than these the padding."""
    before = [tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token]
    padding = next((token for token in before if token not in (None, START, END)), None)
    if padding is None:
        raise ConfigError(
            f"`tokenizer` must have a token to pad with beside {END}, got none: set `pad_token` in its "
            "tokenizer_config.json."
        )
    tokenizer.add_special_tokens(
        {"extra_special_tokens": [START], "eos_token": END, "pad_token": padding}, replace_extra_special_tokens=False
    )


@torch.no_grad()
def _clear_rows(model: PreTrainedModel, first: int) -> None:
    """Set the rows from `first` on to 0."""
    output = model.get_output_embeddings()
    for values in (model.get_input_embeddings().weight, output.weight, output.bias):
        if values is not None:
            values[first:] = 0


@torch.no_grad()
def _begin_rows(model: PreTrainedModel, new: dict[str, int], opens: int, ends: int, known: int) -> None:
    """Set the rows of new tokens, as `add_chat_tokens` says."""
    embedding = model.get_input_embeddings().weight
    output = model.get_output_embeddings()
    tied = output.weight is embedding
    generator = torch.Generator().manual_seed(0)  # the same rows every time
    for token, number in new.items():
        if tied:
            embedding[number] = embedding[ends] if token == END else _sample(embedding[:known], generator)
            continue
        embedding[number] = embedding[opens] if token == START else _sample(embedding[:known], generator)
        for values in (output.weight, output.bias):
            if values is not None:
                values[number] = values[ends] if token == END else values[:known].float().mean(0).to(values.dtype)


def _sample(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Return a normal row (D,) with mean and standard deviation of each channel of `rows` (K, D)."""
    wide = rows.float()
    noise = torch.randn(rows.shape[1], generator=generator).to(rows.device)
    return (wide.mean(0) + wide.std(0) * noise).to(rows.dtype)
