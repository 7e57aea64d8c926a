"""Text of one request on its way out: whole characters, and nothing that may be the beginning of a stop string."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from fanformer.generation.decoding import Decoder, TextDecoder


class StopStrings:
    """Finds the first stop string in text that comes in pieces, however it is cut."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Look for `stops`, none of them empty."""
        assert all(stops), "an empty stop string would stop before the first character"
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._pending = ""
        self.found: str | None = None
        """The stop string that ended the text."""

    def push(self, piece: str) -> str:
        """Take the next piece and return what surely belongs to the text.

        Where a stop string is complete, `found` is it, and the text ends before it. Of several, the one that is
        complete first counts, and of those the longest.
        """
        text = self._pending + piece
        best: tuple[int, int] | None = None
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0 and (best is None or (start + len(stop), start) < best):
                best = start + len(stop), start
        if best is not None:
            end, start = best
            self.found, self._pending = text[start:end], ""
            return text[:start]
        held = self._held(text)
        self._pending = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """Return what was held back: no stop string comes any more."""
        rest, self._pending = self._pending, ""
        return rest

    def _held(self, text: str) -> int:
        """Return the length of the longest end of `text` with which a stop string begins."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[len(text) - length :]
            if any(len(stop) > length and stop.startswith(end) for stop in self._stops):
                return length
        return 0


@dataclass(frozen=True)
class Token:
    """A token with its probability."""

    id: int
    log_probability: float | None
    """In nats, of the model before any filter; None for the first of a text, which nothing stands before."""
    likeliest: tuple[tuple[int, float], ...] = ()
    """Ids that were likeliest in its place, best first, with theirs."""


@dataclass(frozen=True)
class Written:
    """What a token added to the text that may go out."""

    text: str
    tokens: tuple[Token, ...]
    """Those whose text begins in what has gone out by now."""
    offsets: tuple[int, ...]
    """In characters of the new text, where each of them begins."""


class OutgoingText:
    """The new text of one request, from its tokens; each leaves with its text, and those of a stop string never."""

    def __init__(self, tokenizer: Decoder, prompt_ids: Sequence[int], beginning: str, stops: Sequence[str]) -> None:
        """Begin.

        Args:
            tokenizer: of the model.
            prompt_ids: what stands before.
            beginning: what the new text begins with and is left out: it belongs to the prompt.
            stops: strings that end the text and are left out.
        """
        self._decoder = TextDecoder(tokenizer, list(prompt_ids))
        self._skip = len(beginning)
        self._stops = StopStrings(stops)
        self._decoded = self._sent = 0  # characters, without the beginning
        self._waiting: deque[tuple[int, Token]] = deque()

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended the text."""
        return self._stops.found is not None

    def push(self, token: Token) -> Written:
        """Take the next token; return what can go out."""
        self._waiting.append((self._decoded, token))
        return self._send(self._stops.push(self._taken(self._decoder.push(token.id))))

    def finish(self) -> Written:
        """Return what was held back, where no stop string ended the text."""
        if self.stopped:
            return Written("", (), ())
        text = self._stops.push(self._taken(self._decoder.finish()))
        return self._send(text if self.stopped else text + self._stops.finish(), ending=not self.stopped)

    def _taken(self, piece: str) -> str:
        left_out = min(self._skip, len(piece))
        self._skip -= left_out
        piece = piece[left_out:]
        self._decoded += len(piece)
        return piece

    def _send(self, text: str, ending: bool = False) -> Written:
        self._sent += len(text)
        tokens, offsets = [], []
        # a token without text yet may be the first bytes of a character: it leaves with what follows it
        while self._waiting and (ending or self._waiting[0][0] < self._sent):
            offset, token = self._waiting.popleft()
            tokens.append(token)
            offsets.append(offset)
        return Written(text, tuple(tokens), tuple(offsets))
