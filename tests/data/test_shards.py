import gzip
import itertools
import json
import lzma
import os
import pickle
import shutil
import subprocess

import numpy as np
import pytest

from fanformer.data import token_files
from fanformer.data.preparation import journal, outputs, selection
from fanformer.data.preparation import prepare as shards
from fanformer.data.preparation.prepare import open_prepared, prepare
from fanformer.data.preparation.selection import is_held_out
from fanformer.data.sources.documents import open_source
from fanformer.data.tokenizer import encode_documents
from fanformer.errors import ConfigError, DataError
from tests.data.texts import CODE, MANY, Texts, read_back


def test_training_and_held_out_are_disjoint_and_cover_all_documents(tmp_path):
    data = prepare(Texts(MANY), tmp_path / "out", tokenizer=None, vocab_size=300, held_out_fraction=0.1)
    expected = {"train": [], "heldout": []}
    for number, text in enumerate(MANY):
        expected["heldout" if is_held_out(f"document {number}", 0.1) else "train"].append(text)
    assert len(expected["heldout"]) > 5
    assert {name: read_back(data, name) for name in expected} == expected
    assert data.metadata["split"] == "by document"
    for name, texts in expected.items():
        entry, stream = data.metadata["splits"][name], data.split(name)
        assert entry["documents"] == stream.num_documents == len(texts)
        assert entry["bytes"] == stream.num_bytes == sum(len(text.encode()) for text in texts)
        assert entry["tokens"] == len(stream.tokens)
    assert data.metadata["dtype"] == "<u2"


def test_start_and_end_of_two_kinds_surround_every_document(tmp_path, two_token_tokenizer):
    data = prepare(Texts(MANY), tmp_path / "out", tokenizer=two_token_tokenizer, vocab_size=0)
    assert read_back(data, "train") + read_back(data, "heldout") == sorted(MANY, key=lambda t: is_held_out_text(t))
    stream = data.split("train")
    assert (stream.start_id, stream.end_id) == (0, 1)


def is_held_out_text(text):
    return is_held_out(f"document {MANY.index(text)}", 0.05)


@pytest.mark.parametrize("texts", [[CODE.format(1) * 500], MANY[:3], ["x" * 1000]], ids=["one", "few", "no line end"])
def test_end_of_a_small_source_is_held_out(tmp_path, tokenizer, texts):
    data = prepare(Texts(texts), tmp_path / "out", tokenizer=tokenizer, vocab_size=0)
    assert data.metadata["split"] == "by position"
    train, held_out = "".join(read_back(data, "train")), "".join(read_back(data, "heldout"))
    assert train + held_out == "".join(texts)
    assert 0.05 <= len(held_out) / len(train + held_out) <= 0.1
    assert train[-1] in "\nx "


def test_documents_that_hash_to_one_side_only_are_split_by_position(tmp_path, tokenizer):
    names = [name for name in (f"document {i}" for i in range(60)) if not is_held_out(name, 0.05)]
    source = Texts(["text of some length\n"] * len(names))
    source.name = names.__getitem__
    data = prepare(source, tmp_path / "out", tokenizer=tokenizer, vocab_size=0)
    assert data.metadata["split"] == "by position"
    assert data.metadata["splits"]["heldout"]["documents"] > 0


def test_replaced_bytes_are_counted_per_split(tmp_path, tokenizer):
    text = "bad \ufffd line\n" * 99 + "bad \ufffd line\n"
    data = prepare(Texts([text]), tmp_path / "out", tokenizer=tokenizer, vocab_size=0)
    replaced = [data.metadata["splits"][name]["replaced_bytes"] for name in shards.SPLITS]
    assert replaced == [95, 5]


def test_a_fraction_of_zero_holds_out_nothing(tmp_path, tokenizer):
    data = prepare(Texts(MANY[:5]), tmp_path / "out", tokenizer=tokenizer, vocab_size=0, held_out_fraction=0)
    assert read_back(data, "train") == MANY[:5]
    assert data.metadata["split"] == "none"
    with pytest.raises(DataError, match=r"has no heldout tokens: prepare it with a `held_out_fraction` above 0"):
        data.split("heldout")
    with pytest.raises(DataError, match=r"split must be one of train, heldout, got 'test'"):
        data.split("test")


def test_large_source_without_held_out_documents_is_refused(tmp_path, tokenizer):
    source = Texts(["x"] * (selection.SURVEYED_DOCUMENTS + 1))
    with pytest.raises(DataError, match=r"none of the documents fell into the split heldout: use another `held_out_fr"):
        prepare(source, tmp_path / "out", tokenizer=tokenizer, vocab_size=0, held_out_fraction=1e-9)
    assert os.listdir(tmp_path) == []


def test_max_bytes_reads_only_the_beginning(tmp_path, tokenizer):
    limit = sum(len(text.encode()) for text in MANY[:20])
    calls = []
    data = prepare(
        Texts(MANY),
        tmp_path / "out",
        tokenizer=tokenizer,
        vocab_size=0,
        max_bytes=limit,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert "".join(read_back(data, "train") + read_back(data, "heldout")) == "".join(MANY[:20])
    assert calls == [(limit, limit)]
    with pytest.raises(ConfigError, match=r"`max_bytes` must be at least 1, got 0"):
        prepare(Texts(MANY), tmp_path / "b", tokenizer=tokenizer, vocab_size=0, max_bytes=0)


def test_no_part_is_opened_once_there_is_enough(tmp_path, tokenizer):
    class Parts(Texts):
        """One text a part."""

        def __init__(self, texts):
            super().__init__(texts)
            self.parts, self.opened = tuple(range(len(texts))), []

        def read_part(self, number, skip=0):
            self.opened.append(number)
            yield from itertools.islice(super().read_part(0, number), skip, 1)

    source = Parts(MANY[:30])
    limit = sum(len(text.encode()) for text in MANY[:7])
    options = {"tokenizer": tokenizer, "vocab_size": 0, "max_bytes": limit}
    data = prepare(source, tmp_path / "out", **options)
    whole = prepare(Texts(MANY[:30]), tmp_path / "whole", **options)
    assert data.fingerprint == whole.fingerprint
    assert set(source.opened) == set(range(7))


def test_batches_do_not_change_the_result(tmp_path, tokenizer, monkeypatch):
    one = prepare(Texts(MANY), tmp_path / "one", tokenizer=tokenizer, vocab_size=0)
    monkeypatch.setattr(selection, "BATCH_CHARACTERS", 500)
    calls = []
    many = prepare(
        Texts(MANY), tmp_path / "many", tokenizer=tokenizer, vocab_size=0, progress=lambda *call: calls.append(call)
    )
    assert one.fingerprint == many.fingerprint
    assert len(calls) > 20
    assert calls[-1][0] == calls[-1][1] == sum(len(text.encode()) for text in MANY)


def test_compressed_sizes_are_those_of_the_commands(tmp_path, tokenizer):
    data = prepare(Texts(MANY), tmp_path / "out", tokenizer=tokenizer, vocab_size=0, held_out_fraction=0.3)
    entry = data.metadata["splits"]["heldout"]
    content = "".join(read_back(data, "heldout")).encode()
    assert len(content) == entry["bytes"]
    for command in ("gzip", "xz"):
        if shutil.which(command) is None:
            pytest.skip(f"needs the command {command}")
        packed = subprocess.run([command, "-9", "-c"], input=content, capture_output=True, check=True).stdout
        # the containers may differ by a flag byte or padding
        assert abs(len(packed) - entry[f"{command}_bytes"]) <= 4
    assert "gzip_bytes" not in data.metadata["splits"]["train"]


def test_compression_of_a_large_held_out_part_is_not_measured(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(outputs, "LARGEST_COMPRESSED", 100)
    data = prepare(Texts(MANY), tmp_path / "out", tokenizer=tokenizer, vocab_size=0)
    entry = data.metadata["splits"]["heldout"]
    assert entry["gzip_bytes"] is entry["xz_bytes"] is None


def test_fingerprint_is_that_of_tokens_and_tokenizer(tmp_path):
    def fingerprint(texts, size):
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        return prepare(Texts(texts), out, tokenizer=None, vocab_size=size).fingerprint

    first = fingerprint(MANY, 300)
    assert fingerprint(MANY, 300) == first
    changed = [*MANY[:-1], MANY[-1][:-2] + "!" + MANY[-1][-1]]
    assert fingerprint(changed, 300) != first
    assert fingerprint(MANY, 301) != first


def test_fingerprint_sees_a_tokenizer_that_gives_the_same_tokens(tmp_path, tokenizer):
    first = prepare(Texts(MANY), tmp_path / "a", tokenizer=tokenizer, vocab_size=0)
    other = first.tokenizer()
    other.add_tokens(["never seen in these texts"])
    second = prepare(Texts(MANY), tmp_path / "b", tokenizer=other, vocab_size=0)
    assert (tmp_path / "a" / "train-00000.bin").read_bytes() == (tmp_path / "b" / "train-00000.bin").read_bytes()
    assert first.fingerprint != second.fingerprint


def test_prepared_folder_opens_with_its_tokenizer(tmp_path):
    made = prepare(Texts(MANY), tmp_path / "out", tokenizer=None, vocab_size=300)
    assert os.listdir(tmp_path) == ["out"]
    opened = open_prepared(tmp_path / "out")
    assert opened == made
    assert opened.tokenizer().backend_tokenizer.to_str() == made.tokenizer().backend_tokenizer.to_str()
    assert opened.metadata["tokenizer"] == "trained on the training split"
    assert set(opened.metadata["created_with"]) == {"python", "fanformer", "tokenizers", "transformers"}


def test_more_than_65536_tokens_are_written_in_four_bytes(tmp_path, tokenizer):
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["model"]["vocab"] |= {f"never {i}": len(tokenizer) + i for i in range(1 << 16)}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(backend))
    large = type(tokenizer)(tokenizer_file=str(path), eos_token="<|endoftext|>")
    data = prepare(Texts(MANY[:5]), tmp_path / "out", tokenizer=large, vocab_size=0)
    assert data.split("train").tokens.dtype == np.dtype("<u4")
    assert "".join(read_back(data, "train") + read_back(data, "heldout")) == "".join(MANY[:5])


def test_stream_travels_to_another_process_as_a_file_name(tmp_path, tokenizer):
    stream = prepare(Texts(MANY * 5), tmp_path / "out", tokenizer=tokenizer, vocab_size=0).split("train")
    content = pickle.dumps(stream)
    assert len(content) < 500 < 2 * len(stream.tokens)
    copy = pickle.loads(content)
    assert isinstance(copy.tokens, token_files.ShardedTokens)
    assert np.array_equal(copy.tokens, stream.tokens)
    assert (copy.start_id, copy.end_id, copy.num_documents, copy.num_bytes) == (
        stream.start_id,
        stream.end_id,
        stream.num_documents,
        stream.num_bytes,
    )


def test_existing_folder_is_not_touched(tmp_path, tokenizer):
    (tmp_path / "out").mkdir()
    prepare(Texts(MANY), tmp_path / "out", tokenizer=tokenizer, vocab_size=0)  # an empty one may be filled
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(DataError, match=r"out exists already: choose another --output-dir, or delete it first"):
        prepare(Texts(MANY), tmp_path / "out", tokenizer=tokenizer, vocab_size=0)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_folder_that_cannot_be_made_is_named(tmp_path, tokenizer):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/out.partial cannot be written: File exists"):
        prepare(Texts(MANY), tmp_path / "file" / "out", tokenizer=tokenizer, vocab_size=0)


@pytest.mark.parametrize("tokenizer_given", [True, False], ids=["while encoding", "while training the tokenizer"])
def test_error_in_late_data_leaves_nothing_behind(tmp_path, tokenizer, tokenizer_given):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine line of text"}\n' * 1500 + "broken\n")
    with pytest.raises(DataError, match=r"a.jsonl:1501: expected a JSON object on every line"):
        prepare(
            open_source(str(path)),
            tmp_path / "out",
            tokenizer=tokenizer if tokenizer_given else None,
            vocab_size=300,
        )
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_leftovers_of_a_killed_run_are_replaced(tmp_path, tokenizer):
    (tmp_path / "out.partial" / "work").mkdir(parents=True)
    (tmp_path / "out.partial" / "train-00000.bin").write_bytes(b"half")
    prepare(Texts(MANY), tmp_path / "out", tokenizer=tokenizer, vocab_size=0)
    assert os.listdir(tmp_path) == ["out"]


@pytest.fixture
def small_disk(mount_disk):
    """A file system of 64 KiB."""
    return mount_disk("size=64k")


@pytest.mark.parametrize("token_bytes", [1 << 20, 56 << 10], ids=["while writing tokens", "while saving the tokenizer"])
def test_full_disk_is_reported_and_nothing_is_left(small_disk, tokenizer, token_bytes):
    text = MANY[0] * 20
    [ids] = encode_documents(tokenizer, [text])
    source = Texts([text] * (token_bytes // (2 * len(ids) + 2)))
    with pytest.raises(DataError, match=r"disk is full: [\d,]+ bytes were written for [\d,]+.* bytes of text and"):
        prepare(source, small_disk / "out", tokenizer=tokenizer, vocab_size=0)
    assert os.listdir(small_disk) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left"), Exception("No space left on device (os error 28)")])
def test_full_disk_is_recognised_in_the_errors_of_python_and_rust(tmp_path, tokenizer, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(token_files.StreamWriter, "write", fail)
    with pytest.raises(DataError, match=r"is full: [\d,]+ bytes were written .* are free: make room or choose another"):
        prepare(Texts(MANY), tmp_path / "out", tokenizer=tokenizer, vocab_size=0)
    assert os.listdir(tmp_path) == []


def test_tokenizer_that_writes_its_end_token_inside_text_is_refused(tmp_path, tokenizer, monkeypatch):
    class Unsplit:
        def encode(self, texts):
            return [np.array(tokenizer(text)["input_ids"]) for text in texts]

    monkeypatch.setattr(shards, "document_encoder", lambda _: Unsplit())
    with pytest.raises(ConfigError, match=r"turns text of document 3 into its start or end token \(id 0 or 0\)"):
        prepare(Texts([*MANY[:3], "a <|endoftext|> b" * 90]), tmp_path / "out", tokenizer=tokenizer, vocab_size=0)


@pytest.mark.parametrize("fraction", [-0.1, 0.6, 1])
def test_held_out_fraction_out_of_range_is_refused(tmp_path, tokenizer, fraction):
    with pytest.raises(ConfigError, match=rf"`held_out_fraction` must be in \[0, 0.5\], got {fraction}"):
        prepare(Texts(MANY), tmp_path / "out", tokenizer=tokenizer, vocab_size=0, held_out_fraction=fraction)


def test_single_character_is_too_little(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"data must hold at least 2 characters, .*, got 1"):
        prepare(Texts(["x"]), tmp_path / "out", tokenizer=tokenizer, vocab_size=0)
    prepare(Texts(["xy"]), tmp_path / "out", tokenizer=tokenizer, vocab_size=0)


def test_file_formats_and_compressions_give_the_same_token_files(tmp_path, tokenizer):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in MANY).encode()
    fingerprints = set()
    for name, content in (
        ("a.jsonl", lines),
        ("a.jsonl.gz", gzip.compress(lines)),
        ("a.jsonl.xz", lzma.compress(lines)),
    ):
        (tmp_path / name).write_bytes(content)
        out = tmp_path / (name + ".out")
        fingerprints.add(prepare(open_source(str(tmp_path / name)), out, tokenizer=tokenizer, vocab_size=0).fingerprint)
    assert len(fingerprints) == 1


def test_tokens_are_those_of_the_tokenizer(tmp_path, tokenizer):
    data = prepare(Texts(MANY), tmp_path / "out", tokenizer=tokenizer, vocab_size=0, held_out_fraction=0)
    expected = [token for ids in encode_documents(tokenizer, MANY) for token in (0, *ids)] + [0]
    assert data.split("train").tokens[:].tolist() == expected


def test_token_above_what_the_tokenizer_says_is_refused(tmp_path, tokenizer, monkeypatch):
    class Sparse:
        def encode(self, texts):
            return [np.array([70_000], dtype=np.uint32) for _ in texts]

    monkeypatch.setattr(shards, "document_encoder", lambda _: Sparse())
    with pytest.raises(ConfigError, match=r"gives the token 70000 and says that it has 300: use another --tokenizer"):
        prepare(Texts(MANY), tmp_path / "out", tokenizer=tokenizer, vocab_size=0)


def test_full_disk_keeps_the_work_and_the_same_call_goes_on(small_disk, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(journal, "INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr(selection, "BATCH_CHARACTERS", 2000)
    source = Texts(MANY * 20)
    whole = prepare(source, tmp_path / "whole", tokenizer=tokenizer, vocab_size=0)
    with pytest.raises(DataError, match=r"is full: .* make room, and the same command goes on from what is kept in "):
        prepare(source, small_disk / "out", tokenizer=tokenizer, vocab_size=0)
    assert os.listdir(small_disk) == ["out.partial"]
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    throughput = []
    data = prepare(source, small_disk / "out", tokenizer=tokenizer, vocab_size=0, report=throughput.append)
    assert data.fingerprint == whole.fingerprint
    assert throughput[0].resumed_bytes > 0
    assert os.listdir(small_disk) == ["out"]


def test_read_only_folder_is_named(small_disk, tokenizer):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(DataError, match=r"out.lock cannot be written: Read-only file system"):
        prepare(Texts(MANY), small_disk / "out", tokenizer=tokenizer, vocab_size=0)
