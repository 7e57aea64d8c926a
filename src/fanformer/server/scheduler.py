"""Requests that share a model's steps: each joins and leaves at any token, and none waits for another to end.

Slots are shared among clients too: they take turns, and none has two more than another who waits.

One thread computes. A step takes one token of every text that is being written, then a piece of one prompt that is
being read, in order of arrival: a long prompt delays the others by a piece at a time. What a slot still holds of the
text before is not read again where the next text begins the same way.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fanformer.errors import CheckpointError, ConfigError, FANformerError
from fanformer.generation.sampling import (
    Floats,
    Sampling,
    TokenSampler,
    check_numbers,
    likeliest,
    log_probabilities,
)
from fanformer.generation.text_model import excluded_first
from fanformer.server.refusal import log_failure
from fanformer.server.slots import Shown, Slots
from fanformer.server.stopping import OutgoingText, Token, Written

_LEAST_SHARED = 8
"""Tokens that a slot's text must share with a new one before that slot is preferred to the first free one."""
_FAILURES = 3
"""Steps that fail one after another before the scheduler calls itself broken."""
_BROKEN_SECONDS = 30.0
"""That it does, after the last of them: then it asks to be tried, or whoever looks before asking never came back."""
_INTERNAL = "internal error: see the server's log"
_log = logging.getLogger("fanformer.server")


class QueueFullError(FANformerError, RuntimeError):
    """As many requests wait as may."""


class ClosedError(FANformerError, RuntimeError):
    """The scheduler takes no requests any more."""


@dataclass(frozen=True)
class Request:
    """A text to continue."""

    ids: list[int]
    """Its tokens, at least one."""
    max_tokens: int
    """Most new tokens; with 0 the text is only read."""
    sampling: Sampling = field(default_factory=Sampling)
    stops: tuple[str, ...] = ()
    beginning: str = ""
    """What the new text must begin with, and is left out of what is written."""
    likeliest: int | None = None
    """How many of the likeliest ids to tell with each token's log-probability; None tells neither."""
    scores_prompt: bool = False
    """Whether to tell the log-probabilities of the prompt's tokens too."""
    num_steps: int | None = None
    """How often a recurrent depth runs its core; None is as usual. Only where the slots have `steps`."""
    shown: Shown | None = None
    """Pictures and recordings, at whose places `ids` have any id. Only where the slots take them."""

    @cached_property
    def names(self) -> list[int]:
        """What tells its tokens apart from those of others: only where these are the same is computed work shared."""
        return self.ids if self.shown is None else self.shown.named(self.ids)


@dataclass(frozen=True)
class PromptScores:
    """Log-probabilities of a prompt's tokens; told before any new text."""

    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Finish:
    """The last event of a request that went well."""

    reason: Literal["stop", "length"]
    completion_tokens: int
    """New tokens, the end token included."""
    cached_tokens: int
    """Tokens of the prompt that a slot still held."""
    log_probability: float
    """Of all new tokens, where the request asked for log-probabilities; else 0."""


@dataclass(frozen=True)
class Failure:
    """The last event of a request that did not."""

    message: str
    closing: bool = False
    """Whether it is only because the scheduler ends: another one could still answer."""


Event = Written | PromptScores | Finish | Failure
Listener = Callable[[Event], None]


@dataclass
class Counters:
    """What has happened so far, for whoever watches."""

    finished: dict[str, int] = field(default_factory=lambda: {"stop": 0, "length": 0, "cancelled": 0, "failed": 0})
    refused: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    steps: int = 0
    first_token_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=512))
    """From arrival to the first token, of the last requests."""
    busy_seconds: float = 0.0


class Ticket:
    """A request that was taken; `cancel` ends it."""

    def __init__(self, request: Request, listener: Listener, client: str) -> None:
        self.request, self.client, self._listener = request, client, listener
        self.arrived = time.monotonic()
        self.cancelled = False
        self.slot = -1
        self.read = self.cached = self.written = 0
        self.log_probability = 0.0
        self.next: int | None = None
        self.prompt: list[Token] = [Token(request.ids[0], None)]
        self.sampler: TokenSampler
        self.text: OutgoingText

    def cancel(self) -> None:
        """End the request after the step in work; nothing is told any more. Any thread may call it, at any time."""
        self.cancelled = True

    def tell(self, event: Event) -> None:
        """Hand an event over, unless nobody wants to hear any more."""
        if self.cancelled:
            return
        try:
            self._listener(event)
        except Exception:  # whoever listened is gone: that ends this request and no other
            _log.warning("a listener failed: its request is cancelled")
            self.cancelled = True


class Scheduler:
    """Shares a model's slots among requests."""

    def __init__(
        self,
        slots: Slots,
        tokenizer: Any,
        known: int,
        end_ids: Sequence[int],
        queue_size: int = 256,
        never: Sequence[int] = (),
    ) -> None:
        """Start computing in a thread.

        Args:
            slots: nobody else's from now on.
            tokenizer: of the model.
            known: how many ids it has.
            end_ids: what ends a text.
            queue_size: most requests that wait for a slot.
            never: ids that are never drawn.
        """
        self.slots, self.known, self.queue_size = slots, known, queue_size
        self.counters = Counters()
        self._tokenizer, self._end_ids, self._never = tokenizer, list(end_ids), list(never)
        self._changed = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._active: dict[int, Ticket] = {}
        self._turns: dict[str, int] = {}
        self._held: list[list[int]] = [[] for _ in range(slots.count)]
        self._begins: dict[str, NDArray[np.bool_] | None] = {}
        self._closed = False
        self._failures, self._failed_at = 0, 0.0
        self._thread = threading.Thread(target=self._run, name="fanformer-scheduler", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many requests wait for a slot."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many requests have a slot."""
        return len(self._active)

    @property
    def is_healthy(self) -> bool:
        """Whether steps work, as far as is known, and there is a thread to take them."""
        is_broken = self._failures >= _FAILURES and time.monotonic() < self._failed_at + _BROKEN_SECONDS
        return self._thread.is_alive() and not is_broken

    @property
    def most_of_a_client(self) -> int:
        """Requests that one client may have here: a quarter of the queue is kept for the others."""
        return self.slots.count + self.queue_size - self.queue_size // 4

    def submit(self, requests: Sequence[Request], listeners: Sequence[Listener], client: str = "") -> list[Ticket]:
        """Queue requests, all or none of them.

        Args:
            requests: texts to continue.
            listeners: for each, who hears its events, in the computing thread: must not block.
            client: who asks; clients take turns.

        Raises:
            ConfigError: if one has no tokens, more than there are positions for, or unknown ones.
            QueueFullError: if there is no room in the queue.
            ClosedError: after `close`.
        """
        for request in requests:
            self._check(request)
        tickets = [Ticket(request, listener, client) for request, listener in zip(requests, listeners, strict=True)]
        with self._changed:
            self.check_room(len(tickets), client)
            self._waiting.extend(tickets)
            self._changed.notify()
        return tickets

    def check_room(self, count: int = 1, client: str = "") -> None:
        """Raise what `submit` raises where there is no room for so many requests of a client now."""
        if self._closed:
            raise ClosedError("the server is shutting down: ask another one.")
        with self._changed:
            known = [*self._waiting, *self._active.values()]
        held = sum(ticket.client == client for ticket in known)
        if count > self.queue_size + self.slots.count - len(known):
            self.counters.refused += count
            raise QueueFullError(f"{len(known)} answers are in work or wait already: try again later.")
        if held + count > self.most_of_a_client:
            self.counters.refused += count
            raise QueueFullError(
                f"a client may have {self.most_of_a_client} answers in work, {held} are: try again later."
            )

    def _check(self, request: Request) -> None:
        ids, positions = request.ids, self.slots.positions
        if not ids or request.max_tokens < 0:
            raise ConfigError(f"a request needs at least one token and `max_tokens` 0 or more, got {len(ids)} tokens.")
        if len(ids) + request.max_tokens > positions:
            raise ConfigError(
                f"the prompt has {len(ids)} tokens and max_tokens {request.max_tokens} more make "
                f"{len(ids) + request.max_tokens}, expected at most {positions}: shorten one of them."
            )
        if not 0 <= min(ids) <= max(ids) < self.known:
            raise ConfigError(f"token ids must be in [0, {self.known}), got {min(ids)} to {max(ids)}.")

    def close(self, timeout_seconds: float = 30.0) -> None:
        """End all requests and the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout_seconds)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._closed or self._waiting or self._active):
                    self._changed.wait()
                if self._closed:
                    break
                self._drop_cancelled()
                self._admit()
            if self._active:
                self._step()
        for ticket in [*self._active.values(), *self._waiting]:
            ticket.tell(Failure("the server is shutting down: ask another one.", closing=True))
        self._active.clear()
        self._waiting.clear()
        self.slots.close()

    def _drop_cancelled(self) -> None:
        for ticket in [one for one in self._active.values() if one.cancelled]:
            self._release(ticket, "cancelled")
        kept = deque(one for one in self._waiting if not one.cancelled)
        self.counters.finished["cancelled"] += len(self._waiting) - len(kept)
        self._waiting = kept

    def _admit(self) -> None:
        while self._waiting and len(self._active) < self.slots.count:
            ticket = self._next_in_turn()
            self._waiting.remove(ticket)
            try:
                self._seat(ticket)
            except Exception as error:  # ends this request, and not the thread with all others
                log_failure(_log, "a request failed", error)
                ticket.tell(Failure(_INTERNAL))
                self.counters.finished["failed"] += 1

    def _next_in_turn(self) -> Ticket:
        """Return what waits of the client with the fewest slots; among several, of the one longest without a turn."""
        seated = Counter(ticket.client for ticket in self._active.values())
        chosen = min(self._waiting, key=lambda one: (seated[one.client], self._turns.get(one.client, 0)))
        there = {ticket.client for ticket in self._waiting}
        latest = max(self._turns.values(), default=0)
        self._turns = {client: turn for client, turn in self._turns.items() if client in there}
        self._turns[chosen.client] = latest + 1
        return chosen

    def _seat(self, ticket: Ticket) -> None:
        """Give a request the free slot that holds most of its text already, or else the first free one."""
        request = ticket.request
        free = [slot for slot in range(self.slots.count) if slot not in self._active]
        usual = None if self.slots.steps is None else self.slots.steps.usual
        depth = request.num_steps or usual
        shared = {
            slot: _shared(self._held[slot], request.names) if depth == self.slots.depth(slot) else 0 for slot in free
        }
        best = max(free, key=lambda slot: (shared[slot], -slot))
        ticket.slot = best if shared[best] >= _LEAST_SHARED else free[0]
        keep = 0 if request.scores_prompt else shared[ticket.slot]
        self.slots.cut(ticket.slot, keep)
        del self._held[ticket.slot][keep:]
        if depth is not None:
            self.slots.think(ticket.slot, depth)
        self.slots.show(ticket.slot, request.shown)
        ticket.read = ticket.cached = keep
        noise = self.slots.noise(request.sampling.seed)
        first = self._excluded(request.beginning)
        ticket.sampler = TokenSampler(
            request.sampling, noise, self.known, self._end_ids, request.ids, first, self._never
        )
        ticket.text = OutgoingText(self._tokenizer, request.ids, request.beginning, request.stops)
        self._active[ticket.slot] = ticket
        self.counters.prompt_tokens += len(request.ids)
        self.counters.cached_tokens += keep

    def _excluded(self, beginning: str) -> NDArray[np.bool_] | None:
        """Return what `excluded_first` returns, kept for the next request."""
        if beginning not in self._begins:
            if len(self._begins) >= 64:
                self._begins.clear()
            self._begins[beginning] = excluded_first(self._tokenizer, beginning, self.known)
        return self._begins[beginning]

    def _release(self, ticket: Ticket, outcome: str) -> None:
        del self._active[ticket.slot]
        self.slots.show(ticket.slot, None)
        self.counters.finished[outcome] += 1

    def _step(self) -> None:
        """Write a token of every text, and read a piece of one prompt."""
        began = time.monotonic()
        writing = {slot: [one.next] for slot, one in self._active.items() if one.next is not None}
        reading = min(
            (ticket for ticket in self._active.values() if ticket.next is None),
            key=lambda ticket: ticket.arrived,
            default=None,
        )
        if writing:
            self._compute(writing, False, self._wrote)
        if reading is not None:
            end = min(reading.read + self.slots.chunk_tokens, len(reading.request.ids))
            piece = {reading.slot: reading.request.ids[reading.read : end]}
            self._compute(piece, reading.request.scores_prompt, self._have_read)
        self.counters.steps += 1
        self.counters.busy_seconds += time.monotonic() - began

    def _compute(
        self, tokens: dict[int, list[int]], every: bool, use: Callable[[Ticket, list[int], Floats], None]
    ) -> None:
        """Compute logits, and use those of each slot; what fails ends the requests that it concerns, and no others."""
        try:
            found = self.slots.forward(tokens, every)
        except Exception as error:
            self._failures, self._failed_at = self._failures + 1, time.monotonic()
            log_failure(_log, "a step failed", error)
            for slot in tokens:
                self._fail(self._active[slot], "the model failed to compute: see the server's log")
            return
        self._failures = 0
        for slot, row in tokens.items():
            ticket = self._active[slot]
            names = ticket.request.names[ticket.read : ticket.read + len(row)]
            self._held[slot].extend(row if ticket.next is not None else names)
            try:
                use(ticket, row, found[slot])
            except CheckpointError as error:
                self._fail(ticket, str(error))
            except Exception as error:
                log_failure(_log, "a request failed", error)
                self._fail(ticket, _INTERNAL)

    def _fail(self, ticket: Ticket, message: str) -> None:
        self._held[ticket.slot].clear()
        self.slots.wipe(ticket.slot)
        ticket.tell(Failure(message))
        self._release(ticket, "failed")

    def _have_read(self, ticket: Ticket, row: list[int], logits: Floats) -> None:
        request = ticket.request
        check_numbers(logits[-1])
        if request.scores_prompt:
            self._score_prompt(ticket, logits)
        ticket.read += len(row)
        if ticket.read < len(request.ids):
            return
        if request.scores_prompt:
            ticket.tell(PromptScores(tuple(ticket.prompt)))
        if request.max_tokens == 0:
            self._finish(ticket, "length")
            return
        self.counters.first_token_seconds.append(time.monotonic() - ticket.arrived)
        self._draw(ticket, logits[-1])

    def _score_prompt(self, ticket: Ticket, logits: Floats) -> None:
        """Note how likely the tokens were that follow those just read."""
        ids, start = ticket.request.ids, ticket.read
        following = ids[start + 1 : start + 1 + len(logits)]
        if following:
            scores = log_probabilities(logits[: len(following)])
            ticket.prompt += [self._token(ticket, number, row) for number, row in zip(following, scores, strict=True)]

    def _token(self, ticket: Ticket, number: int, scores: Floats | None) -> Token:
        if scores is None:
            return Token(number, None)
        return Token(number, float(scores[number]), tuple(likeliest(scores, ticket.request.likeliest or 0, self.known)))

    def _wrote(self, ticket: Ticket, row: list[int], logits: Floats) -> None:
        self._draw(ticket, logits[-1])

    def _draw(self, ticket: Ticket, logits: Floats) -> None:
        """Take the next token and tell what it adds; finish where it is the last."""
        request = ticket.request
        number = ticket.sampler.draw(logits)
        scores = None if request.likeliest is None else log_probabilities(logits[None])[0]
        token = self._token(ticket, number, scores)
        ticket.written += 1
        ticket.log_probability += token.log_probability or 0.0
        self.counters.completion_tokens += 1
        written = ticket.text.push(token)
        if written.text or written.tokens:
            ticket.tell(written)
        if number in self._end_ids or ticket.text.stopped:
            self._finish(ticket, "stop")
        elif ticket.written >= request.max_tokens:
            self._finish(ticket, "length")
        else:
            ticket.next = number

    def _finish(self, ticket: Ticket, reason: Literal["stop", "length"]) -> None:
        rest = ticket.text.finish()
        if ticket.text.stopped:  # a stop string was complete only with the last bytes
            reason = "stop"
        if rest.text or rest.tokens:
            ticket.tell(rest)
        ticket.tell(Finish(reason, ticket.written, ticket.cached, ticket.log_probability))
        self._release(ticket, reason)


def _shared(held: Sequence[int], ids: Sequence[int]) -> int:
    """Return how many first tokens of `ids` are held; the last one always has to be read, for what follows it."""
    limit = min(len(held), len(ids) - 1)
    if held[:limit] == ids[:limit]:
        return limit
    return next(index for index in range(limit) if held[index] != ids[index])
