"""The strict reader: a whole file is read, and everything else is refused in one line."""

import os
import shutil
import struct

import numpy as np
import pytest

from fanformer.errors import CheckpointError
from fanformer.gguf.architecture import open_model
from fanformer.gguf.blocks import TYPES
from fanformer.gguf.file import ARRAY, STRING, GGUFFile, Texts
from fanformer.gguf.writer import write_gguf
from tests.gguf_models import export

BASE = {"general.architecture": (STRING, "fanformer")}
ONE = [("a", (2, 4), TYPES["f32"])]


def written(path, metadata=BASE, tensors=ONE, content=None):
    rng = np.random.default_rng(0)
    if content is None:
        content = [
            rng.integers(0, 256, np.prod(shape[:-1], dtype=int) * kind.row_bytes(shape[-1]), dtype=np.uint8)
            for _, shape, kind in tensors
        ]
    write_gguf(path, metadata, tensors, content)
    return path


@pytest.fixture
def spoilt(tmp_path):
    """Write a small file, replace bytes in it, and read it again."""

    def spoil(old, new, **arguments):
        path = written(tmp_path / "file.gguf", **arguments)
        content = path.read_bytes()
        assert content.count(old) == 1, content
        path.write_bytes(content.replace(old, new))
        return GGUFFile(path)

    return spoil


def test_everything_written_is_read_again(tmp_path):
    metadata = {
        **BASE,
        "a.text": (STRING, "Gr\u00fc\u00dfe"),
        "a.flag": (7, True),
        "a.small": (1, -3),
        "a.large": (10, 2**63),
        "a.float": (6, 0.5),
        "a.double": (12, 0.1),
        "a.texts": (ARRAY, (STRING, ["x", "", "\u20ac"])),
        "a.numbers": (ARRAY, (5, [1, -2, 3])),
        "a.flags": (ARRAY, (7, [True, False])),
        "a.empty": (ARRAY, (4, [])),
    }
    rows = np.arange(64, dtype=np.float32).reshape(2, 32)
    tensors = [("first", (2, 32), TYPES["f32"]), ("second", (3,), TYPES["f16"]), ("third", (1, 2, 32), TYPES["q8_0"])]
    content = [rows.view(np.uint8).ravel(), np.ones(3, np.float16).view(np.uint8), np.zeros(68, np.uint8)]
    file = GGUFFile(written(tmp_path / "file.gguf", metadata, tensors, content))
    for key, (kind, value) in metadata.items():
        if kind == ARRAY:
            assert list(file.metadata[key]) == value[1]
        else:
            assert file.metadata[key] == value
            assert type(file.metadata[key]) is type(value)
    assert [(item.name, item.shape, item.kind.name) for item in file.tensors.values()] == [
        ("first", (2, 32), "f32"), ("second", (3,), "f16"), ("third", (1, 2, 32), "q8_0"),
    ]  # fmt: skip
    assert all(item.offset % 32 == 0 for item in file.tensors.values())
    np.testing.assert_array_equal(file.read_floats(file.tensors["first"]), rows)
    np.testing.assert_array_equal(file.read_floats(file.tensors["second"]), np.ones(3))


def test_texts_are_a_sequence():
    words = ["", "one", "", "Gr\u00fc\u00dfe", "two"]
    texts = Texts("".join(words).encode(), np.cumsum([len(word.encode()) for word in words]))
    assert list(texts) == words
    assert (texts[1], texts[-1], texts[1:4], len(texts)) == ("one", "two", words[1:4], 5)
    with pytest.raises(IndexError):
        texts[5]


def test_the_gguf_packages_reader_lists_the_same(saved_model):
    reader = pytest.importorskip("gguf", reason="needs the package gguf")
    path = export(saved_model, "f16")
    ours, theirs = GGUFFile(path), reader.GGUFReader(path)
    assert [item.name for item in theirs.tensors] == list(ours.tensors)
    for item in theirs.tensors:
        own = ours.tensors[item.name]
        assert item.shape.tolist() == list(reversed(own.shape))
        assert (int(item.tensor_type), int(item.data_offset), int(item.n_bytes)) == (
            own.kind.number, own.offset, own.num_bytes,
        )  # fmt: skip
        np.testing.assert_array_equal(np.asarray(item.data).view(np.uint8).ravel(), ours.read_raw(own))
    for key, value in ours.metadata.items():
        found = theirs.fields[key].contents()
        assert list(found) == list(value) if isinstance(value, Texts | np.ndarray) else found == value


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"GGUF", b"GGML", r"is no GGUF file: it begins with b'GGML', expected b'GGUF'"),
        (b"GGUF\x03\x00\x00\x00", b"GGUF\x02\x00\x00\x00", "has GGUF version 2, expected 3"),
        (b"GGUF\x03\x00\x00\x00", b"GGUF\x00\x00\x00\x03", "version 50331648 .of a machine with the other byte order"),
        (b"fanformer", b"fanformes", "holds a model of architecture 'fanformes', expected `fanformer`"),
    ],
)
def test_other_formats_versions_and_architectures_are_refused(spoilt, old, new, message):
    with pytest.raises(CheckpointError, match=message):
        spoilt(old, new)


def test_header_fields_that_lie_are_refused(tmp_path):
    path = written(tmp_path / "file.gguf", {**BASE, "a.texts": (ARRAY, (STRING, ["one", "two"]))})
    content = path.read_bytes()
    name = content.index(struct.pack("<Q", 1) + b"a")
    entries = content.index(b"a.texts") + len(b"a.texts")
    huge = struct.pack("<Q", 2**62)
    cases = {
        "claims 4611686018427387904 tensors": (8, huge),
        "claims 4611686018427387904 metadata keys": (16, huge),
        "a key has 4611686018427387904 bytes, at most 65535": (24, huge),
        "`general.architecture` takes 4611686018427387904 bytes": (24 + 8 + 20 + 4, huge),
        "claims 4611686018427387904 entries of `a.texts`": (entries + 8, huge),
        "`a.texts` has the unknown type 99": (entries, struct.pack("<I", 99)),
        "`a.texts` is an array of the type 9, which is none": (entries + 4, struct.pack("<I", 9)),
        "an entry of `a.texts` takes": (entries + 16, huge),
        "a tensor's name has 4611686018427387904 bytes, at most 63": (name, huge),
        "`a` has 5 dimensions, expected 1 to 4": (name + 9, struct.pack("<I", 5)),
        "`a` has 0 dimensions": (name + 9, struct.pack("<I", 0)),
        r"`a` has the shape \(2, 0\)": (name + 13, struct.pack("<Q", 0)),
        r"`a` has the shape \(2, 4611686018427387904\)": (name + 13, huge),
        "stores `a` in the ggml type 3, expected one of f32": (name + 29, struct.pack("<I", 3)),
        "has rows of 4 numbers, which blocks of 32": (name + 29, struct.pack("<I", 8)),
        "`a` is said to begin at 64, expected 0": (name + 33, struct.pack("<Q", 64)),
        "its header says": (name + 13, struct.pack("<Q", 64)),
    }
    for message, (place, replacement) in cases.items():
        path.write_bytes(content[:place] + replacement + content[place + len(replacement) :])
        with pytest.raises(CheckpointError, match=message):
            GGUFFile(path)


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        (BASE, [*ONE, *ONE], "has the tensor `a` twice"),
        ({**BASE, "split.count": (2, 3)}, ONE, "is one of 3 parts of a model"),
        ({**BASE, "general.alignment": (4, 24)}, ONE, "`general.alignment` must be a power of two from 8 on, got 24"),
        ({**BASE, "general.alignment": (STRING, "32")}, ONE, "`general.alignment` must be a power of two"),
        ({**BASE, "\u00e9": (7, True)}, ONE, "is no key"),
        ({"general.name": (STRING, "x")}, ONE, "holds a model of architecture 'None'"),
    ],
)
def test_headers_that_make_no_sense_are_refused(tmp_path, metadata, tensors, message):
    with pytest.raises(CheckpointError, match=message):
        GGUFFile(written(tmp_path / "file.gguf", metadata, tensors))


def test_key_that_is_there_twice_is_refused(spoilt):
    with pytest.raises(CheckpointError, match=r"it has the key `a.one` twice"):
        spoilt(b"a.two", b"a.one", metadata={**BASE, "a.one": (7, True), "a.two": (7, True)})


def test_flag_that_is_neither_true_nor_false_is_refused(spoilt):
    with pytest.raises(CheckpointError, match=r"`a.flag` must be true or false, got 7"):
        spoilt(b"a.flag\x07\x00\x00\x00\x01", b"a.flag\x07\x00\x00\x00\x07", metadata={**BASE, "a.flag": (7, True)})


def test_text_that_is_no_utf8_is_refused(spoilt):
    with pytest.raises(CheckpointError, match=r"`a.text` is not UTF-8"):
        spoilt(b"hello", b"hell\xff", metadata={**BASE, "a.text": (STRING, "hello")})


def test_every_truncation_and_any_addition_is_refused(saved_model, tmp_path):
    content = export(saved_model).read_bytes()
    path = tmp_path / "cut.gguf"
    for length in [*range(64), *range(64, len(content), len(content) // 200), len(content) - 33]:
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            open_model(str(path))
    path.write_bytes(content + bytes(32))
    with pytest.raises(CheckpointError, match=r"is damaged: .* bytes, its header says"):
        open_model(str(path))


def test_file_that_shrinks_after_its_header_was_read_is_refused(saved_model, tmp_path):
    path = shutil.copy(export(saved_model), tmp_path / "file.gguf")
    file, _ = open_model(str(path))
    os.truncate(path, file.tensors["output.weight"].offset + 10)
    with pytest.raises(CheckpointError, match=r"ends within tensor `output.weight`: it is truncated"):
        file.read_floats(file.tensors["output.weight"])


def test_missing_file_and_folder_are_refused(tmp_path):
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(CheckpointError, match=r"no GGUF file"):
            GGUFFile(path)


def test_tensors_must_be_those_of_the_architecture(saved_model, tmp_path):
    path = export(saved_model)
    content = path.read_bytes()
    for old, new, message in (
        (b"blk.1.attn_output.bias", b"blk.1.attn_output.bios", "lacks `blk.1.attn_output.bias`"),
        (b"fanformer.block_count\x04\0\0\0\x02", b"fanformer.block_count\x04\0\0\0\x01", r"it has `blk.1.attn_\w+"),
        (b"fanformer.block_count\x04\0\0\0\x02\0", b"fanformer.block_count\x04\0\0\0\xff\xff", "claims 65535 blocks"),
        (b"feed_forward_length\x04\0\0\0\x60", b"feed_forward_length\x04\0\0\0\x40", r"expected \(64,"),
    ):
        assert content.count(old) == 1, old
        spoilt = tmp_path / "spoilt.gguf"
        spoilt.write_bytes(content.replace(old, new))
        with pytest.raises(CheckpointError, match=message):
            open_model(str(spoilt))


def test_embedding_is_read_row_by_row_and_notices_a_file_that_shrinks(saved_model, tmp_path):
    from fanformer.gguf.embedding import Embedding

    path = shutil.copy(export(saved_model, "f16"), tmp_path / "file.gguf")
    file, _ = open_model(str(path))
    info = file.tensors["token_embd.weight"]
    embedding, whole = Embedding(file, info), file.read_floats(info)
    ids = np.array([5, 0, 319, 5], dtype=np.int32)
    np.testing.assert_array_equal(embedding.rows(ids), whole[ids])
    os.truncate(path, info.offset + 100)
    with pytest.raises(CheckpointError, match=r"file.gguf became shorter while it was in use"):
        embedding.rows(ids)
    content = bytearray(export(saved_model, "f16").read_bytes())
    content[info.offset + 2 * 64 * 300 : info.offset + 2 * 64 * 300 + 2] = b"\0\x7c"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"`token_embd.weight` holds values that are not finite"):
        Embedding(file, info)


def test_a_file_that_another_takes_the_place_of_is_read_on(saved_model, tmp_path):
    from fanformer.gguf.embedding import Embedding

    path = shutil.copy(export(saved_model, "f16"), tmp_path / "file.gguf")
    file, _ = open_model(str(path))
    info, content = file.tensors["token_embd.weight"], path.read_bytes()
    whole = file.read_floats(info)
    (tmp_path / "other").write_bytes(content[: info.offset] + bytes(len(content) - info.offset))  # all weights are 0
    os.replace(tmp_path / "other", path)
    np.testing.assert_array_equal(file.read_floats(info), whole)
    ids = np.array([5, 0, 319], dtype=np.int32)
    np.testing.assert_array_equal(Embedding(file, info).rows(ids), whole[ids])


def test_a_file_is_closed_when_nobody_reads_from_it_any_more(saved_model):
    from fanformer.gguf.embedding import Embedding

    file, _ = open_model(str(export(saved_model, "f16")))
    embedding, descriptor = Embedding(file, file.tensors["token_embd.weight"]), file.stream.fileno()
    del file
    assert embedding.rows(np.array([5], dtype=np.int32)).shape == (1, 64)
    del embedding
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
