"""Token ids to text while they come: whole characters only; torch-free."""

from collections.abc import Callable, Sequence
from typing import Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

_NO_CHARACTER = "\ufffd"


class Decoder(Protocol):
    """What a tokenizer must offer, one of `transformers` or of a GGUF file."""

    @property
    def backend_tokenizer(self) -> Tokenizer:
        """The tokenizer of the `tokenizers` library behind it."""

    def decode(
        self, ids: Sequence[int], skip_special_tokens: bool = ..., clean_up_tokenization_spaces: bool = ...
    ) -> str:
        """Return the text of token ids."""


class TextDecoder:
    """Turns token ids into text one at a time; a character whose bytes are not all there yet is held back."""

    def __init__(self, tokenizer: Decoder, prompt_ids: list[int]):
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids)
        self._text = tokenizer.decode(prompt_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self._stream = DecodeStream(ids=list(prompt_ids), skip_special_tokens=True)
        self._returns_prompt = self._text.endswith(_NO_CHARACTER)  # the stream's first piece then begins with it

    def push(self, token_id: int) -> str:
        """Take the next token and return the text that is complete with it, often one word, sometimes nothing."""
        self._ids.append(token_id)
        piece = self._stream.step(self._tokenizer.backend_tokenizer, token_id) or ""
        if piece and self._returns_prompt:
            self._returns_prompt = False
            piece = self._behind_prompt(piece)
        self._text += piece
        return piece

    def finish(self) -> str:
        """Return what is still held back; bytes that never became a character come as U+FFFD."""
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        rest = self._behind_prompt(whole) if self._returns_prompt else whole[len(self._text) :]
        self._text, self._returns_prompt = whole, False
        return rest

    def _behind_prompt(self, whole: str) -> str:
        """Return what stands behind the prompt, a character that it begins and what follows completes among it."""
        if not whole.startswith(self._text):
            self._text = self._text.rstrip(_NO_CHARACTER)
        return whole[len(self._text) :]


class TextWriter:
    """Hands the text of one sequence to a function as its tokens come; the prompt is left out.

    So are the first `skip` new characters, where they belong to the prompt too.
    """

    def __init__(self, tokenizer: Decoder, prompt_ids: list[int], on_text: Callable[[str], None], skip: int = 0):
        self._decoder = TextDecoder(tokenizer, prompt_ids)
        self._on_text = on_text
        self._skip = skip

    def push(self, token_id: int) -> None:
        """Take the next token."""
        self._hand_over(self._decoder.push(token_id))

    def finish(self) -> None:
        """Hand over what was held back."""
        self._hand_over(self._decoder.finish())

    def _hand_over(self, text: str) -> None:
        left_out = min(self._skip, len(text))
        self._skip -= left_out
        if text[left_out:]:
            self._on_text(text[left_out:])


def decode_new(tokenizer: Decoder, prompt_ids: list[int], new_ids: list[int]) -> str:
    """Return the text of `new_ids` behind `prompt_ids`, as a TextDecoder gives it."""
    decoder = TextDecoder(tokenizer, prompt_ids)
    return "".join([*map(decoder.push, new_ids), decoder.finish()])
