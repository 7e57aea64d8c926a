"""A conversation: which tokens the model sees for the next answer, and what is forgotten when they are too many."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from fanformer.errors import ConfigError
from fanformer.inference.interruption import Interruption
from fanformer.inference.prompts import Remembered, check_text
from fanformer.inference.settings import GenerationSettings
from fanformer.inference.text_models import generation_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from fanformer.inference.ggml_engine import Engine
    from fanformer.inference.gguf_tokenizer import GGUFTokenizer


class Conversation:
    """Messages so far, and the model that answers the next one.

    A tokenizer without a chat template belongs to a base model: each message is then a text of its own to continue.
    With one, what earlier turns had in common with this one is not read again.
    """

    def __init__(
        self,
        model: "PreTrainedModel | Engine",
        tokenizer: "PreTrainedTokenizerFast | GGUFTokenizer",
        settings: GenerationSettings,
    ):
        self.messages: list[dict[str, str]] = []
        self.has_template = bool(tokenizer.chat_template)
        self._model = model
        self._generation = generation_of(model)
        self._tokenizer = tokenizer
        self._settings = settings
        self._answers = 0
        self._remembered = Remembered()

    def reset(self) -> None:
        """Forget all messages."""
        self.messages = []

    def answer(self, message: str, on_text: Callable[[str], None], interruption: Interruption) -> int:
        """Answer `message`, or continue it where there is no chat template.

        Args:
            message: what the user wrote.
            on_text: is handed the answer piece by piece.
            interruption: ends the answer early when requested; what was written of it stays in the conversation.

        Returns:
            How many of the oldest messages were forgotten to make room.

        Raises:
            ConfigError: if the message is not valid Unicode, or leaves no room for an answer.
        """
        check_text(message)
        settings = self._settings
        if settings.seed is not None:  # a fixed seed reproduces the conversation, not one and the same answer
            settings = dataclasses.replace(settings, seed=settings.seed + self._answers)
        if not self.has_template:
            self._generation.generate(
                self._model, self._tokenizer, [message], settings, on_text, interruption=interruption
            )
            self._answers += 1
            return 0
        messages = [*self.messages, {"role": "user", "content": message}]
        ids, forgotten = self._fit(messages)
        completion = next(
            self._generation.continue_ids(
                self._model,
                self._tokenizer,
                [message],
                [ids],
                settings,
                on_text,
                interruption=interruption,
                remembered=self._remembered,
            )
        )
        self.messages = [*messages[forgotten:], {"role": "assistant", "content": completion.text}]
        self._answers += 1
        return forgotten

    def _fit(self, messages: list[dict[str, str]]) -> tuple[list[int], int]:
        """Return the ids of `messages` without as many of the oldest as do not fit, and their number."""
        positions = getattr(self._model.config, "max_position_embeddings", None)
        for start in range(0, len(messages), 2):  # a question goes with its answer
            ids = self._tokenizer.apply_chat_template(messages[start:], add_generation_prompt=True, return_dict=False)
            if positions is None or len(ids) + self._settings.max_length <= positions:
                return ids, start
        raise ConfigError(
            f"the message has {len(ids)} tokens with its template, and max_length {self._settings.max_length} more do "
            f"not fit the model's {positions} positions: shorten it, or lower max_length."
        )
