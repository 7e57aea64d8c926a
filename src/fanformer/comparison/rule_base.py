"""What all rule-learning tasks have in common: rows of tokens with labels, and the room for more of them."""

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from fanformer.errors import ConfigError

IGNORED = -100  # the label of a position that predicts nothing


@dataclass(frozen=True)
class Examples:
    """Rows of one task.

    Attributes:
        input_ids: (N, T) int64.
        labels: (N, T) int64, the token that follows each position where that is an answer, else -100.
        keys: what each row stands for: (N, 2), the pair (a, b), or (N,), the period.
    """

    input_ids: Tensor
    labels: Tensor
    keys: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, rows: Any) -> "Examples":
        return Examples(self.input_ids[rows], self.labels[rows], self.keys[rows])


@dataclass(frozen=True)
class RuleTask(ABC):
    """A rule, the examples that teach it, and those that ask whether it was understood.

    The examples are made once, when they are first asked for.
    """

    name: ClassVar[str]

    @property
    @abstractmethod
    def vocabulary(self) -> list[str]:
        """The tokens, by id."""

    @property
    @abstractmethod
    def prompt_tokens(self) -> int:
        """T: tokens in a row."""

    @cached_property
    @abstractmethod
    def train(self) -> Examples:
        """What the model is trained on."""

    @cached_property
    @abstractmethod
    def test(self) -> Examples:
        """What it never saw: the hole, or longer periods."""

    def to_dict(self) -> dict[str, Any]:
        """Return name and fields, as `create_task` takes them."""
        return {"name": self.name, **dataclasses.asdict(self)}

    def text(self, ids: Tensor) -> str:
        """Return the tokens of `ids` (T,) as text."""
        return "".join(self.vocabulary[index] for index in ids.tolist())

    def _check_at_least(self, **lowest: int) -> None:
        for name, least in lowest.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(
                    f"`{name}` of the rule {self.name} must be an integer from {least} on, got {value!r}."
                )
