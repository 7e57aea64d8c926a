"""Outputs written aside: what is there under a name is whole, at whatever moment the process is killed."""

import json
import os
import subprocess
import sys

import pytest

from fanformer.errors import ConfigError
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


def test_two_who_write_one_file_never_write_into_one_and_a_users_file_is_left_alone(tmp_path):
    place, users = tmp_path / "a.gguf", tmp_path / "a.gguf.new"
    users.write_text("mine")
    with staging.staged(place) as (first,):
        first.write_text("first")
        with staging.staged(place) as (second,):
            second.write_text("second")
        assert (place.read_text(), first.read_text()) == ("second", "first")
    assert place.read_text() == "first"
    assert sorted(tmp_path.iterdir()) == [place, users]
    assert users.read_text() == "mine"


def test_files_take_their_names_together_or_not_at_all(tmp_path):
    places = tmp_path / "one", tmp_path / "two"
    places[0].write_text("old")

    def fail():
        with staging.staged(*places) as asides:
            asides[0].write_text("new")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("one", "old")]
    killed = tmp_path / ".one.killed.fanformer-new"
    write(killed / "new", "unfinished")
    (killed / "lock").touch()
    with staging.staged(*places) as asides:
        for aside in asides:
            aside.write_text(f"new {aside.name}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    assert places[0].read_text() != places[1].read_text()
    (tmp_path / "usual").write_text("")
    assert places[0].stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_place_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    for check in (staging.check_place, staging.check_folder):
        with pytest.raises(ConfigError, match=r"file is no folder, expected a folder for out: give another"):
            check(tmp_path / "file/deep/out")
    staging.check_folder(tmp_path / "new/deep/out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_place_that_is_a_mount_point_or_on_a_read_only_disk_is_refused(mount_disk):
    disk = mount_disk("size=64k,ro")
    with pytest.raises(ConfigError, match=r"disk is a mount point, which cannot be replaced: give a name in it"):
        staging.check_place(disk)
    with pytest.raises(ConfigError, match=r"disk cannot be written to, expected a folder for a.gguf: give another"):
        staging.check_free(disk / "a.gguf", overwrite=False)


def test_the_folder_that_a_shell_is_in_is_refused(tmp_path, monkeypatch):
    (tmp_path / "here/below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here/below")
    for place in (tmp_path / "here/below", tmp_path / "here"):
        with pytest.raises(ConfigError, match=r"is the current folder, which cannot be replaced: give another"):
            staging.check_folder(place)
    staging.check_folder(tmp_path / "here/below/out")
    staging.check_folder(tmp_path / "he")
