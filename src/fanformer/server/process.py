"""The server as a process: slow and greedy connections are ended, and SIGTERM lets answers in work be finished."""

import asyncio
import json
import logging
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fanformer.errors import ConfigError
from fanformer.server.app import Service
from fanformer.server.limits import Limits
from fanformer.server.refusal import RefusalError

_log = logging.getLogger("fanformer.server")
_GRACE_SECONDS = 2
_SEND_BYTES = 256 << 10
"""What the system keeps of answers that a client does not read; by itself it would be megabytes a connection."""


class Connection(H11Protocol):
    """A connection that is ended when the client is slow to ask or to read."""

    limits = Limits()
    """Of the server; a subclass has its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._unread_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Begin, unless there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._end(503, "there are too many connections: try again later.")
            return
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        """Take bytes of a request.

        What comes after a whole request and before its answer is dropped, and the connection ends with the answer: a
        next request waiting there would hide a hang-up.
        """
        in_work = self.cycle is not None and not self.cycle.response_complete
        if not (in_work and self.conn.their_state is h11.DONE):
            super().data_received(data)
            self._watch_head()
            if self.conn.their_state is not h11.DONE:
                return
            self.flow.resume_reading()
            if not self.conn.trailing_data[0]:
                return
        self.cycle.keep_alive = False

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timers."""
        for timer in (self._head_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Wait for the client to read, but not for ever."""
        super().pause_writing()
        self._watch_reading()

    def resume_writing(self) -> None:
        """Go on."""
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _watch_reading(self) -> None:
        self._unread_bytes = self.transport.get_write_buffer_size()
        self._write_timer = self.loop.call_later(self.limits.write_seconds, self._end_unless_read)

    def _end_unless_read(self) -> None:
        """End the connection of a client that has read nothing meanwhile; give one that reads as long again."""
        if self.transport.get_write_buffer_size() < self._unread_bytes:
            self._watch_reading()
        else:
            self.transport.abort()

    def _watch_head(self) -> None:
        """Let a timer run while the head of a request is missing; more of it does not start the time anew."""
        is_missing = self.conn.their_state is h11.IDLE
        if is_missing and self._head_timer is None:
            self._head_timer = self.loop.call_later(self.limits.header_seconds, self._too_slow)
        elif not is_missing and self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _too_slow(self) -> None:
        self._head_timer = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self._end(408, f"a request's head took more than {self.limits.header_seconds:g} seconds.")

    def send_400_response(self, msg: str) -> None:
        """Say in the API's shape that this is no HTTP."""
        self._end(400, "the request is no valid HTTP.")

    def _end(self, status: int, message: str) -> None:
        body = json.dumps(RefusalError(status, message).body).encode()
        head = f"HTTP/1.1 {status} Refused\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()


class Server(uvicorn.Server):
    """A server that, told to stop, first finishes what is in work."""

    def __init__(self, config: uvicorn.Config, service: Service, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._service, self._on_started = service, on_started
        self._draining_since: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Send newcomers away and finish what is in work; asked again, stop at once."""
        if self._draining_since is None:
            self._draining_since = time.monotonic()
            self._service.gate.draining = True
            _log.warning("%s: finishing %d requests", signal.Signals(sig).name, self._service.gate.in_work)
        else:
            self.should_exit = self.force_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        self._on_started()

    async def on_tick(self, counter: int) -> bool:
        """Return whether to stop: when nothing is in work or on its way any more, or it took too long."""
        if self._draining_since is not None:
            left = self._draining_since + self._service.limits.drain_seconds - time.monotonic()
            if left <= 0 or (self._service.gate.in_work == 0 and not self._is_sending()):
                self.should_exit = True
                await asyncio.get_running_loop().run_in_executor(None, self._service.close)
        return await super().on_tick(counter)

    def _is_sending(self) -> bool:
        """Return whether a part of an answer waits for a client to read what comes before."""
        connections = self.server_state.connections
        return any(isinstance(one, Connection) and one.transport.get_write_buffer_size() > 0 for one in connections)


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound, so that a taken port is known before a model is loaded.

    Args:
        host: address or name to bind.
        port: 0 takes a free one.

    Raises:
        ConfigError: if the host is no address of this machine, or the port is taken.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BYTES)  # of connections too
        bound.bind(address)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"cannot listen at `--host` {host} and `--port` {port}: {error}; choose another, 0 takes a free port."
        ) from error
    return bound


def server(service: Service, on_started: Callable[[], None] = lambda: None) -> Server:
    """Return a server that is ready to run on a socket that is bound.

    Args:
        service: the application.
        on_started: called when requests are welcome.
    """
    limits = service.limits
    config = uvicorn.Config(
        service.gate,
        http=type("LimitedConnection", (Connection,), {"limits": limits}),
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=max(1, round(limits.idle_seconds)),
        timeout_graceful_shutdown=_GRACE_SECONDS,
        h11_max_incomplete_event_size=limits.header_bytes,
        backlog=1024,
    )
    return Server(config, service, on_started)
