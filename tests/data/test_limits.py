"""What is no file is refused before it is opened, and no small file makes a reader take all memory."""

import gzip
import json
import lzma
import os
import socket
import struct
import subprocess
import sys

import pytest

from fanformer.data.sources import decompression, readers
from fanformer.data.sources.documents import open_source
from fanformer.errors import DataError

MEBIBYTE = 1 << 20


def run_limited(code, *arguments, gibibytes=3):
    """Run code in a process that may not have more memory than that, so that a bomb ends it and not the machine."""
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({gibibytes} << 30, {gibibytes} << 30))\n"
    return subprocess.run(
        [sys.executable, "-c", limit + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("kind", ["pipe", "socket", "character device", "pipe by a link"])
def test_what_is_no_regular_file_is_refused_with_what_it_is(tmp_path, kind):
    path = tmp_path / "a.txt"
    bound = socket.socket(socket.AF_UNIX)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "pipe by a link":
        os.mkfifo(tmp_path / "fifo")
        path.symlink_to("fifo")
    elif kind == "socket":
        bound.bind(str(path))
    else:
        path = "/dev/zero"
    expected = (
        rf"{path} is a {kind.split(' by')[0]}, expected a regular file: write what it holds to a file and name that"
    )
    with pytest.raises(DataError, match=expected):
        open_source(str(path))
    bound.close()


def test_process_substitution_and_devices_are_one_line_to_the_command(tmp_path):
    (tmp_path / "f.txt").write_text("text of a file\n" * 99)
    program = f"{sys.executable} -m fanformer.cli.main data prepare"
    for spec in ("<(cat f.txt)", "/dev/zero", "/dev/stdin"):
        command = f"ulimit -v 8000000; cat f.txt | {program} {spec} --output-dir out --vocab-size 300"
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=100)
        assert done.returncode == 2, done
        assert done.stderr.count("\n") == 1
        assert "expected a regular file: write what it holds to a file and name that" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["f.txt"]


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
def test_line_beyond_the_limit_is_refused_with_its_number(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(readers, "LONGEST_LINE", 3 * MEBIBYTE)
    path = tmp_path / f"a.jsonl{suffix}"
    fits = json.dumps({"text": "x" * (3 * MEBIBYTE - 20)})
    content = f'{fits}\n{{"text": "{"y" * 3 * MEBIBYTE}"}}\n'.encode()
    if suffix == ".zst":
        content = pytest.importorskip("zstandard").ZstdCompressor().compress(content)
    path.write_bytes({".gz": gzip.compress, ".xz": lzma.compress}.get(suffix, bytes)(content))
    with pytest.raises(
        DataError, match=r"a\.jsonl.*:2: a line must have at most 3,145,728 characters, got more: is this jsonl\?"
    ):
        list(open_source(str(path)))
    path.write_bytes({".gz": gzip.compress, ".xz": lzma.compress}.get(suffix, bytes)(content[:0]))


READ = "import sys; from fanformer.data.sources.documents import open_source\n" + (
    "for document in open_source(sys.argv[1]): pass"
)
FIELDS = "import sys; from pathlib import Path; from fanformer.data.sources.readers import field_names\n" + (
    "field_names(Path(sys.argv[1]))"
)


@pytest.mark.parametrize("code", [READ, FIELDS], ids=["reading", "field names"])
def test_bomb_of_one_line_ends_in_an_error_and_not_in_all_memory(tmp_path, code):
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(700):
            file.write(b"a" * MEBIBYTE)
    done = run_limited(code, path)
    assert "bomb.jsonl.gz:1: a line must have at most 268,435,456 characters, got more" in done.stderr, done.stderr


def test_zstandard_bomb_is_read_in_small_pieces(tmp_path):
    pytest.importorskip("zstandard")
    blocks = 20_000  # of one byte repeated 128 KiB, in four bytes each: 2.4 GiB in 80 KB
    block = struct.pack("<I", (1 << 1 | (128 << 10) << 3))[:3] + b"a"
    last = struct.pack("<I", (1 | 1 << 1 | (128 << 10) << 3))[:3] + b"a"
    path = tmp_path / "bomb.txt.zst"
    # no checksum, no size, a window of 128 KiB
    path.write_bytes(b"\x28\xb5\x2f\xfd\x00" + bytes([7 << 3]) + block * blocks + last)
    done = run_limited(
        "import sys; from pathlib import Path; from fanformer.data.sources.decompression import read_chunks\n"
        "print(sum(len(chunk) for chunk in read_chunks(Path(sys.argv[1]))))",
        path,
        gibibytes=1,
    )
    assert done.stdout.strip() == str((blocks + 1) * (128 << 10)), done.stderr


def test_window_or_dictionary_beyond_the_limit_is_refused(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    path = tmp_path / "wide.txt.zst"
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path.write_bytes(stream.compress(b"some text") + stream.flush())
    with pytest.raises(
        DataError, match=r"wide\.txt\.zst must be readable with a window of at most 128 MiB, .*: decompress it"
    ):
        list(open_source(str(path)))
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 30}]
    path = tmp_path / "wide.txt.xz"
    path.write_bytes(lzma.compress(b"some text", filters=filters))
    with pytest.raises(
        DataError, match=r"wide\.txt\.xz must be readable with a dictionary of at most 256 MiB, .*: decompress it"
    ):
        list(open_source(str(path)))


def test_compressed_parquet_beyond_the_limit_is_refused(tmp_path, monkeypatch):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["x" * MEBIBYTE * 3]}), tmp_path / "a.parquet", compression="none")
    path = tmp_path / "b.parquet.gz"
    path.write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    assert len(list(open_source(str(path)))) == 1
    monkeypatch.setattr(decompression, "LARGEST_IN_MEMORY", 2 * MEBIBYTE)
    with pytest.raises(
        DataError, match=r"b\.parquet\.gz must have at most 2,097,152 bytes decompressed, got more: decompress it"
    ):
        list(open_source(str(path)))


@pytest.mark.ci
def test_value_that_many_rows_of_a_parquet_file_share_is_not_copied_for_all_at_once(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "bomb.parquet"
    shared = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 1000, "int32"), pyarrow.array(["a" * 8_000_000]))
    table = pyarrow.table({"text": shared})
    parquet.write_table(table, path, dictionary_pagesize_limit=1 << 30, store_schema=False)
    assert path.stat().st_size < 600_000
    done = run_limited(READ + "\nprint('read')", path, gibibytes=5)
    assert done.stdout.strip() == "read", done.stderr[-500:]


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_several_streams_and_padding_read_as_one_file(tmp_path, suffix):
    parts = [os.urandom(3000).hex().encode() * 40, b"", b"the end\n"]
    if suffix == ".zst":
        pack = pytest.importorskip("zstandard").ZstdCompressor().compress
    else:
        pack = {".gz": gzip.compress, ".xz": lzma.compress}[suffix]
    path = tmp_path / f"a.txt{suffix}"
    padding = b"\0" * 8 if suffix == ".xz" else b""
    path.write_bytes(padding.join(pack(part) for part in parts) + padding)
    assert b"".join(decompression.read_chunks(path)) == b"".join(parts)
    assert max(map(len, decompression.read_chunks(path))) <= decompression.CHUNK_BYTES
