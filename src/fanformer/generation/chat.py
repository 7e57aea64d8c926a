"""A conversation: which tokens the model sees for the next answer, and what is forgotten when they are too many."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from fanformer.errors import ConfigError
from fanformer.generation.interruption import Interruption
from fanformer.generation.settings import GenerationSettings
from fanformer.generation.text_model import Remembered, TextModel, check_text


class Conversation:
    """Messages so far, and the model that answers the next one.

    A tokenizer without a chat template belongs to a base model: each message is then a text of its own to continue.
    With one, what earlier turns had in common with this one is not read again.

    Attributes:
        messages: what was said.
        cut: whether the last answer had as many tokens as the settings allow, and no end.
    """

    def __init__(self, model: TextModel, settings: GenerationSettings) -> None:
        self.messages: list[dict[str, Any]] = []
        self._model = model
        self._settings = settings
        self._answers = 0
        self.cut = False
        self._remembered = Remembered()

    def reset(self) -> None:
        """Forget all messages."""
        self.messages = []

    def answer(
        self, message: str, on_text: Callable[[str], None], interruption: Interruption, media: Sequence[Any] = ()
    ) -> int:
        """Answer `message`, or continue it where there is no chat template.

        Args:
            message: what the user wrote.
            on_text: is handed the answer piece by piece.
            interruption: ends the answer early when requested; what was written of it stays in the conversation.
            media: pictures and recordings that the user shows with it, for a `MediaModel`.

        Returns:
            How many of the oldest messages were forgotten to make room.

        Raises:
            ConfigError: if the message is not valid Unicode, or leaves no room for an answer.
        """
        check_text(message)
        settings = self._settings
        if settings.seed is not None:  # a fixed seed reproduces the conversation, not one and the same answer
            settings = dataclasses.replace(settings, seed=settings.seed + self._answers)
        if not self._model.has_chat_template:
            list(self._model.complete([message], settings, on_text, interruption=interruption))
            self._answers += 1
            self.cut = False  # a text that is continued ends nowhere
            return 0
        content = [*media, message] if media else message
        messages = [*self.messages, {"role": "user", "content": content}]
        ids, forgotten = self._fit(messages)
        shown = [part for one in messages[forgotten:] for part in one["content"] if not isinstance(part, str)]
        completion = self._model.complete_ids(
            ids, message, settings, on_text, interruption=interruption, remembered=self._remembered, media=shown
        )
        self.messages = [*messages[forgotten:], {"role": "assistant", "content": completion.text}]
        self.cut = completion.finish_reason == "length"
        self._answers += 1
        return forgotten

    def _fit(self, messages: list[dict[str, Any]]) -> tuple[list[int], int]:
        """Return the ids of `messages` without as many of the oldest as do not fit, and their number."""
        positions = self._model.positions
        for start in range(0, len(messages), 2):  # a question goes with its answer
            ids = self._model.encode_messages(messages[start:])
            if positions is None or len(ids) + self._settings.max_length <= positions:
                return ids, start
        raise ConfigError(
            f"the message has {len(ids)} tokens with its template, and max_length {self._settings.max_length} more do "
            f"not fit the model's {positions} positions: shorten it, or lower max_length."
        )
