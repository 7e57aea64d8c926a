"""A kind of architecture, and the FFN or the ranks with which it has a size at a width."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from fanformer.model.footprint import footprint

SIZE_TOLERANCE = 0.01
"""How far from a size that is asked for, as a share, what is built may be."""
_FFN_STEPS = (8, 2)
"""Multiples of intermediate_size: the second where the first is too coarse to meet a small size."""
_RANK_STEPS = {True: (32, 16), False: (16, 8)}
"""The same for ranks, from a width of 256 on and below."""
_RANK_WIDTH = 256
_MOST = 2.0
"""Largest share of the usual ranks that is looked at."""


@dataclass(frozen=True)
class Family:
    """A kind of architecture.

    Attributes:
        config_type: its configuration class.
        fields: that make it what it is, on top of the class's defaults.
        shape: of the published model; what a name without SIZE gives.
        ffn_ratio: intermediate_size over hidden_size that scaled shapes keep near to.
        key_value_share: query heads for each key-value head in scaled shapes, at least.
        width_of: family whose hidden_size scaled shapes take over where it fits, so that embeddings are equal too.
        ranks: fields that hold a rank, with its share of hidden_size in scaled shapes.
        ranks_fit: whether it is the ranks that make up a size, intermediate_size being `ffn_ratio` times the width, or
            intermediate_size, the ranks being their shares of the width.
        recipe: fields of RunConfig with which it learns language, where they are not the preset's.
        block: number of what is built; raised with every change of its defaults or of its initialisation. Trainings of
            another number are not taken for those of this one; docs/experiments.md says what each number was.
    """

    config_type: type[PreTrainedConfig]
    fields: Mapping[str, Any]
    shape: Mapping[str, Any]
    ffn_ratio: float
    key_value_share: int
    width_of: str | None = None
    ranks: Mapping[str, float] = field(default_factory=dict)
    ranks_fit: bool = False
    recipe: Mapping[str, Any] = field(default_factory=dict)
    block: int = 2

    def ranks_at(self, fields: Mapping[str, Any]) -> dict[str, int]:
        """Return the ranks at a width, without those that are given."""
        given = self.ranks.keys() & fields.keys()
        return {name: max(1, int(self.ranks[name] * fields["hidden_size"])) for name in self.ranks if name not in given}


class Fitted(NamedTuple):
    """Fields that bring a shape to a size.

    Attributes:
        fields: their values.
        share: of what is usual; infinite where even the most is too small, 0 where even the least is too large.
    """

    fields: dict[str, int]
    share: float


_TOO_SMALL, _TOO_LARGE = Fitted({}, float("inf")), Fitted({}, 0.0)


def fitted(family: Family, fields: dict[str, Any], size: int, finer: bool) -> Fitted:
    """Return intermediate_size and ranks that are not given, so that the size is met as nearly as may be."""
    width = fields["hidden_size"]
    free = {name: share * width for name, share in family.ranks.items() if name not in fields}
    if family.ranks_fit and free:
        ffn = {} if "intermediate_size" in fields else {"intermediate_size": round(family.ffn_ratio * width)}
        found = _fitting_ranks(family, {**fields, **ffn}, size, _RANK_STEPS[width >= _RANK_WIDTH][finer], free)
        return found._replace(fields={**found.fields, **ffn})
    ranks = family.ranks_at(fields)
    if "intermediate_size" in fields:
        return Fitted(ranks, fields["intermediate_size"] / width / family.ffn_ratio)
    wide = _fitting_ffn(family, {**fields, **ranks}, size, _FFN_STEPS[finer])
    if not wide:
        return _TOO_SMALL if wide is None else _TOO_LARGE
    return Fitted({**ranks, "intermediate_size": wide}, wide / width / family.ffn_ratio)


def _fitting_ranks(family: Family, fields: dict[str, Any], size: int, step: int, usual: Mapping[str, float]) -> Fitted:
    """Return multiples of `step` near one and the same share of the `usual` ranks that come near to the size."""

    def count(ranks: Mapping[str, int]) -> int:
        return footprint(family.config_type(**{**fields, **ranks})).without_embeddings

    least = dict.fromkeys(usual, step)
    base = count(least)
    costs = {name: count({**least, name: 2 * step}) - base for name in usual}  # every step costs the same

    def total(steps: Mapping[str, int]) -> int:
        return base + sum((steps[name] - 1) * cost for name, cost in costs.items())

    def at(share: float) -> dict[str, int]:
        return {name: max(1, round(share * rank / step)) for name, rank in usual.items()}

    if base > (1 + SIZE_TOLERANCE) * size:
        return _TOO_LARGE
    if total(at(_MOST)) < (1 - SIZE_TOLERANCE) * size:
        return _TOO_SMALL
    shares = [_MOST * part / 128 for part in range(1, 129)]
    share = min(shares, key=lambda candidate: abs(total(at(candidate)) - size))
    middle, wanted = at(share), {name: share * rank / step for name, rank in usual.items()}
    beside = [
        dict(zip(usual, steps, strict=True))
        for steps in itertools.product(*([max(1, n - 1), n, n + 1] for n in middle.values()))
    ]

    def misfit(steps: Mapping[str, int]) -> tuple[float, float]:
        off = abs(total(steps) / size - 1)
        return max(0.0, off - 0.75 * SIZE_TOLERANCE), sum(abs(steps[name] / wanted[name] - 1) for name in usual)

    best = min(beside, key=misfit)
    return Fitted({name: n * step for name, n in best.items()}, sum(best.values()) * step / sum(usual.values()))


def _fitting_ffn(family: Family, fields: dict[str, Any], size: int, step: int) -> int | None:
    """Return the intermediate_size, a multiple of `step`, that comes nearest to the size.

    None where even the largest is too small; 0 where the blocks are too large without an FFN.
    """
    counted: dict[int, int] = {}

    def count(steps: int) -> int:
        if steps not in counted:
            config = family.config_type(**{**fields, "intermediate_size": steps * step})
            counted[steps] = footprint(config).without_embeddings
        return counted[steps]

    low, high = 1, 8 * fields["hidden_size"] // step
    if count(low) > size:
        return 0
    if count(high) < (1 - SIZE_TOLERANCE) * size:
        return None
    while high - low > 1:
        # nearly a straight line: where it meets the size, but never an end again
        guess = low + round((high - low) * (size - count(low)) / (count(high) - count(low)))
        middle = min(max(guess, low + 1), high - 1)
        low, high = (middle, high) if count(middle) <= size else (low, middle)
        if high - low > 1:  # the other end stays far off where the line bends
            beside = min(low + 1, high - 1) if low == middle else max(high - 1, low + 1)
            low, high = (beside, high) if count(beside) <= size else (low, beside)
    nearest = min((low, high), key=lambda steps: abs(count(steps) - size))
    return nearest * step
