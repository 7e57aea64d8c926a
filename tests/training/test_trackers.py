"""Trackers hear the figures that metrics.jsonl holds; one that fails or is missing is told, and ends no training."""

import sys

import pytest

from fanformer.cli.main import main
from fanformer.cli.train import train as train_command
from fanformer.errors import DependencyError
from fanformer.training import trackers
from fanformer.training.events import Event, silent
from fanformer.training.folder import read_records
from fanformer.training.run import train
from fanformer.training.trackers import also_to
from tests.training.conftest import Notebook


class Kept:
    """A tracker that keeps what it is given, and may fail at a step."""

    made: list = []
    fails_at, fails_to_close = None, False

    def __init__(self, config, step):
        self.folder, self.first, self.lines, self.is_closed = config.folder, step, [], False
        self.had_run_file = (config.folder / "run.yaml").is_file()
        Kept.made.append(self)

    def log(self, figures, step):
        if step == self.fails_at:
            raise ConnectionError("no\nway")
        self.lines.append((step, dict(figures)))

    def close(self):
        self.is_closed = True
        if self.fails_to_close:
            raise OSError("disk full")


@pytest.fixture
def kept(monkeypatch):
    """The tracker in the place of one whose package is here."""
    monkeypatch.setitem(trackers.TRACKERS, "json", Kept)
    monkeypatch.setattr(Kept, "made", [])
    return Kept


def test_a_tracker_hears_every_figure_of_the_records(run_config, kept):
    config, notebook = run_config(log_steps=1, eval_steps=3), Notebook()
    with also_to("json", config, notebook) as listener:
        assert kept.made == []  # the folder is not claimed yet
        train(config, listener)
    [tracker] = kept.made
    assert tracker.had_run_file
    assert tracker.is_closed
    assert tracker.first == 1
    expected = [
        (record["step"], {key: value for key, value in record.items() if key not in ("step", "rows", "sample")})
        for record in read_records(config.folder)
    ]
    assert [step for step, _ in tracker.lines] == [step for step, _ in expected] == [1, 2, 3, 4, 5, 6]
    for (_, given), (_, written) in zip(tracker.lines, expected, strict=True):
        assert given.keys() == written.keys()
        assert given["loss"] == written["loss"]
    assert notebook.steps == [1, 2, 3, 4, 5, 6]
    assert len(notebook.samples) == 2


def test_a_tracker_that_fails_is_told_once_and_training_goes_on(run_config, kept, monkeypatch):
    monkeypatch.setattr(kept, "fails_at", 3)
    config, notebook = run_config(log_steps=1), Notebook()
    with also_to("json", config, notebook) as listener:
        train(config, listener)
    told = [note for note in notebook.notes if "logging to json ended" in note]
    assert told == ["logging to json ended (no way): training goes on, metrics.jsonl has every figure"]
    assert [step for step, _ in kept.made[0].lines] == [1, 2]
    assert [record["step"] for record in read_records(config.folder)] == [1, 2, 3, 4, 5, 6]
    monkeypatch.setattr(kept, "fails_to_close", True)
    notebook = Notebook()
    with also_to("json", config, notebook) as listener:
        listener(Event("record", figures={"step": 1, "loss": 2.0}))
    assert ["disk full" in note for note in notebook.notes] == [True]


def test_a_missing_package_names_the_extra_before_anything_is_done(run_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = run_config()
    with (
        pytest.raises(DependencyError, match=r"needs wandb, .*: pip install 'fanformer\[wandb\]'"),
        also_to("wandb", config, silent),
    ):
        raise AssertionError("nothing begins")
    assert not config.folder.exists()


def test_the_flag_names_every_tracker():
    [flag] = [parameter for parameter in train_command.params if parameter.name == "log_to"]
    assert list(flag.type.choices) == list(trackers.TRACKERS)


def test_commands_refuse_what_has_no_effect(capsys):
    assert main(["train", "--log-to", "aim"]) == 2
    assert "'aim' is not one of 'trackio', 'tensorboard', 'wandb'" in capsys.readouterr().err
    assert main(["train", "--log-to", "wandb", "--prove-resume"]) == 2
    assert "`--log-to` does not apply to --prove-resume, got wandb: leave one out" in capsys.readouterr().err
