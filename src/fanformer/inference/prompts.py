"""What every way of writing text has in common: prompts, their checks, their seeds, and the result; torch-free."""

import hashlib
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fanformer.errors import ConfigError
from fanformer.inference.decoding import Decoder, decode_new
from fanformer.inference.interruption import Interruption
from fanformer.inference.settings import GenerationSettings


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

    def take(self, ids: Sequence[int]) -> tuple[int, Any]:
        """Return how many of `ids` need not be read again, and where they are; nothing is remembered until told anew.

        The last token always has to be read: what follows it is asked for.
        """
        known, kept = self.ids, self.kept
        self.ids, self.kept = [], None
        limit = min(len(known), len(ids) - 1)
        shared = next((index for index in range(limit) if known[index] != ids[index]), limit)
        return (shared if kept is not None else 0), kept

    def keep(self, row: Sequence[int], new: Sequence[int], length: int, kept: Any) -> None:
        """Remember a text that was continued.

        Args:
            row: the tokens that were there.
            new: those written after them.
            length: how many of all these the model has read.
            kept: where they are.
        """
        self.ids, self.kept = [*row, *new][:length], kept


def check_text(prompt: str) -> None:
    """Raise ConfigError if the prompt is not valid Unicode."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"a prompt must be valid UTF-8, got {prompt[:40]!r}.") from error


def read_prompts(
    prompts: Sequence[str],
    encode: Callable[[str], list[int]],
    tokenizer: Decoder,
    positions: int | None,
    max_length: int,
    *,
    batch_size: int,
    streamed: bool,
) -> tuple[list[list[int]], list[str]]:
    """Return the token ids of every prompt, and the spaces at its end that they leave out.

    Args:
        prompts: the texts.
        encode: returns a prompt's token ids, the start token in front.
        tokenizer: decodes them.
        positions: that the model has, None where it has no limit.
        max_length: most new tokens.
        batch_size: prompts that will be continued together.
        streamed: whether the text is handed over as it comes.

    Raises:
        ConfigError: if a prompt and its continuation are longer than the model's positions, if several prompts are to
            be streamed, or if the batch size is below 1.
    """
    if streamed and len(prompts) != 1:
        raise ConfigError(f"`on_text` streams the text of one prompt, got {len(prompts)}: call once for each.")
    if batch_size < 1:
        raise ConfigError(f"`batch_size` must be at least 1, got {batch_size}.")
    encoded = [encode(prompt) for prompt in prompts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        check_length(positions, prompt, ids, max_length)
    cut = [withhold_spaces(tokenizer, ids) for ids in encoded]
    return [ids for ids, _ in cut], [spaces for _, spaces in cut]


@dataclass(frozen=True)
class Batch:
    """Prompts that are continued together."""

    rows: Sequence[list[int]]
    """Their token ids."""
    beginnings: Sequence[str]
    """What the text of each row's first new token must begin with."""
    seeds: Sequence[int]
    """Of each row's random numbers."""


def continue_in_batches(
    prompts: Sequence[str],
    encoded: Sequence[list[int]],
    beginnings: Sequence[str] | None,
    settings: GenerationSettings,
    tokenizer: Decoder,
    end_ids: Sequence[int],
    continue_batch: Callable[[Batch], list[list[int]]],
    *,
    batch_size: int,
    interruption: Interruption,
) -> Iterator[Completion]:
    """Continue prompts batch by batch, and say what became of each.

    Args:
        prompts: the texts.
        encoded: their token ids.
        beginnings: what the ids leave out at the end of each text; None is nothing.
        settings: lengths and sampling.
        tokenizer: decodes ids.
        end_ids: that end a text.
        continue_batch: returns the new ids of each row, up to an end token or the longest length.
        batch_size: prompts in a batch.
        interruption: leaves out what has not begun when requested.
    """
    beginnings = beginnings if beginnings is not None else [""] * len(encoded)
    seed = secrets.randbits(32) if settings.seed is None else settings.seed
    for start in range(0, len(encoded), batch_size):
        if interruption.requested:
            return
        rows, withheld = encoded[start : start + batch_size], beginnings[start : start + batch_size]
        batch = Batch(rows, withheld, [row_seed(seed, start + index) for index in range(len(rows))])
        began = time.perf_counter()
        outputs = continue_batch(batch)
        seconds = time.perf_counter() - began
        for prompt, row, beginning, new_ids in zip(prompts[start:], rows, withheld, outputs, strict=False):
            ended = bool(new_ids) and new_ids[-1] in end_ids
            cut_short = interruption.requested and len(new_ids) < settings.max_length
            yield Completion(
                prompt=prompt,
                text=decode_new(tokenizer, row, new_ids)[len(beginning) :],
                tokens=len(new_ids),
                finish_reason="end" if ended else "interrupted" if cut_short else "length",
                tokens_per_second=len(new_ids) / seconds,
                seed=seed,
            )


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


def row_seed(seed: int, index: int) -> int:
    """Return the seed of the prompt at place `index`, so that equal prompts of one call get different texts."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=7).digest(), "big")
