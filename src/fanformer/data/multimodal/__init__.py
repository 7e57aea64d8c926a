"""Conversations with pictures and recordings: rows of messages, their media, and what training reads."""

from collections.abc import Mapping
from typing import Any

PLACEHOLDERS: Mapping[str, str] = {"image": "<|image|>", "audio": "<|audio|>"}
"""For each kind of media, the token of a place."""
MEDIA_INPUTS = ("pixel_values", "input_features", "input_features_mask")
"""What a batch holds beside its tokens where it has pictures and recordings."""


def placeholder_ids(tokenizer: Any) -> list[int]:
    """Return the ids of a tokenizer's placeholders, which no text may hold; none for most."""
    named = (getattr(tokenizer, f"{kind}_token_id", None) for kind in PLACEHOLDERS)
    return [number for number in named if number is not None]


def known_ids(config: Any) -> int:
    """Return how many token ids a tokenizer of the model may have: V, or more where placeholders lie beyond."""
    placeholders = [getattr(config, f"{kind}_token_id", None) for kind in PLACEHOLDERS]
    return max(int(config.vocab_size), *(1 + number for number in placeholders if number is not None), 0)
