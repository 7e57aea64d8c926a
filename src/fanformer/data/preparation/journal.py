"""How far a preparation has come, on disk, so that the same command goes on from there after any end."""

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fanformer.data.sources.decompression import unreadable
from fanformer.errors import DataError
from fanformer.files.durable import read_json, replace_text

JOURNAL_VERSION = 3
INTERVAL_SECONDS = 5.0
"""Shortest time between two entries, and before the first: shorter work is not worth keeping."""


class OtherArgumentsError(DataError):
    """Work that is there was begun with other arguments than those that are given now."""


class Journal:
    """The last entry, in a file that is replaced as a whole, and the arguments that it belongs to."""

    def __init__(self, path: Path, arguments: Mapping[str, Any]) -> None:
        """Name the file; nothing is written yet.

        Args:
            path: the file, in the subfolder `work` of a partial folder.
            arguments: everything that the result depends on, as JSON values.
        """
        self.path = path
        self._remedy = f"delete {path.parent.parent} and start anew"
        self._arguments = json.loads(json.dumps(arguments))
        self._last = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """Return the last entry, None if there is none.

        Raises:
            OtherArgumentsError: if it was made with other arguments; the message says which.
            DataError: if it is damaged.
        """
        if not self.path.is_file():
            return None
        try:
            content = read_json(self.path)
            version = content["version"]
            if version == JOURNAL_VERSION:
                arguments, entry = content["arguments"], content["entry"]
                if content["sha256"] != _digest(arguments, entry):
                    raise ValueError("its content is not what its checksum was made of")
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.path} is damaged: {self._remedy}") from error
        except OSError as error:
            raise unreadable(self.path, error) from error
        if version != JOURNAL_VERSION:
            raise DataError(f"{self.path} must have version {JOURNAL_VERSION}, got {version!r:.40}: {self._remedy}")
        difference = _difference(arguments, self._arguments)
        if difference:
            raise OtherArgumentsError(
                f"{self.path.parent.parent} was begun with {difference}: give the same again to go on from there, "
                "or delete it to start anew"
            )
        return entry

    def is_due(self) -> bool:
        """Return whether INTERVAL_SECONDS have passed since the last entry or the beginning."""
        return time.monotonic() - self._last >= INTERVAL_SECONDS

    def save(self, entry: Mapping[str, Any]) -> None:
        """Replace the entry; what it speaks of must be on the disk already."""
        digest = _digest(self._arguments, entry)
        content = {"version": JOURNAL_VERSION, "sha256": digest, "arguments": self._arguments, "entry": entry}
        replace_text(self.path, json.dumps(content))
        self._last = time.monotonic()


def _digest(arguments: Any, entry: Any) -> str:
    return hashlib.sha256(json.dumps([arguments, entry], sort_keys=True).encode()).hexdigest()


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Describe the first argument that differs, "" if none does."""
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            return f"another {name} ({_difference(old, new).removeprefix('another ')})"
        if isinstance(old, list) and isinstance(new, list) and old and isinstance(old[0], dict):
            changed = next((a for a, b in zip(old, new, strict=False) if a != b), None)
            return f"`{name}` as they were before {changed['name'] if changed else 'some came or went'} changed"
        return f"`{name}` {old!r}, not {new!r}"
    return ""
