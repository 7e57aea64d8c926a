"""Which texts were seen before, exactly, in memory that does not grow with their number."""

import hashlib
import sqlite3
from pathlib import Path

_CACHE_KIBIBYTES = 1 << 16


def text_digest(text: str) -> bytes:
    """Return the 16 bytes that stand for a text: two texts share them with a chance of 2**-128."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


class SeenTexts:
    """A set of texts on disk, each with the number of the document that had it first."""

    def __init__(self, path: Path | None = None) -> None:
        """Open the set, or create it.

        Args:
            path: its file; None is a temporary one, which goes with this object.
        """
        # Made here and used by one thread after another: a tokenizer is trained in a thread of its own.
        self._database = sqlite3.connect(str(path) if path else "", isolation_level=None, check_same_thread=False)
        self._database.execute(f"PRAGMA cache_size = -{_CACHE_KIBIBYTES}")
        columns = "digest BLOB PRIMARY KEY, number INTEGER"
        self._database.execute(f"CREATE TABLE IF NOT EXISTS seen ({columns}) WITHOUT ROWID")
        self._database.execute("BEGIN")

    def add(self, text: str, number: int) -> bool:
        """Add a text and return whether it is new.

        Args:
            text: the text.
            number: of its document, larger than those before.
        """
        cursor = self._database.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (text_digest(text), number))
        return cursor.rowcount == 1

    def commit(self) -> None:
        """Write everything added so far to the disk."""
        self._database.execute("COMMIT")
        self._database.execute("BEGIN")

    def forget_from(self, number: int) -> None:
        """Forget the texts of the document with this number and of all later ones."""
        self._database.execute("DELETE FROM seen WHERE number >= ?", (number,))

    def close(self) -> None:
        """Close the file; what was not committed is lost."""
        self._database.close()
