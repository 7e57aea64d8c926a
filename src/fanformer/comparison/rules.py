"""Rules to learn from scratch: modular addition and linear regression with a hole, and the continuation of a period.

A task makes all of its examples, as rows of token ids whose labels are the answers; nothing is downloaded or sampled
anew. The two hole tasks are those of FANformer, arXiv:2502.21309, section 4.4.3 and appendix M.4 (leave-square-out,
after arXiv:2402.17709), which finetunes models of 1B parameters on them.
"""

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from fanformer.comparison.depth_rules import A5Product, PointerChasing, S3Product
from fanformer.comparison.rule_base import IGNORED, Examples, RuleTask
from fanformer.comparison.series import SeriesContinuation
from fanformer.errors import ConfigError, did_you_mean, refuse_unknown


@dataclass(frozen=True)
class HoleTask(RuleTask):
    """A function c of a and b on a square of `size` x `size` pairs, trained on all but a square hole in the middle.

    Attributes:
        signs: the prompt's tokens, "a" and "b" standing for the numbers.
        size_field: which field of a task is its `size`.
        hole_side: values of a, and of b, that are left out; odd; the paper's hole has 21.
    """

    signs: ClassVar[tuple[str, ...]]
    size_field: ClassVar[str]
    hole_side: int = 21

    def __post_init__(self) -> None:
        self._check_at_least(**{self.size_field: 2, "hole_side": 1})
        self._check_hole()

    @property
    def size(self) -> int:
        """Values of a, and of b: 0 to size - 1."""
        return getattr(self, self.size_field)

    @abstractmethod
    def answer(self, a: Tensor, b: Tensor) -> Tensor:
        """Return c for pairs of integers, of their shape."""

    @property
    def prompt_tokens(self) -> int:
        """T: tokens in a prompt; its last one predicts the answer."""
        return len(self.signs)

    @property
    def center(self) -> int:
        """The a, and the b, in the middle of the hole."""
        return self.size // 2

    @property
    def hole(self) -> tuple[int, int]:
        """First and last a, and b, of the hole."""
        return self.center - self.hole_side // 2, self.center + self.hole_side // 2

    @cached_property
    def pairs(self) -> Tensor:
        """All pairs (a, b): (size^2, 2), b running fastest."""
        return torch.cartesian_prod(torch.arange(self.size), torch.arange(self.size))

    @cached_property
    def in_hole(self) -> Tensor:
        """Which of `pairs` lie in the hole: (size^2,) bool."""
        first, last = self.hole
        return ((self.pairs >= first) & (self.pairs <= last)).all(-1)

    @cached_property
    def vocabulary(self) -> list[str]:
        """Every number that occurs as one token, then the signs."""
        answers = self.answer(*self.pairs.unbind(-1))
        numbers = max(self.size, int(answers.max()) + 1)
        return [*map(str, range(numbers)), *sorted(set(self.signs) - {"a", "b"})]

    @cached_property
    def everything(self) -> Examples:
        """All pairs, trained or not, in the order of `pairs`."""
        ids = {token: index for index, token in enumerate(self.vocabulary)}
        a, b = self.pairs.unbind(-1)
        columns = {"a": a, "b": b}
        input_ids = torch.stack([columns.get(sign, torch.full_like(a, ids.get(sign, 0))) for sign in self.signs], -1)
        labels = torch.full_like(input_ids, IGNORED)
        labels[:, -1] = self.answer(a, b)
        return Examples(input_ids, labels, self.pairs)

    @cached_property
    def train(self) -> Examples:
        """The pairs outside the hole."""
        return self.everything[~self.in_hole]

    @cached_property
    def test(self) -> Examples:
        """The pairs in the hole."""
        return self.everything[self.in_hole]

    def _check_hole(self) -> None:
        """Check that what the hole asks for can be known from outside: its numbers and its answers occur there.

        Raises:
            ConfigError: if the hole is not odd, leaves the square, or holds a number or answer that is nowhere else.
        """
        value, name = self.hole_side, self.name
        if value % 2 == 0:
            raise ConfigError(
                f"`hole_side` of the rule {name} must be odd, got {value}: the hole reaches equally far from its "
                f"middle; the paper's |a - {self.center}| <= 10 is 21."
            )
        first, last = self.hole
        if first < 0 or last >= self.size:
            raise ConfigError(
                f"`hole_side` of the rule {name} must leave the hole inside the {self.size} x {self.size} pairs, got "
                f"{value}: take a smaller one."
            )
        for column, what in ((0, "a"), (1, "b"), (None, "answer")):
            known, asked = (
                set((part.labels[:, -1] if column is None else part.keys[:, column]).tolist())
                for part in (self.train, self.test)
            )
            if asked - known:
                raise ConfigError(
                    f"`hole_side` of the rule {name} must leave every number of the hole in the training examples too, "
                    f"got {value}: {what} {min(asked - known)} occurs in the hole only; take a smaller one."
                )


@dataclass(frozen=True)
class ModularAddition(HoleTask):
    """c = (a + b) mod `modulus`, prompt `a+b=`.

    Attributes:
        modulus: the paper's is 113.
    """

    name: ClassVar[str] = "modular-addition"
    signs = ("a", "+", "b", "=")
    size_field = "modulus"
    modulus: int = 113

    def answer(self, a: Tensor, b: Tensor) -> Tensor:
        """Return (a + b) mod `modulus`."""
        return (a + b) % self.modulus


@dataclass(frozen=True)
class LinearRegression(HoleTask):
    """c = a + 2 b + 3, prompt `(a,b)=`.

    Attributes:
        values: values of a, and of b; the paper's are 0 to 99.
    """

    name: ClassVar[str] = "linear-regression"
    signs = ("(", "a", ",", "b", ")", "=")
    size_field = "values"
    values: int = 100

    def answer(self, a: Tensor, b: Tensor) -> Tensor:
        """Return a + 2 b + 3, of their shape."""
        return a + 2 * b + 3


@dataclass(frozen=True)
class PeriodicContinuation(RuleTask):
    """Continue a pattern of distinct symbols that repeats with a period longer than any in training.

    From the second symbol of the second period on the rest of the row is determined, and only that is asked for. All
    rows are equally long, and accuracy is measured at the same positions for every period: those at which the longest
    period is determined too. So a longer period means a longer look back, never a position that training lacked.

    Attributes:
        shortest_period: of the training rows.
        trained_period: longest period of the training rows.
        longest_period: of the test rows, whose periods start at `trained_period` + 1.
        num_symbols: different symbols that patterns draw from.
        scored_tokens: positions at the end of each row at which accuracy is measured.
        num_train_rows: training rows, their periods in equal shares.
        rows_per_period: test rows for each period.
        data_seed: seed of all patterns.
    """

    name: ClassVar[str] = "periodic"
    shortest_period: int = 3
    trained_period: int = 8
    longest_period: int = 16
    num_symbols: int = 32
    scored_tokens: int = 16
    num_train_rows: int = 24000
    rows_per_period: int = 200
    data_seed: int = 0

    def __post_init__(self) -> None:
        ones = ("shortest_period", "trained_period", "scored_tokens", "num_train_rows", "rows_per_period")
        self._check_at_least(**dict.fromkeys(ones, 1), longest_period=2, num_symbols=2, data_seed=0)
        if not self.shortest_period <= self.trained_period < self.longest_period <= self.num_symbols:
            raise ConfigError(
                "`shortest_period` <= `trained_period` < `longest_period` <= `num_symbols` must hold in the rule "
                f"{self.name}, got {self.shortest_period}, {self.trained_period}, {self.longest_period} and "
                f"{self.num_symbols}: a pattern's symbols are distinct, and test periods are longer than trained ones."
            )
        if len(self.train.input_ids.unique()) < self.num_symbols:
            raise ConfigError(
                f"`num_train_rows` of the rule {self.name} must be large enough for every symbol to occur, got "
                f"{self.num_train_rows} for {self.num_symbols} symbols: take more rows or fewer symbols."
            )

    @cached_property
    def vocabulary(self) -> list[str]:
        """The symbols, named by numbers in brackets."""
        return [f"[{index}]" for index in range(self.num_symbols)]

    @property
    def prompt_tokens(self) -> int:
        """T: tokens in a row, the last one predicted but not read."""
        return self.longest_period + self.scored_tokens

    @property
    def scored_from(self) -> int:
        """The first position whose prediction is scored."""
        return self.longest_period

    @cached_property
    def train(self) -> Examples:
        """Rows with periods up to `trained_period`."""
        periods = torch.arange(self.num_train_rows) % (self.trained_period - self.shortest_period + 1)
        return self._rows(periods + self.shortest_period, self.data_seed)

    @cached_property
    def test(self) -> Examples:
        """Rows with longer periods, up to `longest_period`."""
        periods = torch.arange(self.trained_period + 1, self.longest_period + 1)
        return self._rows(periods.repeat_interleave(self.rows_per_period), self.data_seed + 1)

    @cached_property
    def fresh(self) -> Examples:
        """Rows with the trained periods and patterns that training lacks, where there are any left."""
        periods = torch.arange(self.shortest_period, self.trained_period + 1)
        rows = self._rows(periods.repeat_interleave(self.rows_per_period), self.data_seed + 2)
        seen = set(map(tuple, self.train.input_ids.tolist()))
        return rows[torch.tensor([tuple(row) not in seen for row in rows.input_ids.tolist()])]

    def _rows(self, periods: Tensor, seed: int) -> Examples:
        """Return one row for each of `periods` (N,)."""
        generator = torch.Generator().manual_seed(seed)
        patterns = torch.rand(len(periods), self.num_symbols, generator=generator).argsort(-1)  # (N, symbols)
        place = torch.arange(self.prompt_tokens + 1)
        tokens = patterns.gather(1, place % periods[:, None])  # (N, T + 1)
        known = place[:-1] >= periods[:, None]  # the prediction at `period` is the second symbol of the second round
        return Examples(tokens[:, :-1].contiguous(), tokens[:, 1:].where(known, IGNORED), periods)


TASKS: Mapping[str, type[RuleTask]] = {
    task.name: task
    for task in (
        ModularAddition,
        LinearRegression,
        PeriodicContinuation,
        SeriesContinuation,
        S3Product,
        A5Product,
        PointerChasing,
    )
}


def create_task(name: str, **fields: Any) -> RuleTask:
    """Return the task called `name`.

    Args:
        name: modular-addition, linear-regression, periodic, series, s3-product, a5-product or pointer-chasing.
        **fields: what differs from the task's defaults, such as `hole_side`.

    Raises:
        ConfigError: if there is no such task or field (the nearest is offered), or a field has a wrong value.
    """
    if name not in TASKS:
        raise ConfigError(f"a rule must be one that exists, got {name!r}: {did_you_mean(name, TASKS)}")
    refuse_unknown(fields, (field.name for field in dataclasses.fields(TASKS[name])), f"a field of the rule {name}")
    return TASKS[name](**fields)


def model_fields(task: RuleTask) -> dict[str, Any]:
    """Return what a task asks of a model's configuration; its tokens have no start, end or padding among them."""
    return {
        "vocab_size": len(task.vocabulary),
        "max_position_embeddings": task.prompt_tokens,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
