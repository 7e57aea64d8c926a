import json

import pytest

from fanformer.training.checkpoint import write_state
from fanformer.training.configuration import resolve
from fanformer.training.folder import write_run_file
from fanformer.training.schedule import (
    SHARES,
    Due,
    RunClock,
    RunLength,
    is_finished,
    learning_rate_factor,
    run_length,
)
from fanformer.training.state import LoopState

NO_STEPS = dict.fromkeys(SHARES)


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


def saved_at(length, state, steps):
    clock = RunClock(length, NO_STEPS, started=0.0)
    clock.begin(state)
    found = [step for step in range(state.step + 1, steps + 1) if Due.SAVE in clock.after_step(step, False)]
    clock.store(state)
    state.step = steps
    return found


def test_a_finished_run_that_is_made_longer_saves_at_every_fifth_of_its_new_length():
    state = LoopState()
    assert saved_at(RunLength(1000, None), state, 1000) == [200, 400, 600, 800, 1000]
    assert saved_at(RunLength(10000, None), state, 10000) == [2000, 4000, 6000, 8000, 10000]
    state = LoopState()
    saved_at(RunLength(1000, None), state, 1000)
    assert saved_at(RunLength(1500, None), state, 1500) == [1200, 1500]


def test_a_run_of_the_same_length_saves_after_a_resume_what_it_would_have_saved():
    state = LoopState()
    assert saved_at(RunLength(1000, None), state, 450) == [200, 400]
    assert saved_at(RunLength(1000, None), state, 1000) == [600, 800, 1000]


def test_the_last_evaluation_takes_no_more_than_a_fifth_of_a_runs_time():
    clock = RunClock(RunLength(None, 100.0), NO_STEPS, started=0.0)
    clock.note_evaluation(seconds=1.0, tokens=1000, tokens_of_the_last=5000)
    assert (clock.reserved_seconds, clock.tokens_of_the_last) == (pytest.approx(5.5), None)
    clock.note_evaluation(seconds=1.0, tokens=1000, tokens_of_the_last=1_000_000)
    assert (clock.reserved_seconds, clock.tokens_of_the_last) == (pytest.approx(20.0), 18181)


def test_a_limit_beside_a_number_of_steps_keeps_time_for_a_sample_alone(monkeypatch):
    clock = RunClock(RunLength(1000, 100.0), NO_STEPS, started=0.0)
    clock.begin(LoopState())
    clock.note_evaluation(seconds=1.0, tokens=1000, tokens_of_the_last=1_000_000)
    assert clock.tokens_of_the_last is None
    for now, stops in ((98.0, False), (99.0, True)):
        monkeypatch.setattr("fanformer.training.schedule.time.monotonic", lambda now=now: now)
        assert (Due.STOP in clock.after_step(7, False)) is stops


@pytest.fixture
def left(tmp_path):
    """Make the folder of a run as a process leaves it after step 7."""

    def make(max_steps, max_seconds, finished_seconds=None, measured_step=7):
        parts = {name: {"a": 1} for name in ("configuration", "model", "data", "environment")}
        write_run_file(tmp_path, {**parts, "length": {"max_steps": max_steps, "max_seconds": max_seconds}})
        checkpoint = tmp_path / "checkpoint-7"
        checkpoint.mkdir()
        (checkpoint / "manifest.json").write_text("{}")
        write_state(checkpoint, {"loop": {"step": 7, "finished_seconds": finished_seconds}})
        (tmp_path / "model.safetensors").write_bytes(b"")
        (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": measured_step, "val_loss": 1.0}) + "\n")
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("fields", "finished"),
    [
        ({"max_steps": 7, "max_seconds": None}, True),
        ({"max_steps": 8, "max_seconds": None}, False),
        ({"max_steps": 8, "max_seconds": 60.0}, False),  # a limit beside the steps cut it short
        ({"max_steps": None, "max_seconds": 60.0, "finished_seconds": 60.0}, True),
        ({"max_steps": None, "max_seconds": 60.0}, False),  # a signal came first
        ({"max_steps": None, "max_seconds": 90.0, "finished_seconds": 60.0}, False),  # it was made longer since
        ({"max_steps": 7, "max_seconds": None, "measured_step": 5}, False),  # a signal came while it was measured
    ],
)
def test_a_run_is_finished_where_it_ended_as_planned_and_was_measured(left, fields, finished):
    assert is_finished(left(**fields)) is finished


def test_a_folder_without_a_whole_checkpoint_or_without_a_run_holds_no_finished_run(left, tmp_path):
    assert not is_finished(tmp_path)
    folder = left(7, None)
    (folder / "checkpoint-7/manifest.json").unlink()
    assert not is_finished(folder)
