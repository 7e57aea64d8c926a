"""Text as `transformers` generates it: handed over while it comes, and stopped when asked."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from fanformer.generation.decoding import TextWriter
from fanformer.generation.interruption import Interruption


class TextStreamer(BaseStreamer):
    """Hands the text of one sequence to a function while `generate` makes it, as a TextWriter does."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, on_text: Callable[[str], None], skip: int = 0):
        self._tokenizer = tokenizer
        self._skip = skip
        self._on_text = on_text
        self._writer: TextWriter | None = None

    def put(self, value: Tensor) -> None:
        """Take the prompt (1, T) at the first call, and the next token (1,) at every other."""
        ids = value.flatten().tolist()
        if self._writer is None:
            self._writer = TextWriter(self._tokenizer, ids, self._on_text, self._skip)
            return
        for token_id in ids:
            self._writer.push(token_id)

    def end(self) -> None:
        """Hand over what was held back."""
        if self._writer is not None:
            self._writer.finish()


class StopWhenInterrupted(StoppingCriteria):
    """Ends every sequence of a batch once an interruption is requested."""

    def __init__(self, interruption: Interruption):
        self._interruption = interruption

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return for each row of `input_ids` (B, T) whether it ends here."""
        return torch.full((input_ids.shape[0],), self._interruption.requested, device=input_ids.device)
