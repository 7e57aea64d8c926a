"""The demos: a training that was stopped is told in a line, gone on with the next time, and no base for towers."""

import sys
from types import SimpleNamespace

import click
import pytest

from fanformer.errors import CheckpointError, ConfigError
from fanformer.training.configuration import resolve_run
from fanformer.training.folder import read_run_file, write_run_file


@pytest.fixture
def examples(repository, monkeypatch):
    """Let a test import the programs of examples/."""
    monkeypatch.syspath_prepend(str(repository / "examples"))


@pytest.fixture
def stopped(tmp_path):
    """The folder of the demo's training as Ctrl-C leaves it."""
    config = resolve_run(None, {"preset": "nano", "output_dir": str(tmp_path / "demo"), "max_time": 300.0})
    folder = config.folder
    (folder / "checkpoint-5").mkdir(parents=True)
    (folder / "checkpoint-5/manifest.json").write_text("{}")
    (folder / "checkpoint-5/training_state.json").write_text('{"format_version": 1, "loop": {"step": 5}}')
    (folder / "model.safetensors").write_bytes(b"")
    parts = {name: {"a": 1} for name in ("model", "data", "environment")}
    length = {"max_steps": None, "max_seconds": 300.0}
    write_run_file(folder, {"configuration": config.to_dict(), "length": length, **parts})
    return folder


def test_a_demo_that_ctrl_c_stopped_goes_on_the_next_time_and_ends_without_a_traceback(examples, stopped, monkeypatch):
    import demo

    asked = []

    def run_and_report(config, *, to_go_on):
        asked.append((config.output.resume, to_go_on))
        raise click.exceptions.Exit(130)

    monkeypatch.setattr(demo, "run_and_report", run_and_report)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output-dir", str(stopped)])
    assert demo.main() == 130
    assert asked == [(True, "the same command goes on")]


def test_towers_get_no_base_whose_training_was_stopped(examples, stopped, monkeypatch, capsys):
    from multimodal_demo import base_model

    trained = []

    def train(config, listener):
        trained.append(config.output.resume)
        return SimpleNamespace(reached_end=False, step=9)

    monkeypatch.setattr("fanformer.training.run.train", train)
    with pytest.raises(CheckpointError, match=r"demo was stopped after step 9: the same command goes on\."):
        base_model(stopped, 60.0)
    assert trained == [True]
    content = read_run_file(stopped)
    content["configuration"]["learning_rate"] = 0.5
    write_run_file(stopped, content)
    with pytest.raises(ConfigError, match=r"`--base` must be a model that was trained to its end, got the run .*demo"):
        base_model(stopped, 60.0)
    assert trained == [True]
    for path in stopped.glob("checkpoint-5/*"):  # what cannot go on is what it is
        path.unlink()
    assert base_model(stopped, 60.0) == stopped
    assert capsys.readouterr().out == f"{stopped}: a language model is there, using it\n"
