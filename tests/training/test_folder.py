"""Who may write into a run's folder."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from fanformer.errors import CheckpointError, ConfigError
from fanformer.files.locking import hold
from fanformer.training.folder import LOCK_FILE, claimed

HOLD = """
import sys, time
from pathlib import Path
from fanformer.files.locking import hold
from fanformer.errors import CheckpointError
with hold(Path(sys.argv[1]) / ".lock", "the folder", CheckpointError):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of a folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_in_one_folder_is_told_who_holds_it_and_since_when(tmp_path, holder):
    with pytest.raises(CheckpointError) as caught:
        claimed(tmp_path, resume=True, overwrite=False).__enter__()
    said = str(caught.value)
    assert f"is in use by process {holder.pid} on {os.uname().nodename} since {time.strftime('%Y-')}" in said
    assert "wait until it ends, or stop it" in said


def test_a_killed_holder_holds_nothing(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with hold(tmp_path / LOCK_FILE, "the folder", CheckpointError):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_a_damaged_lock_file_locks_all_the_same(tmp_path, holder):
    (tmp_path / LOCK_FILE).write_text("?")
    with pytest.raises(CheckpointError, match="is in use by another process: wait"):
        hold(tmp_path / LOCK_FILE, "the folder", CheckpointError).__enter__()


def test_a_folder_made_for_a_run_that_never_began_is_gone_again(tmp_path):
    claim = claimed(tmp_path / "a" / "run", resume=False, overwrite=False)
    assert claim.__enter__() is False
    (tmp_path / "a" / "run" / "data.partial").mkdir()
    assert claim.__exit__(ZeroDivisionError, ZeroDivisionError(), None) is False
    assert not (tmp_path / "a" / "run").exists()


def test_hours_of_preparing_data_are_not_deleted_with_a_run_that_never_began(tmp_path):
    begun = tmp_path / "run" / "data.partial" / "train-00000.bin"
    for error in (KeyboardInterrupt, ZeroDivisionError):
        claim = claimed(tmp_path / "run", resume=False, overwrite=False)
        claim.__enter__()
        begun.parent.mkdir(exist_ok=True)
        begun.write_bytes(b"tokens")
        assert claim.__exit__(error, error(), None) is False
        assert begun.read_bytes() == b"tokens"


def test_data_that_a_killed_run_prepared_are_not_deleted_with_one_that_is_refused(tmp_path):
    prepared = tmp_path / "run" / "data" / "train-00000.bin"
    prepared.parent.mkdir(parents=True)
    prepared.write_bytes(b"tokens")
    claim = claimed(tmp_path / "run", resume=False, overwrite=False)
    claim.__enter__()
    (tmp_path / "run" / "held-out").mkdir()
    assert claim.__exit__(ZeroDivisionError, ZeroDivisionError(), None) is False
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["data"]
    assert prepared.read_bytes() == b"tokens"


@pytest.mark.parametrize("name", ["metrics.jsonl", "metrics.jsonl.new", "run.yaml.new", "data.partial", "data.lock"])
def test_what_a_kill_before_run_yaml_leaves_is_the_beginning_of_a_run(tmp_path, name):
    (tmp_path / ".lock").write_text("")
    (tmp_path / name).write_text("")
    with claimed(tmp_path, resume=True, overwrite=False) as going_on:
        assert going_on is False
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not empty and holds no run"):
        claimed(tmp_path, resume=True, overwrite=False).__enter__()


def test_a_file_or_a_read_only_folder_is_named(tmp_path, mount_disk):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="`output_dir` must be a folder, got the file"):
        claimed(tmp_path / "file", resume=False, overwrite=False).__enter__()
    disk = mount_disk("size=64k,ro")
    with pytest.raises(CheckpointError, match=r"disk/.lock cannot be written: Read-only file system"):
        claimed(disk, resume=False, overwrite=False).__enter__()
    with pytest.raises(OSError, match="Read-only file system"):
        claimed(disk / "run", resume=False, overwrite=False).__enter__()
