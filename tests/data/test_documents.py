import gzip
import json
import lzma
import os
import sys

import pytest

from fanformer.data.sources import readers
from fanformer.data.sources.decompression import CHUNK_BYTES
from fanformer.data.sources.documents import FileSource, StdlibSource, is_prepared_folder, open_source
from fanformer.errors import DataError, DependencyError

TEXTS = ["first\r\n\tindented\n", "zweite Zeile: äöü 漢字 🙂", "", "third\u2028\x0b end"]


def write_jsonl(path, texts=TEXTS, field="text"):
    path.write_text("".join(json.dumps({"id": 1, field: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def compress(path, suffix):
    content, target = path.read_bytes(), path.with_name(path.name + suffix)
    if suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        middle = len(content) // 2  # two frames, as `cat a.zst b.zst` gives
        content = b"".join(zstandard.ZstdCompressor().compress(part) for part in (content[:middle], content[middle:]))
    else:
        content = {".gz": gzip.compress, ".xz": lzma.compress}[suffix](content)
    target.write_bytes(content)
    return target


def write_parquet(path, columns):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(columns), path)
    return path


def documents(path, **options):
    return [(document.name, document.text) for document in open_source(str(path), **options)]


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_compressed_file_gives_the_same_documents(tmp_path, kind, suffix):
    plain = tmp_path / f"data.{kind}"
    if kind == "txt":
        plain.write_text("".join(f"line {i} äöü\n" + "\n" * (i % 9 == 0) for i in range(100_000)), newline="")
    elif kind == "jsonl":
        write_jsonl(plain)
    else:
        write_parquet(plain, {"text": TEXTS})
    expected = documents(plain)
    assert len(expected) > 2
    assert documents(compress(plain, suffix)) == expected


def test_jsonl_and_parquet_give_their_non_empty_texts_unchanged(tmp_path):
    expected = [text for text in TEXTS if text]
    assert [text for _, text in documents(write_jsonl(tmp_path / "a.jsonl"))] == expected
    assert [text for _, text in documents(write_parquet(tmp_path / "a.parquet", {"text": TEXTS}))] == expected
    assert documents(write_jsonl(tmp_path / "b.jsonl", field="body"), text_field="body")[2] == ("b.jsonl:4", TEXTS[3])


def test_text_file_is_one_document_with_its_newlines_and_without_byte_order_mark(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + TEXTS[0].encode() + TEXTS[1].encode())
    assert documents(path) == [("a.txt", TEXTS[0] + TEXTS[1])]


@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be"])
def test_utf16_is_recognised_by_its_byte_order_mark(tmp_path, codec):
    path = tmp_path / "a.txt"
    path.write_bytes(("\ufeff" + "".join(TEXTS)).encode(codec))
    assert documents(path) == [("a.txt", "".join(TEXTS))]
    path.write_bytes(("\ufeff" + "".join(TEXTS)).encode(codec)[:-1])
    with pytest.raises(DataError, match=r"a\.txt: broken UTF-16 at byte \d+: save it as UTF-8"):
        documents(path)


def test_long_text_file_is_cut_at_blank_lines_and_joins_to_the_file(tmp_path):
    path = tmp_path / "long.txt"
    text = "".join(f"paragraph {i} äöü\n\n" for i in range(120_000))
    path.write_text(text)
    found = documents(path)
    assert "".join(part for _, part in found) == text
    assert [name for name, _ in found] == [f"long.txt#{i}" for i in range(len(found))]
    assert all(part.endswith("\n\n") for _, part in found)
    assert all(readers.PIECE <= len(part) <= readers.PIECE + readers.CUT_WINDOW for _, part in found[:-1])


def test_text_without_any_break_is_still_cut(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("x" * (readers.LONGEST_TEXT + 1))
    found = documents(path)
    assert len(found[0][1]) == readers.PIECE + readers.CUT_WINDOW
    assert sum(len(text) for _, text in found) == readers.LONGEST_TEXT + 1


def test_isolated_bad_bytes_are_replaced_and_counted_in_their_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a" * 300 + b"\xff" + "ä".encode()[:1] + b"b" * 300)
    [document] = open_source(str(path))
    assert document.text == "a" * 300 + "\ufffd\ufffd" + "b" * 300
    assert document.replaced_bytes == 2
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n{"text": "caf\xe9"}\n{"text": "lone \\ud83d surrogate"}\n')
    assert [(d.text, d.replaced_bytes) for d in open_source(str(path))] == [
        ("good", 0),
        ("caf\ufffd", 1),
        ("lone \ufffd surrogate", 1),
    ]


@pytest.mark.parametrize("position", [5, CHUNK_BYTES - 1, CHUNK_BYTES + 7])
def test_binary_file_is_refused_with_the_offset_of_its_nul(tmp_path, position):
    path = tmp_path / "a.txt"
    path.write_bytes("é".encode() + b"a" * (position - 2) + b"\0" + b"a" * 9)
    with pytest.raises(DataError, match=rf"a\.txt: expected text, got a binary file \(a NUL at byte {position}\)"):
        documents(path)


def test_file_that_is_not_utf8_is_refused_with_the_first_bad_offset(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("Käse und Brötchen für Österreich".encode("latin-1"))
    with pytest.raises(DataError, match=r"expected UTF-8 text, got 4 undecodable bytes among 32, the first at byte 1:"):
        documents(path)


def test_glob_names_documents_by_their_path_after_the_fixed_folder(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("b/two.md", "one.txt", "b/three.py"):
        (tmp_path / name).write_text(name)
    assert documents(tmp_path / "**" / "t*") == [("b/three.py", "b/three.py"), ("b/two.md", "b/two.md")]
    assert documents(tmp_path / "b" / "*.md") == [("two.md", "b/two.md")]
    assert open_source(str(tmp_path / "*.txt")).total_bytes == len("one.txt")
    assert open_source(str(write_jsonl(tmp_path / "a.jsonl"))).total_bytes is None


def test_description_changes_with_the_content(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = open_source(str(path)).describe()
    assert open_source(str(path)).describe() == before
    path.write_text("two")
    assert open_source(str(path)).describe() != before
    assert json.loads(json.dumps(before)) == before


def test_description_of_a_large_file_names_its_time_of_change(tmp_path, monkeypatch):
    monkeypatch.setattr("fanformer.data.sources.documents.HASHED_BYTES", 2)
    path = tmp_path / "a.txt"
    path.write_text("one")
    [entry] = open_source(str(path)).describe()["files"]
    assert entry == {"name": "a.txt", "bytes": 3, "modified_ns": path.stat().st_mtime_ns}


def test_stdlib_is_deterministic_and_leaves_out_tests_and_packages():
    first, second = StdlibSource(), open_source("stdlib")
    assert first.describe() == second.describe()
    assert list(first) == list(second)
    names = [document.name for document in first]
    assert names == sorted(names)
    assert "json/decoder.py" in names
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    assert first.describe()["python"].endswith(".".join(map(str, sys.version_info[:3])))
    assert first.total_bytes == sum(len(document.text.encode()) for document in first) > 5_000_000


def test_stdlib_files_of_other_encodings_are_decoded_and_broken_ones_listed(tmp_path):
    (tmp_path / "latin.py").write_bytes("# -*- coding: latin-1 -*-\r\n# ä\r\n".encode("latin-1"))
    (tmp_path / "broken.py").write_bytes(b"# \xe4\n")
    source = StdlibSource(tmp_path)
    assert [(d.name, d.text) for d in source] == [("latin.py", "# -*- coding: latin-1 -*-\r\n# ä\r\n")]
    assert source.describe()["skipped_files"] == ["broken.py"]
    with pytest.raises(DataError, match=r"this Python has no source files at .*: use --data FILE"):
        StdlibSource(tmp_path / "nothing")


def test_missing_file_is_named_by_its_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DataError, match=rf"data `no.txt`: no file {tmp_path}/no.txt: expected `stdlib`, a file or glob"
    ):
        open_source("no.txt")
    with pytest.raises(DataError, match=rf"no file matches {tmp_path}/no\*.txt: quote the pattern"):
        open_source("no*.txt")


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf"], ids=["no bytes", "only a byte order mark"])
def test_empty_file_is_refused(tmp_path, content):
    (tmp_path / "empty.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"empty.txt` holds no text: name a source that does"):
        documents(tmp_path / "empty.txt")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root can read every file")
def test_unreadable_file_is_refused(tmp_path):
    path = tmp_path / "secret.txt"
    path.write_text("secret")
    path.chmod(0)
    with pytest.raises(DataError, match=r"secret.txt cannot be read: Permission denied"):
        open_source(str(path))


def test_file_that_vanishes_after_opening_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("text")
    source = FileSource("a.txt", [path], tmp_path, readers.Fields("text"))
    path.unlink()
    with pytest.raises(DataError, match=r"a.txt cannot be read: No such file"):
        list(source)


def test_folder_is_refused_unless_it_is_prepared(tmp_path):
    with pytest.raises(DataError, match=r"is a folder without data.json: expected a folder written by `fanformer data"):
        open_source(str(tmp_path))
    assert not is_prepared_folder(str(tmp_path))
    (tmp_path / "data.json").write_text("{}")
    assert is_prepared_folder(str(tmp_path))
    with pytest.raises(DataError, match=r"is prepared already: give it to `fanformer train --data`"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", r"a.jsonl:2: expected a JSON object on every line, got Expecting value"),
        ("[1]", r"a.jsonl:2: expected a JSON object on every line, got list"),
        ('{"body": "x", "id": 1}', r"a.jsonl:2: no field `text`; it has `body`, `id`: name the one that holds text"),
        ('{"text": null}', r"a.jsonl:2: field `text` must be a string, got NoneType"),
        (
            "[" * 100_000,
            r"a.jsonl:2: expected a JSON object on every line, got one nested too deep to be read: mend or delete it",
        ),
        (
            '{"text": "x", "id": ' + "7" * 5000 + "}",
            r"a.jsonl:2: expected a JSON object on every line, got a number of more than 4,300 digits: mend or delete",
        ),
        ('{"text": "x", "id": {"a":' * 100_000, r"a.jsonl:2: expected a JSON object on every line, got one nested too"),
    ],
    ids=["no JSON", "a list", "other fields", "no string", "nested lists", "long number", "nested objects"],
)
def test_broken_jsonl_line_is_named_by_its_number(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        documents(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("line", "got"),
    [("not json", "Expecting value"), ("[" * 100_000, "one nested too"), ("7" * 5000, "a number of more than 4,300")],
    ids=["no JSON", "nested", "long number"],
)
def test_first_line_that_field_names_cannot_read_is_named(tmp_path, line, got):
    (tmp_path / "a.jsonl").write_text("\n\n" + line + "\n")
    with pytest.raises(DataError, match=rf"a.jsonl:3: expected a JSON object on every line, got {got}"):
        readers.field_names(tmp_path / "a.jsonl")


def test_json_is_refused_with_what_to_rename_it_to(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(DataError, match=r"a.json: .json can be read in several ways: rename it to .jsonl"):
        open_source(str(tmp_path / "a.json"))


def test_parquet_without_the_column_or_with_other_values_is_refused(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"body": ["x"], "number": [1], "gaps": ["x", None][:1]})
    with pytest.raises(DataError, match=r"no column `text`; it has `body`, `number`, `gaps`: name the one"):
        documents(path)
    with pytest.raises(DataError, match=r"column `number` must hold strings, got int64"):
        documents(path, text_field="number")
    path = write_parquet(tmp_path / "b.parquet", {"text": ["x", None]})
    with pytest.raises(DataError, match=r"b.parquet:2: field `text` must be a string, got NoneType"):
        documents(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"b.parquet: not a complete parquet file \(.*\): fetch it again"):
        documents(path)


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_truncated_compressed_file_is_refused(tmp_path, suffix):
    (tmp_path / "a.txt").write_bytes(os.urandom(3000).hex().encode())
    path = compress(tmp_path / "a.txt", suffix)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"damaged or cut short \(.*\): fetch or compress it again"):
        documents(path)
    path.write_bytes(b"this is not compressed")
    with pytest.raises(DataError, match=r"damaged.*: fetch or compress it again"):
        documents(path)


@pytest.mark.parametrize(("name", "package"), [("a.txt.zst", "zstandard"), ("a.parquet", "pyarrow")])
def test_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, name, package):
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DependencyError, match=rf"reading {name} needs the package `{package}`.*'fanformer\[data\]'"):
        open_source(str(tmp_path / name))
