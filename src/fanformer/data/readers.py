"""Read one file, plain or compressed, as the texts it holds: text, jsonl or parquet.

Bytes that are not UTF-8 travel as lone surrogates (PEP 383) until a document is complete, so that each is counted in
the document where it ends up, as one U+FFFD.
"""

import codecs
import gzip
import importlib
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, cast

from fanformer.errors import DataError, DependencyError

CHUNK_BYTES = 1 << 20
LONGEST_TEXT = 1 << 20
"""Characters of a text file above which it is cut into several documents."""
PIECE = 1 << 18
"""Characters of such a document, up to the next blank line."""
CUT_WINDOW = 1 << 14
"""Characters after PIECE among which a blank line, a line end or a space is looked for."""

COMPRESSIONS = (".gz", ".xz", ".zst")
_SURROGATES = re.compile("[\ud800-\udfff]")
_BYTE_ORDER_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))


def import_extra(module: str, purpose: str) -> ModuleType:
    """Import an optional package of the extra `data`.

    Raises:
        DependencyError: if it is not installed; the message names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DependencyError(
            f"{purpose} needs the package `{module.partition('.')[0]}`, which is not installed: "
            "pip install 'fanformer[data]'"
        ) from error


def plain_name(name: str) -> str:
    """Return a file name without the suffix of its compression."""
    return name.removesuffix(Path(name).suffix) if Path(name).suffix in COMPRESSIONS else name


def file_kind(path: Path) -> str:
    """Return how a file is read: "text", "jsonl" or "parquet".

    Raises:
        DataError: for .json, which may be a document, a list or lines.
    """
    suffix = Path(plain_name(path.name)).suffix.lower()
    if suffix == ".json":
        raise DataError(
            f"{path}: .json can be read in several ways: rename it to .jsonl if every line is an object, "
            "or to .txt to learn its text as it stands"
        )
    return {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}.get(suffix, "text")


def require_extras(path: Path) -> None:
    """Raise DependencyError where reading this file needs a package that is not installed."""
    if path.suffix == ".zst":
        import_extra("zstandard", f"reading {path.name}")
    if file_kind(path) == "parquet":
        import_extra("pyarrow", f"reading {path.name}")


def replace_undecodable(text: str) -> tuple[str, int]:
    """Replace every lone surrogate by U+FFFD and return the text with how many there were."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return _SURROGATES.subn("\ufffd", text)
    return text, 0


def read_texts(path: Path, text_field: str) -> Iterator[tuple[str, str]]:
    """Yield (suffix of the document's name, text) for every document of a file.

    A text may hold lone surrogates; `replace_undecodable` removes them. A text file is one document, or several of
    about PIECE characters where it is longer than LONGEST_TEXT.

    Raises:
        DataError: if the file cannot be read, is damaged, binary, or lacks the field.
    """
    kind = file_kind(path)
    if kind == "parquet":
        yield from _parquet_texts(path, text_field)
    elif kind == "jsonl":
        yield from _jsonl_texts(path, _decode(path, _read_chunks(path)), text_field)
    else:
        yield from _cut_texts(_decode(path, _read_chunks(path)))


def _read_chunks(path: Path) -> Iterator[bytes]:
    """Yield the decompressed bytes of a file in pieces of CHUNK_BYTES."""
    try:
        if path.suffix == ".zst":
            yield from _zstandard_chunks(path)
            return
        with _open_binary(path) as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
        raise DataError(f"{path}: damaged or cut short ({error}): fetch or compress it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _open_binary(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    return cast(BinaryIO, lzma.open(path, "rb")) if path.suffix == ".xz" else path.open("rb")


def _zstandard_chunks(path: Path) -> Iterator[bytes]:
    """Yield what every frame of a .zst file holds; its stream reader would take a cut file for a complete one."""
    zstandard = import_extra("zstandard", f"reading {path.name}")
    frame, pending = None, bytearray()
    with path.open("rb") as file:
        while raw := file.read(CHUNK_BYTES // 8):
            while raw:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                try:
                    pending += frame.decompress(raw)
                except zstandard.ZstdError as error:
                    raise DataError(f"{path}: damaged ({error}): fetch or compress it again") from error
                raw = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
            while len(pending) >= CHUNK_BYTES:
                yield bytes(pending[:CHUNK_BYTES])
                del pending[:CHUNK_BYTES]
    if frame is not None:
        raise DataError(f"{path}: damaged or cut short (its last frame has no end): fetch or compress it again")
    if pending:
        yield bytes(pending)


def _decode(path: Path, chunks: Iterator[bytes]) -> Iterator[str]:
    """Decode UTF-8, or UTF-16 where a byte order mark says so; the mark is dropped, newlines stay.

    Raises:
        DataError: if the bytes are binary: a NUL, or more than 1% of what was read so far (and more than one byte)
            that is not UTF-8.
    """
    head = next(chunks, b"")
    mark, codec = next((pair for pair in _BYTE_ORDER_MARKS if head.startswith(pair[0])), (b"", "utf-8"))
    errors = "surrogateescape" if codec == "utf-8" else "strict"
    decoder = codecs.getincrementaldecoder(codec)(errors)
    consumed, num_bad, first_bad = len(mark), 0, 0
    chunk: bytes | None = head[len(mark) :]
    while chunk is not None:
        start = consumed - len(decoder.getstate()[0])
        following = next(chunks, None)
        try:
            text = decoder.decode(chunk, final=following is None)
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: broken UTF-16 at byte {start + error.start}: save it as UTF-8") from error
        consumed += len(chunk)
        if "\0" in text:
            offset = start + len(text[: text.index("\0")].encode(codec, errors))
            raise DataError(f"{path}: expected text, got a binary file (a NUL at byte {offset})")
        cleaned, bad_here = replace_undecodable(text)
        if bad_here and not num_bad:
            first_bad = start + len(text[: _first_difference(text, cleaned)].encode(codec, errors))
        num_bad += bad_here
        if num_bad > max(1, consumed // 100):
            raise DataError(
                f"{path}: expected UTF-8 text, got {num_bad} undecodable bytes among {consumed}, the first at byte "
                f"{first_bad}: convert the file to UTF-8"
            )
        yield text
        chunk = following


def _first_difference(text: str, cleaned: str) -> int:
    return next(index for index, (a, b) in enumerate(zip(text, cleaned, strict=True)) if a != b)


def _cut_texts(texts: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Join the pieces of one text file, then cut it at blank lines where it is long."""
    buffer, index = "", 0
    for text in texts:
        buffer += text
        if index or len(buffer) > LONGEST_TEXT:
            while len(buffer) >= PIECE + CUT_WINDOW:
                cut = _cut_position(buffer)
                yield f"#{index}", buffer[:cut]
                buffer, index = buffer[cut:], index + 1
    if buffer:
        yield (f"#{index}" if index else ""), buffer


def _cut_position(text: str) -> int:
    for mark in ("\n\n", "\r\n\r\n", "\n", " "):
        found = text.find(mark, PIECE, PIECE + CUT_WINDOW)
        if found >= 0:
            return found + len(mark)
    return PIECE + CUT_WINDOW


def _jsonl_texts(path: Path, texts: Iterable[str], text_field: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(_lines(texts), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: expected a JSON object on every line, got {error}") from error
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected a JSON object on every line, got {type(record).__name__}")
        if text_field not in record:
            raise DataError(f"{where}: no field `{text_field}`; it has {_names(record)}: name the one that holds text")
        yield f":{number}", require_text(record[text_field], where, text_field)


def _lines(texts: Iterable[str]) -> Iterator[str]:
    rest = ""
    for text in texts:
        *complete, rest = (rest + text).split("\n")
        yield from complete
    yield rest


def require_text(value: Any, where: str, text_field: str) -> str:
    """Return a field's value, or raise DataError where it is no string."""
    if not isinstance(value, str):
        raise DataError(f"{where}: field `{text_field}` must be a string, got {type(value).__name__}")
    return value


def _names(fields: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in fields) or "none"


def _parquet_texts(path: Path, text_field: str) -> Iterator[tuple[str, str]]:
    try:
        with _seekable(path) as source:
            for number, text in parquet_rows(source, str(path), text_field):
                yield f":{number}", text
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def parquet_rows(source: BinaryIO, where: str, text_field: str, skip: int = 0) -> Iterator[tuple[int, str]]:
    """Yield (number of the row, from 1, text) for the rows of a parquet file, reading one column only.

    Args:
        source: the file, open for reading from any place.
        where: the file's name, for messages.
        text_field: column that holds the text.
        skip: rows to leave out at the beginning; row groups that hold no others are not read.

    Raises:
        DataError: if the file is damaged, or the column is missing or holds something else.
    """
    pyarrow = import_extra("pyarrow", f"reading {where}")
    parquet = import_extra("pyarrow.parquet", f"reading {where}")
    try:
        # buffered ahead, all row groups would be fetched, and held in memory, before the first row
        with parquet.ParquetFile(source, pre_buffer=False) as file:
            check_text_column(file.schema_arrow, where, text_field)
            group, number = 0, 0
            while group < file.num_row_groups and number + file.metadata.row_group(group).num_rows <= skip:
                number += file.metadata.row_group(group).num_rows
                group += 1
            groups = range(group, file.num_row_groups)
            for batch in file.iter_batches(batch_size=1024, row_groups=groups, columns=[text_field]):
                # as bytes, so that a string that is not UTF-8 is treated like that of any other file
                for value in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                    number += 1
                    if number > skip:
                        text = value.decode("utf-8", "surrogateescape") if value is not None else None
                        yield number, require_text(text, f"{where}:{number}", text_field)
    except pyarrow.ArrowException as error:
        first_line = str(error).partition("\n")[0]
        raise DataError(f"{where}: not a complete parquet file ({first_line}): fetch it again") from error


def check_text_column(schema: Any, where: str, text_field: str) -> None:
    """Raise DataError unless a pyarrow schema has the column and it holds strings."""
    if text_field not in schema.names:
        raise DataError(
            f"{where}: no column `{text_field}`; it has {_names(schema.names)}: name the one that holds text"
        )
    if str(schema.field(text_field).type) not in ("string", "large_string", "string_view"):
        raise DataError(f"{where}: column `{text_field}` must hold strings, got {schema.field(text_field).type}")


def _seekable(path: Path) -> BinaryIO:
    """Open a file for reading from any place; parquet has its table of contents at the end."""
    return io.BytesIO(b"".join(_read_chunks(path))) if path.suffix in COMPRESSIONS else path.open("rb")
