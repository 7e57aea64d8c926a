"""Text as it is generated: whole characters only, and a way to stop it."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import PreTrainedTokenizerFast, StoppingCriteria
from transformers.generation.streamers import BaseStreamer


class TextDecoder:
    """Turns token ids into text one at a time; a character whose bytes are not all there yet is held back."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, prompt_ids: list[int]):
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids)
        self._text = tokenizer.decode(prompt_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self._stream = DecodeStream(ids=list(prompt_ids), skip_special_tokens=True)

    def push(self, token_id: int) -> str:
        """Take the next token and return the text that is complete with it, often one word, sometimes nothing."""
        self._ids.append(token_id)
        piece = self._stream.step(self._tokenizer.backend_tokenizer, token_id) or ""
        self._text += piece
        return piece

    def finish(self) -> str:
        """Return what is still held back; bytes that never became a character come as U+FFFD."""
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        rest = whole[len(self._text) :]
        self._text = whole
        return rest


class TextStreamer(BaseStreamer):
    """Hands the text of one sequence to a function while `generate` makes it; the prompt is left out.

    So are the first `skip` new characters, where they belong to the prompt too.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, on_text: Callable[[str], None], skip: int = 0):
        self._tokenizer = tokenizer
        self._skip = skip
        self._on_text = on_text
        self._decoder: TextDecoder | None = None

    def put(self, value: Tensor) -> None:
        """Take the prompt (1, T) at the first call, and the next token (1,) at every other."""
        ids = value.flatten().tolist()
        if self._decoder is None:
            self._decoder = TextDecoder(self._tokenizer, ids)
            return
        for token_id in ids:
            self._hand_over(self._decoder.push(token_id))

    def end(self) -> None:
        """Hand over what was held back."""
        if self._decoder is not None:
            self._hand_over(self._decoder.finish())

    def _hand_over(self, text: str) -> None:
        left_out = min(self._skip, len(text))
        self._skip -= left_out
        if text[left_out:]:
            self._on_text(text[left_out:])


class Interruption:
    """Whether somebody asked for the text to stop."""

    def __init__(self) -> None:
        self.requested = False

    def request(self) -> None:
        """Ask for the text to stop after the token in work."""
        self.requested = True


class StopWhenInterrupted(StoppingCriteria):
    """Ends every sequence of a batch once an interruption is requested."""

    def __init__(self, interruption: Interruption):
        self._interruption = interruption

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return for each row of `input_ids` (B, T) whether it ends here."""
        return torch.full((input_ids.shape[0],), self._interruption.requested, device=input_ids.device)


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Let Ctrl-C request an interruption instead of raising, within the block; a second Ctrl-C raises after all.

    Only a program's main thread gets signals: in another thread the block changes nothing.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        if interruption.requested:
            raise KeyboardInterrupt
        interruption.request()

    previous = signal.signal(signal.SIGINT, on_signal)
    try:
        yield interruption
    finally:
        signal.signal(signal.SIGINT, previous)
