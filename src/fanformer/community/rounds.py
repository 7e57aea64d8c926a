"""The rounds of a host: shares are handed out, reports taken and judged, and the next base made; without a transport.

The caller brings the time, as `time.monotonic` gives it, the measurement of the held-out loss, and what makes an
accepted round durable (`Publish`). The host's folder holds what a kill must not lose:

rounds.jsonl   a line for every closed round: `records.py`
open.json      the shares of the round that is open
reports/       its payloads

A round counts once its state is published, and only then: a host that is killed before opens the same round again,
with the shares that were handed out and the reports that had come.
"""

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fanformer.community.aggregation import Verdict, aggregate, counted_tokens, is_gate_open
from fanformer.community.folder import OPEN_FILE, REPORTS_FOLDER
from fanformer.community.outer import OuterState, outer_step
from fanformer.community.plan import Plan, Task
from fanformer.community.records import RoundLog, RoundRecord, as_record
from fanformer.community.updates import (
    BaseType,
    Label,
    Limits,
    Shapes,
    Update,
    decode_update,
    fragments,
    is_name,
    read_label,
    rounded,
    shapes_of,
    weights_checksum,
)
from fanformer.errors import CheckpointError, DataError
from fanformer.files.durable import read_json, replace_json, sync

OUTER_FILE, STATE_FILE = "outer.safetensors", "host_state.json"
_LEAST_SHARE = 0.05
"""Of a round's time that must be left for a share to be worth while."""
_MOST_REFUSALS = 3
"""Of a member in a round that are recorded."""


@dataclass(frozen=True)
class HostState:
    """What the next round goes on from, and all that a host must not lose.

    Attributes:
        number: accepted rounds.
        outer: the master weights and their momentum.
        next_place: first row that was not handed out.
        best_loss: lowest held-out loss of the first base and of accepted rounds, None where none was measured.
        record: of the round that led here, None before the first.
    """

    number: int
    outer: OuterState
    next_place: int = 0
    best_loss: float | None = None
    record: RoundRecord | None = None

    def weights(self, dtype: BaseType) -> dict[str, Tensor]:
        """Return the base as members get it: float32 by name, rounded to `dtype`."""
        return rounded(self.outer.weights, dtype)

    def save(self, folder: Path) -> None:
        """Write OUTER_FILE and STATE_FILE into a folder; the caller makes them durable."""
        self.outer.save(folder / OUTER_FILE)
        content = {name: getattr(self, name) for name in ("number", "next_place", "best_loss")}
        content["record"] = None if self.record is None else dataclasses.asdict(self.record)
        (folder / STATE_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "HostState":
        """Read what `save` wrote; the same bits.

        Raises:
            CheckpointError: if it is missing or damaged.
        """
        path = folder / STATE_FILE
        try:
            content = read_json(path)
            record = content.pop("record")
            record = None if record is None else as_record(record)
            return cls(outer=OuterState.load(folder / OUTER_FILE), record=record, **content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"cannot read {path.absolute()} ({type(error).__name__}): go back to an earlier round."
            ) from error


@dataclass(frozen=True)
class _Opened:
    """What open.json holds."""

    round: int
    base: str
    next_place: int
    tasks: Mapping[str, Task]


Publish = Callable[[HostState, RoundRecord], None]
"""Makes an accepted round durable, whole or not at all, or raises; the host goes on from it only after that."""
Measure = Callable[[Mapping[str, Tensor]], float]
"""Returns the held-out loss of weights, in nats per token."""


class Host:
    """Hands out the shares of a round, takes the reports, and makes the next base of them.

    All of its methods are for one thread at a time. It holds the reports of a round in memory, a byte or half a byte
    for each number.
    """

    def __init__(self, folder: Path, plan: Plan, state: HostState, now: float) -> None:
        """Begin, or go on after a kill with the round that was open.

        Args:
            folder: of the host, made if need be.
            plan: of the run.
            state: of the last accepted round, or the one to begin with.
            now: the time.

        Raises:
            CheckpointError: if a file of the folder is damaged.
            ConfigError: if the plan has more fragments than the model has blocks.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.plan, self.state = folder, plan, state
        self._log = RoundLog(folder)
        opened = self._read_open()
        # the log of rounds that are forgotten says no more which numbers are used, open.json does
        highest = max((record.round for record in self._log.records), default=-1)
        highest = max(highest, -1 if opened is None else opened.round - 1)
        self._log.forget_after(state.number)
        told = {record.round for record in self._log.records}
        if state.record is not None and state.record.round not in told:  # killed between the two
            self._log.append(state.record)
            highest = max(highest, state.record.round)
        self._like = shapes_of(state.outer.weights)
        self._fragments = fragments(self._like, plan.fragments)
        self._seen = {verdict.digest for record in self._log.records for verdict in record.verdicts}
        self._round = highest
        self._open_round()
        self._take_up(opened, now)

    def _open_round(self) -> None:
        self._round += 1
        self.weights: Mapping[str, Tensor] = self.state.weights(self.plan.base_dtype)
        """The base of the open round, float32 by name."""
        self.checksum = weights_checksum(self.weights)
        self.next_place = self.state.next_place
        self.tasks: dict[str, Task] = {}
        """Shares of the open round by member."""
        self._opened: float | None = None
        self._updates: dict[str, Update] = {}
        self._refused: dict[str, list[Verdict]] = {}
        self._not_awaited: set[str] = set()
        self._bytes = 0

    def _read_open(self) -> "_Opened | None":
        """Return what is known of the round that was open when the host was killed."""
        path = self.folder / OPEN_FILE
        if not path.is_file():
            return None
        try:
            content = read_json(path)
            tasks = {name: Task(**task) for name, task in content["tasks"].items()}
            return _Opened(int(content["round"]), str(content["base"]), int(content["next_place"]), tasks)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path.absolute()} is damaged ({type(error).__name__}): delete it; the open round begins anew."
            ) from error

    def _take_up(self, opened: "_Opened | None", now: float) -> None:
        """Go on with a round that was open when the host was killed; reports of others are deleted."""
        reports = self.folder / REPORTS_FOLDER
        if opened is not None:
            self.next_place = max(self.next_place, opened.next_place)
            if (opened.round, opened.base) == self._identity:
                self.tasks = dict(opened.tasks)
                self._opened = now if self.tasks else None
                for report in sorted(reports.glob("*.update")) if reports.is_dir() else []:
                    self._take_up_report(report.read_bytes(), now)
                return
        shutil.rmtree(reports, ignore_errors=True)

    def _take_up_report(self, payload: bytes, now: float) -> None:
        try:
            member = read_label(payload, self._like).member
        except DataError:  # damaged on the disk: its member sends it again, or loses its share
            return
        self.receive(member, payload, now)

    @property
    def _identity(self) -> tuple[int, str]:
        return self._round, self.checksum

    @property
    def round(self) -> int:
        """Number of the open round."""
        return self._round

    @property
    def records(self) -> Sequence[RoundRecord]:
        """Of all closed rounds."""
        return tuple(self._log.records)

    @property
    def finished(self) -> bool:
        """Whether all rounds of the plan are accepted."""
        return self.state.number >= self.plan.rounds

    @property
    def reported(self) -> tuple[str, ...]:
        """Members whose reports of the open round will be judged."""
        return tuple(sorted(self._updates))

    @property
    def fragment(self) -> int:
        """Fragment that the open round sends."""
        return self.state.number % self.plan.fragments

    @property
    def like(self) -> Shapes:
        """Shapes of the tensors that the open round sends, by name."""
        return {name: self._like[name] for name in self._fragments[self.fragment]}

    def join(self, member: str, now: float) -> Task | None:
        """Return a member's share of the open round; the same one, with less time, when it asks again.

        A round's time runs from its first share on, and anew where it ran out without enough reports.

        Args:
            member: its name, as whoever authenticated it knows it.
            now: the time.

        Returns:
            The share, or None where there is nothing to do now: the run is over, the round is about to end, or the
            member has reported.

        Raises:
            DataError: if the name is empty, too long or not printable.
            OSError: if the share cannot be written down.
        """
        if not is_name(member):
            raise DataError(f"a member's name must be printable and at most 200 characters long, got {member!a:.80}.")
        if self.finished or member in self._updates or self.is_due(now):
            return None
        limit = self.plan.round_seconds
        if self._opened is None or self.is_overtime(now):
            self._opened = now
        seconds = None if limit is None else self._opened + limit - now
        if seconds is not None and limit is not None and seconds < _LEAST_SHARE * limit:
            return None
        self._not_awaited.discard(member)
        known = self.tasks.get(member)
        if known is not None:
            return dataclasses.replace(known, seconds=seconds)
        rows = self.plan.round_steps * self.plan.batch_size
        first_step = self.state.number * self.plan.round_steps
        task = Task(
            self._round, self.checksum, first_step, self.plan.round_steps, self.next_place, self.fragment, seconds
        )
        self._write_open({**self.tasks, member: task}, self.next_place + rows)
        self.tasks[member] = task
        self.next_place += rows
        return task

    def _write_open(self, tasks: Mapping[str, Task], next_place: int) -> None:
        number, base = self._identity
        shares = {name: dataclasses.asdict(task) for name, task in tasks.items()}
        content = {"round": number, "base": base, "next_place": next_place, "tasks": shares}
        replace_json(self.folder / OPEN_FILE, content)

    def leave(self, member: str) -> None:
        """Do not wait for the report of a member in this round; where it comes in time it counts all the same."""
        self._not_awaited.add(member)

    def receive(self, member: str, payload: bytes, now: float) -> str:
        """Take a member's report.

        The same payload again gets the same answer, also when its round is over, and counts once.

        Args:
            member: who sent it, as whoever authenticated it knows it.
            payload: what it sent.
            now: the time.

        Returns:
            Why it is refused; empty where it will be judged, or was.

        Raises:
            OSError: if the payload cannot be written down; the host is as before, and it may be sent again.
        """
        try:
            label = read_label(payload, self._like)
            if label.round != self._round:
                return self._answer_late(label, member, len(payload))
            update = self._checked(member, payload)
        except DataError as error:
            self._not_awaited.add(member)
            return self._refuse(member, str(error), len(payload))
        before = self._updates.get(member)
        if before is not None:
            same = before.digest == update.digest
            return "" if same else self._refuse(member, "it has reported in this round already", len(payload))
        if update.digest in self._seen | {one.digest for one in self._updates.values()}:
            self._not_awaited.add(member)
            return self._refuse(member, "replayed: an update of these very numbers was sent before", len(payload))
        self._keep(member, payload)
        self._updates[member] = update
        self._bytes += len(payload)
        return ""

    def _checked(self, member: str, payload: bytes) -> Update:
        """Return the update of the open round that a payload holds.

        Raises:
            DataError: if it is none, or not the one that the member was asked for.
        """
        task = self.tasks.get(member)
        if task is None:
            raise DataError(f"no share of round {self._round} was handed out to {member!a}: join first.")
        update = decode_update(payload, self.like, Limits(task.steps * self.plan.tokens_per_step))
        if update.member != member:
            raise DataError(f"an update of {member!a} must bear its name, got {update.member!a:.80}.")
        if update.base != self.checksum:
            raise DataError(
                f"an update of round {self._round} must begin with base {self.checksum[:16]}, got {update.base[:16]}: "
                "it is stale."
            )
        return update

    def _answer_late(self, label: Label, member: str, size: int) -> str:
        """Return what became of a report of another round, or refuse it; its member is awaited in this one."""
        for record in self._log.records:
            for verdict in record.verdicts:
                if (record.round, verdict.member, verdict.digest) == (label.round, member, label.digest):
                    return "" if verdict.counted else verdict.reason
        return self._refuse(member, f"late: round {label.round} is not open, round {self._round} is", size)

    def _refuse(self, member: str, reason: str, size: int) -> str:
        self._bytes += size
        refusals = self._refused.setdefault(member, [])
        if len(refusals) < _MOST_REFUSALS:
            refusals.append(Verdict(member, False, reason))
        return reason

    def _keep(self, member: str, payload: bytes) -> None:
        """Put a payload on the disk."""
        folder = self.folder / REPORTS_FOLDER
        folder.mkdir(exist_ok=True)
        path = folder / f"{hashlib.sha256(member.encode()).hexdigest()[:32]}.update"
        aside = path.with_suffix(".new")
        try:
            aside.write_bytes(payload)
            sync(aside)
            aside.replace(path)
        except OSError:
            aside.unlink(missing_ok=True)
            raise
        sync(folder)

    def is_due(self, now: float) -> bool:
        """Return whether the round can be closed: enough have reported, and nobody is waited for any more.

        Nobody is waited for once the round's time is over; before, not for who has left or sent only what was refused.
        """
        if self.finished or len(self._updates) < self.plan.min_reports:
            return False
        return self.is_overtime(now) or not set(self.tasks) - set(self._updates) - self._not_awaited

    def is_overtime(self, now: float) -> bool:
        """Return whether the round's time is over; it begins anew with who asks for a share then."""
        limit = self.plan.round_seconds
        return limit is not None and self._opened is not None and now - self._opened >= limit

    def close(self, now: float, measure: Measure | None, publish: Publish) -> RoundRecord:
        """Judge the reports, make the step, measure, publish, and open the next round.

        Where `measure` or `publish` raises, the round is open as before, and closing it again comes to the same. Where
        the disk has no room for the record of a published round, it is added when the host begins again.

        Args:
            now: the time.
            measure: of the held-out loss; None accepts without.
            publish: makes an accepted round durable.
        """
        judged = aggregate([self._updates[name] for name in sorted(self._updates)], self.like, self.plan.defence)
        refused = tuple(verdict for name in sorted(self._refused) for verdict in self._refused[name])
        verdicts = judged.verdicts + refused
        reason, loss, result, outer = "no usable update", None, self.checksum, self.state.outer
        if judged.tensors is not None:
            outer = outer_step(self.state.outer, judged.tensors, self.plan.outer)
            reason, loss, result = self._weigh(outer, measure)
        is_accepted = not reason
        record = RoundRecord(
            round=self._round, accepted=is_accepted, reason=reason, number=self.state.number + is_accepted,
            base=self.checksum, result=result, tokens=counted_tokens(verdicts), held_out_loss=loss,
            bytes_received=self._bytes, seconds=0.0 if self._opened is None else now - self._opened, verdicts=verdicts,
        )  # fmt: skip
        if is_accepted:
            best = min((one for one in (self.state.best_loss, loss) if one is not None), default=None)
            state = HostState(self.state.number + 1, outer, self.next_place, best, record)
            publish(state, record)
            self.state = state
        else:
            self.state = dataclasses.replace(self.state, next_place=self.next_place)
        self._seen |= {verdict.digest for verdict in verdicts}
        self._open_round()  # before anything else can raise: no round may be applied twice
        self._log.append(record)
        shutil.rmtree(self.folder / REPORTS_FOLDER, ignore_errors=True)
        self._write_open({}, self.next_place)
        return record

    def _weigh(self, outer: OuterState, measure: Measure | None) -> tuple[str, float | None, str]:
        """Return why the weights after a step are not accepted, empty where they are; their loss; the next checksum."""
        try:
            weights = rounded(outer.weights, self.plan.base_dtype)
        except DataError as error:
            return str(error), None, self.checksum
        if measure is None:
            return "", None, weights_checksum(weights)
        if self.state.best_loss is None and math.isfinite(begun_with := measure(self.weights)):
            self.state = dataclasses.replace(self.state, best_loss=begun_with)
        loss = measure(weights)
        if is_gate_open(loss, self.state.best_loss, self.plan.gate_tolerance):
            return "", loss, weights_checksum(weights)
        if not math.isfinite(loss):
            return "the held-out loss is not finite", None, self.checksum
        best = self.state.best_loss
        return f"the held-out loss {loss:.4f} is too far above {best:.4f}, the lowest so far", loss, self.checksum
