"""What watches a host learns how its rounds go, and ends a process that a killed host left behind."""

import contextlib
import json
import shutil
import socket
import subprocess
import sys

import pytest

from fanformer.community.flower.content import flower
from fanformer.community.flower.keeping import _Watch, end_left_behind
from fanformer.community.flower.outcome import (
    NODES_FILE,
    Outcome,
    clear_outcome,
    read_nodes,
    read_outcome,
    write_outcome,
)
from fanformer.community.flower.processes import HostProcesses, _changed
from fanformer.community.identity import make_member_key, read_public_members
from fanformer.errors import DataError


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


class Processes:
    """Stands where a host's processes are, and says who was let in."""

    is_alive = True

    def __init__(self):
        self.registered = []

    def start(self):
        pass

    stop = submit = start

    def register(self, members):
        self.registered.append([one.name for one in members])
        return []


@pytest.fixture
def members(tmp_path):
    """Folder with the keys of alice and bob."""
    pytest.importorskip("cryptography", reason="needs the extra `community` (cryptography)")
    folder = tmp_path / "members"
    folder.mkdir()
    for name in ("alice", "bob"):
        _, public = make_member_key(name, tmp_path)
        public.rename(folder / public.name)
    return folder


def test_a_file_that_holds_no_key_keeps_nobody_out_or_in_and_ends_nothing(members, tmp_path):
    (members / "mal.pub").write_text("ssh-rsa nonsense")
    processes, notes = Processes(), []
    watch = _Watch(tmp_path / "run", processes, members, notes.append)
    watch.begin()
    (members / "alice.pub").unlink()
    assert not watch.is_over()
    watch.begin()  # as where a process died
    shutil.rmtree(members)
    watch.begin()
    assert not watch.is_over()
    assert processes.registered == [["alice", "bob"], ["bob"]]
    first, second = notes
    assert "mal.pub must hold a public key" in first
    assert "`--members` must be a folder of public keys" in second


@pytest.mark.ci
def test_a_key_whose_number_a_kill_kept_from_the_disk_is_not_registered_twice(members, tmp_path, monkeypatch):
    pytest.importorskip("flwr", reason="needs the extra `community` (flwr)")
    kinds, node = flower("proto.control_pb2"), flower("proto.node_pb2")

    class Control:
        """Flower's commands for members, of which it takes a key once."""

        numbers = {}

        def ListNodes(self, request):
            found = [node.NodeInfo(node_id=number, public_key=key) for key, number in self.numbers.items()]
            return kinds.ListNodesResponse(nodes_info=found)

        def RegisterNode(self, request):
            if request.public_key in self.numbers:
                raise DataError("the key is in use")
            self.numbers[request.public_key] = 7 + len(self.numbers)
            return kinds.RegisterNodeResponse(node_id=self.numbers[request.public_key])

    monkeypatch.setattr(HostProcesses, "_control", lambda self: contextlib.nullcontext(Control()))
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    run = tmp_path / "run"
    processes, known = HostProcesses(run, "127.0.0.1", port), read_public_members(members)
    (run / "flower" / "state.db").touch()
    assert processes.register(known[:1]) == ["alice may take part"]
    (run / "flower" / NODES_FILE).unlink()
    assert processes.register(known) == ["alice may take part", "bob may take part"]
    assert read_nodes(run) == {7: "alice", 8: "bob"}
