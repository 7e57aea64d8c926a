"""Prompts: their checks, what is left out at their end, and their seeds; torch-free."""

import hashlib

from fanformer.errors import ConfigError
from fanformer.generation.decoding import Decoder


def check_text(prompt: str) -> None:
    """Raise ConfigError if the prompt is not valid Unicode."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"a prompt must be valid UTF-8, got {prompt[:40]!r}.") from error


def check_length(positions: int | None, prompt: str, ids: list[int], max_length: int) -> None:
    """Raise ConfigError if a prompt and its continuation are longer than the model's positions."""
    if positions is None or len(ids) + max_length <= positions:
        return
    shown = prompt if len(prompt) <= 30 else prompt[:27] + "..."
    room = positions - len(ids)
    remedy = f"lower max_length to {room}" if room > 0 else f"shorten the prompt to fewer than {positions} tokens"
    raise ConfigError(
        f"prompt {shown!r} has {len(ids)} tokens with its start token, and max_length {max_length} more make "
        f"{len(ids) + max_length}; the model has {positions} positions: {remedy}."
    )


def withhold_spaces(tokenizer: Decoder, ids: list[int]) -> tuple[list[int], str]:
    """Return `ids` without a last token that is nothing but spaces, and those spaces; a start token stays."""
    text = tokenizer.decode(ids[-1:], clean_up_tokenization_spaces=False)
    if len(ids) > 1 and text and not text.strip(" "):
        return ids[:-1], text
    return ids, ""


def row_seed(seed: int, index: int) -> int:
    """Return the seed of the prompt at place `index`, so that equal prompts of one call get different texts."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=7).digest(), "big")
