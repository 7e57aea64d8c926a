"""What writes text, whatever it runs on: prompts in, completions out; torch-free."""

import hashlib
import math
import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from fanformer.errors import ConfigError, did_you_mean
from fanformer.generation.decoding import Decoder, decode_new
from fanformer.generation.interruption import Interruption
from fanformer.generation.settings import GenerationSettings

if TYPE_CHECKING:
    from fanformer.data.conversations.chatml import ChatML


@dataclass(frozen=True)
class Completion:
    """One continued prompt."""

    prompt: str
    text: str
    """The continuation alone."""
    tokens: int
    """New tokens, the end token included."""
    finish_reason: Literal["end", "length", "interrupted"]
    tokens_per_second: float
    """New tokens of this prompt over the seconds that its batch took."""
    seed: int
    """The seed that was used, given or drawn."""


@dataclass
class Remembered:
    """What a model has read and written, kept so that a text with the same beginning goes on from there."""

    ids: list[int] = field(default_factory=list)
    """The tokens whose keys and values are kept."""
    kept: Any = None
    """Where they are: a cache of torch, or which text of the ggml engine's they belong to."""
    media: tuple[str, ...] = ()
    """What tells apart the pictures and recordings among them."""

    def take(self, ids: Sequence[int]) -> tuple[int, Any]:
        """Return how many of `ids` need not be read again, and where they are; nothing is remembered until told anew.

        The last token always has to be read: what follows it is asked for.
        """
        known, kept = self.ids, self.kept
        self.ids, self.kept = [], None
        limit = min(len(known), len(ids) - 1)
        shared = next((index for index in range(limit) if known[index] != ids[index]), limit)
        return (shared if kept is not None else 0), kept

    def forget(self) -> None:
        """Remember nothing, so that all is read again."""
        self.ids, self.kept, self.media = [], None, ()

    def keep(self, row: Sequence[int], new: Sequence[int], length: int, kept: Any) -> None:
        """Remember a text that was continued.

        Args:
            row: the tokens that were there.
            new: those written after them.
            length: how many of all these the model has read.
            kept: where they are.
        """
        self.ids, self.kept = [*row, *new][:length], kept


@dataclass(frozen=True)
class Batch:
    """Prompts that are continued together, and how."""

    rows: Sequence[list[int]]
    """Their token ids; a single one where there is `on_text` or `remembered`."""
    beginnings: Sequence[str]
    """What the text of each row's first new token must begin with."""
    settings: GenerationSettings
    """Lengths and sampling."""
    on_text: Callable[[str], None] | None
    """Is handed the text as it comes."""
    interruption: Interruption
    """Ends all rows when requested."""
    remembered: Remembered | None = None
    """What was read before, and takes over what is read now."""
    seeds: Sequence[int] = ()
    """Of each row's random numbers."""
    media: Sequence[Sequence[Any]] = ()
    """Pictures and recordings of each row, for a model with towers; nothing where no row has some."""


class Score(NamedTuple):
    """How likely a text is."""

    log_likelihood: float
    """Of its tokens behind those before them, in nats."""
    tokens: int
    """How many were scored."""
    bits_per_byte: float
    """The same in bits, over the UTF-8 bytes of the text; nan for an empty one."""


class TextModel(ABC):
    """A language model that writes and scores text: a folder on torch or a GGUF file on ggml.

    Several threads may ask it, and a stream may be half read while others are: texts are computed one after the other.

    Attributes:
        tokenizer: turns text into token ids and back.
        positions: how many tokens a text may have, its start token included; None is without limit.
        end_ids: tokens that end a text.
        own_sampling: fields of `GenerationSettings` that its folder or file asks for.
    """

    tokenizer: Any
    positions: int | None
    end_ids: Sequence[int]
    own_sampling: Mapping[str, Any]

    def __init__(self) -> None:
        self._lock, self._holder = threading.Lock(), 0
        self.own_sampling = {}

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Let this thread alone compute within the `with` block; another one waits for its turn.

        Raises:
            ConfigError: if this thread computes already, and would wait for itself.
        """
        if self._holder == threading.get_ident():
            raise ConfigError("a model must not be asked while it writes, got a call from `on_text`: ask afterwards.")
        with self._lock:
            try:
                self._holder = threading.get_ident()
                yield
            finally:
                self._holder = 0

    @property
    def num_steps(self) -> int | None:
        """How many steps of a recurrent depth it takes; None for a model without."""
        return None

    @property
    def depth_note(self) -> str | None:
        """What a command says of the depth where nobody chose one; None for a model without recurrent depth."""
        return None

    @abstractmethod
    def encode(self, prompt: str) -> list[int]:
        """Return the token ids of `prompt`, the start token in front; what looks like a special token is plain text.

        Raises:
            ConfigError: if the prompt is not valid Unicode, or the tokenizer has no token to start a text with.
        """

    @abstractmethod
    def continue_batch(self, batch: Batch) -> list[list[int]]:
        """Return the new token ids of each row, up to an end token, which is included, or the longest length."""

    @abstractmethod
    def log_likelihoods(self, ids: Sequence[int]) -> list[float]:
        """Return the log-probability in nats of every token of `ids` but the first, given those before it."""

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer knows how a conversation is written."""
        return bool(self.tokenizer.chat_template)

    @cached_property
    def chatml(self) -> "ChatML | None":
        """What encodes conversations where the chat template is ChatML, as training does; None where it is not."""
        from fanformer.data.conversations.chatml import chatml_of  # a text that is continued needs none of it

        return chatml_of(self.tokenizer)

    def encode_messages(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the ids of a conversation whose next answer is to be written.

        Args:
            messages: `role` and `content` of each. Under a ChatML template a control token that one spells is text.

        Raises:
            CheckpointError: if the template of a GGUF file refuses the messages.
        """
        from fanformer.data.conversations.chatml import encode_messages

        return encode_messages(self.tokenizer, self.chatml, messages)

    def settings(self, **sampling: Any) -> GenerationSettings:
        """Return how a text is drawn: as is given here, else as the model asks, else by `GenerationSettings`' defaults.

        Args:
            **sampling: fields of `GenerationSettings`.

        Raises:
            ConfigError: if there is no such field, or a value is out of its range.
        """
        known = [one.name for one in fields(GenerationSettings)]
        for name in sampling:
            if name not in known:
                raise ConfigError(f"no setting `{name}`: {did_you_mean(name, known)}")
        return GenerationSettings(**{**self.own_sampling, **sampling})

    @overload
    def generate(self, prompt: str, **sampling: Any) -> str: ...
    @overload
    def generate(self, prompt: Sequence[str], **sampling: Any) -> list[str]: ...
    def generate(self, prompt: str | Sequence[str], **sampling: Any) -> str | list[str]:
        """Continue a prompt, or several, and return what was written after each.

        Args:
            prompt: a text or several.
            **sampling: as for `settings`, such as `seed=1` or `max_length=50`.

        Raises:
            ConfigError: as `complete`, or if a field of the settings is wrong.
        """
        one = isinstance(prompt, str)
        found = [done.text for done in self.complete([prompt] if one else prompt, self.settings(**sampling))]  # type: ignore[list-item]
        return found[0] if one else found

    def stream(self, prompt: str, **sampling: Any) -> Iterator[str]:
        """Continue a prompt and yield what is written, piece by piece; closing the iterator stops the text.

        It is written whether or not it is read, and other calls wait until then.

        Args:
            prompt: a text.
            **sampling: as for `generate`.

        Raises:
            ConfigError: as `generate`.
        """
        return self._pieces(prompt, self.settings(**sampling))

    def _pieces(self, prompt: str, settings: GenerationSettings) -> Iterator[str]:
        """Yield what another thread writes."""
        interruption, pieces = Interruption(), SimpleQueue[str | BaseException | None]()

        def write() -> None:
            try:
                list(self.complete([prompt], settings, pieces.put, interruption=interruption))
            except BaseException as error:  # raised again where the pieces are read
                pieces.put(error)
            pieces.put(None)

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            interruption.request()
            writer.join()

    def score(self, text: str, prompt: str = "") -> Score:
        """Return how likely `text` is after `prompt`.

        The two are encoded by themselves and joined, with a start token in front.

        Raises:
            ConfigError: if both together are longer than the model's positions, or no valid Unicode.
        """
        before = self.encode(prompt)
        ids = self.encode(text)[1:]
        if self.positions is not None and len(before) + len(ids) > self.positions:
            raise ConfigError(
                f"prompt and text have {len(before) + len(ids)} tokens with the start token, and the model has "
                f"{self.positions} positions: score it in parts."
            )
        total = sum(self.log_likelihoods([*before, *ids])[len(before) - 1 :]) if ids else 0.0
        num_bytes = len(text.encode())
        return Score(total, len(ids), -total / num_bytes / math.log(2) if num_bytes else float("nan"))

    def complete(
        self,
        prompts: Sequence[str],
        settings: GenerationSettings,
        on_text: Callable[[str], None] | None = None,
        *,
        batch_size: int = 8,
        interruption: Interruption | None = None,
    ) -> Iterator[Completion]:
        """Continue every prompt, batch by batch, and say what became of each.

        Args:
            prompts: the texts; an empty one begins a new text.
            settings: lengths and sampling.
            on_text: is handed the text of a single prompt as it comes, the prompt left out.
            batch_size: prompts that are continued together.
            interruption: ends the texts early when requested; prompts not begun are then left out.

        Raises:
            ConfigError: if a prompt and its continuation are longer than the model's positions, if a prompt is no
                valid text, if the tokenizer has no start token, if several prompts are to be streamed, if `batch_size`
                is below 1, or if torch cannot compile here.
            CheckpointError: if the model computes values that are no numbers.
        """
        check_batches(len(prompts), on_text is not None, batch_size)
        encoded = [self.encode(prompt) for prompt in prompts]
        for prompt, ids in zip(prompts, encoded, strict=True):
            check_length(self.positions, prompt, ids, settings.max_length)
        cut = [withhold_spaces(self.tokenizer, ids) for ids in encoded]
        rows, spaces = [ids for ids, _ in cut], [withheld for _, withheld in cut]
        whole = Batch(rows, spaces, settings, on_text, interruption or Interruption())
        return self._in_batches(prompts, whole, batch_size)

    def complete_ids(
        self,
        ids: list[int],
        prompt: str,
        settings: GenerationSettings,
        on_text: Callable[[str], None] | None = None,
        *,
        interruption: Interruption | None = None,
        remembered: Remembered | None = None,
        media: Sequence[Any] = (),
    ) -> Completion:
        """Continue a text that is token ids already; `prompt` is what the completion calls it.

        With `remembered` it is read from where it differs from the text before it; `media` are its pictures
        and recordings, for a model with towers.
        """
        whole = Batch([ids], [""], settings, on_text, interruption or Interruption(), remembered, media=[media])
        return next(self._in_batches([prompt], whole, 1))

    def _in_batches(self, prompts: Sequence[str], whole: Batch, batch_size: int) -> Iterator[Completion]:
        """Continue the rows of `whole`, so many at a time; they lack the beginnings that their new text has to have."""
        settings = whole.settings
        seed = secrets.randbits(32) if settings.seed is None else settings.seed
        for start in range(0, len(prompts), batch_size):
            if whole.interruption.requested:
                return
            part = slice(start, start + batch_size)
            seeds = [row_seed(seed, index) for index in range(len(prompts))[part]]
            rows, beginnings, media = whole.rows[part], whole.beginnings[part], whole.media[part]
            batch = replace(whole, rows=rows, beginnings=beginnings, seeds=seeds, media=media)
            began = time.perf_counter()
            outputs = self.continue_batch(batch)
            seconds = time.perf_counter() - began
            for prompt, row, beginning, new in zip(prompts[part], batch.rows, batch.beginnings, outputs, strict=True):
                ended = bool(new) and new[-1] in self.end_ids
                cut_short = whole.interruption.requested and len(new) < settings.max_length
                yield Completion(
                    prompt=prompt,
                    text=decode_new(self.tokenizer, row, new)[len(beginning) :],
                    tokens=len(new),
                    finish_reason="end" if ended else "interrupted" if cut_short else "length",
                    tokens_per_second=len(new) / seconds,
                    seed=seed,
                )


def depth_note(num_steps: int, largest: int) -> str:
    """Return the line with which a command says that it takes the mean of training."""
    return (
        f"recurrent depth: {num_steps} steps, the mean that the model was trained with (--num-steps 1 to {largest} "
        "takes others)."
    )


def check_batches(count: int, streams: bool, batch_size: int) -> None:
    """Raise ConfigError if so many prompts cannot be streamed, or not be continued so many at a time."""
    if streams and count != 1:
        raise ConfigError(f"`on_text` streams the text of one prompt, got {count}: call once for each.")
    if batch_size < 1:
        raise ConfigError(f"`batch_size` must be at least 1, got {batch_size}.")


def check_text(prompt: str) -> None:
    """Raise ConfigError if the prompt is not valid Unicode."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"a prompt must be valid UTF-8, got {prompt[:40]!r}.") from error


def check_length(positions: int | None, prompt: str, ids: list[int], max_length: int) -> None:
    """Raise ConfigError if a prompt and its continuation are longer than the model's positions."""
    if positions is None or len(ids) + max_length <= positions:
        return
    shown = prompt if len(prompt) <= 30 else prompt[:27] + "..."
    room = positions - len(ids)
    remedy = f"lower max_length to {room}" if room > 0 else f"shorten the prompt to fewer than {positions} tokens"
    raise ConfigError(
        f"prompt {shown!r} has {len(ids)} tokens with its start token, and max_length {max_length} more make "
        f"{len(ids) + max_length}; the model has {positions} positions: {remedy}."
    )


def withhold_spaces(tokenizer: Decoder, ids: list[int]) -> tuple[list[int], str]:
    """Return `ids` without a last token that is nothing but spaces, and those spaces; a start token stays."""
    text = tokenizer.decode(ids[-1:], clean_up_tokenization_spaces=False)
    if len(ids) > 1 and text and not text.strip(" "):
        return ids[:-1], text
    return ids, ""


def excluded_first(tokenizer: Decoder, beginning: str, known: int) -> NDArray[np.bool_] | None:
    """Return which of the first `known` ids cannot be the first new token: those whose text begins otherwise.

    Args:
        tokenizer: of the model.
        beginning: what the text must begin with, such as the spaces that `withhold_spaces` took.
        known: how many ids there are.

    Returns:
        (known) bool, or None where `beginning` is empty.
    """
    if not beginning:
        return None
    texts = (tokenizer.decode([number], clean_up_tokenization_spaces=False) for number in range(known))
    return np.array([not text.startswith(beginning) for text in texts])


def row_seed(seed: int, index: int) -> int:
    """Return the seed of the prompt at place `index`, so that equal prompts of one call get different texts."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=7).digest(), "big")
