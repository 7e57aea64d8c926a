"""Which texts were seen before, exactly, in memory that does not grow with their number."""

import errno
import hashlib
import os
import sqlite3
from pathlib import Path

from fanformer.data.token_files import changed
from fanformer.errors import DataError

_CACHE_KIBIBYTES = 1 << 16


class SeenTexts:
    """A set of texts on disk, each with the number of the document that had it first."""

    def __init__(self, path: Path | None = None) -> None:
        """Open the set, or create it.

        Args:
            path: its file; None is a temporary one, which goes with this object.
        """
        self._path = path
        self.checksum = 0
        """All digests, exclusive or: it tells whether a file holds what it held, in whatever order."""
        # Made here and used by one thread after another: a tokenizer is trained in a thread of its own.
        try:
            self._database = sqlite3.connect(str(path) if path else "", isolation_level=None, check_same_thread=False)
        except sqlite3.DatabaseError as error:
            raise _failure(path, error) from error
        self._execute(f"PRAGMA cache_size = -{_CACHE_KIBIBYTES}")
        columns = "digest BLOB PRIMARY KEY, number INTEGER"
        self._execute(f"CREATE TABLE IF NOT EXISTS seen ({columns}) WITHOUT ROWID")
        self._execute("BEGIN")

    def _execute(self, command: str, values: tuple[object, ...] = ()) -> sqlite3.Cursor:
        try:
            return self._database.execute(command, values)
        except sqlite3.DatabaseError as error:
            raise _failure(self._path, error) from error

    def add(self, text: str, number: int) -> bool:
        """Add a text and return whether it is new.

        Args:
            text: the text.
            number: of its document, larger than those before.
        """
        # two texts share one with a chance of 2**-128
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if self._execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (digest, number)).rowcount != 1:
            return False
        self.checksum ^= int.from_bytes(digest)
        return True

    def commit(self) -> None:
        """Write everything added so far to the disk."""
        self._execute("COMMIT")
        self._execute("BEGIN")

    def go_back(self, number: int, checksum: int) -> None:
        """Forget the texts of all documents after the one with this number.

        Args:
            number: of the last document that counts.
            checksum: what `checksum` was after it.

        Raises:
            DataError: if the other texts are not all there.
        """
        self._execute("DELETE FROM seen WHERE number > ?", (number,))
        self.checksum = 0
        try:
            for (digest,) in self._execute("SELECT digest FROM seen"):
                self.checksum ^= int.from_bytes(digest)
        except (sqlite3.DatabaseError, TypeError) as error:
            raise _damaged(self._path) from error
        if self.checksum != checksum:
            raise _damaged(self._path)

    def close(self) -> None:
        """Close the file; what was not committed is lost."""
        self._database.close()


def _damaged(path: Path | None) -> DataError:
    return changed(path) if path else DataError("the set of texts seen is not as it was left: start anew")


def _failure(path: Path | None, error: sqlite3.DatabaseError) -> Exception:
    """Return what is to be raised in place of an error of the database."""
    place = str(path) if path else "a temporary file for the texts seen, in the folder that TMPDIR names,"
    kind = getattr(error, "sqlite_errorname", "")
    if kind == "SQLITE_FULL":
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), place)
    if kind.startswith("SQLITE_IOERR") or kind in ("SQLITE_CANTOPEN", "SQLITE_READONLY"):
        return DataError(f"{place} cannot be written ({error}): make room, or choose another place")
    return _damaged(path)
