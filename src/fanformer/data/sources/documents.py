"""Where documents come from: the standard library of this Python, files, or a dataset on the hub."""

import glob
import hashlib
import io
import itertools
import os
import platform
import sysconfig
import tokenize
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fanformer.data.sources.decompression import COMPRESSIONS, require_regular
from fanformer.data.sources.readers import (
    Fields,
    file_kind,
    plain_name,
    read_records,
    replace_undecodable,
    require_extras,
)
from fanformer.errors import ConfigError, DataError
from fanformer.files.durable import printable

PREPARED_METADATA = "data.json"
"""The file that a prepared folder holds once it is complete."""
HASHED_BYTES = 1 << 26
"""Files up to this size are described by their content, larger ones by size and time of change."""


@dataclass(frozen=True)
class Document:
    """A text with a name that stays the same from run to run, such as `json/decoder.py` or `stories.jsonl:17`."""

    text: str
    name: str
    replaced_bytes: int = 0
    """Bytes that were not UTF-8, each now a U+FFFD in the text."""
    source: str | None = None
    """Where the text comes from, for attribution; None is the source of all documents."""
    licence: str | None = None
    """What allows its use, for attribution; None is the licence of all documents."""


class DocumentSource(ABC):
    """Documents in a fixed order, in parts that can be read one without the other; reading again gives the same."""

    spec: str
    parts: Sequence[str]
    """Names of the parts, in order: one for each file, as a rule."""
    total_bytes: int | None = None
    """Bytes of text, about, where that is known without reading; for progress only."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what identifies the data, as JSON values: equal descriptions mean equal documents."""

    @abstractmethod
    def read_part(self, number: int, skip: int = 0) -> Iterator[Document]:
        """Yield the documents of a part, empty ones included.

        Args:
            number: index into `parts`.
            skip: documents to leave out at its beginning, for who has read them before.
        """

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents that hold text.

        Raises:
            DataError: if none does.
        """
        empty = True
        for number in range(len(self.parts)):
            for document in self.read_part(number):
                if document.text:
                    empty = False
                    yield document
        if empty:
            raise DataError(f"data `{self.spec}` holds no text: name a source that does")


class StdlibSource(DocumentSource):
    """The Python source of the running interpreter's own standard library, one document per file."""

    EXCLUDED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})

    def __init__(self, folder: Path | None = None) -> None:
        """Find the files.

        Args:
            folder: another folder to read in place of the standard library.

        Raises:
            DataError: if this Python comes without its source.
        """
        self.spec, self.parts = "stdlib", ("stdlib",)
        self._folder = folder or Path(sysconfig.get_path("stdlib"))
        self._contents, self.skipped_files = self._read()
        if not self._contents:
            raise DataError(f"data `stdlib`: this Python has no source files at {self._folder}: use --data FILE")
        self.total_bytes = sum(len(text.encode()) for text in self._contents.values())

    def _read(self) -> tuple[dict[str, str], list[str]]:
        contents, skipped = {}, []
        for name in sorted(self._names()):
            raw = (self._folder / name).read_bytes()
            try:
                # `tokenize.open` would translate newlines
                contents[name] = raw.decode(tokenize.detect_encoding(io.BytesIO(raw).readline)[0])
            except (SyntaxError, UnicodeDecodeError):
                skipped.append(name)
        return contents, skipped

    def _names(self) -> Iterator[str]:
        for folder, subfolders, files in os.walk(self._folder):
            # config-* and _sysconfigdata* describe how one machine built Python: other machines have others
            subfolders[:] = [
                name for name in subfolders if name not in self.EXCLUDED and not name.startswith("config-")
            ]
            for name in files:
                if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                    yield (Path(folder) / name).relative_to(self._folder).as_posix()

    def read_part(self, number: int, skip: int = 0) -> Iterator[Document]:
        """Yield a document for every file of the one part."""
        for name in itertools.islice(self._contents, skip, None):
            yield Document(self._contents[name], name, source="Python's standard library", licence="PSF-2.0")

    def describe(self) -> dict[str, Any]:
        """Return the Python version and a hash over the names and texts of all files."""
        digest = hashlib.sha256()
        for name, text in self._contents.items():
            digest.update(f"{printable(name)}\0{len(text)}\0{text}".encode())
        return {
            "kind": "stdlib",
            "python": f"{platform.python_implementation()} {platform.python_version()}",
            "files": len(self._contents),
            "skipped_files": self.skipped_files,
            "bytes": self.total_bytes,
            "sha256": digest.hexdigest(),
        }


class FileSource(DocumentSource):
    """Files of text, jsonl or parquet, plain or compressed, in the order of their names."""

    def __init__(self, spec: str, paths: list[Path], root: Path, fields: Fields) -> None:
        """Check that every file can be read.

        Args:
            spec: as the user wrote it.
            paths: the files.
            root: folder that the documents' names are relative to; a name that is not UTF-8 is taken as `printable`.
            fields: fields or columns to read.

        Raises:
            DataError: if one is unreadable, or no regular file.
            DependencyError: if a package that reads such files is missing.
        """
        self.spec = printable(spec)
        self._fields = fields
        self._files = sorted((printable(path.relative_to(root).as_posix()), path) for path in paths)
        self.parts = [name for name, _ in self._files]
        for _, path in self._files:
            require_regular(path)
            require_extras(path)
        if all(file_kind(path) == "text" and path.suffix not in COMPRESSIONS for _, path in self._files):
            self.total_bytes = sum(path.stat().st_size for _, path in self._files)

    def read_part(self, number: int, skip: int = 0) -> Iterator[Document]:
        """Yield the documents of one file."""
        name, path = self._files[number]
        for record in itertools.islice(read_records(path, self._fields), skip, None):
            text, replaced_bytes = replace_undecodable(record.text)
            yield Document(text, plain_name(name) + record.suffix, replaced_bytes, record.source, record.licence)

    def describe(self) -> dict[str, Any]:
        """Return every file's name and size with a hash of its bytes, or its time of change where it is large."""
        files = []
        for name, path in self._files:
            status = path.stat()
            entry: dict[str, Any] = {"name": name, "bytes": status.st_size}
            if status.st_size <= HASHED_BYTES:
                entry["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                entry["modified_ns"] = status.st_mtime_ns
            files.append(entry)
        return {"kind": "files", "spec": self.spec, **self._fields._asdict(), "files": files}


def is_prepared_folder(spec: str) -> bool:
    """Return whether `spec` names a folder that `prepare` has written, for `open_prepared`."""
    return (Path(spec).expanduser() / PREPARED_METADATA).is_file()


def open_source(
    spec: str,
    text_field: str = "text",
    *,
    source_field: str | None = None,
    licence_field: str | None = None,
    leave_out: Sequence[Path] = (),
) -> DocumentSource:
    """Open the documents that `spec` names: `stdlib`, a file or glob, or `hf:NAME[:CONFIG]`.

    Args:
        spec: what to read.
        text_field: field of jsonl, or column of parquet and hub datasets, that holds the text.
        source_field: field or column that says where a text comes from, for attribution; None has none.
        licence_field: field or column that holds a text's licence, for attribution; None has none.
        leave_out: absolute paths of files and folders that a pattern does not mean.

    Raises:
        ConfigError: if a field is named and the source has none.
        DataError: if there is nothing to read; the message says what was looked for and where.
        DependencyError: if reading needs a package that is not installed.
    """
    fields = Fields(text_field, source_field, licence_field)
    if (source_field or licence_field) and spec == "stdlib":
        raise ConfigError(
            f"`source_field` and `licence_field` apply to jsonl, parquet and hub datasets, got `{spec}`: leave them out"
        )
    if spec == "stdlib":
        return StdlibSource()
    if spec.startswith("hf:"):
        from fanformer.data.sources.hub import HubSource

        return HubSource(spec, fields)
    path = Path(spec).expanduser().absolute()
    if is_prepared_folder(spec):
        raise DataError(f"{path} is prepared already: give it to `fanformer train --data` as it is")
    if path.is_dir():
        raise DataError(
            f"{path} is a folder without {PREPARED_METADATA}: expected a folder written by `fanformer data prepare`, "
            f"or name its files as '{spec.rstrip('/')}/*.txt'"
        )
    if path.exists():
        return FileSource(spec, [path], path.parent, fields)
    if glob.has_magic(spec):
        return _open_glob(spec, path, fields, set(leave_out))
    raise DataError(
        f"data `{spec}`: no file {path}: expected `stdlib`, a file or glob of .txt/.jsonl/.parquet, hf:NAME[:CONFIG] "
        "or a prepared folder"
    )


def _open_glob(spec: str, pattern: Path, fields: Fields, leave_out: set[Path]) -> FileSource:
    from fanformer.data.sources.file_patterns import matching_files

    files = [path for path in matching_files(pattern) if leave_out.isdisjoint((path, *path.parents))]
    if not files:
        raise DataError(f"data `{spec}`: no file matches {pattern}: quote the pattern and check the folder")
    # the folder in front of the first wildcard: names must not change when another file comes to match
    fixed = [part for part in pattern.parts if not glob.has_magic(part)]
    depth = next(index for index, part in enumerate(pattern.parts) if glob.has_magic(part))
    return FileSource(spec, files, Path(*fixed[:depth]), fields)
