"""Read one file, plain or compressed, as the texts it holds: text, jsonl or parquet.

Bytes that are not UTF-8 travel as lone surrogates (PEP 383) until a document is complete, so that each is counted in
the document where it ends up, as one U+FFFD.
"""

import codecs
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from fanformer.data.sources.decompression import COMPRESSIONS, open_seekable, read_chunks, unreadable
from fanformer.errors import DataError, import_extra

LONGEST_TEXT = 1 << 20
"""Characters of a text file above which it is cut into several documents."""
PIECE = 1 << 18
"""Characters of such a document, up to the next blank line."""
CUT_WINDOW = 1 << 14
"""Characters after PIECE among which a blank line, a line end or a space is looked for."""
LONGEST_LINE = 1 << 28
"""Most characters of a jsonl line: it must be in memory as a whole, several times."""

BATCH_BYTES = 1 << 28
"""Bytes of a parquet file's columns that are read at a time, at most, as far as its own table of contents is right."""
_MOST_ROWS, _FEWEST_SHARING = 1024, 32
_MOST_NAMES = 20
"""Names of fields that a message lists."""
_SURROGATES = re.compile("[\ud800-\udfff]")
_BYTE_ORDER_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))


class Fields(NamedTuple):
    """Names of the fields or columns to read; None is not read."""

    text_field: str
    source_field: str | None = None
    licence_field: str | None = None


class Record(NamedTuple):
    """A text with the suffix of its document's name, and where it comes from if a field says so."""

    suffix: str
    text: str
    source: str | None = None
    licence: str | None = None


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


def read_records(path: Path, fields: Fields) -> Iterator[Record]:
    """Yield every document of a file.

    A text may hold lone surrogates; `replace_undecodable` removes them. A text file is one document, or several of
    about PIECE characters where it is longer than LONGEST_TEXT.

    Raises:
        DataError: if the file cannot be read, is damaged, binary, or lacks a field.
    """
    kind = file_kind(path)
    if kind == "parquet":
        yield from _parquet_records(path, fields)
    elif kind == "jsonl":
        yield from _jsonl_records(path, fields)
    else:
        yield from _cut_texts(_decode(path, read_chunks(path)))


def field_names(path: Path) -> list[str]:
    """Return the names of the fields in a jsonl file's first record, or of a parquet file's columns; [] for text.

    Raises:
        DataError: if the file cannot be read.
    """
    kind = file_kind(path)
    if kind == "text":
        return []
    require_extras(path)
    if kind == "parquet":
        pyarrow = import_extra("pyarrow", f"reading {path.name}")
        parquet = import_extra("pyarrow.parquet", f"reading {path.name}")
        try:
            with open_seekable(path) as source:
                return list(parquet.read_schema(source).names)
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{path}: not a complete parquet file: fetch it again") from error
    number, line = next(jsonl_lines(path), (0, "{}"))
    record = _parse(line, f"{path}:{number}")
    return list(record) if isinstance(record, dict) else []


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
        _, bad_here = replace_undecodable(text)
        if bad_here and not num_bad:
            first_bad = start + len(_SURROGATES.split(text, 1)[0].encode(codec, errors))
        num_bad += bad_here
        if num_bad > max(1, consumed // 100):
            raise DataError(
                f"{path}: expected UTF-8 text, got {num_bad} undecodable bytes among {consumed}, the first at byte "
                f"{first_bad}: convert the file to UTF-8"
            )
        yield text
        chunk = following


def _cut_texts(texts: Iterable[str]) -> Iterator[Record]:
    """Join the pieces of one text file, then cut it at blank lines where it is long."""
    buffer, index = "", 0
    for text in texts:
        buffer += text
        if index or len(buffer) > LONGEST_TEXT:
            while len(buffer) >= PIECE + CUT_WINDOW:
                cut = _cut_position(buffer)
                yield Record(f"#{index}", buffer[:cut])
                buffer, index = buffer[cut:], index + 1
    if buffer:
        yield Record(f"#{index}" if index else "", buffer)


def _cut_position(text: str) -> int:
    for mark in ("\n\n", "\r\n\r\n", "\n", " "):
        found = text.find(mark, PIECE, PIECE + CUT_WINDOW)
        if found >= 0:
            return found + len(mark)
    return PIECE + CUT_WINDOW


def _jsonl_records(path: Path, fields: Fields) -> Iterator[Record]:
    for number, line in jsonl_lines(path):
        where = f"{path}:{number}"
        yield record_of(parse_object(line, where), fields, number, where)


def jsonl_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield every line of a file that is not blank with its number from 1; bytes that are not UTF-8 as surrogates.

    Raises:
        DataError: if the file cannot be read, is damaged or binary, or a line is longer than LONGEST_LINE.
    """
    for number, line in enumerate(_lines(_decode(path, read_chunks(path)), str(path)), start=1):
        if line.strip():
            yield number, line


def parse_object(line: str, where: str) -> dict[str, Any]:
    """Return the JSON object on a line.

    Args:
        line: of a jsonl file.
        where: its file and number, for messages.

    Raises:
        DataError: if it is something else, or cannot be read.
    """
    value = _parse(line, where)
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object on every line, got {type(value).__name__}")
    return value


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        got = str(error)
        if isinstance(error, RecursionError):
            got = "one nested too deep to be read"
        elif not isinstance(error, json.JSONDecodeError):
            got = f"a number of more than {sys.get_int_max_str_digits():,} digits"
        raise DataError(f"{where}: expected a JSON object on every line, got {got}: mend or delete it") from error


def record_of(row: dict[str, Any], fields: Fields, number: int, where: str) -> Record:
    """Return the fields asked for of a line or row.

    Args:
        row: all its fields.
        fields: names of those to take; null is none but for the text.
        number: its number in the file, from 1.
        where: file and number, for messages.

    Raises:
        DataError: if one is missing or holds no string.
    """
    text, *others = fields
    told = [None if name in row and row[name] is None else _value(row, name, where) for name in others]
    return Record(f":{number}", _value(row, text, where), *told)


def _value(record: dict[str, Any], field: str | None, where: str) -> Any:
    """Return a field that must hold text; None where no field is asked for."""
    if field is None:
        return None
    if field not in record:
        raise DataError(f"{where}: no field `{field}`; it has {_names(record)}: name the one that holds text")
    if not isinstance(record[field], str):
        raise DataError(f"{where}: field `{field}` must be a string, got {type(record[field]).__name__}")
    return record[field]


def _lines(texts: Iterable[str], where: str) -> Iterator[str]:
    """Yield the lines of a text without their ends.

    Raises:
        DataError: if one is longer than LONGEST_LINE.
    """
    number, length = 1, 0
    begun: list[str] = []
    for text in texts:
        first, *others = text.split("\n")
        begun.append(first)
        length += len(first)
        if length > LONGEST_LINE:
            raise DataError(
                f"{where}:{number}: a line must have at most {LONGEST_LINE:,} characters, got more: is this jsonl? "
                "Cut its text into several documents"
            )
        if others:
            yield "".join(begun)
            yield from others[:-1]
            number, length, begun = number + len(others), len(others[-1]), others[-1:]
    yield "".join(begun)


def _names(fields: Iterable[str]) -> str:
    names = [f"`{name}`" for name in itertools.islice(fields, _MOST_NAMES + 1)]
    return ", ".join([*names[:_MOST_NAMES], *(["more"] if len(names) > _MOST_NAMES else [])]) or "none"


def _parquet_records(path: Path, fields: Fields) -> Iterator[Record]:
    try:
        with open_seekable(path) as source:
            yield from parquet_records(source, str(path), fields)
    except OSError as error:
        raise unreadable(path, error) from error


def parquet_records(source: BinaryIO, where: str, fields: Fields, skip: int = 0) -> Iterator[Record]:
    """Yield the rows of a parquet file, reading the columns asked for only; suffixes count from 1.

    Args:
        source: the file, open for reading from any place.
        where: the file's name, for messages.
        fields: columns to read.
        skip: rows to leave out at the beginning; row groups that hold no others are not read.

    Raises:
        DataError: if the file is damaged, or a column is missing or holds something else.
    """
    pyarrow = import_extra("pyarrow", f"reading {where}")
    parquet = import_extra("pyarrow.parquet", f"reading {where}")
    try:
        # buffered ahead, all row groups would be fetched, and held in memory, before the first row
        with parquet.ParquetFile(source, pre_buffer=False) as file:
            require_columns(file.schema_arrow, where, fields)
            group, number = 0, 0
            while group < file.num_row_groups and number + file.metadata.row_group(group).num_rows <= skip:
                number += file.metadata.row_group(group).num_rows
                group += 1
            groups = range(group, file.num_row_groups)
            rows = _rows_at_once(file.metadata, groups, _named(fields))
            for batch in file.iter_batches(batch_size=rows, row_groups=groups, columns=_named(fields)):
                # as bytes, so that a string that is not UTF-8 is treated like that of any other file
                columns = {name: batch.column(name).cast(pyarrow.large_binary()).to_pylist() for name in _named(fields)}
                for row in zip(*columns.values(), strict=True):
                    number += 1
                    if number > skip:
                        texts = [None if value is None else value.decode("utf-8", "surrogateescape") for value in row]
                        yield record_of(dict(zip(columns, texts, strict=True)), fields, number, f"{where}:{number}")
    except pyarrow.ArrowException as error:
        first_line = str(error).partition("\n")[0]
        if isinstance(error, MemoryError):
            raise DataError(
                f"{where}: its rows need more memory than there is ({first_line}): cut its texts into shorter ones"
            ) from error
        raise DataError(f"{where}: not a complete parquet file ({first_line}): fetch it again") from error


def _rows_at_once(metadata: Any, groups: Iterable[int], names: list[str]) -> int:
    """Return how many rows to read at a time, so that they hold about BATCH_BYTES where lengths are alike.

    Rows can share one long value of a dictionary, which is in memory once for each; fewer than _FEWEST_SHARING are
    read at a time only where the values are long on average.
    """
    rows = _MOST_ROWS
    for group in map(metadata.row_group, groups):
        for column in map(group.column, range(group.num_columns)):
            if column.path_in_schema in names:
                size = max(column.total_uncompressed_size, 1)
                rows = min(rows, max(1, BATCH_BYTES * max(group.num_rows, 1) // size))
                if column.has_dictionary_page:
                    rows = min(rows, max(_FEWEST_SHARING, BATCH_BYTES // size))
    return rows


def _named(fields: Fields) -> list[str]:
    return [field for field in fields if field is not None]


def require_columns(schema: Any, where: str, fields: Fields) -> None:
    """Raise DataError unless a pyarrow schema has the columns and they hold strings."""
    for name in _named(fields):
        if name not in schema.names:
            raise DataError(f"{where}: no column `{name}`; it has {_names(schema.names)}: name the one that holds text")
        if str(schema.field(name).type) not in ("string", "large_string", "string_view"):
            raise DataError(f"{where}: column `{name}` must hold strings, got {schema.field(name).type}")
