"""A host at work: its processes started, watched, and started again where they died, until all rounds are accepted."""

import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from fanformer.community.flower.outcome import Outcome, clear_outcome, read_outcome
from fanformer.community.flower.processes import HostProcesses
from fanformer.community.identity import PublicMember, read_public_members
from fanformer.community.status import read_status
from fanformer.errors import CheckpointError, DataError, FANformerError

_LOOK_SECONDS = 1.0
_BEGIN_SECONDS = 900.0
"""How long the process that keeps the rounds may take to begin."""
_ASK_SECONDS = 5.0
_END_SECONDS = 30.0
_MOST_RESTARTS = 5
"""In a row, without an accepted round between them."""


def keep(
    folder: Path,
    processes: HostProcesses,
    members: Path,
    note: Callable[[str], None],
    on_open: Callable[[], None] = lambda: None,
) -> None:
    """Host a run that is begun until all its rounds are accepted.

    Args:
        folder: of the run.
        processes: of the host, not started.
        members: folder of the public keys of those who may take part; keys that come later are let in.
        note: is told one line.
        on_open: is called once members may join.

    Raises:
        FANformerError: what ended the rounds, such as a full disk; the run goes on from its last round.
        DataError: if the processes die again and again.
    """
    watch = _Watch(folder, processes, members, note)
    watch.begin()
    on_open()
    while not watch.is_over():
        time.sleep(_LOOK_SECONDS)


def end_left_behind(folder: Path) -> None:
    """End the process that keeps the rounds for a host that was killed, should it be there still.

    Args:
        folder: of the run, of which no host is at work.
    """
    outcome = read_outcome(folder)
    if outcome.state != "running" or not _is_alive(outcome.pid):
        return
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(outcome.pid)
        if any("flwr" in word or "flower" in word for word in process.cmdline()):  # its number may be another's by now
            process.kill()
            process.wait(_END_SECONDS)


class _Watch:
    """What is watched."""

    def __init__(self, folder: Path, processes: HostProcesses, members: Path, note: Callable[[str], None]) -> None:
        self._folder, self._processes, self._members, self._note = folder, processes, members, note
        self._began = self._asked = 0.0
        self._restarts, self._accepted = 0, -1
        self._told: Mapping[str, Any] = {}
        self._known: list[PublicMember] = []
        self._troubles: set[str] = set()
        """What is wrong in the folder of members, once it was told."""

    def begin(self) -> None:
        """Start everything."""
        self._processes.stop()
        end_left_behind(self._folder)
        clear_outcome(self._folder)
        self._processes.start()
        self._register()
        self._processes.submit()
        self._began = self._asked = time.monotonic()

    def _register(self) -> None:
        """Let in whose key came, and no more whose key is gone; what is wrong is told once, and ends nothing."""
        troubles: list[str] = []
        try:
            members = read_public_members(self._members, troubles.append)
            if members != self._known:
                for told in self._processes.register(members):
                    self._note(told)
                self._known = members
        except FANformerError as error:
            troubles.append(str(error))
        for trouble in troubles:
            if trouble not in self._troubles:
                self._note(trouble)
        self._troubles = set(troubles)

    def is_over(self) -> bool:
        """Look once, mend what died, and return whether all rounds are accepted."""
        outcome = read_outcome(self._folder)
        self._tell()
        if outcome.state == "finished":
            return True
        if outcome.state == "failed":
            raise DataError(outcome.error)
        self._register()
        if not self._processes.is_alive or self._is_gone(outcome):
            self._begin_again()
        elif not outcome.state and time.monotonic() - self._asked > _ASK_SECONDS:
            self._asked = time.monotonic()
            if self._processes.is_given_up():
                self._note("the host's process began too slowly for Flower: once more")
                self._processes.submit()
        return False

    def _is_gone(self, outcome: Outcome) -> bool:
        """Whether the process that keeps the rounds is not there any more, or never came."""
        if outcome.state == "running":
            return not _is_alive(outcome.pid)
        return time.monotonic() - self._began > _BEGIN_SECONDS

    def _begin_again(self) -> None:
        self._restarts += 1
        if self._restarts > _MOST_RESTARTS:
            raise DataError(
                f"the host's processes died {self._restarts} times without an accepted round: "
                f"{self._processes.last_words()}"
            )
        self._note("a process of the host died: going on from the last round")
        self.begin()

    def _tell(self) -> None:
        """Tell what is new."""
        try:
            status = read_status(self._folder)
        except CheckpointError:
            return
        if status["number"] > self._accepted:
            self._accepted, self._restarts = status["number"], 0
        seen = {one["round"] for one in self._told.get("last_rounds", ())}
        for one in status["last_rounds"] if self._told else []:
            if one["round"] not in seen:
                self._note(_told_round(one, status))
        before = {one["name"]: one["connected"] for one in self._told.get("members", ())}
        for one in status["members"]:
            if one["connected"] != before.get(one["name"], False):
                self._note(f"{one['name']} {'is connected' if one['connected'] else 'went away'}")
        self._told = status


def _told_round(one: Mapping[str, Any], status: Mapping[str, Any]) -> str:
    outcome = "accepted" if one["accepted"] else f"rejected, {one['reason']}"
    loss = "" if one["held_out_loss"] is None else f", held out {one['held_out_loss']:.4f}"
    return (
        f"round {one['round']} {outcome}: {one['counted']} of {one['reports']} updates, {one['tokens']:,} tokens{loss}"
        f", {one['seconds']:.0f} s; {status['number']} of {status['rounds']} done"
    )


def _is_alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
