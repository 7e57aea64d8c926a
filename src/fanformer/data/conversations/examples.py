"""A row of instruction data in any of the forms that the ecosystem writes, as one type.

The forms: `messages`; `prompt` and `completion`; `prompt`, `chosen` and `rejected`; `conversations`, with `from` and
`value`; `instruction`, `input` and `output`. Prompt, completion, chosen and rejected answer are text or messages. A row
with `text` alone is plain text, which keeps a model from forgetting what it was trained on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fanformer.errors import DataError

Role = Literal["system", "user", "assistant"]

_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}
"""What rows call a role, and what it is."""
_CHANGES_MEANING: dict[str, tuple[Any, ...]] = {"tool_calls": (None, []), "function_call": (None,), "weight": (None, 1)}
"""Fields of a message that say something which is not read here, and values of them that say nothing."""
_OTHER_THAN_TEXT = ("images", "image", "audio", "audios", "videos", "tools")


@dataclass(frozen=True)
class Message:
    """What somebody says."""

    role: Role
    content: str


@dataclass(frozen=True)
class Example:
    """A conversation that ends with an answer, and which of its answers are learnt; or a plain text.

    Roles alternate: a system message or none, then user and assistant in turns.

    Attributes:
        messages: the conversation; () of a plain text.
        given: how many of its first messages are read only; the assistant's among the others are learnt.
        rejected: messages that are a worse end than `messages[given:]`; () where the row is no preference.
        text: is learnt whole, in place of a conversation.
        place: file and line, for messages.
    """

    messages: tuple[Message, ...]
    given: int = 0
    rejected: tuple[Message, ...] = ()
    text: str = ""
    place: str = field(default="", compare=False)


def example_of(row: Mapping[str, Any], *, preference: bool = False, place: str = "") -> Example:
    """Return a row as an example.

    Where a row has several forms, the first of `messages`, `conversations`, `completion`, `output`, `chosen` and `text`
    counts.
    A text as a prompt is a user's message. Where chosen and rejected answer are whole conversations, what both begin
    with is the prompt. An empty system message is none.

    Args:
        row: fields by name.
        preference: whether a chosen and a rejected answer are asked for; only these then count.
        place: file and line of the row.

    Raises:
        DataError: if the row is of no form, or no conversation: a field is missing or of another kind, a message has no
            text, roles do not alternate, the last message is no answer, or chosen and rejected answer are the same.
    """
    present = [name for name in _OTHER_THAN_TEXT if row.get(name)]
    if present:
        raise DataError(f"`{present[0]}` must not be there, got some: only text is learnt from: leave the row out")
    if preference:
        if row.get("chosen") is None or row.get("rejected") is None:
            raise DataError(f"a row must have `chosen` and `rejected`, got {_names(row)}: name a file of preferences")
        return _preference(row, place)
    there = [name for name in _FORMS if row.get(name) is not None] or [name for name in _FORMS if name in row]
    if there:
        return _FORMS[there[0]](row, place)
    raise DataError(
        "a row must have `messages`, `conversations`, `prompt` and `completion`, `prompt`, `chosen` and `rejected`, "
        f"`instruction` and `output`, or `text`, got {_names(row)}"
    )


def _of_messages(name: str) -> Callable[[Mapping[str, Any], str], Example]:
    def read(row: Mapping[str, Any], place: str) -> Example:
        messages = _messages(row, name)
        _check_turns(messages, name)
        return Example(messages, place=place)

    return read


def _completion(row: Mapping[str, Any], place: str) -> Example:
    prompt, completion = _either(row, "prompt", "user"), _either(row, "completion", "assistant")
    _check_answer(prompt, completion, "completion")
    return Example((*prompt, *completion), len(prompt), place=place)


def _alpaca(row: Mapping[str, Any], place: str) -> Example:
    asked, context = _text(row, "instruction"), row.get("input") or ""
    if not isinstance(context, str):
        raise DataError(f"`input` must be text, got {type(context).__name__}")
    question = f"{asked}\n\n{context}" if context.strip() else asked
    messages = (Message("user", question), Message("assistant", _text(row, "output")))
    return Example(messages, 1, place=place)


def _preference(row: Mapping[str, Any], place: str) -> Example:
    chosen, rejected = _either(row, "chosen", "assistant"), _either(row, "rejected", "assistant")
    if chosen[0].role == "assistant":
        prompt = _either(row, "prompt", "user")
    else:
        shared = 0
        while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
            shared += 1
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        said = _either(row, "prompt", "user") if "prompt" in row else ()
        if said and prompt[-len(said) :] != said:
            raise DataError("`prompt` must be what `chosen` and `rejected` begin with, got another one: leave it out")
    if chosen == rejected:
        raise DataError("`chosen` and `rejected` must differ, got the same twice: leave the row out")
    _check_answer(prompt, chosen, "chosen")
    _check_answer(prompt, rejected, "rejected")
    return Example((*prompt, *chosen), len(prompt), rejected, place=place)


def _plain(row: Mapping[str, Any], place: str) -> Example:
    return Example((), text=_text(row, "text"), place=place)


_FORMS: dict[str, Callable[[Mapping[str, Any], str], Example]] = {
    "messages": _of_messages("messages"),
    "conversations": _of_messages("conversations"),
    "completion": _completion,
    "output": _alpaca,
    "chosen": _preference,
    "text": _plain,
}
"""How a row is read, by the field that tells its form."""


def _text(row: Mapping[str, Any], name: str) -> str:
    if name not in row:
        raise DataError(f"`{name}` is missing, got {_names(row)}")
    return _checked(row[name], f"`{name}`")


def _checked(value: Any, what: str) -> str:
    """Return what must be a text with something in it."""
    if not isinstance(value, str):
        raise DataError(f"{what} must be text, got {type(value).__name__}")
    if not value.strip():
        raise DataError(f"{what} must say something, got an empty text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{what} must be valid UTF-8, got {value[error.start : error.start + 8]!a}") from error
    return value


def _either(row: Mapping[str, Any], name: str, role: Role) -> tuple[Message, ...]:
    """Return a field that is a text of `role`, or messages."""
    if isinstance(row.get(name), list):
        return _messages(row, name)
    return (Message(role, _text(row, name)),)


def _messages(row: Mapping[str, Any], name: str) -> tuple[Message, ...]:
    values = row[name]
    if not isinstance(values, list) or not values:
        got = "none" if values == [] else type(values).__name__
        raise DataError(f"`{name}` must be a list of messages, got {got}")
    found = []
    for index, value in enumerate(values):
        where = f"{name}[{index}]"
        if not isinstance(value, dict):
            raise DataError(f"`{where}` must be an object with `role` and `content`, got {type(value).__name__}")
        wrong = [key for key, nothing in _CHANGES_MEANING.items() if value.get(key) not in nothing]
        if wrong:
            raise DataError(f"`{where}.{wrong[0]}` must not be there, got some: it is not read")
        who, what = ("from", "value") if "from" in value else ("role", "content")
        role = value.get(who)
        if not isinstance(role, str) or role not in _ROLES:
            raise DataError(f"`{where}.{who}` must be system, user or assistant, got {role!r:.40}")
        if _ROLES[role] == "system" and value.get(what) == "":
            continue
        found.append(Message(_ROLES[role], _checked(value.get(what), f"`{where}.{what}`")))
    return tuple(found)


def _check_turns(messages: Sequence[Message], name: str) -> None:
    """Check that roles alternate and that the last message is an answer."""
    start = 1 if messages and messages[0].role == "system" else 0
    for index, message in enumerate(messages[start:]):
        expected = ("user", "assistant")[index % 2]
        if message.role != expected:
            raise DataError(
                f"`{name}`: message {start + index + 1} must be of the {expected}, got {message.role}: a system "
                "message or none, then user and assistant in turns"
            )
    if not messages or messages[-1].role != "assistant":
        last = messages[-1].role if messages else "nothing"
        raise DataError(f"`{name}` must end with an answer of the assistant, got {last} at the end")


def _check_answer(prompt: tuple[Message, ...], answer: tuple[Message, ...], name: str) -> None:
    """Check a prompt and what follows it; the prompt must end with a question."""
    if not prompt or prompt[-1].role != "user":
        last = prompt[-1].role if prompt else "nothing"
        raise DataError(f"the prompt of `{name}` must end with a message of the user, got {last} at the end")
    _check_turns((*prompt, *answer), name)


def _names(row: Mapping[str, Any]) -> str:
    names = [f"`{str(name)[:40]}`" for name in list(row)[:8]]
    return ", ".join([*names, *(["more"] if len(row) > 8 else [])]) or "no field"
