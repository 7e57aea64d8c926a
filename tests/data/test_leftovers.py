"""What a preparation finds beside its output folder: its own work, as it was left or spoilt, or what is not its own."""

import contextlib
import json
import os
import resource
import sqlite3

import pytest

from fanformer.data.preparation import journal, selection
from fanformer.data.preparation.journal import delete_partial
from fanformer.data.preparation.prepare import identity, open_prepared, prepare
from fanformer.data.preparation.selection import SeenTexts
from fanformer.data.sources.documents import open_source
from fanformer.data.tokenizer import load_tokenizer, train_tokenizer
from fanformer.errors import ConfigError, DataError


class Stop(Exception):
    pass


@pytest.fixture
def text(tmp_path):
    lines = [json.dumps({"text": f"a line of text, number {number}, and no more"}) for number in range(400)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines + lines[:50]))
    return str(tmp_path / "a.jsonl")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Two saved tokenizers that differ in their end token alone."""
    folder = tmp_path_factory.mktemp("tokenizers")
    tokenizer = train_tokenizer(["a line of text, number 0123456789"], 290)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|other|>"]})
    tokenizer.save_pretrained(folder / "one")
    tokenizer.eos_token = "<|other|>"
    tokenizer.save_pretrained(folder / "other")
    return folder


@pytest.fixture
def go(tmp_path, text, tokenizers, monkeypatch):
    """Prepare the text; with `stop`, only until a few batches are in the journal."""
    monkeypatch.setattr(journal, "INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr(selection, "BATCH_CHARACTERS", 2000)

    def run(stop=False, tokenizer="one", out="out"):
        def progress(done, total):
            calls.append(done)
            if stop and len(calls) == 4:
                raise Stop

        calls = []
        own = load_tokenizer(str(tokenizers / tokenizer))
        arguments = {"tokenizer": own, "vocab_size": 0, "deduplicate": True, "progress": progress}
        return prepare(open_source(text), tmp_path / out, **arguments)

    return run


def flip(path, place=10):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["train-00000.bin", "heldout-00000.bin", "work/heldout.txt", "tokenizer.json", "tokenizer_config.json"]
)
def test_work_with_a_changed_bit_is_refused(tmp_path, go, name):
    with pytest.raises(Stop):
        go(stop=True)
    flip(tmp_path / "out.partial" / name)
    with pytest.raises(DataError, match=r"out.partial.*delete"):
        go()
    flip(tmp_path / "out.partial" / name)
    assert go().fingerprint == go(out="whole").fingerprint


def test_lost_or_changed_texts_seen_are_refused(tmp_path, go):
    with pytest.raises(Stop):
        go(stop=True)
    path = tmp_path / "out.partial" / "work" / "seen.sqlite"
    kept = path.read_bytes()
    refused = pytest.raises(DataError, match=r"seen.sqlite is not as it was left: delete .*out.partial and prepare the")
    for content in (b"", b"no database", kept[:100] + b"\0" * 500 + kept[600:], kept[:-4]):
        path.write_bytes(content)
        with refused:
            go()
    path.write_bytes(kept)
    database = sqlite3.connect(path)
    database.execute("DELETE FROM seen WHERE number = 3")
    database.commit()
    database.close()
    with refused:
        go()
    path.write_bytes(kept)
    assert go().metadata["dropped"] == {"duplicate": 50}


def test_error_in_the_first_document_leaves_nothing(tmp_path, text, tokenizers, monkeypatch):
    monkeypatch.setattr(journal, "INTERVAL_SECONDS", 0.0)
    tokenizer = load_tokenizer(str(tokenizers / "one"))
    with pytest.raises(DataError, match="no field `words`"):
        prepare(open_source(text, "words"), tmp_path / "out", tokenizer=tokenizer, vocab_size=0, held_out_fraction=0)
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_work_is_not_gone_on_from_with_another_end_token(go):
    with pytest.raises(Stop):
        go(stop=True)
    with pytest.raises(DataError, match=r"was begun with another tokenizer \(`tokenizer_config.json` "):
        go(tokenizer="other")
    assert go().fingerprint != go(tokenizer="other", out="whole").fingerprint


def test_way_to_a_tokenizer_is_no_part_of_what_it_is(tokenizers, tmp_path):
    tokenizer = load_tokenizer(str(tokenizers / "one"))
    before = identity(tokenizer)
    tokenizer.init_kwargs["local_files_only"] = False
    assert identity(tokenizer) == before
    tokenizer.save_pretrained(tmp_path)
    assert identity(load_tokenizer(str(tmp_path))) == before


@pytest.mark.parametrize("names", [["notes.txt"], ["work/hashes"], ["work/encoded", "work/job.json"]])
def test_partial_folder_of_somebody_else_is_left_alone(tmp_path, go, names):
    for name in names:
        (tmp_path / "out.partial" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out.partial" / name).write_text("mine")
    with pytest.raises(DataError, match=r"out.partial is in the way and holds what no preparation has left: "):
        go()
    assert all((tmp_path / "out.partial" / name).read_text() == "mine" for name in names)


def test_what_a_process_left_that_ended_early_is_no_obstacle(tmp_path, go):
    partial = tmp_path / "out.partial"
    for names in ([], ["work/"], ["work/", "tokenizer.json", "train-00000.bin", "work/heldout.txt"]):
        partial.mkdir()
        for name in names:
            (partial / name).mkdir() if name.endswith("/") else (partial / name).write_text("x")
        go()
        os.rename(tmp_path / "out", tmp_path / f"out-{len(names)}")
        assert not partial.exists()


def interrupted(path):
    raise KeyboardInterrupt


def test_partial_folder_whose_deletion_is_ended_is_known_as_one(tmp_path, go, monkeypatch):
    partial = tmp_path / "out.partial"
    (partial / "work").mkdir(parents=True)
    for name in ("tokenizer.json", "train-00000.bin"):
        (partial / name).write_text("x")
    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            delete_partial(partial)
    assert os.listdir(partial) == ["work"]
    go()


def test_output_may_be_a_link_and_the_folder_is_where_it_leads(tmp_path, go):
    (tmp_path / "disk").mkdir()
    for name, target in (("to a folder", "disk"), ("to nothing", "later")):
        (tmp_path / name).symlink_to(tmp_path / target)
        assert go(out=name).folder == tmp_path / target
        assert (tmp_path / name).is_symlink()
        assert open_prepared(tmp_path / name, verify=True)
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "disk", "later", "to a folder", "to nothing"]


def test_mount_point_is_refused_before_the_work(tmp_path, go, mount_disk):
    disk = mount_disk("size=4m")
    with pytest.raises(DataError, match=r"disk is where a file system begins, and stays: choose an --output-dir in it"):
        go(out="disk")
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "disk"]
    assert os.listdir(disk) == []


@pytest.fixture
def largest_file():
    """Let no file grow beyond a size for the length of a test."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_file_that_cannot_grow_is_told_with_its_place(tmp_path, go, largest_file):
    largest_file(8000)
    with pytest.raises(
        DataError, match=r"out.partial cannot be written \(File too large\)|seen.sqlite cannot be written"
    ):
        go()
    largest_file(1000)
    with pytest.raises(
        DataError, match=r"cannot be written \(File too large\): make room, or have TMPDIR name a folder"
    ):
        go()


def test_full_disk_under_the_texts_seen_is_told(mount_disk):
    with contextlib.closing(SeenTexts(mount_disk("size=64k") / "seen")) as seen:
        for number in range(9000):
            seen.add(str(number), number)
        with pytest.raises(OSError, match="No space left on device"):
            seen.commit()


@pytest.mark.parametrize("size", [1 << 40, 10**20])
def test_vocabulary_that_no_memory_holds_is_refused(size):
    with pytest.raises(ConfigError, match=r"`vocab_size` must be at most 4,194,304, got "):
        train_tokenizer(["a"], size)
