"""Flower's SuperLink behind a guard: members reach what members need on the public port, and nothing else of it.

Flower serves members, its command and the apps it runs on one port, and whoever reaches the commands may start code on
the host. Here these are on a port of the loopback alone. The public port lets through the calls of a member that is
registered already, none that fetches an app's code, and answers with the run's status to everybody else.
"""

import argparse
import asyncio
import base64
import contextlib
import hashlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from fanformer.community.flower.outcome import NODES_FILE, read_fingerprints
from fanformer.community.folder import FLOWER_FOLDER, STATUS_FILE
from fanformer.community.status import read_status, status_page
from fanformer.errors import FANformerError, import_extra
from fanformer.files.durable import replace_text
from fanformer.report.live import LIVE_SCRIPT, POLICY

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

PORT_FILE = "local-port"
MEMBERS_CALLS = frozenset(
    f"/v1/fleet/{name}"
    for name in (
        "activate-node",
        "deactivate-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "pull-object",
        "push-object",
        "confirm-message-received",
    )
)
"""What a member may call; `get-fab`, which fetches code, and `register-node` are not among it."""
LARGEST_REQUEST = 64 << 20
"""Bytes of a request; Flower sends large arrays in pieces of 20 MB."""
_SPARE_BYTES = 4 << 20
_PARENT_SECONDS = 0.5


class Guard:
    """Stands in front of Flower's app."""

    def __init__(self, app: App, local_port: int, folder: Path, key_header: str) -> None:
        """Set up.

        Args:
            app: Flower's.
            local_port: of the loopback, where everything is let through.
            folder: of the run.
            key_header: name of the header that has a member's public key.
        """
        self._app, self._local_port, self._folder = app, local_port, folder
        self._key_header = key_header.lower().encode()
        self._budget, self._members = Budget(folder), Members(folder)
        self._page: tuple[float, bytes] = (0.0, b"")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "lifespan" or scope["server"][1] == self._local_port:
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close"})
        elif scope["path"] in MEMBERS_CALLS:
            await self._pass(scope, receive, send)
        elif scope["method"] == "GET" and scope["path"] in ("/", "/main", "/status.json"):
            await self._tell(scope["path"], send)
        else:
            await _answer(send, 404, b"there is no such path\n", "text/plain")

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a member's call through, up to so many bytes; what a key sends is counted once Flower has accepted it."""
        key = next((value for name, value in scope["headers"] if name == self._key_header), b"")
        member = self._members.fingerprint(key)
        if member is None:
            await _answer(send, 401, b"this key is none of a member\n", "text/plain")
            return
        if self._budget.is_spent(member):
            await _answer(send, 429, b"more bytes than an update of this round has\n", "text/plain")
            return
        taken, accepted = 0, False

        async def bounded() -> MutableMapping[str, Any]:
            nonlocal taken
            event = await receive()
            taken += len(event.get("body", b""))
            if taken > LARGEST_REQUEST:
                return {"type": "http.disconnect"}
            return event

        async def noted(event: MutableMapping[str, Any]) -> None:
            nonlocal accepted
            if event["type"] == "http.response.start":
                accepted = event["status"] < 300
            await send(event)

        await self._app(scope, bounded, noted)
        if accepted:
            self._budget.spend(member, taken)

    async def _tell(self, path: str, send: Send) -> None:
        """Answer with the status as JSON, or as a page that follows it."""
        try:
            if path == "/status.json":
                await _answer(send, 200, (self._folder / STATUS_FILE).read_bytes(), "application/json")
                return
            content = await asyncio.to_thread(self._made)
        except (OSError, FANformerError):
            await _answer(send, 503, b"the run has not begun yet\n", "text/plain")
            return
        if path == "/main":
            content = content[content.index(b"<main>") + 6 : content.index(b"</main>")]
        await _answer(send, 200, content, "text/html")

    def _made(self) -> bytes:
        """Return the page, made anew where the status is another."""
        changed = (self._folder / STATUS_FILE).stat().st_mtime
        if self._page[0] != changed:
            self._page = changed, status_page(read_status(self._folder), LIVE_SCRIPT).encode()
        return self._page[1]


class Members:
    """Who may take part: the signature, by which a key is known to be its owner's, is Flower's to check."""

    def __init__(self, folder: Path) -> None:
        """Set up.

        Args:
            folder: of the run.
        """
        self._folder = folder
        self._seen: tuple[float, frozenset[str]] = (0.0, frozenset())

    def fingerprint(self, key: bytes) -> str | None:
        """Return the fingerprint of a key that is one of theirs, None of any other.

        Args:
            key: in base64 as it comes in a header, which has several spellings of the same bytes.
        """
        with contextlib.suppress(OSError):  # nobody is registered yet
            changed = (self._folder / FLOWER_FOLDER / NODES_FILE).stat().st_mtime
            if changed != self._seen[0]:
                self._seen = changed, read_fingerprints(self._folder)
        try:
            found = hashlib.sha256(base64.b64decode(key, validate=True)).hexdigest()
        except ValueError:
            return None
        return found if found in self._seen[1] else None


class Budget:
    """Bytes that a member may send in a round: two updates and a little."""

    def __init__(self, folder: Path) -> None:
        """Set up.

        Args:
            folder: of the run, whose status says which round is open and how large an update is.
        """
        self._path = folder / STATUS_FILE
        self._seen = (0.0, -1, 0)
        self._spent: dict[str, int] = {}
        """Bytes by the fingerprint of a member's key."""

    def _allowed(self) -> int:
        try:
            changed = self._path.stat().st_mtime
            if changed != self._seen[0]:
                status = json.loads(self._path.read_bytes())
                if status["round"] != self._seen[1]:
                    self._spent.clear()
                self._seen = changed, status["round"], 2 * status["update_bytes"] + _SPARE_BYTES
        except (OSError, ValueError, KeyError):
            return _SPARE_BYTES
        return self._seen[2]

    def is_spent(self, member: str) -> bool:
        """Return whether a member has sent all that it may in this round."""
        allowed = self._allowed()  # a new round forgets what was spent in the one before
        return self._spent.get(member, 0) > allowed

    def spend(self, member: str, size: int) -> None:
        """Count bytes that a member sent."""
        self._spent[member] = self._spent.get(member, 0) + size


async def _answer(send: Send, status: int, body: bytes, kind: str) -> None:
    headers = [
        (b"content-type", f"{kind}; charset=utf-8".encode()),
        (b"content-length", str(len(body)).encode()),
        (b"content-security-policy", POLICY.encode()),
        (b"cache-control", b"no-store"),
        (b"etag", str(hash(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def run_link(folder: Path, host: str, port: int, arguments: Sequence[str]) -> None:
    """Run Flower's SuperLink in this process until it is told to stop, or its parent is gone.

    The port on the loopback, for Flower's commands and apps, is a free one; PORT_FILE in the working folder says which.

    Args:
        folder: of the run.
        host: address of the public port.
        port: the public one.
        arguments: of `flower-superlink`, besides its address.
    """
    sockets = [_bind("127.0.0.1", 0), _bind(host, port)]
    local_port = sockets[0].getsockname()[1]
    uvicorn: Any = import_extra("uvicorn", "a community run", extra="community")
    header = import_extra("flwr.supercore.constant", "a community run", extra="community").FLEET_HTTP_PUBLIC_KEY_HEADER
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()

    def run(app: App, **options: Any) -> None:
        """Serve as Flower asks, on both ports."""
        options = {name: value for name, value in options.items() if name not in ("host", "port", "workers", "reload")}
        config = uvicorn.Config(Guard(app, local_port, folder, header), **options)
        uvicorn.Server(config).run(sockets=sockets)

    uvicorn.run = run
    replace_text(Path(PORT_FILE), str(local_port))
    sys.argv = ["flower-superlink", "--host", "127.0.0.1", "--port", str(local_port), *arguments]
    import_extra("flwr.superlink.cli.flower_superlink", "a community run", extra="community").flower_superlink()


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind((host, port))
    return bound


def _end_with_parent(parent: int) -> None:
    """End this process, and with it what Flower started, when the host's command is gone, however it went."""
    while os.getppid() == parent:
        time.sleep(_PARENT_SECONDS)
    end_all(psutil.Process().children(recursive=True))
    os._exit(0)


def end_all(processes: Sequence[psutil.Process]) -> None:
    """End processes that Flower started: its apps outlive their SuperLink, and ask for it for ever."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    known, arguments = parser.parse_known_args()
    run_link(known.folder, known.host, known.port, arguments)


if __name__ == "__main__":
    _main()
