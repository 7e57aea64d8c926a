"""The models that are served, by name: each with its tokenizer, its slots and its scheduler."""

import functools
import json
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from fanformer.errors import ConfigError
from fanformer.generation.text_model import TextModel, check_text, withhold_spaces
from fanformer.loading import has_towers, is_gguf, load_text_model
from fanformer.server.scheduler import Scheduler
from fanformer.server.slots import Conversation, Slots

if TYPE_CHECKING:
    from fanformer.evaluation.inside import LayerInside
    from fanformer.server.media import MediaReader

_DEFAULT_POSITIONS = 2048
_MOST_INSIDE_TOKENS = 512
"""Of a text whose inside is looked at: more would keep others waiting."""
_MOST_ATTENTION_TOKENS = 64
"""Of a text whose attention is told: the numbers grow with the square."""
_TEMPLATE_ERRORS = ("TemplateError", "UndefinedError", "TemplateRuntimeError", "SecurityError", "CheckpointError")
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class SlotSettings:
    """How much a model may do at once."""

    slots: int = 16
    """Texts that are written together."""
    positions: int | None = None
    """Tokens that each may have; None is what the model has, at most 2,048."""
    queue_size: int = 256
    """Requests that may wait for a slot."""


class TokenReader:
    """Turns token ids into text, and text into ids, in any thread.

    It has a `tokenizers` tokenizer of its own, whose settings never change: elsewhere they do, and nobody else may use
    one meanwhile.
    """

    def __init__(self, backend: Tokenizer) -> None:
        """Copy a tokenizer."""
        self.backend_tokenizer = Tokenizer.from_str(backend.to_str())
        self.backend_tokenizer.no_truncation()
        self.backend_tokenizer.no_padding()
        self.backend_tokenizer.encode_special_tokens = True  # which makes them plain text

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without a start token; what looks like a special token is plain text."""
        return list(self.backend_tokenizer.encode(text, add_special_tokens=False).ids)

    @functools.cached_property
    def longest_token(self) -> int | None:
        """Characters that a token stands for at most, None where a text may lose some on its way to tokens."""
        if self.backend_tokenizer.normalizer is not None or "ByteLevel" not in _decoder_kinds(self.backend_tokenizer):
            return None
        return max(map(len, self.backend_tokenizer.get_vocab()))

    def decode(
        self, ids: Sequence[int], skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False
    ) -> str:
        """Return the text of token ids; spaces are left as they are."""
        return str(self.backend_tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))


class ServedModel:
    """A model under a name, computing in a thread of its own."""

    def __init__(
        self,
        name: str,
        text_model: TextModel,
        slots: Slots,
        known: int,
        queue_size: int,
        media: "MediaReader | None" = None,
    ) -> None:
        """Start serving.

        Args:
            name: what requests call it.
            text_model: whose tokenizer and settings are used.
            slots: of the same model.
            known: how many ids may be written.
            queue_size: most requests that wait for a slot.
            media: reads pictures and recordings for the slots; None for a model of text.
        """
        self.name, self.text_model, self.slots, self.known, self._media = name, text_model, slots, known, media
        self._tokenizer: Any = text_model.tokenizer
        self._model_on_torch: Any = getattr(text_model, "model", None)
        self._encoding, self._looking = threading.Lock(), threading.Lock()
        self.reader = TokenReader(self._tokenizer.backend_tokenizer)
        self.scheduler = Scheduler(slots, self.reader, known, text_model.end_ids, queue_size, self.places)
        self._token_bytes = functools.lru_cache(maxsize=65536)(_byte_reader(self.reader))

    @classmethod
    def open(
        cls,
        path: str | Path,
        name: str,
        settings: SlotSettings,
        device: str = "auto",
        dtype: str = "auto",
        threads: int | None = None,
        check_memory: Callable[[int], None] | None = None,
    ) -> "ServedModel":
        """Load a model folder or a GGUF file and take the memory of its slots.

        Args:
            path: of the folder or file.
            name: what requests call it.
            settings: how much it may do at once.
            device: as `load_text_model` takes it, like the next two.
            dtype: see there.
            threads: see there.
            check_memory: is told the bytes of weights, keys and values before those of all slots are taken, and raises
                where they are too many; None is no limit.

        Raises:
            CheckpointError, ConfigError, DependencyError: as `load_text_model`, or if the slots cannot be made.
        """
        model = load_text_model(path, device, dtype, threads, towers=has_towers(path))
        longest = model.positions or _DEFAULT_POSITIONS
        positions = min(longest, _DEFAULT_POSITIONS) if settings.positions is None else settings.positions
        if not 2 <= positions <= longest:
            raise ConfigError(f"`context` must be from 2 to the {longest} positions of {name}, got {positions}.")
        make = _on_ggml if is_gguf(path) else _on_torch
        if check_memory is not None:  # a first slot shows what each will take
            first = make(model, 1, positions)[0]
            needed = first.weight_bytes + settings.slots * first.cache_bytes
            first.close()
            check_memory(needed)
        slots, known, media = make(model, settings.slots, positions)
        return cls(name, model, slots, known, settings.queue_size, media)

    @property
    def positions(self) -> int:
        """Tokens that a text may have."""
        return self.slots.positions

    @property
    def memory_bytes(self) -> int:
        """Memory of weights, keys and values."""
        return self.slots.weight_bytes + self.slots.cache_bytes

    @property
    def in_words(self) -> str:
        """What is served, in a line."""
        steps = self.text_model.num_steps
        depth = "" if steps is None else f", {steps} steps of its recurrent depth"
        takes = f", takes {' and '.join(self.kinds)} too" if self.kinds else ""
        slots = f"{self.slots.count} texts of {self.positions} tokens"
        return f"{self.name}: {slots} at once, {self.memory_bytes / (1 << 30):.2f} GiB{depth}{takes}"

    @property
    def chat_template(self) -> str | None:
        """How a conversation is written, as a template; None for a base model."""
        return self._tokenizer.chat_template or None

    @property
    def kinds(self) -> tuple[str, ...]:
        """What messages may show: "image", "audio", both, or nothing."""
        return () if self._media is None else self._media.kinds

    @property
    def places(self) -> tuple[int, ...]:
        """Ids that stand for places of pictures and recordings, and that no text has."""
        return () if self._media is None else self._media.places

    @property
    def special_ids(self) -> dict[str, int | None]:
        """Ids of the special tokens by their short names."""
        return {name: getattr(self._tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}

    def special_id(self, text: str) -> int | None:
        """Return the id of the start, end or padding token that a text is the name of, None for any other text."""
        ids = [number for number in self.special_ids.values() if number is not None]
        return next((number for number in ids if self.token_bytes(number) == text.encode(errors="replace")), None)

    @functools.cached_property
    def has_inside(self) -> bool:
        """Whether `look_inside` has something to show: gates or Fourier channels of a folder on torch."""
        if self._model_on_torch is None:
            return False
        from fanformer.evaluation.inside import has_inside

        return has_inside(self._model_on_torch)

    @property
    def capabilities(self) -> dict[str, Any]:
        """What the model can do beside continuing text, for clients that ask before they offer it.

        `chat` and `inside` say whether those requests are answered, `inputs` what messages may hold (`text`, `image`,
        `audio`), `num_steps` the range of latent steps (`least`, `usual`, `most`), None where the depth is fixed.
        `sampling` is how its folder or file asks to be drawn from; a request that wants it says it.
        """
        steps = self.slots.steps
        dial = None if steps is None else {"least": 1, "usual": steps.usual, "most": steps.most}
        return {
            "chat": self.chat_template is not None,
            "inside": self.has_inside,
            "inputs": ["text", *self.kinds],
            "num_steps": dial,
            "sampling": dict(self.text_model.own_sampling),
        }

    def look_inside(self, text: str) -> "tuple[int, list[LayerInside]]":
        """Return what each block does on the beginning of a text, and how many tokens that has.

        Raises:
            ConfigError: if there is nothing to look at, or the text is too short or no valid Unicode.
        """
        from fanformer.evaluation.inside import look_inside

        ids = self._looked_at(text, _MOST_INSIDE_TOKENS)
        with self._looking:
            return len(ids), look_inside(self._model_on_torch, ids)

    def attention_maps(self, text: str, layer: int) -> tuple[list[int], list[list[list[float]]]]:
        """Return the first ids of a text, and the weights that `attention_maps` of the look inside tells of them.

        Raises:
            ConfigError: as `look_inside`, or if there is no such block.
        """
        from fanformer.evaluation.inside import attention_maps

        ids = self._looked_at(text, _MOST_ATTENTION_TOKENS)
        with self._looking:
            return ids, attention_maps(self._model_on_torch, ids, layer)

    def _looked_at(self, text: str, most: int) -> list[int]:
        if not self.has_inside:
            raise ConfigError(f"`{self.name}` has no gates or Fourier channels to look at: name a FANformer's folder.")
        return self.encode(text)[: min(self.positions, most)]

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, the start token in front; what looks like a special token is plain text.

        Raises:
            ConfigError: if it is no valid Unicode.
        """
        check_text(text)
        return [self._start, *self.reader.encode(text)]

    @functools.cached_property
    def _start(self) -> int:
        with self._encoding:
            return self.text_model.encode("")[0]

    def surely_exceeds(self, length: int) -> bool:
        """Return whether a text of so many characters has more tokens than there are positions, whatever it says.

        To make tokens of megabytes takes seconds, in which a conversation of others would wait.
        """
        longest = self.reader.longest_token
        return longest is not None and length > self.positions * longest

    def encode_to_continue(self, text: str) -> tuple[list[int], str]:
        """Return the ids of a text to continue, and the spaces at its end, which belong to the first new token."""
        return withhold_spaces(self.reader, self.encode(text))

    def encode_conversation(self, messages: list[dict[str, Any]]) -> Conversation:
        """Return messages up to where the answer begins.

        Args:
            messages: as `read_messages` returns them for this model's `kinds`.

        Raises:
            ConfigError: if the model has no chat template, it refuses the messages, or one is no valid Unicode.
            RefusalError: if a picture or recording cannot be read.
        """
        if self.chat_template is None:
            raise ConfigError(f"`{self.name}` is a base model without a chat template: use /v1/completions.")
        for message in messages:
            said = [message["content"]] if isinstance(message["content"], str) else message["content"]
            check_text("".join(part for part in said if isinstance(part, str)))
        if self._media is not None:
            return self._media.read(messages, self._encoding)
        try:
            with self._encoding:
                return Conversation(self.text_model.encode_messages(messages))
        except Exception as error:
            if type(error).__name__ not in _TEMPLATE_ERRORS:
                raise
            reason = " ".join(str(error).split())[:200].rstrip(".")
            raise ConfigError(f"the model's chat template refuses the messages: {reason}.") from error

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""
        return self.reader.decode(ids, skip_special_tokens=True)

    def token_bytes(self, number: int) -> bytes:
        """Return the bytes that a token stands for; a special token's are its name."""
        return self._token_bytes(number)

    def token_name(self, number: int) -> str:
        """Return a token as /v1/completions names it: its text, or `bytes:` with what is no whole character."""
        value = self.token_bytes(number)
        try:
            return value.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in value)

    def close(self) -> None:
        """End all requests."""
        self.scheduler.close()


def _on_ggml(model: Any, count: int, positions: int) -> "tuple[Slots, int, MediaReader | None]":
    """Return slots of a GGUF file, how many ids it writes, and None: it takes text only."""
    from fanformer.server.ggml_slots import GgmlSlots

    known = model.tokenizer.known
    return GgmlSlots(model.engine, known, count, positions), known, None


def _on_torch(model: Any, count: int, positions: int) -> "tuple[Slots, int, MediaReader | None]":
    """Return slots of a folder, how many ids it writes, and what reads pictures and recordings where it has towers."""
    from fanformer.server.torch_slots import MediaSlots, TorchSlots

    # ids beyond the vocabulary stand for places of pictures, and no text has them
    known = min(max(model.tokenizer.get_vocab().values()) + 1, model.model.config.vocab_size)
    if model.model.config.model_type != "fanformer_multimodal":
        return TorchSlots(model.model, known, count, positions), known, None
    from fanformer.server.media import MediaReader

    return MediaSlots(model.model, known, count, positions), known, MediaReader(model, positions)


def _decoder_kinds(backend: Tokenizer) -> set[str | None]:
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {}
    return {decoder.get("type"), *(one.get("type") for one in decoder.get("decoders", ()))}


def _byte_reader(reader: TokenReader) -> Callable[[int], bytes]:
    """Return a function from a token's id to its bytes."""
    backend = reader.backend_tokenizer
    special = set(backend.get_added_tokens_decoder())
    kinds = _decoder_kinds(backend)
    table = _byte_table() if "ByteLevel" in kinds else None

    def read(number: int) -> bytes:
        token = backend.id_to_token(number) or ""
        if number in special:
            return token.encode()
        if table is not None and all(character in table for character in token):
            return bytes(table[character] for character in token)
        if "ByteFallback" in kinds and (found := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(found.group(1), 16)])
        # behind itself: at the beginning of a text some decoders leave out the space that a token begins with
        alone = reader.decode([number])
        return reader.decode([number, number])[len(alone) :].encode(errors="replace")

    return read


def _byte_table() -> dict[str, int]:
    """Return the byte of each character of a byte-level vocabulary.

    Source: GPT-2's alphabet: printable bytes stand for themselves, the others for characters from U+0100 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}
