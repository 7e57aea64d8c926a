"""The rounds of a host as a Flower ServerApp: members' messages in and out, all else is the reception's."""

import time
from pathlib import Path
from typing import Any

from fanformer.community.flower.content import flower, offer_content, read_reply
from fanformer.community.flower.outcome import read_nodes, write_outcome
from fanformer.community.flower.replies import Replies, Reply
from fanformer.community.hosted_run import gone_on_with
from fanformer.community.reception import Reception
from fanformer.errors import DataError, FANformerError
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
            Rounds(grid, reception, Replies(grid), folder, hosted.plan.round_seconds).run()
    except (FANformerError, OSError) as error:
        write_outcome(folder, "failed", str(error))
        raise
    write_outcome(folder, "finished")


def _print(event: Event) -> None:
    if event.kind == "note":
        print(event.text, flush=True)  # noqa: T201  the process is Flower's, and its output is the link's log


class Rounds:
    """The loop: who is there gets a share, who answers is heard, and what is due is closed."""

    def __init__(
        self, grid: Any, reception: Reception, replies: Replies, folder: Path, round_seconds: float | None
    ) -> None:
        """Set up.

        Args:
            grid: Flower's way to the members.
            reception: what is done with them.
            replies: what they answer.
            folder: of the run.
            round_seconds: after which a message is not waited for any more.
        """
        self._grid, self._reception, self._replies, self._folder = grid, reception, replies, folder
        self._wait_seconds = round_seconds or _LONGEST_SECONDS
        self._sent: dict[str, tuple[str, float]] = {}
        """Member, and the time until which an answer may come, by message."""
        self._busy: dict[str, str] = {}
        """Messages of the open round by member."""
        self._names: set[str] = set()
        """Of those who may take part."""
        self._written = 0.0

    def run(self) -> None:
        """Go on until the run is over, and tell the members that it is."""
        self._reception.write_status("waiting")
        while not self._reception.finished:
            self.look()
            time.sleep(_POLL_SECONDS)
        self._reception.write_status("finished")
        self._farewell()

    def look(self) -> None:
        """Do once what is to be done."""
        news = self._invite()
        news |= self._hear()
        record = self._reception.close_if_due()
        if record is not None:
            self._busy.clear()
            self._say(f"round {record.round}: {'accepted' if record.accepted else record.reason}")
        elif self._reception.is_overtime:
            self._busy = {name: message for name, message in self._busy.items() if message in self._sent}
        if news or record is not None or time.monotonic() - self._written > _STATUS_SECONDS:
            self._written = time.monotonic()
            self._reception.write_status("training" if self._busy else "waiting")

    def _connected(self) -> dict[str, int]:
        """Return the numbers of those who are connected, by name, as the keys are that may take part now."""
        names = read_nodes(self._folder)
        self._names = set(names.values())
        for name in self._names:
            self._reception.admit(name)
        return {names[number]: number for number in self._grid.get_node_ids() if number in names}

    def _invite(self) -> bool:
        """Offer a share to everyone who is connected and has none."""
        there = self._connected()
        changed = self._reception.connected(there)
        for name in self._busy.keys() - there.keys():
            del self._busy[name]  # its share may have been lost with it: it gets it again when it is back
        for name in sorted(there.keys() - self._busy.keys()):
            sealed = self._reception.offer(name)
            if sealed is not None and self._send(name, there[name], offer_content(sealed, self._reception.base(name))):
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
        """Take what came back, also to messages of rounds that are closed: it is told so.

        A message whose time is over is not answered any more; its member may be asked again.
        """
        now = time.monotonic()
        for message, (name, until) in list(self._sent.items()):
            if until < now:
                self._release(name, message)
                if not self._replies.is_arriving(message):
                    del self._sent[message]
        replies = self._replies.take(list(self._sent)) if self._sent else []
        for reply in replies:
            name, _ = self._sent.pop(reply.message)
            self._take(name, reply)
        return bool(replies)

    def _release(self, name: str, message: str) -> None:
        """Let a member be asked again in this round, unless a newer message is on its way."""
        if self._busy.get(name) == message:
            del self._busy[name]

    def _take(self, name: str, reply: Reply) -> None:
        """Take a reply; where it holds nothing, the member is not waited for, unless a newer message is on its way."""
        payload, reason = None, reply.problem
        if reply.is_lost:
            self._say(f"{name} hands in nothing: {reason}")
            self._release(name, reply.message)
            return
        if reply.content is not None:
            try:
                payload, reason = read_reply(reply.content)
            except DataError as error:
                reason = str(error)
        if name not in self._names:
            self._say(f"{name} may take part no more: its reply is left out")
        elif payload is not None:
            if refused := self._reception.take(name, payload):
                self._say(f"refused {name}: {refused}")
        elif self._busy.get(name) == reply.message:
            self._say(f"{name} hands in nothing: {reason}")
            if self._reception.excuse(name, reason):
                self._release(name, reply.message)

    def _say(self, text: str) -> None:
        _print(Event("note", text))

    def _farewell(self) -> None:
        """Tell all who are connected that the run is over, and wait until they have heard it, but not for ever."""
        self._sent.clear()
        for name, number in self._connected().items():
            self._send(name, number, offer_content(self._reception.farewell(name), None))
        until = time.monotonic() + _FAREWELL_SECONDS
        while self._sent and time.monotonic() < until:
            for reply in self._replies.take(list(self._sent)):
                del self._sent[reply.message]
            time.sleep(_POLL_SECONDS)
