import pytest

from fanformer.training.configuration import resolve
from fanformer.training.schedule import RunLength, learning_rate_factor, run_length


def test_wsd_rises_stays_and_falls_to_its_floor():
    config = resolve(
        "nano",
        overrides={"schedule": "wsd", "warmup_fraction": 0.1, "decay_fraction": 0.4, "min_learning_rate_ratio": 0.1},
    ).schedule
    factor = [learning_rate_factor(progress, config) for progress in (0.0, 0.05, 0.1, 0.6, 0.8, 1.0)]
    assert factor == pytest.approx([0.0, 0.5, 1.0, 1.0, 0.55, 0.1])


def test_cosine_falls_over_all_of_the_run_after_the_warm_up():
    config = resolve(
        "nano",
        overrides={"schedule": "cosine", "warmup_fraction": 0.2, "decay_fraction": 0.0, "min_learning_rate_ratio": 0.1},
    ).schedule
    factor = [learning_rate_factor(progress, config) for progress in (0.1, 0.2, 0.6, 1.0)]
    assert factor == pytest.approx([0.5, 1.0, 0.55, 0.1])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"max_steps": 7}, RunLength(7, None)),
        ({"tokens": 4096 * 3}, RunLength(3, None)),
        ({"epochs": 2.0}, RunLength(20, None)),
        ({}, RunLength(10, None)),
        ({"max_time": 60.0}, RunLength(None, 60.0)),
        ({"max_steps": 7, "max_time": 60.0}, RunLength(7, 60.0)),
    ],
    ids=["steps", "tokens", "epochs", "one epoch by default", "time", "steps within a time"],
)
def test_the_length_of_a_run_comes_from_the_one_field_that_sets_it(fields, expected):
    plain = {"sequence_length": 256, "batch_size": 16, "max_time": None}
    assert run_length(resolve("nano", overrides={**plain, **fields}), rows=160) == expected


def test_progress_counts_steps_where_there_are_steps_else_time():
    assert RunLength(10, 5.0).progress(3, elapsed_seconds=4.0) == pytest.approx(0.3)
    assert RunLength(None, 5.0).progress(3, elapsed_seconds=2.0) == pytest.approx(0.4)
    assert RunLength(None, 5.0).progress(3, elapsed_seconds=2.0, reserved_seconds=1.0) == pytest.approx(0.5)
    assert RunLength(None, 5.0).progress(3, elapsed_seconds=9.0) == 1.0
