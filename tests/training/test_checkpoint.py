"""Checkpoints on disk: whole or not at all, found out when damaged, and never a way to lose the one before."""

import os
import shutil

import pytest

from fanformer.errors import CheckpointError
from fanformer.training.checkpoint import (
    MANIFEST_FILE,
    UNFINISHED,
    CheckpointWriter,
    checkpoints,
    newest_intact,
    problem,
    prune,
    publish,
    read_state,
    remove_unfinished,
    write_checkpoint,
    write_state,
)


def fill_with(content):
    def fill(folder):
        (folder / "model.safetensors").write_bytes(content)
        (folder / "optimizer.safetensors").write_bytes(content[::-1])
        (folder / "README.md").write_text("card")
        write_state(folder, {"loop": {"step": 1}})

    return fill


@pytest.fixture
def folder(tmp_path):
    """A run's folder with three checkpoints."""
    for step in (3, 6, 12):
        write_checkpoint(tmp_path, step, fill_with(b"weights %d" % step * 100))
    return tmp_path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_checkpoints_are_listed_by_step_and_hold_checksums_of_every_file_that_training_reads(folder):
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-3", "checkpoint-6", "checkpoint-12"]
    assert all(problem(path) is None for path in checkpoints(folder))
    manifest = (folder / "checkpoint-3" / MANIFEST_FILE).read_text()
    assert all(name in manifest for name in ("model.safetensors", "optimizer.safetensors", "training_state.json"))
    (folder / "checkpoint-3" / "README.md").write_text("edited by its owner")
    assert problem(folder / "checkpoint-3") is None


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "one bit flipped": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "training_state.json", MANIFEST_FILE])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_put_aside_and_the_one_before_taken(folder, damage, name):
    path = folder / "checkpoint-12" / name
    if damage == "one bit flipped" and name == MANIFEST_FILE:
        path.write_text(path.read_text().replace('"sha256": "', '"sha256": "0'))
    else:
        DAMAGES[damage](path)
    notes = []
    assert newest_intact(folder, notes.append) == folder / "checkpoint-6"
    [note] = notes
    assert note.startswith("checkpoint-12 is damaged: ")
    assert name in note or damage == "one bit flipped"  # in a manifest's checksum: the file it belongs to is named
    assert "kept as checkpoint-12.damaged, going back to the one before" in note
    assert names(folder) == ["checkpoint-12.damaged", "checkpoint-3", "checkpoint-6"]
    assert newest_intact(folder, notes.append) == folder / "checkpoint-6"
    assert len(notes) == 1


def test_when_none_is_whole_there_is_none(folder):
    for path in checkpoints(folder):
        (path / MANIFEST_FILE).unlink()
    notes = []
    assert newest_intact(folder, notes.append) is None
    assert len(notes) == 3
    assert all("it has no manifest.json, so it was never finished" in note for note in notes)


def test_a_write_that_fails_leaves_the_others_and_nothing_half_done(folder):
    def fail(staging):
        fill_with(b"new")(staging)
        raise OSError(5, "Input/output error")

    before = names(folder)
    with pytest.raises(OSError, match="Input/output error"):
        write_checkpoint(folder, 15, fail)
    assert names(folder) == before


def test_what_a_kill_left_half_written_or_half_deleted_is_removed(folder):
    (folder / UNFINISHED).mkdir()
    (folder / UNFINISHED / "model.safetensors").write_bytes(b"half")
    (folder / f"{UNFINISHED}-checkpoint-1").mkdir()
    remove_unfinished(folder)
    assert names(folder) == ["checkpoint-12", "checkpoint-3", "checkpoint-6"]


def test_the_last_ones_and_the_best_are_kept(folder):
    prune(folder, keep_last=1, best_step=3)
    assert names(folder) == ["checkpoint-12", "checkpoint-3"]
    prune(folder, keep_last=1, best_step=None)
    assert names(folder) == ["checkpoint-12"]


@pytest.mark.parametrize("kind", ["a symbolic link", "a file"])
def test_something_else_in_a_checkpoint_s_place_is_refused_and_not_touched(folder, tmp_path, kind):
    elsewhere = tmp_path / "elsewhere"
    shutil.move(folder / "checkpoint-6", elsewhere)
    if kind == "a file":
        (folder / "checkpoint-6").write_text("mine")
    else:
        (folder / "checkpoint-6").symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match=rf"checkpoint-6 must be a folder, got {kind}: move it away; nothing was"):
        newest_intact(folder, print)
    assert problem(elsewhere) is None


def test_a_state_of_another_version_or_none_is_refused(folder):
    state = folder / "checkpoint-3" / "training_state.json"
    state.write_text('{"format_version": 99}')
    with pytest.raises(CheckpointError, match="must have format version 1, got 99: resume with the release that wrote"):
        read_state(folder / "checkpoint-3")
    state.write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot read .*training_state.json \(JSONDecodeError\): use another"):
        read_state(folder / "checkpoint-3")


@pytest.fixture
def small_disk(mount_disk):
    """A file system of 256 KiB."""
    return mount_disk("size=256k")


@pytest.mark.parametrize("known", [True, False], ids=["seen beforehand", "seen while writing"])
def test_a_full_disk_keeps_the_old_checkpoint_and_says_how_much_was_needed(small_disk, known):
    write_checkpoint(small_disk, 1, fill_with(b"x" * 40_000))
    with pytest.raises(CheckpointError) as caught:
        write_checkpoint(small_disk, 2, fill_with(b"y" * 200_000), needed_bytes=400_000 if known else 0)
    message = str(caught.value)
    assert "the disk has no room for" in message
    assert f"{400_000 if known else 0:,} bytes needed, " in message
    assert "free; the checkpoints before are untouched: make room" in message
    assert "\n" not in message
    assert newest_intact(small_disk, print) == small_disk / "checkpoint-1"
    assert names(small_disk) == ["checkpoint-1"]


def test_the_writer_works_beside_its_caller_one_at_a_time_and_tells_what_became_of_each(tmp_path):
    import threading

    go = threading.Event()

    def slow(staging):
        assert go.wait(10)
        fill_with(b"slow")(staging)

    def broken(staging):
        raise OSError(5, "Input/output error")

    writer = CheckpointWriter(tmp_path, keep_last=2)
    writer.submit(1, slow, 0, None)
    assert writer.collect() == []
    assert checkpoints(tmp_path) == []
    go.set()
    writer.submit(2, broken, 0, None)
    writer.wait()
    first, second = writer.collect()
    assert (first.step, first.error, second.step) == (1, None, 2)
    assert isinstance(second.error, OSError)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1"]


def test_a_published_model_is_the_checkpoint_s_without_what_only_training_needs(folder, tmp_path):
    target = tmp_path / "published"
    target.mkdir()
    (target / "model.safetensors").write_bytes(b"old")
    publish(folder / "checkpoint-12", target)
    assert names(target) == ["README.md", "model.safetensors"]
    assert (target / "model.safetensors").read_bytes() == (folder / "checkpoint-12/model.safetensors").read_bytes()
    assert os.stat(target / "model.safetensors").st_nlink == 2  # no second copy of the weights
    (target / "README.md").write_text("changed")
    assert (folder / "checkpoint-12" / "README.md").read_text() == "card"
