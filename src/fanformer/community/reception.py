"""What every door of a host does with its members, whatever carries the bytes: offers, reports, closing, status."""

import dataclasses
import datetime
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from fanformer.community.folder import STATUS_FILE
from fanformer.community.hosted_run import HostedRun
from fanformer.community.offers import Offer, Sealed, seal
from fanformer.community.records import RoundRecord, contributions
from fanformer.community.rounds import Host
from fanformer.community.status import FORMAT_VERSION, MOST_REFUSALS
from fanformer.community.updates import encode_weights, largest_payload
from fanformer.files.durable import read_json, replace_json

_MOST_ROUNDS = 20
"""Rounds that a status tells in full, the newest."""


class Reception:
    """Hands members their shares, takes their reports, closes rounds, and keeps status.json true."""

    def __init__(self, hosted: HostedRun, host: Host, clock: Callable[[], float], members: Iterable[str]) -> None:
        """Set up.

        Args:
            hosted: the run.
            host: its rounds.
            clock: tells the time that the rounds go by, such as `time.monotonic`.
            members: names of all who are registered.
        """
        self._hosted, self._host, self._clock = hosted, host, clock
        self.members = {name: _Seen() for name in members}
        self._holds: dict[str, str] = {}
        """Checksum of the weights that a member has, as its last report says."""
        self._moved: tuple[str, frozenset[str]] = ("", frozenset())
        """Checksum of the base before, and what has moved since then."""
        self._got_part: set[str] = set()
        """Members whose last offer came with a part of the weights."""
        self._bases: dict[frozenset[str], bytes] = {}
        self._base_checksum = ""
        before = _counted_before(hosted.folder)
        self._bytes_sent = int(before.get("bytes_sent", 0))
        for name, seen in self.members.items():
            seen.last_report = before.get("last_reports", {}).get(name)

    @property
    def finished(self) -> bool:
        """Whether all rounds of the plan are accepted."""
        return self._host.finished

    @property
    def is_overtime(self) -> bool:
        """Whether the open round's time is over, and too few have reported to close it."""
        return self._host.is_overtime(self._clock())

    def base(self, name: str = "") -> bytes:
        """Return the weights that the open round begins with, a safetensors file.

        Args:
            name: of a member; of what it has, as far as is known, nothing is sent again.
        """
        moved = self._moved_for(name)
        self._got_part = self._got_part | {name} if moved < self._host.weights.keys() else self._got_part - {name}
        if self._base_checksum != self._host.checksum:
            self._base_checksum = self._host.checksum
            self._bases.clear()
        if moved not in self._bases:
            weights = {one: tensor for one, tensor in self._host.weights.items() if one in moved}
            self._bases[moved] = encode_weights(weights, self._hosted.plan.base_dtype)
        return self._bases[moved]

    def _moved_for(self, name: str) -> frozenset[str]:
        """Return the names of the tensors that a member has otherwise, or not at all."""
        before, moved = self._moved
        known = {before: moved, self._host.checksum: frozenset[str]()}
        return known.get(self._holds.get(name, "none"), frozenset(self._host.weights))

    def offer(self, name: str) -> Sealed | None:
        """Return a member's share of the open round, signed; None where there is nothing for it to do now."""
        task = self._host.join(name, self._clock())
        if task is None:
            return None
        self._bytes_sent += len(self.base(name))
        return self._seal(name, task)

    def farewell(self, name: str) -> Sealed:
        """Return what tells a member that the run is over."""
        return self._seal(name, None)

    def _seal(self, name: str, task: Any) -> Sealed:
        run = self._hosted
        return seal(
            Offer(run.identifier, name, task, run.plan, run.shared, run.tokenizer_files, final=task is None), run.key
        )

    def take(self, name: str, payload: bytes) -> str:
        """Take a member's report; return why it is refused, empty where it will be judged."""
        self.members[name].last_report = _now()
        refused = self._host.receive(name, payload, self._clock())
        if name in self._host.reported:
            self._holds[name] = self._host.checksum
        return refused

    def excuse(self, name: str, reason: str) -> bool:
        """Note that a member hands in nothing in this round, and do not wait for it.

        Returns:
            Whether it is to be asked again with the whole weights: it has lost what it had, perhaps.
        """
        if name in self._got_part:
            self._got_part.remove(name)
            self._holds.pop(name, None)
            return True
        self.members[name].excuse = f"round {self._host.round}: {reason}"
        self._host.leave(name)
        return False

    def admit(self, name: str) -> None:
        """Let in a member that was registered meanwhile."""
        self.members.setdefault(name, _Seen())

    def connected(self, names: Iterable[str]) -> bool:
        """Note who can be reached, and return whether they are others than before; the rest is not waited for."""
        there, changed = set(names), False
        for name, seen in self.members.items():
            changed |= seen.connected != (name in there)
            seen.connected = name in there
        for name in self._host.tasks.keys() - there:  # also who was taken out while no host was at work
            self._host.leave(name)
        return changed

    def close_if_due(self) -> RoundRecord | None:
        """Close the open round where it is due, and return what became of it.

        Raises:
            CheckpointError: if the disk has no room for an accepted round; the round stays open.
        """
        if not self._host.is_due(self._clock()):
            return None
        before, moved = self._host.checksum, frozenset(self._host.like)
        record = self._host.close(self._clock(), self._hosted.measure, self._hosted.publish)
        if record.accepted:
            self._moved = before, moved
        if self._host.finished:
            self._hosted.finish()
        return record

    def write_status(self, state: str) -> None:
        """Write status.json.

        Args:
            state: "waiting", "training" or "finished"; that it ended otherwise says `note_end`.
        """
        replace_json(self._hosted.folder / STATUS_FILE, self.status(state))

    def status(self, state: str) -> dict[str, Any]:
        """Return how the run stands, as plain JSON."""
        host, run = self._host, self._hosted
        accepted = [record for record in host.records if record.accepted]
        return {
            "format_version": FORMAT_VERSION,
            "run": run.identifier,
            "preset": run.config.preset,
            "parameters": run.parameters,
            "state": state,
            "error": "",
            "written": _now(),
            "round": host.round,
            "number": host.state.number,
            "rounds": run.plan.rounds,
            "rejected_rounds": len(host.records) - len(accepted),
            "tokens": sum(record.tokens for record in accepted),
            "held_out": _curve(accepted),
            "bytes_received": sum(record.bytes_received for record in host.records),
            "bytes_sent": self._bytes_sent,
            "update_bytes": largest_payload(host.like),
            "base_bytes": len(self.base()),
            "round_seconds": run.plan.round_seconds,
            "last_reports": {name: seen.last_report for name, seen in self.members.items()},
            "members": self._members(),
            "refusals": _refusals(host.records)[-MOST_REFUSALS:],
            "last_rounds": [_brief(record) for record in host.records[-_MOST_ROUNDS:]],
        }

    def _members(self) -> list[dict[str, Any]]:
        given = contributions(self._host.records)
        nothing: Mapping[str, Any] = {"tokens": 0, "rounds": 0, "refused": 0, "sources": {}}
        return [
            {"name": name, **dataclasses.asdict(seen), **given.get(name, nothing)}
            for name, seen in sorted(self.members.items())
        ]


@dataclasses.dataclass
class _Seen:
    """What the door knows of a member: whether it can be reached, when it last reported, why it last did not."""

    connected: bool = False
    last_report: str | None = None
    excuse: str = ""


def _counted_before(folder: Path) -> Mapping[str, Any]:
    """Return the status that an earlier host of the run left, for its counters."""
    try:
        content = read_json(folder / STATUS_FILE)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _curve(accepted: list[RoundRecord]) -> list[list[float]]:
    """Return tokens so far and held-out loss after every accepted round."""
    points, tokens = [], 0
    for record in accepted:
        tokens += record.tokens
        if record.held_out_loss is not None:
            points.append([tokens, record.held_out_loss])
    return points


def _refusals(records: Iterable[RoundRecord]) -> list[dict[str, Any]]:
    return [
        {"round": record.round, "member": verdict.member, "reason": verdict.reason}
        for record in records
        for verdict in record.verdicts
        if not verdict.counted
    ]


def _brief(record: RoundRecord) -> dict[str, Any]:
    return {
        "round": record.round,
        "accepted": record.accepted,
        "reason": record.reason,
        "counted": sum(verdict.counted for verdict in record.verdicts),
        "reports": len(record.verdicts),
        "tokens": record.tokens,
        "held_out_loss": record.held_out_loss,
        "seconds": record.seconds,
        "bytes_received": record.bytes_received,
    }
