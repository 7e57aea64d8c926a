"""Text that continues prompts on ggml: what generation.py does, for a GGUF file; never imports torch."""

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fanformer.inference.decoding import TextWriter
from fanformer.inference.ggml_engine import Engine
from fanformer.inference.gguf_tensors import open_model
from fanformer.inference.gguf_tokenizer import GGUFTokenizer
from fanformer.inference.interruption import Interruption
from fanformer.inference.prompts import Batch, Completion, Remembered, check_text, continue_in_batches, read_prompts
from fanformer.inference.sampling import Sampler
from fanformer.inference.settings import GenerationSettings


class LoadedEngine(NamedTuple):
    """A model of a GGUF file, ready to run, and its tokenizer."""

    model: Engine
    tokenizer: GGUFTokenizer


def load_engine(path: str | Path, threads: int | None = None) -> LoadedEngine:
    """Load a GGUF file to run it as it is, quantized, on the CPU.

    Args:
        path: the file.
        threads: how many compute at once; None chooses the free cores.

    Raises:
        CheckpointError: if the file or its tokenizer is missing, damaged, or of another kind.
        ConfigError: if the engine cannot do the model's kind of RoPE, or that many threads.
        DependencyError: if the extra `gguf` is not installed.
    """
    file, model = open_model(str(path))
    tokenizer = GGUFTokenizer(file, model.vocab_size)
    engine = Engine(file, model, threads)
    del file  # the texts of all tokens are in its metadata
    give_back_freed_memory()
    return LoadedEngine(engine, tokenizer)


def give_back_freed_memory() -> None:
    """Let the C library give memory that nobody uses any more to the system; without glibc it does so by itself."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def encode_prompt(tokenizer: GGUFTokenizer, prompt: str) -> list[int]:
    """Return the token ids of `prompt`, the start token in front; what looks like a special token is plain text.

    Raises:
        ConfigError: if the prompt is not valid Unicode, or the tokenizer has no token to start a text with.
    """
    check_text(prompt)
    return [tokenizer.start_id, *tokenizer.encode(prompt)]


def iterate(
    model: Engine,
    tokenizer: GGUFTokenizer,
    prompts: Sequence[str],
    settings: GenerationSettings,
    on_text: Callable[[str], None] | None = None,
    *,
    batch_size: int = 8,
    interruption: Interruption | None = None,
) -> Iterator[Completion]:
    """Continue every prompt, batch by batch, as `generation.iterate` does; arguments and errors are the same.

    A seed gives other texts than there: the random numbers are numpy's.
    """
    positions, encode = model.config.max_position_embeddings, partial(encode_prompt, tokenizer)
    encoded, spaces = read_prompts(
        prompts, encode, tokenizer, positions, settings.max_length, batch_size=batch_size, streamed=on_text is not None
    )
    how: dict[str, Any] = {"batch_size": batch_size, "interruption": interruption}
    return continue_ids(model, tokenizer, prompts, encoded, settings, on_text, beginnings=spaces, **how)


def generate(
    model: Engine,
    tokenizer: GGUFTokenizer,
    prompts: Sequence[str],
    settings: GenerationSettings,
    on_text: Callable[[str], None] | None = None,
    *,
    batch_size: int = 8,
    interruption: Interruption | None = None,
) -> list[Completion]:
    """Continue every prompt and return all completions in order; everything else as in `iterate`."""
    return list(iterate(model, tokenizer, prompts, settings, on_text, batch_size=batch_size, interruption=interruption))


def continue_ids(
    model: Engine,
    tokenizer: GGUFTokenizer,
    prompts: Sequence[str],
    encoded: Sequence[list[int]],
    settings: GenerationSettings,
    on_text: Callable[[str], None] | None = None,
    *,
    beginnings: Sequence[str] | None = None,
    batch_size: int = 8,
    interruption: Interruption | None = None,
    remembered: Remembered | None = None,
) -> Iterator[Completion]:
    """Continue prompts that are token ids already, as `generation.continue_ids` does."""
    stop = interruption or Interruption()

    def continue_batch(batch: Batch) -> list[list[int]]:
        skip = len(batch.beginnings[0])
        writer = TextWriter(tokenizer, batch.rows[0], on_text, skip=skip) if on_text is not None else None
        samplers = [
            Sampler(settings, seed, tokenizer.known, tokenizer.end_ids, _excluded(tokenizer, beginning))
            for seed, beginning in zip(batch.seeds, batch.beginnings, strict=True)
        ]
        return _continue_batch(model, tokenizer, batch.rows, settings.max_length, samplers, writer, stop, remembered)

    return continue_in_batches(
        prompts,
        encoded,
        beginnings,
        settings,
        tokenizer,
        tokenizer.end_ids,
        continue_batch,
        batch_size=batch_size,
        interruption=stop,
    )


def _continue_batch(
    model: Engine,
    tokenizer: GGUFTokenizer,
    rows: Sequence[list[int]],
    max_length: int,
    samplers: Sequence[Sampler],
    writer: TextWriter | None,
    interruption: Interruption,
    remembered: Remembered | None = None,
) -> list[list[int]]:
    """Return the new token ids of each row, an end token included."""
    shared = 0
    if remembered is not None:
        shared, text = remembered.take(rows[0])
        shared = shared if text == model.texts else 0
    kept = model.begin(len(rows), max(map(len, rows)) + max_length, shared)
    found: list[list[int]] = [[] for _ in rows]
    following: list[list[int]] = [row[kept:] for row in rows]
    for _ in range(max_length):
        active = [stream for stream, ids in enumerate(following) if ids]
        logits = model.forward(following)
        following = [[] for _ in rows]
        for stream in active:
            token = samplers[stream].draw(logits[stream][0])
            found[stream].append(token)
            if writer is not None:
                writer.push(token)
            if token not in tokenizer.end_ids:
                following[stream] = [token]
        if interruption.requested or not any(following):
            break
    if writer is not None:
        writer.finish()
    if remembered is not None:
        remembered.keep(rows[0], found[0], model.length(0), model.texts)
    return found


def _excluded(tokenizer: GGUFTokenizer, beginning: str) -> NDArray[np.bool_] | None:
    """Return which tokens do not begin with `beginning`, (known) bool, or None where it is empty."""
    if not beginning:
        return None
    return np.array([not tokenizer.decode([number]).startswith(beginning) for number in range(tokenizer.known)])
