"""What host and members agree on: the plan of a run in rounds, and a member's share of one round; plain JSON."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fanformer.community.aggregation import Defence
from fanformer.community.coding import check_bits
from fanformer.community.outer import OuterSettings
from fanformer.community.updates import BaseType
from fanformer.errors import ConfigError, refuse_unknown

_NESTED: Mapping[str, Any] = {"outer": OuterSettings, "defence": Defence}


@dataclass(frozen=True)
class Plan:
    """A run in rounds.

    The learning rate's schedule spans `rounds * round_steps` inner steps, those of one member that does all of them.

    Attributes:
        rounds: accepted rounds in all.
        round_steps: inner steps that a member does in one, at most.
        batch_size: rows of a member's inner step.
        sequence_length: tokens of a row.
        round_seconds: after which a round ends without those who have not reported; None waits for all.
        fragments: into how many parts the tensors are divided, of which a round sends one.
        bits: of an update's numbers, 8 or 4.
        base_dtype: of the weights that members are sent.
        min_reports: usable updates that a round needs.
        gate_tolerance: how far above the lowest so far the held-out loss after a round may be, as a share.
        outer: the outer step.
        defence: the aggregation.
        data_fingerprint: of the data whose rows are shared out; a member with other data goes through its own.
    """

    rounds: int
    round_steps: int
    batch_size: int
    sequence_length: int
    round_seconds: float | None = None
    fragments: int = 1
    bits: int = 8
    base_dtype: BaseType = "float32"
    min_reports: int = 1
    gate_tolerance: float = 0.05
    outer: OuterSettings = field(default_factory=OuterSettings)
    defence: Defence = field(default_factory=Defence)
    data_fingerprint: str = ""

    def __post_init__(self) -> None:
        check_bits(self.bits)
        for name in ("rounds", "round_steps", "batch_size", "sequence_length", "fragments", "min_reports"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ConfigError(f"`{name}` must be a whole number from 1 on, got {getattr(self, name)!r}.")
        if self.base_dtype not in ("float32", "float16"):
            raise ConfigError(f"`base_dtype` must be float32 or float16, got {self.base_dtype!r}.")
        if self.round_seconds is not None and not 0 < self.round_seconds < math.inf:
            raise ConfigError(f"`round_seconds` must be above 0, got {self.round_seconds}: leave it out for no limit.")
        if not 0 <= self.gate_tolerance < math.inf:
            raise ConfigError(f"`gate_tolerance` must be a share from 0 on, got {self.gate_tolerance}.")

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a member's inner step."""
        return self.batch_size * self.sequence_length

    @property
    def max_steps(self) -> int:
        """Inner steps that the learning rate's schedule spans."""
        return self.rounds * self.round_steps

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Plan":
        """Return the plan that `to_dict` made plain JSON of.

        Raises:
            ConfigError: if a field is unknown, missing or out of its range.
        """
        refuse_unknown(content, cls.__dataclass_fields__, "a field of a plan")
        fields = dict(content)
        for name, kind in _NESTED.items():
            if name in fields:
                refuse_unknown(fields[name], kind.__dataclass_fields__, f"a field of `{name}` of a plan")
                fields[name] = kind(**fields[name])
        try:
            return cls(**fields)
        except TypeError as error:
            raise ConfigError(f"a plan must have all of its fields with their types: {error}.") from error


@dataclass(frozen=True)
class Task:
    """A member's share of a round; plain JSON by `dataclasses.asdict`, and back by `Task(**content)`.

    Attributes:
        round: number of the round; rejected ones count too, so that none is used twice.
        base: checksum of the weights to begin with.
        first_step: of the run, for the learning rate.
        steps: inner steps to do, at most.
        place: first of its rows in the order of the run's rows.
        fragment: whose tensors to hand in.
        seconds: until the report should have arrived; None without a limit.
    """

    round: int
    base: str
    first_step: int
    steps: int
    place: int
    fragment: int
    seconds: float | None
