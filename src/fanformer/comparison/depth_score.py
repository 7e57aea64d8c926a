"""How far a model gets in a rule of many steps, over the number of steps that it takes itself."""

from collections.abc import Sequence

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
