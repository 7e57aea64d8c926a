"""Rules that take one step after another: products of a group, and pointers to follow, with an answer for every step.

A model without more depth answers the first so many positions; one that thinks longer should answer more of them. Rows
are trained on their first positions alone, and longer ones ask for the rest.

Sources: prefix products, arXiv:2607.20594; pointer chasing, arXiv:2604.07822 (k-hop facts), as told in a row here.
"""

import itertools
from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from fanformer.comparison.rule_base import IGNORED, Examples, RuleTask
from fanformer.errors import ConfigError


@dataclass(frozen=True)
class DepthTask(RuleTask):
    """Rows with answers at their last positions, each of which takes one step more than the one before.

    Attributes:
        trained_positions: answers of a training row.
        longest_positions: answers of a test row; more than in training, so that what was learned is the step.
        num_train_rows: training rows.
        num_test_rows: test rows.
        data_seed: seed of all rows.
    """

    trained_positions: int = 16
    longest_positions: int = 64
    num_train_rows: int = 50000
    num_test_rows: int = 256
    data_seed: int = 0

    def __post_init__(self) -> None:
        ones = ("trained_positions", "num_train_rows", "num_test_rows")
        self._check_at_least(**dict.fromkeys(ones, 1), longest_positions=2, data_seed=0)
        if self.longest_positions <= self.trained_positions:
            raise ConfigError(
                f"`longest_positions` of the rule {self.name} must be above `trained_positions`, got "
                f"{self.longest_positions} and {self.trained_positions}: test rows ask for what training rows do not."
            )

    @cached_property
    def train(self) -> Examples:
        """Rows with `trained_positions` answers."""
        return self._rows(self.num_train_rows, self.trained_positions, self.data_seed)

    @cached_property
    def test(self) -> Examples:
        """Rows with `longest_positions` answers."""
        return self._rows(self.num_test_rows, self.longest_positions, self.data_seed + 1)

    @abstractmethod
    def _rows(self, count: int, positions: int, seed: int) -> Examples:
        """Return so many rows with so many answers each; keys are the rows' numbers."""


def _elements(group: str) -> list[tuple[int, ...]]:
    """Return the permutations of a group; the identity is the first."""
    points, alternating = {"s3": (3, False), "a5": (5, True)}[group]
    found = []
    for permutation in itertools.permutations(range(points)):
        swaps = sum(a > b for a, b in itertools.combinations(permutation, 2))
        if not alternating or swaps % 2 == 0:
            found.append(permutation)
    return found


@dataclass(frozen=True)
class PrefixProduct(DepthTask):
    """Random elements of a group; the answer at each is the product of all up to it."""

    group: ClassVar[str]

    @cached_property
    def vocabulary(self) -> list[str]:
        """The elements, by where they send the points."""
        return [f"[{''.join(map(str, element))}]" for element in _elements(self.group)]

    @property
    def prompt_tokens(self) -> int:
        """T: tokens of the longest row, an answer at each."""
        return self.longest_positions

    @cached_property
    def products(self) -> Tensor:
        """Number of the product a b, first b and then a, for all pairs: (n, n) int64."""
        elements = _elements(self.group)
        number = {element: index for index, element in enumerate(elements)}
        return torch.tensor([[number[tuple(a[point] for point in b)] for b in elements] for a in elements])

    def _rows(self, count: int, positions: int, seed: int) -> Examples:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(len(self.vocabulary), (count, positions), generator=generator)
        labels = ids.clone()
        for place in range(1, positions):
            labels[:, place] = self.products[labels[:, place - 1], ids[:, place]]
        return Examples(ids, labels, torch.arange(count))


@dataclass(frozen=True)
class S3Product(PrefixProduct):
    """Prefix products of the 6 permutations of 3 points."""

    name: ClassVar[str] = "s3-product"
    group = "s3"


@dataclass(frozen=True)
class A5Product(PrefixProduct):
    """Prefix products of the 60 even permutations of 5 points, a group that has no normal parts to take it apart by."""

    name: ClassVar[str] = "a5-product"
    group = "a5"


@dataclass(frozen=True)
class PointerChasing(DepthTask):
    """A ring of nodes told as pairs in random order, a start, and one arrow after another: where does each lead?

    A row is `a b` for every node a and its next b, then the start, whose answer is its next, and so on along arrows.

    Attributes:
        num_nodes: of the ring; no number of hops up to it leads back to the start.
    """

    name: ClassVar[str] = "pointer-chasing"
    trained_positions: int = 4
    longest_positions: int = 12
    num_nodes: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_at_least(num_nodes=3)
        if self.longest_positions >= self.num_nodes:
            raise ConfigError(
                f"`longest_positions` of the rule {self.name} must be below `num_nodes`, got {self.longest_positions} "
                f"and {self.num_nodes}: hops around the ring lead back."
            )

    @cached_property
    def vocabulary(self) -> list[str]:
        """The nodes, named by numbers in brackets, and the arrow."""
        return [*(f"[{index}]" for index in range(self.num_nodes)), ">"]

    @property
    def prompt_tokens(self) -> int:
        """T: tokens of the longest row."""
        return 2 * self.num_nodes + self.longest_positions

    def _rows(self, count: int, positions: int, seed: int) -> Examples:
        generator, nodes = torch.Generator().manual_seed(seed), self.num_nodes
        ring = torch.rand(count, nodes, generator=generator).argsort(-1)  # (N, nodes), in the order of the hops
        order = torch.rand(count, nodes, generator=generator).argsort(-1)
        pairs = torch.stack((ring, ring.roll(-1, 1)), -1)  # (N, nodes, 2)
        told = pairs.gather(1, order[..., None].expand(-1, -1, 2)).flatten(1)  # (N, 2 nodes)
        arrows = torch.full((count, positions - 1), nodes)
        ids = torch.cat((told, ring[:, :1], arrows), 1)
        labels = torch.cat((torch.full_like(told, IGNORED), ring[:, 1 : positions + 1]), 1)
        return Examples(ids, labels, torch.arange(count))
