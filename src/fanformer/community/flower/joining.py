"""A volunteer's stay: connected, waiting for shares and training them, until the run, the time or a signal ends it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fanformer.community.flower.node import Node, connected
from fanformer.community.identity import read_member_key
from fanformer.community.invitation import Invitation, UnreachableError, fetch_certificate
from fanformer.community.volunteering import Own, Volunteer
from fanformer.errors import DataError
from fanformer.files.locking import hold
from fanformer.training.events import Event, Listener, note_to

CERTIFICATE_FILE, LOCK_FILE = "host-certificate.pem", ".joined.lock"
_WAIT_SECONDS = 2.0
_LONGEST_WAIT_SECONDS = 60.0
_AWAY_SECONDS = 86400.0
"""How long a host may be away: one whose run ended while a share was in work does not come back."""


@dataclass(frozen=True)
class Stay:
    """What a stay came to.

    Attributes:
        rounds: whose updates were sent.
        tokens: trained on in them.
        ended: why it ended: "finished", "time", "gone" where no host has answered for a day, or the name of a signal.
    """

    rounds: int
    tokens: int
    ended: str


def join(
    invitation: Invitation,
    key_file: Path,
    folder: Path,
    own: Own,
    seconds: float | None,
    listener: Listener,
) -> Stay:
    """Take part in a run until it is over, or the time is.

    Args:
        invitation: to the host.
        key_file: the member's private key.
        folder: of what the volunteer keeps, made if need be.
        own: what the volunteer decides for itself.
        seconds: after which it leaves, with the update of the share that is in work; None stays to the end.
        listener: hears what happens.

    Raises:
        ConfigError, DataError, CheckpointError: if this machine cannot take part.
        UnreachableError: if the host does not answer at first; in a folder that it was reached from before, or later,
            it is waited for, a day at most.
    """
    until = None if seconds is None else time.monotonic() + seconds
    key = read_member_key(key_file)
    folder.mkdir(parents=True, exist_ok=True)
    with (
        hold(folder / LOCK_FILE, f"the folder {folder.absolute()}"),
        Volunteer(invitation, folder, own, listener) as volunteer,
    ):
        patience = _Patience(until, listener)
        certificate = folder / CERTIFICATE_FILE
        is_known, is_fetched = certificate.is_file(), False
        while True:
            try:
                if not is_fetched:
                    fetch_certificate(invitation, certificate)
                    is_fetched = True
                with connected(invitation, certificate, key, folder) as node:
                    patience.over()
                    ended = _stay(node, volunteer, until, note_to(listener))
                return Stay(volunteer.rounds, volunteer.tokens, ended)
            except UnreachableError as error:
                if not (is_known or is_fetched):
                    raise
                if ended := patience.wait(str(error)):
                    return Stay(volunteer.rounds, volunteer.tokens, ended)


def _stay(node: Node, volunteer: Volunteer, until: float | None, note: Callable[[str], None]) -> str:
    """Answer what comes, and return why it is over."""
    note("connected; waiting for a share of a round")
    while until is None or time.monotonic() < until:
        try:
            arrived = node.receive()
        except UnreachableError:
            raise
        except DataError as error:
            note(str(error))
            arrived = None
        if arrived is None:
            time.sleep(_WAIT_SECONDS)
            continue
        answer = volunteer.answer(arrived.sealed, arrived.base, arrived.age_seconds, _is_after(until))
        began = time.monotonic()
        node.answer(arrived, answer)
        if answer.payload is not None:
            volunteer.sending_seconds = time.monotonic() - began
        if answer.final:
            return "finished"
        if volunteer.stopped_by is not None:
            return volunteer.stopped_by
    return "time"


def _is_after(until: float | None) -> Callable[[int], bool]:
    """Return what ends a share when the volunteer's time is over, a step at least being done."""
    return lambda steps: until is not None and steps > 0 and time.monotonic() >= until


class _Patience:
    """Waits between tries to reach the host, longer each time, and tells it once."""

    def __init__(self, until: float | None, listener: Listener) -> None:
        self._until, self._listener = until, listener
        self._wait = self._since = 0.0

    def over(self) -> None:
        """Note that the host was reached."""
        self._wait = 0.0

    def wait(self, reason: str) -> str:
        """Wait, and return why the stay is over, as `Stay.ended` has it; empty where it is not."""
        if not self._wait:
            self._since = time.monotonic()
            self._listener(Event("note", f"{reason} trying again until it answers"))
        self._wait = min(_LONGEST_WAIT_SECONDS, 2 * self._wait or _WAIT_SECONDS)
        ends = {"gone": self._since + _AWAY_SECONDS}
        if self._until is not None:
            ends["time"] = self._until
        ended, end = min(ends.items(), key=lambda one: one[1])
        time.sleep(max(0.0, min(self._wait, end - time.monotonic())))
        return ended if time.monotonic() >= end else ""
