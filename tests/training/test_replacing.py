"""`--overwrite`: the run that was there before goes when the new one has a checkpoint, and not before."""

import os
import shutil
import signal

import pytest

from fanformer.errors import CheckpointError, ConfigError, DataError, DivergenceError
from fanformer.training import folder as folder_module
from fanformer.training.checkpoint import REPLACED, checkpoints
from fanformer.training.folder import claimed, read_records
from fanformer.training.run import train
from tests.training.conftest import Notebook


def content(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture
def old(finished):
    """The folder of a finished run."""
    return finished


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"data": "/nowhere/text.txt"}, DataError),
        ({"model.fan_ratio": 0.7}, Exception),
        ({"sample_prompt": "the cat " * 40}, ConfigError),
        ({"precision": "bfloat16", "learning_rate": 1e12, "max_skipped_steps": 1}, DivergenceError),
    ],
    ids=["missing data", "a wrong field", "a long prompt", "a divergence before the first checkpoint"],
)
def test_what_ends_in_an_error_gives_the_run_before_back_to_the_byte(run, old, fields, error):
    before = content(old)
    with pytest.raises(error):
        run(overwrite=True, max_steps=40, save_steps=40, **fields)
    assert content(old) == before


@pytest.mark.parametrize("field", ["data", "eval_data", "init_from", "tokenizer"])
@pytest.mark.parametrize("place", ["", "checkpoint-2", "data", "*.txt"])
def test_what_a_run_is_made_from_is_not_replaced_by_it(run, old, corpus, field, place):
    shutil.copy(corpus, old / "mine.txt")
    before = content(old)
    with pytest.raises(ConfigError, match=f"`{field}` must lie outside the run that --overwrite is to replace"):
        run(overwrite=True, **{field: str(old / place)})
    assert content(old) == before


def test_a_link_does_not_hide_where_something_lies(run, old, tmp_path):
    (tmp_path / "link").symlink_to(old)
    with pytest.raises(ConfigError, match="`init_from` must lie outside the run"):
        run(overwrite=True, init_from=str(tmp_path / "link"))


class Struck(BaseException):
    """Ends a process as SIGKILL does: nothing that an `except Exception` does happens."""


class KilledAt(Notebook):
    def __init__(self, step):
        super().__init__()
        self.at = step

    def step(self, step):
        if step == self.at:
            raise Struck


def test_a_run_killed_before_its_first_checkpoint_gives_way_to_the_one_before(run, run_config, old):
    before = content(old)
    with pytest.raises(Struck):
        train(run_config(overwrite=True, max_steps=40, save_steps=20, learning_rate=1e-4), KilledAt(10))
    assert (old / REPLACED / "model.safetensors").is_file()
    with pytest.raises(CheckpointError, match="already holds a run"):
        run(max_steps=40)
    assert content(old) == before
    result, notebook = run(resume=True, max_steps=2)
    assert result.step == 2
    assert not any("is back" in note for note in notebook.notes)  # it was already


def test_a_run_killed_before_its_first_checkpoint_can_be_begun_again(run, run_config, old):
    with pytest.raises(Struck):
        train(run_config(overwrite=True, max_steps=40, save_steps=20), KilledAt(10))
    prepared = (old / "data" / "train-00000.bin").stat().st_ino
    with pytest.raises(Struck):
        train(run_config(overwrite=True, max_steps=40, save_steps=20), KilledAt(10))
    assert (old / "data" / "train-00000.bin").stat().st_ino == prepared  # not done twice
    with pytest.raises(DataError):
        run(overwrite=True, data="/nowhere/text.txt")
    assert [record["step"] for record in read_records(old)] == [1, 2]
    result, _ = run(overwrite=True, max_steps=3, save_steps=3)
    assert (result.step, (old / REPLACED).exists()) == (3, False)
    assert [path.name for path in checkpoints(old)] == ["checkpoint-3"]


def test_a_run_killed_after_its_first_checkpoint_goes_on(run, run_config, old):
    with pytest.raises(Struck):
        train(run_config(overwrite=True, max_steps=40, save_steps=5, background_save=False), KilledAt(12))
    assert not (old / REPLACED).exists()
    result, notebook = run(resume=True, max_steps=40)
    assert result.step == 40
    assert any(note.endswith("checkpoint-10") for note in notebook.notes)


@pytest.mark.parametrize("back", [False, True], ids=["on the way there", "on the way back"])
def test_a_kill_at_any_move_loses_nothing(old, monkeypatch, back):
    """Each rename in turn is the last that happens."""
    before = content(old)
    real, number = os.replace, 0
    moves = len(list(old.iterdir())) + 1

    def interrupted(source, target):
        nonlocal number
        number -= 1
        if number < 0:
            raise Struck
        real(source, target)

    for last in range(moves):
        if back:
            folder_module._put_aside(old)
            (old / "run.yaml").write_text("of the new run")
        monkeypatch.setattr(folder_module.os, "replace", interrupted)
        number = last
        with pytest.raises(Struck):
            claimed(old, resume=back, overwrite=not back).__enter__()
        monkeypatch.setattr(folder_module.os, "replace", real)
        with claimed(old, resume=True, overwrite=False) as going_on:
            assert going_on
            assert content(old) == before


def test_other_data_than_a_killed_beginning_prepared_are_prepared_anew(run, run_config, tmp_path, monkeypatch):
    """A kill between data and run.yaml, and then the same folder with another text."""
    from fanformer.training import run as run_module

    other = tmp_path / "other.txt"
    other.write_text("a quick red fox jumps over it all.\n" * 500, encoding="utf-8")
    real = run_module.write_run_file

    def killed(*_):
        raise Struck

    monkeypatch.setattr(run_module, "write_run_file", killed)
    with pytest.raises(Struck):
        run(max_steps=1)
    inode = (run_config().folder / "data" / "train-00000.bin").stat().st_ino
    with pytest.raises(Struck):
        run(max_steps=1)
    assert (run_config().folder / "data" / "train-00000.bin").stat().st_ino == inode  # the same: used
    monkeypatch.setattr(run_module, "write_run_file", real)
    result, _ = run(max_steps=1, data=str(other))
    [file] = (result.folder / "data" / "data.json",)
    assert '"other.txt"' in file.read_text()


def test_work_that_a_killed_run_began_on_other_data_goes_with_overwrite_only(run, run_config, tmp_path, monkeypatch):
    from fanformer.data.preparation import journal
    from fanformer.data.preparation import prepare as shards

    other = tmp_path / "other.txt"
    other.write_text("a quick red fox jumps over it all.\n" * 500, encoding="utf-8")
    monkeypatch.setattr(journal, "INTERVAL_SECONDS", 0)

    def killed(*_):
        raise Struck

    real = shards.write_description
    monkeypatch.setattr(shards, "write_description", killed)
    with pytest.raises(Struck):
        run(max_steps=1)
    monkeypatch.setattr(shards, "write_description", real)
    assert (run_config().folder / "data.partial" / "work" / "journal.json").is_file()
    with pytest.raises(DataError, match=r"data\.partial was begun with .*: give the same again to go on from there"):
        run(max_steps=1, data=str(other))
    result, _ = run(max_steps=1, data=str(other), overwrite=True)
    assert '"other.txt"' in (result.folder / "data" / "data.json").read_text()


def test_a_signal_in_the_first_step_leaves_a_checkpoint_of_the_new_run(run_config, old):
    class Impatient(Notebook):
        def step(self, step):
            if step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    result = train(run_config(overwrite=True, max_steps=40, save_steps=40), Impatient())
    assert result.stopped_by == "SIGTERM"
    assert [path.name for path in checkpoints(old)] == [f"checkpoint-{result.step}"]
    assert not (old / REPLACED).exists()
