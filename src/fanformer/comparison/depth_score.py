"""How far a model gets in a rule of many steps, over the number of steps that it takes itself."""

import statistics
from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel

SOLVED_FROM = 0.9
"""Share of right answers from which a position counts as solved."""


def solved_positions(shares: Sequence[float]) -> int:
    """Return how many positions are solved, one after the other from the first.

    Args:
        shares: of right answers at each position.
    """
    return next((place for place, share in enumerate(shares) if share < SOLVED_FROM), len(shares))


def depths(model: PreTrainedModel) -> list[int | None]:
    """Return the numbers of steps that a model can take: None alone for a plain one."""
    recurrence = getattr(model.config, "recurrence", None)
    return [None] if recurrence is None else list(range(1, recurrence.largest_steps + 1))


def figures_of_depth(
    by_steps: Mapping[str, Sequence[float]], trained_positions: int, trained_steps: int
) -> dict[str, float]:
    """Return what a comparison keeps of a rule of many steps, by name.

    `solved_positions` is the most at any number of steps. `late_right` is the share of right answers behind the trained
    positions, as many of them again, at the most steps that training took; `late_right_at_twice` the same at twice as
    many. `solved_linearity` is R^2 of the straight line through the solved positions over the steps, up to where all
    are solved. The last two are left out where the model cannot take the steps.

    Args:
        by_steps: for each number of steps the share of right answers at each position.
        trained_positions: answers of a training row.
        trained_steps: the most that training took.
    """
    late = slice(trained_positions, 2 * trained_positions)

    def right(steps: int) -> float:
        return statistics.fmean(by_steps[str(steps)][late])

    solved = {int(steps): solved_positions(shares) for steps, shares in by_steps.items()}
    found: dict[str, float] = {"solved_positions": max(solved.values()), "late_right": right(trained_steps)}
    if str(2 * trained_steps) in by_steps:
        found["late_right_at_twice"] = right(2 * trained_steps)
    everything = len(next(iter(by_steps.values())))
    first = min((steps for steps, count in solved.items() if count == everything), default=max(solved))
    x = [float(steps) for steps in sorted(solved) if steps <= first]
    y = [float(solved[int(steps)]) for steps in x]
    if len(x) > 2:
        found["solved_linearity"] = statistics.correlation(x, y) ** 2 if len(set(y)) > 1 else 0.0
    return found
