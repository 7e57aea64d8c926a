"""Places for texts that are computed together and start and end when they like: what an engine offers the scheduler."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fanformer.errors import ConfigError
from fanformer.generation.sampling import Floats, Noise


class Steps(NamedTuple):
    """How often a recurrent depth may run its core for a text."""

    usual: int
    """Where a text names no number: the mean of training."""
    most: int
    """The largest."""


@dataclass(frozen=True, eq=False)
class Shown:
    """Pictures and recordings in a prompt: what stands at the places of their tokens."""

    places: tuple[int, ...]
    """In the prompt, in their order."""
    names: tuple[int, ...]
    """For each place a number below -9, which another shares only where it shows the same."""
    modality: int
    """Which kinds there are, as the model numbers them: its adapters work on the whole text."""
    embeddings: Any
    """(places, D), of the engine's own kind."""

    def named(self, ids: Sequence[int]) -> list[int]:
        """Return a prompt's ids with what tells its tokens apart from those of others.

        All that follows the first token depends on it: there stands which adapters computed the text.
        """
        found = list(ids)
        for place, name in zip(self.places, self.names, strict=True):
            found[place] = name
        found[0] = -self.modality - 1
        return found


class Conversation(NamedTuple):
    """A conversation in tokens, up to where the answer begins."""

    ids: list[int]
    """At a place of a picture or recording the one that stands for it."""
    look: Callable[[], Shown] | None = None
    """Computes what stands at these places, which takes its time; None where nothing is shown."""


class Slots(ABC):
    """A model with room for several texts, each in a slot that keeps its keys and values.

    Attributes:
        count: how many slots there are.
        positions: tokens that each has room for.
        chunk_tokens: most tokens of a prompt to read at once, between two steps of the others.
        steps: how deep texts may be thought through, each as deep as it likes; None where all are alike.
    """

    count: int
    positions: int
    chunk_tokens: int
    steps: Steps | None = None

    @property
    @abstractmethod
    def weight_bytes(self) -> int:
        """Memory of the weights."""

    @property
    @abstractmethod
    def cache_bytes(self) -> int:
        """Memory of the keys and values of all slots."""

    @abstractmethod
    def forward(self, tokens: Mapping[int, Sequence[int]], every: bool = False) -> dict[int, Floats]:
        """Add tokens to slots and return logits.

        Args:
            tokens: for some slots the ids that follow what they have, equally many for each and at least one.
            every: whether to return logits for all of them, or for the last of each slot.

        Returns:
            For each of these slots (T, V) float32, T its number of new tokens with `every`, else 1.
        """

    @abstractmethod
    def length(self, slot: int) -> int:
        """Return how many tokens a slot has."""

    @abstractmethod
    def cut(self, slot: int, length: int) -> None:
        """Keep only the first `length` tokens of a slot."""

    def depth(self, slot: int) -> int | None:
        """Return how many steps a slot's text takes; None where all are alike."""
        return None

    def think(self, slot: int, num_steps: int) -> None:
        """Let a slot's text, which must be empty where it had another number, take so many steps of `steps`.

        Raises:
            ConfigError: if all texts are alike here.
        """
        raise ConfigError(f"the depth of these slots is fixed, got {num_steps} steps for one.")

    def show(self, slot: int, shown: Shown | None) -> None:
        """Let pictures and recordings stand at their places of a slot's text, or none.

        Raises:
            ConfigError: if the model takes text only.
        """
        if shown is not None:
            raise ConfigError("these slots take text only, got pictures or recordings for one.")

    @abstractmethod
    def wipe(self, slot: int) -> None:
        """Forget a slot's text, and put zeros where its keys and values were.

        What is no number among them would reach later texts of the slot: a masked place counts 0 times its value.
        """

    @abstractmethod
    def noise(self, seed: int) -> Noise:
        """Return the random stream of a seed; `TextModel.complete` draws the same one on this engine."""

    def close(self) -> None:  # noqa: B027  most engines have nothing to put back
        """Leave the model as it was."""
