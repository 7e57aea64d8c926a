"""What short trainings say of a long one: a floor for every candidate, and one slope in the text that all share.

The held-out bits per byte of candidate i after D bytes of text are taken for

    L_i(D) = F_i + B D^-b

F_i is what its vocabulary and size leave however long it trains, B is common to all, and b is not fitted but taken from
the literature: with few trials F and b cannot be told apart. F and B are the least squares, which are linear.

Source: J. Hoffmann et al., "Training Compute-Optimal Large Language Models", 2022 (arXiv:2203.15556), whose E + A N^-a
is F here, one number for each candidate instead of a law in N; exponents from the fit of T. Besiroglu et al., 2024
(arXiv:2404.10102), and, to see whether the choice depends on it, from that paper's own.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

EXPONENTS = {"Besiroglu et al. 2024": 0.3658, "Hoffmann et al. 2022": 0.28}
"""Exponents b of the text; the first one decides."""
_EXPONENT = next(iter(EXPONENTS.values()))
NOISE = 0.01
"""Bits per byte below which a difference between two single trainings says nothing (docs/experiments.md)."""


@dataclass(frozen=True)
class Point:
    """A training that ended.

    Attributes:
        candidate: its name.
        text_bytes: D, of text that it read.
        bits_per_byte: L, held out.
    """

    candidate: str
    text_bytes: float
    bits_per_byte: float


@dataclass(frozen=True)
class Fit:
    """What fits the points best.

    Attributes:
        exponent: b.
        slope: B, for D in millions of bytes.
        floors: F of each candidate.
        residual: root of the mean squared difference to the points, in bits per byte.
    """

    exponent: float
    slope: float
    floors: Mapping[str, float]
    residual: float

    def bits_per_byte(self, candidate: str, text_bytes: float) -> float:
        """Return L of a candidate after so many bytes."""
        return self.floors[candidate] + self.slope * _scaled(text_bytes, self.exponent)


def _scaled(text_bytes: float, exponent: float) -> float:
    return float((text_bytes / 1e6) ** -exponent)


def fit(points: Sequence[Point], exponent: float) -> Fit:
    """Return the least squares.

    Args:
        points: of at least one candidate two, after different amounts of text.
        exponent: b, above 0.

    Raises:
        ValueError: if no candidate has two.
    """
    names = sorted({point.candidate for point in points})
    lengths = {name: {point.text_bytes for point in points if point.candidate == name} for name in names}
    if not any(len(found) > 1 for found in lengths.values()):
        raise ValueError("the slope needs a candidate with trainings of two lengths, got none.")
    left = np.zeros((len(points), len(names) + 1))
    for row, point in enumerate(points):
        left[row, names.index(point.candidate)] = 1
        left[row, -1] = _scaled(point.text_bytes, exponent)
    right = np.array([point.bits_per_byte for point in points])
    found = np.linalg.lstsq(left, right, rcond=None)[0]
    residual = float(np.sqrt(np.mean((left @ found - right) ** 2)))
    return Fit(exponent, float(found[-1]), dict(zip(names, map(float, found[:-1]), strict=True)), residual)


def best_at(fitted: Fit, text_bytes: Mapping[str, float]) -> str:
    """Return the candidate with the lowest L after the text that each would read."""
    return min(text_bytes, key=lambda name: (fitted.bits_per_byte(name, text_bytes[name]), name))


def rate_for_longer(bits_per_byte: Mapping[float, float]) -> float:
    """Return the learning rate for a training much longer than those that tried it.

    It is the lowest of those that are not behind the best by more than NOISE: the best rate falls with the length.

    Args:
        bits_per_byte: by rate, after the longest training that was tried.
    """
    best = min(bits_per_byte.values())
    return min(rate for rate, value in bits_per_byte.items() if value <= best + NOISE)


@dataclass(frozen=True)
class Choice:
    """What the trials promise.

    Attributes:
        fits: by the name of the exponent's source; the first one decides.
        alone: bits per byte of each candidate then by a slope of its own, at the first exponent; a check, for two
            single trainings make it.
        text_bytes: that each candidate would read in the base's hours.
        tokens: the same in its tokens.
        learning_rate: for the base.
    """

    fits: Mapping[str, Fit]
    alone: Mapping[str, float]
    text_bytes: Mapping[str, float]
    tokens: Mapping[str, float]
    learning_rate: float

    @property
    def candidate(self) -> str:
        """The best one."""
        return best_at(next(iter(self.fits.values())), self.text_bytes)


def choose(
    trainings: Mapping[str, Sequence[Mapping[str, Any]]],
    rates: Sequence[Mapping[str, Any]],
    speeds: Mapping[str, float],
    processor_seconds: float,
) -> Choice:
    """Return what trials promise for a longer training.

    Args:
        trainings: of each candidate, as a comparison's record has them.
        rates: trainings of one candidate at several rates.
        speeds: tokens per second of processor time, of each candidate.
        processor_seconds: of the longer training.
    """
    points, bytes_per_token = [], {}
    for name, found in trainings.items():
        for one in found:
            figures = one["result"]["figures"]
            # by what every entry of the ledger has: older ones lack the counts of bytes and tokens
            bytes_per_token[name] = figures["loss"] / (math.log(2) * figures["bits_per_byte"])
            text_bytes = one["result"]["curve"][-1]["tokens"] * bytes_per_token[name]
            points.append(Point(name, text_bytes, figures["bits_per_byte"]))
    tokens = {name: speeds[name] * processor_seconds for name in trainings}
    text_bytes = {name: count * bytes_per_token[name] for name, count in tokens.items()}
    own = {name: fit([point for point in points if point.candidate == name], _EXPONENT) for name in trainings}
    return Choice(
        {source: fit(points, exponent) for source, exponent in EXPONENTS.items()},
        {name: own[name].bits_per_byte(name, size) for name, size in text_bytes.items()},
        text_bytes,
        tokens,
        rate_for_longer({one["learning_rate"]: one["result"]["figures"]["bits_per_byte"] for one in rates}),
    )
