"""How a continuation is drawn; torch-free, so that `--help` stays fast."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fanformer.errors import CheckpointError, ConfigError

SMALLEST_TEMPERATURE, _LARGEST = 2.0**-126, 2.0**127
"""float32's smallest normal number, and a power of two that it still has."""


def _setting(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True)
class GenerationSettings:
    """How a continuation is drawn; all lengths count new tokens.

    Raises:
        ConfigError: if a value is out of its range.
    """

    max_length: int = _setting(100, "most new tokens")
    min_length: int = _setting(1, "fewest new tokens: the end token is not drawn before")
    top_k: int = _setting(100, "draw from this many most likely tokens; 0 is all")
    top_p: float = _setting(0.85, "draw from the fewest likely tokens of this total probability; 1 is all")
    temperature: float = _setting(0.7, "divides the logits; 0 takes the most likely token always")
    seed: int | None = _setting(None, "makes the text reproducible; default: a new one each time")

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise ConfigError(f"`max_length` must be at least 1 new token, got {self.max_length}.")
        if not 0 <= self.min_length <= self.max_length:
            raise ConfigError(
                f"`min_length` must be between 0 and max_length ({self.max_length}), got {self.min_length}."
            )
        if self.top_k < 0:
            raise ConfigError(f"`top_k` must be at least 0, got {self.top_k}: 0 draws from all tokens.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"`top_p` must be in (0, 1], got {self.top_p}: 1 draws from all tokens.")
        if not 0 <= self.temperature <= _LARGEST:
            raise ConfigError(f"`temperature` must be in [0, {_LARGEST:.1e}], got {self.temperature}: 0 is greedy.")
        if self.seed is not None and self.seed < 0:
            raise ConfigError(f"`seed` must be at least 0, got {self.seed}.")

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken always: at temperature 0, or one too small to divide by."""
        return self.temperature < SMALLEST_TEMPERATURE


def own_sampling(asked: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return how a model asks to be drawn from: fields of `GenerationSettings` that its maker chose for it.

    Args:
        asked: temperature, top_k and top_p, those that it asks for.
        where: this stands, for the message.

    Raises:
        CheckpointError: if one is no number, or out of its range.
    """
    found = {name: asked[name] for name in ("temperature", "top_k", "top_p") if asked.get(name) is not None}
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"{where}: `{name}` must be a number, got {value!r}.")
    try:
        GenerationSettings(**found)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error
    return found
