"""The rounds of a host as a Flower ServerApp: members' messages in and out, all else is the reception's."""

import time
from pathlib import Path
from typing import Any

from fanformer.community.flower.content import flower, offer_content, read_reply
from fanformer.community.flower.outcome import NODES_FILE, write_outcome
from fanformer.community.hosted_run import gone_on_with
from fanformer.community.reception import Reception
from fanformer.errors import DataError, FANformerError
from fanformer.files.durable import read_json
from fanformer.training.events import Event

_POLL_SECONDS = 0.5
_FAREWELL_SECONDS = 20.0
_LONGEST_SECONDS = 7 * 86400.0
"""How long a message waits for a member whose round has no limit."""
_STATUS_SECONDS = 10.0


def server_app() -> Any:
    """Return the app that Flower runs on the host's machine.

    Its configuration has `folder`, the absolute path of the run.
    """
    app = flower("serverapp").ServerApp()

    @app.main()
    def main(grid: Any, context: Any) -> None:
        serve(grid, Path(str(context.run_config["folder"])))

    return app


def serve(grid: Any, folder: Path) -> None:
    """Go on with a run until all its rounds are accepted, and write down how that ends.

    Args:
        grid: Flower's way to the members.
        folder: of the run.

    Raises:
        FANformerError, OSError: what ended it.
    """
    write_outcome(folder, "running")
    try:
        with gone_on_with(folder, _print) as hosted:
            host = hosted.open_host(time.monotonic(), _print)
            reception = Reception(hosted, host, time.monotonic, read_nodes(folder).values())
            _Rounds(grid, reception, folder, hosted.plan.round_seconds).run()
    except (FANformerError, OSError) as error:
        write_outcome(folder, "failed", str(error))
        raise
    write_outcome(folder, "finished")


def _print(event: Event) -> None:
    if event.kind == "note":
        print(event.text, flush=True)  # noqa: T201  the process is Flower's, and its output is the link's log


def read_nodes(folder: Path) -> dict[int, str]:
    """Return the names of registered members by their numbers."""
    path = folder / "flower" / NODES_FILE
    try:
        return {int(node["number"]): str(node["name"]) for node in read_json(path)}
    except FileNotFoundError:
        return {}


class _Rounds:
    """The loop: who is there gets a share, who answers is heard, and what is due is closed."""

    def __init__(self, grid: Any, reception: Reception, folder: Path, round_seconds: float | None) -> None:
        self._grid, self._reception, self._folder = grid, reception, folder
        self._wait_seconds = round_seconds or _LONGEST_SECONDS
        self._sent: dict[str, tuple[str, float]] = {}
        """Member, and the time until which an answer may come, by message."""
        self._busy: dict[str, str] = {}
        """Messages of the open round by member."""
        self._names: dict[int, str] = {}
        self._written = 0.0

    def run(self) -> None:
        """Go on until the run is over, and tell the members that it is."""
        self._reception.write_status("waiting")
        while not self._reception.finished:
            news = self._invite()
            news |= self._hear()
            record = self._reception.close_if_due()
            if record is not None:
                self._busy.clear()
                self._say(f"round {record.round}: {'accepted' if record.accepted else record.reason}")
            if news or record is not None or time.monotonic() - self._written > _STATUS_SECONDS:
                self._written = time.monotonic()
                self._reception.write_status("training" if self._busy else "waiting")
            time.sleep(_POLL_SECONDS)
        self._reception.write_status("finished")
        self._farewell()

    def _connected(self) -> dict[str, int]:
        """Return the numbers of those who are connected, by name; who was registered meanwhile is let in."""
        numbers = list(self._grid.get_node_ids())
        if not set(numbers) <= self._names.keys():
            self._names = read_nodes(self._folder)
            for name in self._names.values():
                self._reception.admit(name)
        return {self._names[number]: number for number in numbers if number in self._names}

    def _invite(self) -> bool:
        """Offer a share to everyone who is connected and has none."""
        there = self._connected()
        changed = self._reception.connected(there)
        for name in self._busy.keys() - there.keys():
            del self._busy[name]  # its share may have been lost with it: it gets it again when it is back
        for name in sorted(there.keys() - self._busy.keys()):
            sealed = self._reception.offer(name)
            if sealed is not None and self._send(name, there[name], offer_content(sealed, self._reception.base())):
                changed = True
        return changed

    def _send(self, name: str, number: int, content: Any) -> bool:
        """Send a member a message, and return whether Flower took it: a member may have gone away meanwhile."""
        message = flower("app").Message(content, number, "train", ttl=self._wait_seconds)
        [sent] = self._grid.push_messages([message])
        if sent is None:
            self._reception.excuse(name, "Flower took no message for it")
            return False
        self._sent[sent] = name, time.monotonic() + self._wait_seconds
        self._busy[name] = str(sent)
        return True

    def _hear(self) -> bool:
        """Take what came back, also to messages of rounds that are closed: it is told so."""
        for message in [one for one, (_, until) in self._sent.items() if until < time.monotonic()]:
            del self._sent[message]
        replies = list(self._grid.pull_messages(list(self._sent))) if self._sent else []
        for reply in replies:
            answered = reply.metadata.reply_to_message_id
            name, _ = self._sent.pop(answered, ("", 0.0))
            if name:
                self._take(name, reply, self._busy.get(name) == answered)
        return bool(replies)

    def _take(self, name: str, reply: Any, is_expected: bool) -> None:
        """Take a reply; where it holds nothing, the member is not waited for, unless a newer message is on its way."""
        payload, reason = None, ""
        if reply.has_error():
            reason = f"no reply ({ascii(str(reply.error.reason))[:200]})"
            if is_expected:
                del self._busy[name]  # the message was lost: it may be asked again in this round
        else:
            try:
                payload, reason = read_reply(reply.content)
            except DataError as error:
                reason = str(error)
        if payload is not None:
            if refused := self._reception.take(name, payload):
                self._say(f"refused {name}: {refused}")
        elif is_expected:
            self._say(f"{name} hands in nothing: {reason}")
            self._reception.excuse(name, reason)

    def _say(self, text: str) -> None:
        _print(Event("note", text))

    def _farewell(self) -> None:
        """Tell all who are connected that the run is over, and wait until they have heard it, but not for ever."""
        self._sent.clear()
        for name, number in self._connected().items():
            self._send(name, number, offer_content(self._reception.farewell(name), None))
        until = time.monotonic() + _FAREWELL_SECONDS
        while self._sent and time.monotonic() < until:
            for reply in self._grid.pull_messages(list(self._sent)):
                self._sent.pop(reply.metadata.reply_to_message_id, None)
            time.sleep(_POLL_SECONDS)
