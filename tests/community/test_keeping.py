"""What watches a host learns how its rounds go, and ends a process that a killed host left behind."""

import contextlib
import json
import subprocess
import sys

import pytest

from fanformer.community.flower.keeping import end_left_behind
from fanformer.community.flower.outcome import Outcome, clear_outcome, read_outcome, write_outcome


def test_an_outcome_comes_back_in_one_line(tmp_path):
    assert read_outcome(tmp_path) == Outcome()
    clear_outcome(tmp_path)
    assert read_outcome(tmp_path) == Outcome()
    write_outcome(tmp_path, "running")
    write_outcome(tmp_path, "failed", "the disk\nhas no room \x1b[2J" + 900 * "!")
    found = read_outcome(tmp_path)
    assert found.state == "failed"
    assert found.error.startswith("the disk has no room \\x1b[2J!")
    assert len(found.error) == 400
    write_outcome(tmp_path, "finished")
    assert read_outcome(tmp_path).error == ""


def test_a_full_disk_has_room_for_the_reason(mount_disk):
    disk = mount_disk("size=64k")
    clear_outcome(disk)
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(512))
    with pytest.raises(OSError, match="No space left"):
        (disk / "more").write_bytes(bytes(8192))
    write_outcome(disk, "failed", "the disk has no room")
    assert read_outcome(disk).error == "the disk has no room"


@pytest.fixture
def sleeper():
    """Start a process that sleeps, with a word in its command."""
    started = []

    def start(word):
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", word]))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("word", "ends"), [("flwr-serverapp", True), ("an-editor", False)])
def test_only_the_process_that_kept_the_rounds_is_ended(tmp_path, sleeper, word, ends):
    """A number that another program has by now is left alone."""
    process = sleeper(word)
    clear_outcome(tmp_path)
    write_outcome(tmp_path, "running")
    path = tmp_path / "flower" / "outcome"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pid": process.pid}))
    end_left_behind(tmp_path)
    assert (process.poll() is not None) == ends


def test_what_ended_by_itself_is_no_trouble(tmp_path):
    end_left_behind(tmp_path)
    clear_outcome(tmp_path)
    write_outcome(tmp_path, "finished")
    end_left_behind(tmp_path)
