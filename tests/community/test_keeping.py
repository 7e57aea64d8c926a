"""What watches a host learns how its rounds go, and ends a process that a killed host left behind."""

import contextlib
import json
import subprocess
import sys

import pytest

from fanformer.community.flower.keeping import end_left_behind
from fanformer.community.flower.outcome import (
    NODES_FILE,
    Outcome,
    clear_outcome,
    read_nodes,
    read_outcome,
    write_outcome,
)
from fanformer.community.flower.processes import _changed


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


def test_whose_key_is_gone_may_take_part_no_more_until_it_is_back(tmp_path):
    known = [{"number": 1, "name": "alice", "fingerprint": "a"}, {"number": 2, "name": "mal", "fingerprint": "b"}]
    (tmp_path / "flower").mkdir()

    def change(wanted):
        told = _changed(known, wanted)
        (tmp_path / "flower" / NODES_FILE).write_text(json.dumps(known))
        return told, read_nodes(tmp_path)

    assert read_nodes(tmp_path) == {}
    assert change({"a", "b"}) == ([], {1: "alice", 2: "mal"})
    assert change({"a"}) == (["mal may take part no more"], {1: "alice"})
    assert change({"a"}) == ([], {1: "alice"})
    assert change({"a", "b"}) == (["mal may take part again"], {1: "alice", 2: "mal"})


def test_what_ended_by_itself_is_no_trouble(tmp_path):
    end_left_behind(tmp_path)
    clear_outcome(tmp_path)
    write_outcome(tmp_path, "finished")
    end_left_behind(tmp_path)
