"""Text by a GGUF file on ggml; never imports torch."""

import contextlib
import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fanformer.generation.decoding import TextWriter
from fanformer.generation.sampling import Sampling, TokenSampler, log_probabilities, noise_of
from fanformer.generation.settings import own_sampling
from fanformer.generation.text_model import Batch, TextModel, check_text, depth_note, excluded_first
from fanformer.gguf.architecture import open_model
from fanformer.gguf.engine import Engine
from fanformer.gguf.file import SAMPLING
from fanformer.gguf.tokenizer import GGUFTokenizer


class GgmlModel(TextModel):
    """A GGUF file that runs as it is, quantized, on the CPU; a seed gives other texts than on torch."""

    def __init__(self, path: str | Path, threads: int | None = None, num_steps: int | None = None) -> None:
        """Open a file.

        Args:
            path: of the file.
            threads: how many compute at once; None chooses the free cores.
            num_steps: how often a recurrent depth runs its core; None is the mean of its training.

        Raises:
            CheckpointError: if the file or its tokenizer is missing, damaged, or of another kind.
            ConfigError: if the engine cannot do the model's kind of RoPE, that many threads, or that many steps.
            DependencyError: if the extra `gguf` is not installed.
        """
        super().__init__()
        file, model = open_model(str(path))
        self.tokenizer = GGUFTokenizer(file, model.vocab_size)
        self.engine = Engine(file, model, threads, num_steps)
        self.own_sampling = _sampling_of(file.metadata, str(path))
        del file  # the texts of all tokens are in its metadata
        self.positions, self.end_ids = model.max_position_embeddings, self.tokenizer.end_ids
        give_back_freed_memory()

    @property
    def num_steps(self) -> int | None:
        """Do what `TextModel.num_steps` says."""
        return None if self.engine.model.steps is None else self.engine.num_steps

    @property
    def depth_note(self) -> str | None:
        """Do what `TextModel.depth_note` says."""
        steps = self.engine.model.steps
        return None if steps is None else depth_note(*steps)

    def encode(self, prompt: str) -> list[int]:
        """Do what `TextModel.encode` says."""
        check_text(prompt)
        return [self.tokenizer.start_id, *self.tokenizer.encode(prompt)]

    def continue_batch(self, batch: Batch) -> list[list[int]]:
        """Do what `TextModel.continue_batch` says."""
        with self.turn():
            return self._continue(batch)

    def _continue(self, batch: Batch) -> list[list[int]]:
        tokenizer, engine, rows, settings = self.tokenizer, self.engine, batch.rows, batch.settings
        sampling, known, end_ids = Sampling.of(settings), tokenizer.known, tokenizer.end_ids
        on_text, remembered = batch.on_text, batch.remembered
        writer = TextWriter(tokenizer, rows[0], on_text, len(batch.beginnings[0])) if on_text is not None else None
        samplers = [
            TokenSampler(
                sampling, noise_of(seed, known), known, end_ids, (), excluded_first(tokenizer, beginning, known)
            )
            for seed, beginning in zip(batch.seeds, batch.beginnings, strict=True)
        ]
        shared, text = remembered.take(rows[0]) if remembered is not None else (0, None)
        kept = engine.begin(len(rows), max(map(len, rows)) + settings.max_length, shared if text == engine.texts else 0)
        found: list[list[int]] = [[] for _ in rows]
        following: list[list[int]] = [row[kept:] for row in rows]
        for _ in range(settings.max_length):
            active = [stream for stream, ids in enumerate(following) if ids]
            logits = engine.forward(following)
            following = [[] for _ in rows]
            for stream in active:
                token = samplers[stream].draw(logits[stream][0])
                found[stream].append(token)
                if writer is not None:
                    writer.push(token)
                if token not in end_ids:
                    following[stream] = [token]
            if batch.interruption.requested or not any(following):
                break
        if writer is not None:
            writer.finish()
        if remembered is not None:
            remembered.keep(rows[0], found[0], engine.length(0), engine.texts)
        return found

    def log_likelihoods(self, ids: Sequence[int]) -> list[float]:
        """Do what `TextModel.log_likelihoods` says, in float32."""
        with self.turn():
            self.engine.begin(1, len(ids))
            logits = self.engine.forward([list(ids[:-1])], every=True)[0]  # (T - 1, V)
        return log_probabilities(logits)[np.arange(len(logits)), ids[1:]].tolist()


def _sampling_of(metadata: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return how a file asks to be drawn from; 32 bits of 0.7 are 0.7 again, as in the folder behind it."""
    asked = {name: metadata.get(key) for name, key in SAMPLING.items()}
    near = {name: float(f"{value:.7g}") if isinstance(value, float) else value for name, value in asked.items()}
    return own_sampling(near, path)


def give_back_freed_memory() -> None:
    """Let the C library give memory that nobody uses any more to the system; without glibc it does so by itself."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
