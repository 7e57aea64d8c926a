"""How a conversation with pictures and recordings is written in tokens, for training, the command line and chat alike.

Where the base speaks ChatML, so it is written. A base that does not gets no new token, whose row in the LM head would
change what it makes of text: the conversation opens as its documents do, what a user says ends with a line end, and an
answer with the token that ends documents.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fanformer.data.conversations.chatml import END, START, ChatML, EncodedConversation, chatml_of
from fanformer.data.multimodal import PLACEHOLDERS
from fanformer.data.multimodal.messages import Media, MediaMessage
from fanformer.data.tokenizer import encode_documents, end_token_id, start_token_id
from fanformer.errors import ConfigError

_SAID = (
    "{% macro said(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
    f"{{% if part['type'] == 'image' %}}{PLACEHOLDERS['image']}{{% elif part['type'] == 'audio' %}}"
    f"{PLACEHOLDERS['audio']}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}"
    "{% endfor %}{% endif %}{% endmacro %}"
)
CHATML_TEMPLATE = (
    _SAID + "{% for message in messages %}"
    f"{{{{ '{START}' + message['role'] + '\\n' }}}}"
    "{% if message['role'] == 'assistant' %}"
    f"{{% generation %}}{{{{ said(message['content']) + '{END}' }}}}{{% endgeneration %}}"
    f"{{% else %}}{{{{ said(message['content']) + '{END}' }}}}{{% endif %}}"
    "{{ '\\n' }}{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ '{START}assistant\\n' }}}}{{% endif %}}"
)
PLAIN_TEMPLATE = (
    _SAID + "{{ bos_token or eos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ said(message['content']) + (eos_token or bos_token) }}{% endgeneration %}"
    "{% else %}{{ said(message['content']) + '\\n' }}{% endif %}"
    "{% endfor %}"
)


@dataclass(frozen=True)
class Wording:
    """What turns messages into tokens; `wording_of` makes it.

    Attributes:
        template: the same as a chat template.
        ids: of each kind's placeholder.
        chatml: writes it, None where the base does not speak ChatML.
        start_id: opens a conversation without ChatML.
        end_id: ends an answer without ChatML.
        encode_plain: returns the ids of a text in which nothing is a control token.
    """

    template: str
    ids: dict[str, int]
    chatml: ChatML | None
    start_id: int
    end_id: int
    encode_plain: Callable[[str], list[int]]

    def encode(
        self, messages: Sequence[MediaMessage], counts: Sequence[int], *, prompt: bool = False
    ) -> EncodedConversation:
        """Return the tokens of a conversation, and which of them are learnt: those of answers and their ends.

        Args:
            messages: the conversation.
            counts: tokens of each picture and recording, in their order.
            prompt: whether the assistant is to go on.
        """
        found = EncodedConversation([], [])
        left = list(counts)
        if self.chatml is None:
            _extend(found, [self.start_id], False)
        elif self.chatml.default_system is not None and (not messages or messages[0].role != "system"):
            self._append(found, MediaMessage("system", (self.chatml.default_system,)), left)
        for message in messages:
            self._append(found, message, left)
        if prompt and self.chatml is not None:
            _extend(found, self.chatml.headers["assistant"], False)
        return found

    def _append(self, found: EncodedConversation, message: MediaMessage, left: list[int]) -> None:
        answers = message.role == "assistant"
        if self.chatml is not None:
            _extend(found, self.chatml.headers[message.role], False)
            _extend(found, [*self._said(message.parts, left), self.chatml.end_id], answers)
            _extend(found, self.chatml.line_end, False)
        elif answers:
            _extend(found, [*self._said(message.parts, left), self.end_id], True)
        else:
            _extend(found, self._said((*message.parts, "\n"), left), False)

    def _said(self, parts: Sequence[str | Media], left: list[int]) -> list[int]:
        """Return the ids of what is said, texts that follow one another as one, and each media's places."""
        ids: list[int] = []
        text = ""
        for part in parts:
            if isinstance(part, str):
                text += part
                continue
            ids += [*self.encode_plain(text), *([self.ids[part.kind]] * left.pop(0))]
            text = ""
        return [*ids, *self.encode_plain(text)]


def _extend(found: EncodedConversation, ids: Sequence[int], trained: bool) -> None:
    found.ids.extend(ids)
    found.trained.extend([trained] * len(ids))


def wording_of(tokenizer: Any, ids: dict[str, int]) -> Wording:
    """Return how conversations are written for a tokenizer with placeholders.

    Args:
        tokenizer: whose chat template is ChatML, one of this module's, or none.
        ids: of each kind's placeholder.

    Raises:
        ConfigError: if the tokenizer has another chat template.
    """
    template = tokenizer.chat_template
    chatml = None if template == PLAIN_TEMPLATE else chatml_of(tokenizer)
    if template and template != PLAIN_TEMPLATE and chatml is None:
        raise ConfigError("`tokenizer` must have a ChatML template or none, got another one: take another base.")

    def encode_plain(text: str) -> list[int]:
        return encode_documents(tokenizer, [text])[0] if text else []

    return Wording(
        template=PLAIN_TEMPLATE if chatml is None else CHATML_TEMPLATE,
        ids=ids,
        chatml=chatml,
        start_id=start_token_id(tokenizer),
        end_id=end_token_id(tokenizer),
        encode_plain=encode_plain if chatml is None else chatml.encode_plain,
    )
