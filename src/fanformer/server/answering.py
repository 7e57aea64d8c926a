"""A planned request on its way through the scheduler, seen from HTTP: its events, its time limit, its client."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fanformer.errors import ConfigError
from fanformer.server.models import ServedModel
from fanformer.server.planning import Plan
from fanformer.server.refusal import RefusalError, error_object, invalid
from fanformer.server.scheduler import (
    ClosedError,
    Event,
    Failure,
    Finish,
    Listener,
    PromptScores,
    QueueFullError,
    Scheduler,
    Ticket,
    Written,
)
from fanformer.server.wire import Answer, Wire, event

_PING_SECONDS = 15.0
_MOST_RETRY_SECONDS = 60
Result = TypeVar("Result")


class ClientGoneError(Exception):
    """Nobody is there any more to answer."""


class Answering:
    """The answers of one HTTP request; `cancel` frees their slots."""

    def __init__(self, model: ServedModel, plan: Plan, is_chat: bool, seconds: float, client: str) -> None:
        """Queue the requests.

        Args:
            model: that answers.
            plan: what was asked.
            is_chat: which shape the answer has.
            seconds: most that it may take, waiting included.
            client: who asks.

        Raises:
            RefusalError: if there is no room in the queue, or the server is shutting down.
        """
        self.wire = Wire(model, plan, is_chat)
        self._plan = plan
        self._deadline = time.monotonic() + seconds
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def listener(index: int) -> Listener:
            def listen(told: Event) -> None:
                loop.call_soon_threadsafe(self._events.put_nowait, (index, told))

            return listen

        listeners = [listener(index) for index in range(len(plan.requests))]
        self._tickets = _submit(model.scheduler, plan, listeners, client)
        self._begun: set[int] = set()

    def cancel(self) -> None:
        """Free the slots; what is finished stays so."""
        for ticket in self._tickets:
            ticket.cancel()

    async def parts(self) -> AsyncIterator[tuple[int, Answer] | None]:
        """Yield what came of which answer, and None where nothing came for a while; the last part has its finish.

        Raises:
            RefusalError: if an answer failed, or all took too long.
        """
        missing, sizes = len(self._plan.requests), [0] * len(self._plan.requests)
        while missing:
            told = await self._next()
            if told is None:
                yield None
                continue
            index, what = told
            part = Answer()
            if index not in self._begun:
                self._begun.add(index)
                if self._plan.echo:
                    self._echo(part, index, what)
                    sizes[index] = len(part.text)
            if isinstance(what, Written):
                part.text += what.text
                part.tokens += what.tokens
                part.offsets += [sizes[index] + offset for offset in what.offsets]
            elif isinstance(what, Finish):
                part.finish = what
                missing -= 1
            elif isinstance(what, Failure):
                raise _shutting_down(what.message) if what.closing else RefusalError(500, what.message, code="failed")
            yield index, part

    def _echo(self, part: Answer, index: int, what: Event) -> None:
        """Put the prompt, and its tokens where they were scored, into the first part of an answer."""
        part.text = self._plan.prompts[index // self._plan.drawn]
        if isinstance(what, PromptScores):
            part.tokens += what.tokens
            part.offsets += self.wire.prompt_offsets(part.text, [token.id for token in what.tokens])

    async def _next(self) -> tuple[int, Event] | None:
        left = self._deadline - time.monotonic()
        if left <= 0:  # not 503, after which routers try another replica, as clients would: all are as busy
            raise RefusalError(
                504,
                "the answer took too long: ask for fewer tokens, or try again later.",
                code="timeout",
                headers={"x-should-retry": "false"},
            )
        getting = asyncio.ensure_future(self._events.get())
        try:
            await asyncio.wait({getting}, timeout=min(left, _PING_SECONDS))
            return getting.result() if getting.done() else None
        finally:
            getting.cancel()

    async def whole(self) -> dict[str, Any]:
        """Return the response that is no stream.

        Raises:
            RefusalError: as `parts`.
        """
        answers = [Answer() for _ in self._plan.requests]
        try:
            async for told in self.parts():
                if told is not None:
                    index, part = told
                    answers[index].text += part.text
                    answers[index].tokens += part.tokens
                    answers[index].offsets += part.offsets
                    answers[index].finish = part.finish
        finally:
            self.cancel()
        usage = self.wire.usage([answer.finish for answer in answers if answer.finish is not None])
        return self.wire.whole(self._best(answers), usage)

    def _best(self, answers: Sequence[Answer]) -> list[Answer]:
        drawn, told = self._plan.drawn, self._plan.told
        if drawn == told:
            return list(answers)
        groups = [answers[start : start + drawn] for start in range(0, len(answers), drawn)]
        return [
            answer
            for group in groups
            for answer in sorted(group, key=lambda one: one.mean_log_probability, reverse=True)[:told]
        ]

    async def stream(self) -> AsyncIterator[bytes]:
        """Yield the events of the stream; what goes wrong on the way is an event too."""
        finishes: dict[int, Finish] = {}
        opened: set[int] = set()
        try:
            async for told in self.parts():
                if told is None:
                    yield b": ping\n\n"
                    continue
                index, part = told
                opening = self.wire.opening(index) if index not in opened else None
                opened.add(index)
                if opening is not None:
                    yield event(opening)
                if part.finish is not None:
                    finishes[index] = part.finish
                if part.text or part.tokens or part.finish is not None:
                    yield event(self.wire.piece(index, part))
            if self._plan.include_usage:
                usage = self.wire.usage([finishes[index] for index in sorted(finishes)])
                yield event(self.wire.usage_chunk(usage))
        except RefusalError as refusal:
            yield event({"error": error_object(refusal.status, str(refusal), refusal.param, refusal.code)})
        finally:
            self.cancel()
        yield event("[DONE]")


def _submit(scheduler: Scheduler, plan: Plan, listeners: Sequence[Listener], client: str) -> list[Ticket]:
    most = scheduler.most_of_a_client
    if len(plan.requests) > most:
        raise invalid(
            f"a request may have {most} answers here, got {len(plan.requests)}: send fewer prompts.", "prompt"
        )
    with refused_in_http(scheduler):
        return scheduler.submit(plan.requests, listeners, client)


@contextmanager
def refused_in_http(scheduler: Scheduler) -> Iterator[None]:
    """Let what the scheduler refuses within the `with` block be a RefusalError."""
    try:
        yield
    except QueueFullError as error:
        headers = {"retry-after": str(retry_seconds(scheduler))}
        raise RefusalError(429, str(error), code="rate_limit_exceeded", headers=headers) from error
    except ClosedError as error:
        raise _shutting_down(str(error)) from error
    except ConfigError as error:
        raise invalid(str(error)) from error


def _shutting_down(message: str) -> RefusalError:
    return RefusalError(503, message, code="shutting_down", headers={"retry-after": "1"})


def retry_seconds(scheduler: Scheduler) -> int:
    """Return after how long there may be room: what a request took of a slot's time so far, at least a second."""
    done = sum(scheduler.counters.finished.values())
    seconds = scheduler.counters.busy_seconds / done if done else 1.0
    return max(1, min(_MOST_RETRY_SECONDS, math.ceil(seconds)))


async def unless_gone(request: HTTPRequest, work: Coroutine[Any, Any, Result]) -> Result:
    """Return what `work` does, unless the client hangs up first: then it is cancelled.

    Raises:
        ClientGoneError: if it was.
    """
    return await _until_gone(request.receive, work)


async def _until_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        for task in (working, watching):
            if not task.done():
                task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A response of server-sent events that ends when the client does."""

    media_type = "text/event-stream"

    def __init__(self, answering: Answering) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._answering = answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events, or stop where the client hangs up."""
        try:
            await _until_gone(receive, self._send(send))
        except ClientGoneError:
            pass
        finally:
            self._answering.cancel()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for piece in self._answering.stream():
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
