"""What a prepared folder is: its shards, reading across them, and what is refused when it is opened."""

import hashlib
import json
import os

import numpy as np
import pytest

from fanformer.data import prepared as prepared_module
from fanformer.data import token_files
from fanformer.data.preparation.prepare import open_prepared, prepare
from fanformer.data.tokenizer import encode_documents
from fanformer.errors import DataError
from tests.data.texts import MANY, Texts, read_back


@pytest.fixture
def prepared(tmp_path, tokenizer):
    return prepare(Texts(MANY), tmp_path / "out", tokenizer=tokenizer, vocab_size=0).folder


def test_missing_or_foreign_folder_is_refused(prepared):
    with pytest.raises(DataError, match=r"none/data.json does not exist: create the folder with `fanformer data prep"):
        open_prepared(prepared / "none")
    deep, long_number = "[" * 100_000, '{"format_version": ' + "2" * 5000 + "}"
    for content in ("{", "[]", "{}", deep, '{"format_version": 2, "splits": ' + deep, long_number, "\udce9"):
        (prepared / "data.json").write_text(content, errors="surrogateescape")
        with pytest.raises(DataError, match=r"data.json was not written by `fanformer data prepare`: name another"):
            open_prepared(prepared)
    (prepared / "data.json").write_text('{"format_version": 99}')
    with pytest.raises(DataError, match=r"must have format version 2, got 99: prepare the data again"):
        open_prepared(prepared)


def test_truncated_or_missing_token_file_is_refused(prepared):
    path = prepared / "heldout-00000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(
        DataError, match=r"heldout-00000.bin must have \d+ bytes, got \d+ bytes: prepare the data again"
    ):
        open_prepared(prepared)
    path.unlink()
    with pytest.raises(DataError, match=r"heldout-00000.bin must have \d+ bytes, got no file"):
        open_prepared(prepared)


def test_token_outside_the_vocabulary_is_refused(prepared):
    tokens = np.fromfile(prepared / "train-00000.bin", dtype="<u2")
    tokens[5] = 300
    tokens.tofile(prepared / "train-00000.bin")
    with pytest.raises(DataError, match=r"out: train holds the token 300, and its tokenizer has 300: prepare the data"):
        open_prepared(prepared)


def test_shard_size_does_not_change_stream_or_fingerprint(tmp_path, tokenizer):
    one = prepare(Texts(MANY), tmp_path / "one", tokenizer=tokenizer, vocab_size=0)
    many = prepare(Texts(MANY), tmp_path / "many", tokenizer=tokenizer, vocab_size=0, shard_tokens=700)
    names = [shard["name"] for shard in many.metadata["splits"]["train"]["shards"]]
    assert len(names) > 5
    assert names == sorted(names)
    assert (
        b"".join((many.folder / name).read_bytes() for name in names) == (one.folder / "train-00000.bin").read_bytes()
    )
    assert one.fingerprint == many.fingerprint
    assert read_back(one, "train") == read_back(many, "train")


def test_stream_hash_is_that_of_the_joined_shards(tmp_path, tokenizer):
    data = prepare(Texts(MANY), tmp_path / "out", tokenizer=tokenizer, vocab_size=0, shard_tokens=700)
    entry = data.metadata["splits"]["train"]
    joined = b"".join((data.folder / shard["name"]).read_bytes() for shard in entry["shards"])
    assert hashlib.sha256(joined).hexdigest() == entry["sha256"]


@pytest.mark.parametrize("length", [1, 63, 699, 700, 701, 1500])
def test_rows_across_shard_borders_are_those_of_one_shard(tmp_path, tokenizer, length):
    from fanformer.data.packing import PackedRows

    one = prepare(Texts(MANY), tmp_path / "one", tokenizer=tokenizer, vocab_size=0).split("train")
    many = prepare(Texts(MANY), tmp_path / "many", tokenizer=tokenizer, vocab_size=0, shard_tokens=700).split("train")
    for keep_partial in (False, True):
        ours, theirs = (PackedRows(stream, length, keep_partial=keep_partial) for stream in (many, one))
        assert len(ours) == len(theirs)
        assert ours.num_labels == theirs.num_labels
        for index in {0, len(ours) // 2, len(ours) - 1}:
            assert all((ours[index][name] == theirs[index][name]).all() for name in ours[index])


def test_only_a_few_shards_are_open_at_once(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(token_files, "_OPEN_SHARDS", 3)
    data = prepare(Texts(MANY), tmp_path / "out", tokenizer=tokenizer, vocab_size=0, shard_tokens=300)
    tokens = data.split("train").tokens
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    joined = np.concatenate([tokens[start : start + 70] for start in range(0, len(tokens), 70)])
    assert np.array_equal(joined, np.asarray(tokens))
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 3
    with pytest.raises(IndexError, match="sliced with step 1, got 2"):
        tokens[::2]


def test_shard_of_another_preparation_is_refused(prepared):
    path = prepared / "train-00000.bin"
    tokens = np.fromfile(path, dtype="<u2")
    tokens[5], tokens[6] = tokens[6], tokens[5]
    tokens.tofile(path)
    with pytest.raises(DataError, match=r"train-00000.bin is not the file that data.json describes: its SHA-2"):
        open_prepared(prepared)
    open_prepared(prepared, verify=False)


def test_large_folders_are_verified_on_request_only(prepared, monkeypatch):
    monkeypatch.setattr(prepared_module, "VERIFIED_BYTES", 10)
    path = prepared / "train-00000.bin"
    tokens = np.fromfile(path, dtype="<u2")
    tokens[5], tokens[6] = tokens[6], tokens[5]
    tokens.tofile(path)
    open_prepared(prepared)
    with pytest.raises(DataError, match=r"its SHA-256 differs: copy the folder again, or prepare the data again"):
        open_prepared(prepared, verify=True)


def edit(folder, **changes):
    metadata = json.loads((folder / "data.json").read_text())
    (folder / "data.json").write_text(json.dumps(metadata | changes))


def test_vocabulary_that_the_integers_cannot_hold_is_refused(prepared):
    edit(prepared, vocab_size=70_000)
    with pytest.raises(DataError, match=r"says 70000 tokens in 2 bytes each, which hold 65536: prepare the data again"):
        open_prepared(prepared)


def replaced(content, place, value):
    """The content with another value at a place, a path of keys."""
    key, *rest = place
    return content | {key: replaced(content[key], rest, value) if rest else value}


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("dtype",), "<f8"),
        (("dtype",), ["<u2"]),
        (("vocab_size",), "300"),
        (("start_token_id",), -1),
        (("end_token_id",), True),
        (("fingerprint",), 7),
        (("dropped",), None),
        (("source",), "stdlib"),
        (("tokenizer_files",), []),
        (("tokenizer_files",), {"tokenizer.json": "no hash"}),
        (("tokenizer_files",), {"../tokenizer.json": "0" * 64}),
        (("splits", "train"), []),
        (("splits", "train", "sha256"), "x" * 64),
        (("splits", "train", "tokens"), 1.5),
        (("splits", "heldout", "documents"), -3),
        (("splits", "heldout", "shards"), {"name": "a"}),
        (("splits", "heldout", "shards"), [{"name": "/etc/passwd", "tokens": 1, "bytes": 2, "sha256": "0" * 64}]),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else str(value)[:24],
)
def test_description_with_a_value_of_another_kind_is_refused(prepared, place, value):
    metadata = json.loads((prepared / "data.json").read_text())
    (prepared / "data.json").write_text(json.dumps(replaced(metadata, place, value)))
    with pytest.raises(DataError, match=r"data.json was not written by `fanformer data prepare`: name another folder$"):
        open_prepared(prepared)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("splits", "train", "tokens"), 10**15),
        (("splits", "train", "documents"), 10**15),
        (("splits", "heldout", "shards"), []),
    ],
    ids=["tokens", "documents", "no shards"],
)
def test_description_that_claims_more_than_its_shards_hold_is_refused(prepared, place, value):
    metadata = json.loads((prepared / "data.json").read_text())
    (prepared / "data.json").write_text(json.dumps(replaced(metadata, place, value)))
    with pytest.raises(
        DataError, match=rf"data.json says that {place[1]} has .* shards hold .*: prepare the data again$"
    ):
        open_prepared(prepared)
    metadata["splits"]["train"]["shards"][0]["tokens"] *= 1000
    metadata["splits"]["train"]["tokens"] *= 1000
    (prepared / "data.json").write_text(json.dumps(metadata))
    with pytest.raises(DataError, match=r"data.json says that train has .*: prepare the data again$"):
        open_prepared(prepared)


def test_description_too_large_to_be_one_is_not_read(prepared):
    os.truncate(prepared / "data.json", 1 << 40)  # takes no place on the disk
    with pytest.raises(DataError, match=r"data.json was not written by `fanformer data prepare`"):
        open_prepared(prepared)


def test_folder_whose_parts_do_not_belong_together_is_refused(prepared, tmp_path):
    edit(prepared, fingerprint="0" * 64)
    with pytest.raises(DataError, match=r"data.json has a fingerprint that its shards do not: prepare the data again"):
        open_prepared(prepared)
    (prepared / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer.json is not the tokenizer that the tokens were made with: prepare"):
        open_prepared(prepared)
    edit(prepared, splits={})
    with pytest.raises(DataError, match=r"data.json was not written by `fanformer data prepare`: name another folder"):
        open_prepared(prepared)


def test_evaluated_text_has_the_layout_of_a_prepared_stream(tmp_path, tokenizer, two_token_tokenizer):
    from fanformer.data.token_files import lay_out
    from fanformer.data.tokenizer import end_token_id, start_token_id

    for number, kind in enumerate((tokenizer, two_token_tokenizer)):
        data = prepare(Texts(MANY[:9]), tmp_path / str(number), tokenizer=kind, vocab_size=0, held_out_fraction=0)
        ids = [np.array(document) for document in encode_documents(kind, MANY[:9])]
        stream = lay_out(ids, start_token_id(kind), end_token_id(kind), np.dtype(np.uint32), close=True)
        assert np.array_equal(stream, data.split("train").tokens[:])
