"""Ratios over documents, such as nats per token, with the standard error that their documents give them."""

from collections.abc import Iterable, Sequence

import numpy as np


def ratio_stderr(numerators: np.ndarray, denominators: np.ndarray) -> float | None:
    """Return the standard error of sum(numerators) / sum(denominators), each pair being an independent sample.

    Source: Cochran, Sampling Techniques, 3rd ed., section 6.4: the ratio estimator, linearised (delta method).

    Args:
        numerators: (N,), such as nats of each document.
        denominators: (N,), such as tokens of each document; pairs of zeros do not count.

    Returns:
        The standard error, or None where fewer than two pairs count.
    """
    counted = denominators > 0
    above, below = numerators[counted], denominators[counted]
    number = len(below)
    if number < 2:
        return None
    residuals = above - (above.sum() / below.sum()) * below
    return float(np.sqrt(number / (number - 1) * np.square(residuals).sum()) / below.sum())


def ratio(pairs: Iterable[Sequence[float]]) -> tuple[float, float | None]:
    """Return sum(first) / sum(second) over pairs, and its standard error as `ratio_stderr` gives it."""
    table = np.array(list(pairs), dtype=np.float64)
    return float(table[:, 0].sum() / table[:, 1].sum()), ratio_stderr(table[:, 0], table[:, 1])
