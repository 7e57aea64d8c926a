"""The bytes of one regular file, plain or compressed, a few at a time whatever the file claims.

A few bytes can stand for gigabytes: decoders are given little at a time or asked for little, and their windows, which
the file chooses, have limits.
"""

import gzip
import io
import lzma
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fanformer.errors import DataError, import_extra

CHUNK_BYTES = 1 << 20
COMPRESSIONS = (".gz", ".xz", ".zst")
ZSTD_WINDOW_MEBIBYTES = 128
"""Largest window of a .zst file, that of `zstd -19 --long`."""
XZ_DICTIONARY_MEBIBYTES = 256
"""Largest dictionary of an .xz file; `xz -9` has 64 MiB."""
LARGEST_IN_MEMORY = 1 << 31
"""Bytes of a compressed parquet file, decompressed: it is read from any place, so it must be in memory as a whole."""
_ZSTD_INPUT_BYTES = 1 << 10
"""Compressed bytes decoded at a time: four can stand for 128 KiB, these for 32 MiB."""
_KINDS = (
    (stat.S_ISFIFO, "pipe"),
    (stat.S_ISCHR, "character device"),
    (stat.S_ISBLK, "block device"),
    (stat.S_ISSOCK, "socket"),
    (stat.S_ISDIR, "folder"),
)


def require_regular(path: Path) -> None:
    """Return if a path leads to a regular file that can be read; nothing is read from it.

    Raises:
        DataError: if it does not: text is read several times, which a pipe or a device cannot give.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            path.open("rb").close()
            return
    except OSError as error:
        raise unreadable(path, error) from error
    kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "special file")
    raise DataError(f"{path} is a {kind}, expected a regular file: write what it holds to a file and name that")


def unreadable(path: Path, error: OSError) -> DataError:
    """Return the error for a file that the system will not read."""
    return DataError(f"{path} cannot be read: {error.strerror or error}")


def read_chunks(path: Path) -> Iterator[bytes]:
    """Yield the decompressed bytes of a file in pieces of at most CHUNK_BYTES.

    Raises:
        DataError: if it cannot be read, is damaged, or needs more memory than the limits above.
    """
    decoders = {".xz": _xz_chunks, ".zst": _zstandard_chunks}
    try:
        yield from decoders.get(path.suffix, _plain_chunks)(path)
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
        raise DataError(f"{path}: damaged or cut short ({error}): fetch or compress it again") from error
    except OSError as error:
        raise unreadable(path, error) from error


def open_seekable(path: Path) -> BinaryIO:
    """Open a file for reading from any place.

    Raises:
        DataError: if it is compressed and holds more than LARGEST_IN_MEMORY.
    """
    if path.suffix not in COMPRESSIONS:
        return path.open("rb")
    content = io.BytesIO()
    for chunk in read_chunks(path):
        if content.tell() + len(chunk) > LARGEST_IN_MEMORY:
            raise DataError(
                f"{path} must have at most {LARGEST_IN_MEMORY:,} bytes decompressed, got more: decompress it first"
            )
        content.write(chunk)
    content.seek(0)
    return content


def _plain_chunks(path: Path) -> Iterator[bytes]:
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _xz_chunks(path: Path) -> Iterator[bytes]:
    """Yield what every stream of an .xz file holds; `lzma.open` knows no limit of memory."""
    decoder = None
    limit = (XZ_DICTIONARY_MEBIBYTES + 1) << 20  # one more for what is no dictionary
    for raw in _plain_chunks(path):
        while raw or (decoder is not None and not decoder.needs_input):
            if decoder is None:
                raw = raw.lstrip(b"\0")  # the padding between streams
                if not raw:
                    break
                decoder = lzma.LZMADecompressor(memlimit=limit)
            try:
                chunk = decoder.decompress(raw, CHUNK_BYTES)
            except lzma.LZMAError as error:
                if "Memory usage limit" in str(error):
                    raise _too_wide(path, "dictionary", XZ_DICTIONARY_MEBIBYTES, error) from error
                raise
            raw = decoder.unused_data if decoder.eof else b""
            decoder = None if decoder.eof else decoder
            if chunk:
                yield chunk
    if decoder is not None:
        raise EOFError("its last stream has no end")


def _zstandard_chunks(path: Path) -> Iterator[bytes]:
    """Yield what every frame of a .zst file holds; its stream reader would take a cut file for a complete one."""
    zstandard = import_extra("zstandard", f"reading {path.name}")
    frame, pending = None, bytearray()
    with path.open("rb") as file:
        while raw := file.read(_ZSTD_INPUT_BYTES):
            while raw:
                window = ZSTD_WINDOW_MEBIBYTES << 20
                frame = frame or zstandard.ZstdDecompressor(max_window_size=window).decompressobj()
                try:
                    pending += frame.decompress(raw)
                except zstandard.ZstdError as error:
                    if "too much memory" in str(error):
                        raise _too_wide(path, "window", ZSTD_WINDOW_MEBIBYTES, error) from error
                    raise DataError(f"{path}: damaged ({error}): fetch or compress it again") from error
                raw = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
            for start in range(0, len(pending) - CHUNK_BYTES + 1, CHUNK_BYTES):
                yield bytes(pending[start : start + CHUNK_BYTES])
            if len(pending) >= CHUNK_BYTES:
                del pending[: len(pending) // CHUNK_BYTES * CHUNK_BYTES]
    if frame is not None:
        raise DataError(f"{path}: damaged or cut short (its last frame has no end): fetch or compress it again")
    if pending:
        yield bytes(pending)


def _too_wide(path: Path, what: str, mebibytes: int, error: Exception) -> DataError:
    return DataError(
        f"{path} must be readable with a {what} of at most {mebibytes} MiB, got more ({error}): decompress it first"
    )
