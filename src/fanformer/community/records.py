"""What became of the rounds of a run: a line of JSON for each, on the disk before the next one is opened."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fanformer.community.aggregation import Verdict, as_verdict
from fanformer.community.folder import RECORDS_FILE
from fanformer.errors import CheckpointError
from fanformer.files.durable import replace_text, sync


@dataclass(frozen=True)
class RoundRecord:
    """What became of a round; plain JSON by `dataclasses.asdict`.

    Attributes:
        round: number of the round.
        accepted: whether its result is the next base.
        reason: why not; empty where it is.
        number: accepted rounds after it.
        base: checksum of the weights that it began with.
        result: checksum of those that the next one begins with.
        tokens: of the updates that counted.
        held_out_loss: of the weights that it came to, in nats per token, where measured.
        bytes_received: of all payloads, refused ones among them.
        seconds: from the first share that was handed out to the end.
        verdicts: on all reports.
    """

    round: int
    accepted: bool
    reason: str
    number: int
    base: str
    result: str
    tokens: int
    held_out_loss: float | None
    bytes_received: int
    seconds: float
    verdicts: tuple[Verdict, ...]


def as_record(content: Mapping[str, Any]) -> RoundRecord:
    """Return the record that `dataclasses.asdict` made plain JSON of."""
    return RoundRecord(**{**content, "verdicts": tuple(as_verdict(verdict) for verdict in content["verdicts"])})


class RoundLog:
    """The rounds.jsonl of a run."""

    def __init__(self, folder: Path) -> None:
        """Read it; a last line that a kill left half written is dropped.

        Raises:
            CheckpointError: if another line is no record.
        """
        self._path = folder / RECORDS_FILE
        self.records: list[RoundRecord] = []
        self._pending = ""
        content = self._path.read_bytes() if self._path.exists() else b""
        *lines, rest = content.split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                self.records.append(as_record(json.loads(line)))
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise CheckpointError(
                    f"{self._path.absolute()}:{number} must be the record of a round ({type(error).__name__}): delete "
                    "that line; what its round came to stays."
                ) from error
        if rest:
            self._rewrite()

    def append(self, record: RoundRecord) -> None:
        """Add a line and wait until it is on the disk.

        Raises:
            OSError: if the disk refuses; the file then ends with a whole line, as before, and the next call tries
                again.
        """
        self.records.append(record)
        self._pending += _line(record)
        line = self._pending.encode()
        handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            before = os.fstat(handle).st_size
            try:
                written = os.write(handle, line)
                if written < len(line):
                    raise OSError(f"only {written} of {len(line)} bytes of {self._path.absolute()} were written")
                os.fsync(handle)
            except OSError:
                os.ftruncate(handle, before)
                raise
        finally:
            os.close(handle)
        self._pending = ""
        if not before:
            sync(self._path.parent)

    def forget_after(self, number: int) -> None:
        """Drop the accepted rounds beyond so many, which a run that went back does again, and all that followed."""
        kept = next(
            (place for place, one in enumerate(self.records) if one.accepted and one.number > number),
            len(self.records),
        )
        if kept < len(self.records):
            del self.records[kept:]
            self._rewrite()

    def _rewrite(self) -> None:
        replace_text(self._path, "".join(map(_line, self.records)))
        self._pending = ""


def _line(record: RoundRecord) -> str:
    return json.dumps(dataclasses.asdict(record), separators=(",", ":")) + "\n"


def contributions(records: Sequence[RoundRecord]) -> dict[str, dict[str, Any]]:
    """Return what every member gave to the rounds that were accepted.

    Args:
        records: of the run.

    Returns:
        By member `tokens` that counted, `rounds` in which they did, `refused` reports, and `sources`: tokens by name
        and licence of the data, as "name (licence)".
    """
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        for verdict in record.verdicts:
            own = found.setdefault(verdict.member, {"tokens": 0, "rounds": 0, "refused": 0, "sources": {}})
            if not verdict.counted:
                own["refused"] += 1
            elif record.accepted:
                own["tokens"] += verdict.tokens
                own["rounds"] += 1
                for source in verdict.sources:
                    key = f"{source.name} ({source.licence})"
                    own["sources"][key] = own["sources"].get(key, 0) + source.tokens
    return found
