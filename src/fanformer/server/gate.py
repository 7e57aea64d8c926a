"""What a request passes before the application sees it: who asks, by which name, how much, how fast."""

import asyncio
import contextlib
import hmac
import logging
import time
from collections import Counter
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fanformer.server.limits import Access, Limits
from fanformer.server.page import is_page
from fanformer.server.refusal import RefusalError, log_failure

PAGE = "/"
"""The page and its files, as the log and the metrics call them."""
ROUTES = (
    PAGE,
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/models",
    "/tokenize",
    "/detokenize",
    "/tokenizer_info",
    "/inside",
    "/health",
    "/metrics",
)
_DISCARDED, _DISCARD_SECONDS = 4, 2.0
"""How many times the largest body, and for how long, is read on of one that is refused."""
_TOO_SLOW = 408
"""Of a body that had its time: it gets no more."""
_log = logging.getLogger("fanformer.server")


class Gate:
    """The outermost part of the application, in front of all routes."""

    def __init__(self, app: ASGIApp, access: Access, limits: Limits) -> None:
        """Stand before `app`."""
        self._app, self._access, self._limits = app, access, limits
        self._keys = [key.encode() for key in access.keys]
        self.draining = False
        """Whether newcomers are sent away."""
        self.in_work = 0
        """Requests that are being answered; asking for health and metrics does not count."""
        self.held_bytes = 0
        """Of the bodies of these."""
        self._clients: Counter[str] = Counter()
        self.responses: Counter[tuple[str, int]] = Counter()
        """How many responses there were, by route and status."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 0
        headers = Headers(scope=scope)
        is_read = headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers

        async def heard() -> Message:
            nonlocal is_read
            message = await receive()
            is_read = is_read or (message["type"] == "http.request" and not message.get("more_body", False))
            return message

        async def told(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                # who is answered before his body has come could keep the connection by never sending the rest
                ends = [] if is_read else [(b"connection", b"close")]
                message = {**message, "headers": [*message["headers"], *self._cors(headers), *ends]}
            await send(message)

        try:
            await self._pass(scope, headers, heard, told)
        except RefusalError as refusal:
            if not is_read and refusal.status != _TOO_SLOW:
                await _discard(heard, _DISCARDED * self._limits.body_bytes)
            await _response(refusal)(scope, receive, told)
        except Exception as error:  # not its message: a prompt could stand in it
            log_failure(_log, "a request failed", error)
            if not status:
                internal = RefusalError(500, "internal error: see the server's log", code="internal")
                await _response(internal)(scope, receive, told)
        finally:
            route = route_of(scope["path"])
            self.responses[route, status] += 1
            _log.info("%s %s %d %.3f s", scope["method"][:8], route, status, time.monotonic() - began)

    async def _pass(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        self._check_names(headers)
        if scope["method"] == "OPTIONS" and "origin" in headers:
            await _preflight(headers)(scope, receive, send)
            return
        path = scope["path"]
        is_open = path == "/health" or is_page(path) or (path == "/metrics" and self._access.is_loopback)
        client = "" if is_open else self._client(scope, headers)
        if is_open or path == "/metrics":
            await self._app(scope, receive, send)
            return
        if self.draining:
            raise _draining()
        if self._clients[client] >= self._limits.requests_per_client:
            raise RefusalError(
                429,
                f"a client may have {self._limits.requests_per_client} requests in work: wait for one to end.",
                code="rate_limit_exceeded",
                headers={"retry-after": "1"},
            )
        self._clients[client] += 1
        self.in_work += 1
        parts: list[bytes] = []
        try:
            await self._read(parts, headers, receive)
            parts[:] = [b"".join(parts)]
            scope.setdefault("state", {})["client"] = client
            await self._app(scope, _replayed(parts[0], receive), send)
        finally:
            self.held_bytes -= sum(map(len, parts))
            self.in_work -= 1
            self._clients[client] -= 1
            self._clients += Counter()  # drops those at 0

    def _check_names(self, headers: Headers) -> None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if len(headers.getlist("host")) != 1 or not self._access.allows_host(host):
            raise RefusalError(
                403, "the Host header does not name this server: name it with --allowed-host.", code="unknown_host"
            )
        if origin is not None and not self._access.allows_origin(origin, host):
            raise RefusalError(
                403, "web pages of that origin may not ask: name it with --allow-origin.", code="unknown_origin"
            )

    def _client(self, scope: Scope, headers: Headers) -> str:
        """Return who asks, by the key, however it is written, or without keys by the address.

        The time it takes to refuse a key does not tell how much of one is right.

        Raises:
            RefusalError: if there are keys, and the request has none of them.
        """
        if not self._keys:
            return str(scope["client"][0]) if scope.get("client") else ""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        matches = [hmac.compare_digest(given.strip().encode(), key) for key in self._keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise RefusalError(
                401,
                "the API key is missing or wrong: send `Authorization: Bearer KEY`.",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return f"key {matches.index(True)}"

    async def _read(self, parts: list[bytes], headers: Headers, receive: Receive) -> None:
        """Read the body into `parts`, within the limits.

        Raises:
            RefusalError: if it is too large or too slow, or there are too many large ones.
        """
        most = self._limits.body_bytes
        declared = headers.get("content-length", "0")
        if declared.isdigit() and (len(declared) > 18 or int(declared) > most):
            raise _too_large(most)
        size = 0
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise RefusalError(400, "the connection ended within the request.", code="disconnected")
                    piece = message.get("body", b"")
                    size += len(piece)
                    if size > most:
                        raise _too_large(most)
                    self._hold(parts, piece)
                    if not message.get("more_body", False):
                        return
        except TimeoutError as error:
            raise RefusalError(
                _TOO_SLOW,
                f"the request's body took more than {self._limits.body_seconds:g} seconds: send it faster.",
                code="timeout",
                headers={"connection": "close"},
            ) from error

    def _hold(self, parts: list[bytes], piece: bytes) -> None:
        if self.held_bytes + len(piece) > self._limits.bodies_bytes:
            message = "too many large requests are in work: try again later."
            headers = {"retry-after": "1", "connection": "close"}
            raise RefusalError(429, message, code="rate_limit_exceeded", headers=headers)
        self.held_bytes += len(piece)
        parts.append(piece)

    def _cors(self, headers: Headers) -> list[tuple[bytes, bytes]]:
        origin = headers.get("origin")
        if origin is None or origin not in self._access.origins:
            return []
        return [
            (b"access-control-allow-origin", origin.encode("latin-1")),
            (b"access-control-expose-headers", b"Retry-After"),
            (b"vary", b"Origin"),
        ]


async def _discard(receive: Receive, most: int) -> None:
    """Read on for a moment: a client that is cut off while it sends does not read why."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_SECONDS):
            while most > 0:
                message = await receive()
                most -= len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


def _draining() -> RefusalError:
    message = "the server is shutting down: ask another one, or this one again later."
    return RefusalError(503, message, code="shutting_down", headers={"retry-after": "1", "connection": "close"})


def _too_large(most: int) -> RefusalError:
    message = f"a request's body may have {most} bytes: send less."
    return RefusalError(413, message, code="request_too_large", headers={"connection": "close"})


def _response(refusal: RefusalError) -> Response:
    return JSONResponse(refusal.body, refusal.status, refusal.headers)


def _preflight(headers: Headers) -> Response:
    """Return what tells a browser that the page of an allowed origin may send its request, with what headers it has.

    OpenAI's client for browsers sends a dozen of its own beside the key.
    """
    allowed = {"access-control-allow-methods": "GET, POST", "access-control-max-age": "600"}
    if "access-control-request-headers" in headers:
        allowed["access-control-allow-headers"] = headers["access-control-request-headers"]
    return Response(status_code=204, headers=allowed)


def _replayed(body: bytes, receive: Receive) -> Callable[[], "asyncio.Future[Message]"]:
    """Return a `receive` that tells the body at once, and then what the client does."""
    has_told = False

    async def replay() -> Message:
        nonlocal has_told
        if has_told:
            return await receive()
        has_told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay  # type: ignore[return-value]


def route_of(path: str) -> str:
    """Return the route that a path belongs to: nothing else of a path is logged or counted."""
    if path.startswith("/v1/models/"):
        return "/v1/models/{id}"
    if is_page(path):
        return PAGE
    return path if path in ROUTES else "other"
