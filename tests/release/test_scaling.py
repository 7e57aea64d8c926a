"""What short trainings promise: the law that made them is found again, and with it the best of the candidates."""

import math

import pytest

FLOORS, SLOPE = {"small": 1.30, "large": 1.20}, 0.8
SPEEDS, BYTES_PER_TOKEN = {"small": 3000.0, "large": 1000.0}, 3.5


def promised(name, tokens, exponent):
    return FLOORS[name] + SLOPE * (tokens * BYTES_PER_TOKEN / 1e6) ** -exponent


def training(name, tokens, exponent, rate=0.01, off=0.0):
    """A training as a comparison's record has it, also where the ledger stands in for its folder."""
    bits = promised(name, tokens, exponent) + off
    figures = {"bits_per_byte": bits, "loss": bits * math.log(2) * BYTES_PER_TOKEN}
    return {"learning_rate": rate, "result": {"figures": figures, "curve": [{"tokens": tokens}]}}


def chosen(exponent, seconds):
    from scaling import choose

    trainings = {
        name: [training(name, speed * short, exponent) for short in (120, 480)] for name, speed in SPEEDS.items()
    }
    rates = [training("small", 1_000_000, exponent, rate, off) for rate, off in ((0.01, 0.0), (0.005, 0.008))]
    return choose(trainings, rates, SPEEDS, seconds)


def test_the_law_behind_the_trainings_is_found():
    from scaling import EXPONENTS

    for source, exponent in EXPONENTS.items():
        fit = chosen(exponent, 40_000).fits[source]
        # what is left is rounding: the points lie on the law, which is linear in what is sought
        assert fit.slope == pytest.approx(SLOPE, abs=1e-9)
        assert fit.floors == pytest.approx(FLOORS, abs=1e-9)
        assert fit.residual < 1e-9


def test_a_small_model_is_best_for_a_short_time_and_a_large_one_for_a_long_one():
    from scaling import EXPONENTS

    first = next(iter(EXPONENTS.values()))
    assert chosen(first, 480).candidate == "small"
    long = chosen(first, 40_000)
    assert long.candidate == "large"
    assert long.tokens == {"small": 120e6, "large": 40e6}
    assert long.text_bytes["large"] == pytest.approx(140e6)
    for fit in (next(iter(long.fits.values())).bits_per_byte("large", 140e6), long.alone["large"]):
        assert fit == pytest.approx(promised("large", 40e6, first), abs=1e-9)


def test_the_exponent_tells_in_the_residual():
    from scaling import EXPONENTS

    first, second = EXPONENTS
    found = chosen(EXPONENTS[second], 40_000)
    assert found.fits[second].residual < 1e-9 < found.fits[first].residual


def test_a_rate_that_is_as_good_but_lower_is_taken():
    from scaling import rate_for_longer

    assert chosen(0.3, 480).learning_rate == 0.005
    assert rate_for_longer({0.005: 1.52, 0.01: 1.50, 0.02: 1.501}) == 0.01
    assert rate_for_longer({0.005: 1.52}) == 0.005


def test_one_length_alone_has_no_slope():
    from scaling import Point, fit

    with pytest.raises(ValueError, match="a candidate with trainings of two lengths, got none"):
        fit([Point("a", 1e6, 1.5), Point("b", 2e6, 1.4)], 0.3)
