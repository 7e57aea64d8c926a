"""A measured time series, written as tokens, to be continued beyond the window that training saw.

The series come with packages of the extra `series`; nothing is downloaded. Training sees rows of the earlier part, the
rows that are asked for lie in the later part, which no training row touches.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from fanformer.comparison.rule_base import IGNORED, Examples, RuleTask
from fanformer.errors import ConfigError, DataError, did_you_mean, import_extra

LIMIT = 3.0
"""Standard deviations from the mean that the levels reach; what lies beyond is written as the outermost level."""
_SCALES, _SHIFTS = (0.8, 1.25), (-0.3, 0.3)  # by which training rows differ from the series, in standard deviations
_PURPOSE = "the rule series"


@dataclass(frozen=True)
class Source:
    """A series and where it comes from.

    Attributes:
        load: returns all values in their order, (N,) float64.
        periods: by which it repeats, in values, with their names, the shortest first.
        digest: first 12 characters of the SHA-256 of the values as float64, little-endian; "" for no check.
    """

    load: Callable[[], Tensor]
    periods: Mapping[str, int]
    digest: str = ""


def _demand() -> Tensor:
    """Return the electricity demand of England and Wales, 5 June to 27 August 2000, in megawatts: (1008,) float64.

    One value is the mean of two hours, so that a week is 84 values, and a row that holds one is short.

    Source: half-hourly in Taylor (2003), Journal of the Operational Research Society 54, 799-805, `taylor` in R's
    forecast; here from pmdarima.
    """
    values = import_extra("pmdarima.datasets", _PURPOSE, "series").load_taylor()
    return torch.as_tensor(values, dtype=torch.float64).view(-1, 4).mean(-1)


SOURCES: dict[str, Source] = {"demand": Source(_demand, {"day": 12, "week": 84}, "093279ac4dd9")}


@dataclass(frozen=True)
class SeriesContinuation(RuleTask):
    """Continue a measured series, at first as far as training rows reach, then further.

    A value is one token: the standardised value in `levels` equal steps over 6 standard deviations, one digit in base
    100. Two digits in base 10 would say the same in rows of twice the length, with periods of twice as many positions.
    The steps of 0.06 cost 0.015 standard deviations of error on average, a fifth of the best baseline's error. Mean and
    standard deviation are those of the training part. Training rows are the series scaled and shifted a little by
    chance, each by its own, so that few values become many rows.

    With the defaults a row is given a week, training rows go on for two days, and test rows for a week.

    Attributes:
        source: of SOURCES.
        held_out: values at the end that only test rows hold.
        skipped: values after these that nothing holds, so that the cut lies earlier in time.
        context: values at the beginning of a row that are given.
        trained_horizon: values that training rows have after that.
        horizon: values that are asked for.
        levels: different tokens.
        num_train_rows: training rows.
        start_every: values between the starts of two test rows.
        data_seed: seed of starts, scales and shifts of the training rows.
    """

    name: ClassVar[str] = "series"
    source: str = "demand"
    held_out: int = 252
    skipped: int = 0
    context: int = 84
    trained_horizon: int = 24
    horizon: int = 84
    levels: int = 100
    num_train_rows: int = 6000
    start_every: int = 1
    data_seed: int = 0

    def __post_init__(self) -> None:
        least = {"held_out": 1, "skipped": 0, "context": 1, "trained_horizon": 1, "horizon": 2, "levels": 2}
        self._check_at_least(**least, num_train_rows=1, start_every=1, data_seed=0)
        if self.source not in SOURCES:
            raise ConfigError(
                f"`source` of the rule series must be one that exists, got {self.source!r}: "
                f"{did_you_mean(self.source, SOURCES)}"
            )
        period = max(SOURCES[self.source].periods.values())
        if self.context < period:
            raise ConfigError(
                f"`context` of the rule series must be at least {period}, the longest period of {self.source}, got "
                f"{self.context}: a naive forecast repeats it."
            )
        if not self.trained_horizon < self.horizon or self.held_out < self.prompt_tokens:
            raise ConfigError(
                "`trained_horizon` < `horizon` and `context` + `horizon` <= `held_out` must hold in the rule series, "
                f"got {self.trained_horizon}, {self.horizon}, {self.context} and {self.held_out}: a test row lies in "
                "the held-out part and is longer than any training row."
            )

    @property
    def vocabulary(self) -> list[str]:
        """The levels, from the lowest, named by numbers in brackets."""
        return [f"[{index}]" for index in range(self.levels)]

    @property
    def prompt_tokens(self) -> int:
        """T: tokens in a test row; training rows are shorter."""
        return self.context + self.horizon

    @cached_property
    def values(self) -> Tensor:
        """The series up to the end of the held-out part, in standard deviations from the mean: (N,) float64.

        Raises:
            DependencyError: where the package that holds it is not installed.
            DataError: where it holds other values than it did, or too few.
        """
        source = SOURCES[self.source]
        values = source.load()
        digest = hashlib.sha256(values.numpy().astype("<f8").tobytes()).hexdigest()[:12]
        if source.digest and digest != source.digest:
            raise DataError(
                f"the series {self.source} must be the one whose digest is {source.digest}, got {digest}: install the "
                "versions in requirements-dev.txt."
            )
        values = values[: len(values) - self.skipped]
        known = values[: -self.held_out]
        if len(known) < self.context + self.trained_horizon:
            raise DataError(
                f"the series {self.source} must have at least {self.context + self.trained_horizon} values before the "
                f"held-out part, got {len(known)}: lower held_out, skipped or context."
            )
        return (values - known.mean()) / known.std()

    @property
    def first_held_out(self) -> int:
        """The place in `values` at which the held-out part begins."""
        return len(self.values) - self.held_out

    def encode(self, values: Tensor) -> Tensor:
        """Return the tokens of values in standard deviations: int64 of the same shape."""
        return ((values + LIMIT) * (self.levels / (2 * LIMIT))).floor().long().clamp(0, self.levels - 1)

    def decode(self, tokens: Tensor) -> Tensor:
        """Return the middles of the steps that tokens of any shape stand for, in standard deviations: float64."""
        return (tokens.double() + 0.5) * (2 * LIMIT / self.levels) - LIMIT

    @cached_property
    def train(self) -> Examples:
        """Rows of `context` + `trained_horizon` values from before the held-out part; the keys are their starts."""
        generator = torch.Generator().manual_seed(self.data_seed)
        length = self.context + self.trained_horizon
        starts = torch.randint(self.first_held_out - length + 1, (self.num_train_rows,), generator=generator)
        rows = self.values[starts[:, None] + torch.arange(length)]  # (N, T)
        for (low, high), change in ((_SCALES, torch.mul), (_SHIFTS, torch.add)):
            rows = change(rows, low + (high - low) * torch.rand(len(rows), 1, generator=generator, dtype=torch.float64))
        return self._examples(rows, starts)

    @cached_property
    def test_values(self) -> Tensor:
        """Rows of `context` + `horizon` values of the held-out part: (N, T) float64."""
        return self.values[self.first_held_out :].unfold(0, self.prompt_tokens, self.start_every)

    @cached_property
    def test(self) -> Examples:
        """The rows of `test_values`; the keys are their starts."""
        starts = self.first_held_out + torch.arange(len(self.test_values)) * self.start_every
        return self._examples(self.test_values, starts)

    def _examples(self, rows: Tensor, starts: Tensor) -> Examples:
        tokens = self.encode(rows)
        labels = torch.full_like(tokens, IGNORED)
        labels[:, :-1] = tokens[:, 1:]
        return Examples(tokens, labels, starts)

    def baselines(self) -> dict[str, Tensor]:
        """Return what naive forecasts say of `test_values`, (N, horizon) each.

        "persistence" repeats the last value of the context, "a PERIOD ago" its last period, "the mean" is 0.
        """
        context, steps = self.test_values[:, : self.context], torch.arange(self.horizon)
        periods = {"persistence": 1}
        periods |= {f"a {name} ago": period for name, period in SOURCES[self.source].periods.items()}
        said = {name: context[:, self.context - period + steps % period] for name, period in periods.items()}
        return {**said, "the mean": torch.zeros(len(context), self.horizon, dtype=torch.float64)}
