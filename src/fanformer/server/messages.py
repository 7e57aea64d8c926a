"""What the messages of a conversation say and show, out of their parts; nothing that one names is opened or fetched."""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fanformer.server.fields import ContentPart, ImageURL, Message
from fanformer.server.refusal import invalid

MAX_MEDIA = 16
"""Most pictures and recordings of one request."""
MAX_PARTS = 2048
"""Most parts of all its messages: an empty one of 26 bytes takes a kilobyte."""
_KINDS: dict[str, Literal["image", "audio"]] = {"image_url": "image", "input_audio": "audio"}
_DATA_URL = re.compile("data:image/[a-z0-9.+-]+;base64,", re.IGNORECASE)


@dataclass(frozen=True)
class MediaPart:
    """A picture or recording of a message, as it was sent."""

    kind: Literal["image", "audio"]
    content: bytes
    place: str
    """Where it stands in the request."""


def shows(messages: Sequence[Message]) -> bool:
    """Return whether there are pictures or recordings in messages."""
    return _count(messages) > 0


def _parts(messages: Sequence[Message]) -> list[ContentPart]:
    return [part for message in messages if not isinstance(message.content, str) for part in message.content]


def _count(messages: Sequence[Message]) -> int:
    return sum(part.type in _KINDS for part in _parts(messages))


def read_messages(messages: Sequence[Message], kinds: Sequence[str]) -> list[dict[str, Any]]:
    """Return messages as models take them: `role` and `content` of each, which is a text, or a list of texts and media.

    Args:
        messages: of a request.
        kinds: what the model takes besides text: "image", "audio".

    Raises:
        RefusalError: if a part is of a kind that the model does not take, or is no whole one, or there are too many.
    """
    length = len(_parts(messages))
    if length > MAX_PARTS:
        raise invalid(f"`messages` may have {MAX_PARTS} parts, got {length}: join their texts.", "messages")
    count = _count(messages)
    if count > MAX_MEDIA:
        raise invalid(f"`messages` may show {MAX_MEDIA} pictures and recordings, got {count}: show fewer.", "messages")
    return [_read_message(message, f"messages[{index}]", kinds) for index, message in enumerate(messages)]


def _read_message(message: Message, where: str, kinds: Sequence[str]) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return {"role": role, "content": message.content}
    parts: list[str | MediaPart] = []
    for number, part in enumerate(message.content):
        place = f"{where}.content[{number}]"
        read = _read_part(part, place, kinds)
        if role != "user" and not isinstance(read, str):
            raise invalid(f"`{place}` must be text in a message of the {role}: only the user shows something.", place)
        parts.append(read)
    texts = [part for part in parts if isinstance(part, str)]
    return {"role": role, "content": "".join(texts) if len(texts) == len(parts) else parts}


def _read_part(part: ContentPart, place: str, kinds: Sequence[str]) -> str | MediaPart:
    taken = ["text", *(name for name, kind in _KINDS.items() if kind in kinds)]
    if part.type not in taken:
        kind = "".join(character for character in part.type[:32] if character.isalnum() or character in "_-")
        told = "the model reads text only" if len(taken) == 1 else "the model takes no other"
        raise invalid(
            f"`{place}` is a part of type {kind}, expected {' or '.join(taken)}: {told}.", place, "unsupported_content"
        )
    for name in ("text", *_KINDS):
        if (getattr(part, name) is None) == (name == part.type):
            has = f"has no `{name}`" if name == part.type else f"has `{name}` too"
            raise invalid(f"`{place}` {has}: expected the field `{part.type}`, and no other.", place)
    if part.image_url is not None:
        return MediaPart("image", _picture(part.image_url, f"{place}.image_url"), place)
    if part.input_audio is not None:
        return MediaPart("audio", _decoded(part.input_audio.data, f"{place}.input_audio.data"), place)
    return part.text or ""


def _picture(field: ImageURL, place: str) -> bytes:
    if field.detail not in (None, "auto"):
        raise invalid(
            f"`{place}.detail` must be auto: a picture is read at the one size that the model takes.", f"{place}.detail"
        )
    found = _DATA_URL.match(field.url)
    if found is None:
        raise invalid(
            f"`{place}.url` must be `data:image/png;base64,...`, or the same with jpeg or webp: no address is opened.",
            f"{place}.url",
        )
    return _decoded(field.url[found.end() :], f"{place}.url")


def _decoded(text: str, place: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:  # of characters beyond ASCII too
        raise invalid(f"`{place}` must be whole base64, got {len(text)} characters of another kind.", place) from error
