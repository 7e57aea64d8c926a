"""ChatML: how a conversation is written in tokens, for training, chat and serving alike; torch-free.

A message is `<|im_start|>role`, a line end, what it says, `<|im_end|>` and a line end. Each of these parts becomes
tokens by itself, so that what a prompt ends with is what a learnt answer begins behind, and what a message says is
plain text even where it spells a control token.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from tokenizers import Tokenizer

from fanformer.data.conversations.examples import Message, Role

START, END = "<|im_start|>", "<|im_end|>"

TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The chat template of a tuned folder; `generation` marks what is learnt."""

_SAID = " <think>\nso\n</think>\n yes "  # what some templates that look like ChatML trim or rewrite
_PROBE = [Message("system", _SAID), Message("user", _SAID), Message("assistant", _SAID), Message("user", _SAID)]


class ChatTokenizer(Protocol):
    """What a tokenizer must offer, one of `transformers` or of a GGUF file."""

    @property
    def backend_tokenizer(self) -> Tokenizer:
        """The tokenizer of the `tokenizers` library behind it."""

    @property
    def chat_template(self) -> Any:
        """The template in Jinja, or None."""

    @property
    def apply_chat_template(self) -> Callable[..., Any]:
        """What writes messages as text or ids by the template."""


class EncodedConversation(NamedTuple):
    """A conversation as tokens."""

    ids: list[int]
    trained: list[bool]
    """Whether each token is learnt: what answers say, and the token that ends them."""


@dataclass(frozen=True)
class ChatML:
    """What turns messages into tokens; `chatml_of` makes it.

    Attributes:
        start_id: id of START.
        end_id: id of END.
        headers: ids in front of what each role says.
        line_end: ids behind END.
        default_system: what the template has a system message say where there is none; None leaves it out.
        encode_plain: returns the ids of a text in which nothing is a control token.
    """

    start_id: int
    end_id: int
    headers: Mapping[Role, list[int]]
    line_end: list[int]
    default_system: str | None
    encode_plain: Callable[[str], list[int]]

    def encode(self, messages: Sequence[Message], given: int = 0, *, prompt: bool = False) -> EncodedConversation:
        """Return the tokens of a conversation, and which of them are learnt.

        Args:
            messages: the conversation.
            given: how many of its first messages hold nothing to learn.
            prompt: whether the assistant is to go on: the header of an answer is put behind.
        """
        found = EncodedConversation([], [])
        if self.default_system is not None and (not messages or messages[0].role != "system"):
            self._append(found, Message("system", self.default_system), False)
        for index, message in enumerate(messages):
            self._append(found, message, message.role == "assistant" and index >= given)
        if prompt:
            self._header(found, "assistant")
        return found

    def count(self, message: Message) -> int:
        """Return how many tokens a message adds to a conversation."""
        found = EncodedConversation([], [])
        self._append(found, message, False)
        return len(found.ids)

    def _append(self, found: EncodedConversation, message: Message, trained: bool) -> None:
        self._header(found, message.role)
        said = [*self.encode_plain(message.content), self.end_id]
        found.ids.extend([*said, *self.line_end])
        found.trained.extend([trained] * len(said) + [False] * len(self.line_end))

    def _header(self, found: EncodedConversation, role: Role) -> None:
        header = self.headers[role]
        found.ids.extend(header)
        found.trained.extend([False] * len(header))


def chatml_of(tokenizer: ChatTokenizer) -> ChatML | None:
    """Return what encodes conversations for a tokenizer whose chat template is ChatML, and None for any other.

    It is ChatML if it writes some messages so, with what they say unchanged, and START and END are control tokens; a
    system message of its own where there is none may stand in front.
    """
    backend = tokenizer.backend_tokenizer
    start_id, end_id = backend.token_to_id(START), backend.token_to_id(END)
    if not tokenizer.chat_template or start_id is None or end_id is None:
        return None

    plain = copy.deepcopy(backend)  # its own: what others set theirs to, meanwhile or before, must not let tokens in
    plain.encode_special_tokens = True
    plain.no_truncation()
    plain.no_padding()

    def encode_plain(text: str) -> list[int]:
        return list(plain.encode(text, add_special_tokens=False).ids)

    def written(messages: Sequence[Message], prompt: bool) -> str:
        rows = [vars(message) for message in messages]
        return str(tokenizer.apply_chat_template(rows, add_generation_prompt=prompt, tokenize=False))

    if not {start_id, end_id}.isdisjoint(encode_plain(START + END)):
        return None
    try:
        exact = written(_PROBE, True) == as_text(_PROBE, prompt=True) and written(_PROBE[:3], False) == as_text(
            _PROBE[:3]
        )
        without_system = written(_PROBE[1:], True)
    except Exception:  # the template's own errors are those of jinja2: it refuses what ChatML takes
        return None
    rest = as_text(_PROBE[1:], prompt=True)
    opening, closing = f"{START}system\n", f"{END}\n"
    before = without_system.removesuffix(rest)
    if not exact or not without_system.endswith(rest) or (before and not before.startswith(opening)):
        return None
    roles: tuple[Role, ...] = ("system", "user", "assistant")
    return ChatML(
        start_id,
        end_id,
        headers={role: [start_id, *encode_plain(f"{role}\n")] for role in roles},
        line_end=encode_plain("\n"),
        default_system=before.removeprefix(opening).removesuffix(closing) if before else None,
        encode_plain=encode_plain,
    )


def as_text(messages: Sequence[Message], *, prompt: bool = False) -> str:
    """Return a conversation as ChatML's text; `prompt` puts the header of an answer behind."""
    said = "".join(f"{START}{message.role}\n{message.content}{END}\n" for message in messages)
    return said + (f"{START}assistant\n" if prompt else "")


def encode_messages(
    tokenizer: ChatTokenizer, chatml: ChatML | None, messages: Sequence[Mapping[str, str]]
) -> list[int]:
    """Return the ids of a conversation whose next answer is to be written.

    Args:
        tokenizer: that has a chat template.
        chatml: of the tokenizer; where it is None, the template's text is encoded as a whole.
        messages: `role` and `content` of each.
    """
    if chatml is None:
        return list(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False))
    return chatml.encode([Message(row["role"], row["content"]) for row in messages], prompt=True).ids  # type: ignore[arg-type]
