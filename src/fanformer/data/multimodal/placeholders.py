"""Tokens that stand for the places of pictures and recordings."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from fanformer.data.conversations.chat_tokens import renamed, reserved_tokens
from fanformer.data.multimodal import PLACEHOLDERS
from fanformer.errors import ConfigError


@dataclass(frozen=True)
class PlaceholderTokens:
    """A tokenizer with placeholders.

    Attributes:
        tokenizer: a copy, with `image_token` and `audio_token` where they were asked for; it pads on the left.
        ids: of each kind's placeholder.
        notes: what was decided, in lines.
    """

    tokenizer: PreTrainedTokenizerFast
    ids: Mapping[str, int]
    notes: tuple[str, ...]


def add_placeholders(tokenizer: PreTrainedTokenizerFast, vocab_size: int, kinds: Sequence[str]) -> PlaceholderTokens:
    """Give a tokenizer a placeholder for each kind of media; no row of the model changes.

    They take rows that only fill up the model's vocabulary; where there are none, reserved tokens; where there are none
    either, ids beyond the vocabulary, which cost nothing since a placeholder's row is never read.

    Args:
        tokenizer: of the language model.
        vocab_size: V, the rows of its embedding.
        kinds: of PLACEHOLDERS.

    Raises:
        ConfigError: if the tokenizer has no token to pad with, or takes text for a placeholder.
    """
    copied, notes = tokenizer, []
    missing = [kind for kind in kinds if tokenizer.backend_tokenizer.token_to_id(PLACEHOLDERS[kind]) is None]
    free = vocab_size - 1 - max(tokenizer.get_vocab().values())
    if len(missing) > free:
        reserved = reserved_tokens(tokenizer)[: len(missing)]
        if len(reserved) == len(missing):
            names = {old: PLACEHOLDERS[kind] for old, kind in zip(reserved, missing, strict=True)}
            copied = renamed(copied, names)
            notes += [f"{new} takes the reserved token {old}" for old, new in names.items()]
    padding = tokenizer.pad_token or tokenizer.eos_token
    if padding is None:
        raise ConfigError("`tokenizer` must have a token to pad with, got none: set `pad_token` in its configuration.")
    backend = copy.deepcopy(copied.backend_tokenizer)
    backend.add_special_tokens([PLACEHOLDERS[kind] for kind in kinds])
    special: dict[str, Any] = dict(copied.special_tokens_map) | {"pad_token": padding}
    special.pop("extra_special_tokens", None)
    found = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=tokenizer.model_max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=tokenizer.chat_template,
        extra_special_tokens={f"{kind}_token": PLACEHOLDERS[kind] for kind in kinds},
        **special,
    )
    ids = {kind: int(backend.token_to_id(PLACEHOLDERS[kind])) for kind in kinds}
    beyond = [PLACEHOLDERS[kind] for kind in kinds if ids[kind] >= vocab_size]
    if beyond:
        notes.append(f"{' and '.join(beyond)} lie beyond the {vocab_size} rows of the vocabulary, which is full")
    return PlaceholderTokens(found, ids, tuple(notes))
