"""Outputs written aside: what is there under a name is whole, at whatever moment the process is killed."""

import json
import os
import subprocess
import sys

import pytest

from fanformer.files import staging
from fanformer.files.locking import hold

REPLACE_UNTIL_KILLED = """
import json, os, shutil, signal, sys
from pathlib import Path
from transformers import PreTrainedTokenizerFast
from fanformer.files import staging
from fanformer.quantization.quantized_folder import Settings, write_folder
from tests.warm_processes import Strike, strike_at_change

source, work = Path(sys.argv[1]), Path(sys.argv[2])
tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
target, found = work / "out", []

def write_model(name):
    def write(folder):
        folder.mkdir()
        for number in range(3):
            (folder / f"part-{number}").write_text(name)
        return ()
    write_folder(source, target, Settings("gptq"), tokenizer, 0, (), write, "")

def content():
    parts = [file.read_text() for file in sorted(target.glob("part-*"))] if target.is_dir() else []
    return parts[0] if len(set(parts)) == 1 and len(parts) == 3 and (target / "README.md").exists() else "lost"

for change in range(1, 200):
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    write_model("old")
    child = os.fork()
    if child == 0:
        strike_at_change(Strike(signal.SIGKILL, change), work)
        write_model("new")
        os._exit(0)
    ended = os.waitpid(child, 0)[1]
    found.append(content())
    write_model("next")
    assert content() == "next" and sorted(os.listdir(work)) == ["out"], os.listdir(work)
    if ended == 0:
        break
print(json.dumps(found))
"""


@pytest.mark.ci
def test_folder_is_old_or_new_whenever_the_process_is_killed(saved_model, tmp_path, repository):
    words = [sys.executable, "-c", REPLACE_UNTIL_KILLED, str(saved_model), str(tmp_path / "work")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == {"old", "new"}
    assert found == sorted(found, reverse=True)  # once it is new, it stays so
    assert found.count("old") > 5


def write(folder, text):
    folder.mkdir(parents=True)
    (folder / "file").write_text(text)


@pytest.mark.parametrize("place", ["linux", "a file system that cannot", "darwin", "win32"])
def test_folder_takes_the_place_of_another(tmp_path, monkeypatch, place):
    if place == "linux" != sys.platform:
        pytest.skip("only Linux exchanges two names")
    if place == "a file system that cannot":
        monkeypatch.setattr(staging, "_exchange", lambda first, second: False)
    else:
        monkeypatch.setattr(sys, "platform", place)
    for name in ("place", "place.new", "place.old"):
        write(tmp_path / name, name)
    with staging.staged_folder(tmp_path / "place") as aside:
        write(aside, "new")
        assert (tmp_path / "place/file").read_text() == "place"
    found = {path.name: (path / "file").read_text() for path in tmp_path.iterdir()}
    assert found == {"place": "new", "place.new": "place.new", "place.old": "place.old"}


@pytest.mark.parametrize("place", [False, True], ids=["nothing there", "a folder there"])
def test_what_fails_leaves_everything_as_it_was(tmp_path, place):
    if place:
        write(tmp_path / "place", "old")
    write(tmp_path / "place.new", "a user's")
    before = sorted(tmp_path.rglob("*"))

    def fail():
        with staging.staged_folder(tmp_path / "place") as aside:
            write(aside, "new")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert sorted(tmp_path.rglob("*")) == before


def test_new_folder_has_the_permissions_of_any_other(tmp_path):
    (tmp_path / "usual").mkdir()
    with staging.staged_folder(tmp_path / "place") as aside:
        write(aside, "new")
    assert (tmp_path / "place").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_only_what_killed_processes_left_is_deleted(tmp_path):
    killed, running, users = (tmp_path / f".place.{name}.fanformer-new" for name in ("killed", "running", "users"))
    for folder in (killed, running, users):
        write(folder / "new", "unfinished")
    (tmp_path / ".place.begun.fanformer-new").mkdir()
    (killed / "lock").touch()
    with hold(running / "lock", "running"), staging.staged_folder(tmp_path / "place") as aside:
        assert not killed.exists()
        write(aside, "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [running.name, users.name, "place"]
    assert (running / "new/file").exists()


def test_the_only_whole_folders_go_when_there_is_another(tmp_path):
    killed = tmp_path / ".place.killed.fanformer-new"  # between two steps, where they cannot be one
    for name in ("new", "old"):
        write(killed / name, name)
    (killed / "lock").touch()
    with pytest.raises(OSError, match="full"), staging.staged_folder(tmp_path / "place"):
        raise OSError("full")
    assert (killed / "old/file").exists()
    with staging.staged_folder(tmp_path / "place") as aside:
        write(aside, "newest")
    assert [path.name for path in tmp_path.iterdir()] == ["place"]
