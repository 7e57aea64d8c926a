"""A row of messages with pictures and recordings, as one type; media are named relative to the row's file."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fanformer.data.conversations.examples import Role
from fanformer.data.sources.decompression import require_regular
from fanformer.data.sources.readers import file_kind, jsonl_lines, parse_object
from fanformer.errors import DataError, import_extra
from fanformer.model.multimodal import base64_bytes

_SOURCES = ("path", "url", "base64", "bytes")
_LISTS = {"image": ("images", "image"), "audio": ("audio", "audios")}
"""For each kind, the fields of a row that may hold what the messages' parts only point to, in their order."""
_ROLES: tuple[Role, ...] = ("system", "user", "assistant")


@dataclass(frozen=True)
class Media:
    """A picture or a recording.

    Attributes:
        kind: "image" or "audio".
        source: a file, or the bytes themselves.
        name: what messages call it; "" for the file's path, or for bytes that nobody named.
    """

    kind: str
    source: Path | bytes
    name: str = field(default="", compare=False)

    @property
    def called(self) -> str | None:
        """What messages call it, None for bytes without a name."""
        return self.name or (str(self.source) if isinstance(self.source, Path) else None)


@dataclass(frozen=True)
class MediaMessage:
    """What somebody says and shows, in its order."""

    role: Role
    parts: tuple[str | Media, ...]


@dataclass(frozen=True)
class MediaExample:
    """A conversation that ends with an answer; a system message or none, then user and assistant in turns.

    Attributes:
        messages: the conversation.
        place: file and line, for messages.
    """

    messages: tuple[MediaMessage, ...]
    place: str = field(default="", compare=False)

    @property
    def media(self) -> list[Media]:
        """Its pictures and recordings, in their order."""
        return [part for message in self.messages for part in message.parts if isinstance(part, Media)]

    @property
    def answer(self) -> str:
        """Return what its last message says."""
        return "".join(part for part in self.messages[-1].parts if isinstance(part, str))


def read_media_examples(path: Path) -> list[MediaExample]:
    """Read a .jsonl or .parquet file whose rows have `messages`; a wrong row ends it.

    Raises:
        DataError: if the file cannot be read, holds no row, or one is wrong; the message names the row.
        DependencyError: if it is parquet and pyarrow is not installed.
    """
    path = path.expanduser().absolute()
    if not path.exists():
        raise DataError(f"data `{path}`: no such file: expected .jsonl or .parquet with rows of messages")
    require_regular(path)
    if file_kind(path) not in ("jsonl", "parquet"):
        raise DataError(f"data `{path}`: expected a .jsonl or .parquet file with rows of messages, got {path.name}")
    found = []
    for place, row in _rows(path):
        try:
            found.append(media_example(row, path.parent, place))
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
    if not found:
        raise DataError(f"data `{path}` holds no row, expected one conversation a line")
    return found


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if file_kind(path) == "jsonl":
        for number, line in jsonl_lines(path):
            place = f"{path}:{number}"
            yield place, parse_object(line, place)
        return
    parquet = import_extra("pyarrow.parquet", f"reading {path.name}")
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", row
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these kinds
        raise DataError(f"{path}: not a complete parquet file ({' '.join(str(error).split())[:120]})") from error


def media_example(row: Mapping[str, Any], folder: Path, place: str = "") -> MediaExample:
    """Return a row as an example.

    A message's `content` is a text or parts: {"type": "text", "text"}, and {"type": "image" or "audio"} with `path`,
    `base64` or `bytes`, or with none of them, which takes the next of the row's `images` or `audio`.

    Args:
        row: fields by name.
        folder: that paths are relative to, and that they may not leave.
        place: file and line of the row.

    Raises:
        DataError: if the row is no conversation that ends with an answer, a part is of another kind, a path leaves the
            folder, or there are more or fewer media than places for them.
    """
    values = row.get("messages")
    if not isinstance(values, list) or not values:
        raise DataError(f"`messages` must be a list of messages, got {type(values).__name__}")
    listed = {kind: _listed(row, kind, folder) for kind in _LISTS}
    messages = []
    for index, value in enumerate(values):
        where = f"messages[{index}]"
        if not isinstance(value, Mapping):
            raise DataError(f"`{where}` must be an object with `role` and `content`, got {type(value).__name__}")
        if value.get("role") not in _ROLES:
            raise DataError(f"`{where}.role` must be system, user or assistant, got {value.get('role')!r:.40}")
        parts = _parts(value.get("content"), where, folder, listed)
        if value["role"] != "user" and any(isinstance(part, Media) for part in parts):
            raise DataError(f"`{where}` must be text, got media: only the user shows something")
        messages.append(MediaMessage(value["role"], parts))
    left = [kind for kind, values in listed.items() if values]
    if left:
        raise DataError(f"`{_LISTS[left[0]][0]}` must have one for each place in the messages, got more")
    _check_turns(messages)
    return MediaExample(tuple(messages), place)


def _listed(row: Mapping[str, Any], kind: str, folder: Path) -> list[Media]:
    given: Any = next((row[name] for name in _LISTS[kind] if row.get(name)), [])
    values = given if isinstance(given, list) else [given]
    return [Media(kind, _source(value, f"{_LISTS[kind][0]}[{n}]", folder)) for n, value in enumerate(values)]


def _parts(content: Any, where: str, folder: Path, listed: dict[str, list[Media]]) -> tuple[str | Media, ...]:
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or not content:
        raise DataError(f"`{where}.content` must be text or a list of parts, got {type(content).__name__}")
    found: list[str | Media] = []
    for index, part in enumerate(content):
        name = f"{where}.content[{index}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            found.append(_text(part.get("text"), name))
        elif isinstance(kind, str) and kind in _LISTS:
            if any(part.get(key) is not None for key in (*_SOURCES, kind)):
                found.append(Media(kind, _source(part, name, folder)))
            elif listed[kind]:
                found.append(listed[kind].pop(0))
            else:
                raise DataError(
                    f"`{name}` must have a path or base64, got neither, and `{_LISTS[kind][0]}` has no more"
                )
        else:
            raise DataError(f"`{name}.type` must be text, image or audio, got {kind!r:.40}")
    if not any(isinstance(part, Media) or part.strip() for part in found):
        raise DataError(f"`{where}.content` must say something, got an empty text")
    return tuple(found)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"`{name}.text` must be text, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"`{name}.text` must be valid UTF-8, got {value[error.start :][:8]!a}") from error
    return value


def _source(value: Any, name: str, folder: Path) -> Path | bytes:
    """Return where a picture or recording is: text is a path, an object has one of _SOURCES."""
    if isinstance(value, Mapping):
        for key in ("bytes", "base64", "path", "url", "image", "audio"):
            given = value.get(key)
            if key == "bytes" and isinstance(given, bytes):
                return given
            if isinstance(given, str):
                return _decoded(given, name) if key == "base64" else _inside(given, name, folder)
    elif isinstance(value, bytes):
        return value
    elif isinstance(value, str):
        return _inside(value, name, folder)
    raise DataError(f"`{name}` must have a path or base64, got {type(value).__name__}")


def _decoded(text: str, name: str) -> bytes:
    try:
        return base64_bytes(text.partition(",")[2] if text.startswith("data:") else text)
    except ValueError as error:
        raise DataError(f"`{name}`: {error}") from error


def _inside(text: str, name: str, folder: Path) -> Path | bytes:
    """Return a file's path, which must not leave the folder, by no `..`, link or root."""
    if text.startswith("data:"):
        return _decoded(text, name)
    if "://" in text or "\0" in text:
        raise DataError(f"`{name}` must be a path in {folder}, got {text[:60]!r}: fetch it first")
    root = folder.resolve()
    try:
        path = (root / text).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, or characters that no name has
        reason = " ".join(str(error).split())[:120].encode("ascii", "backslashreplace").decode()
        raise DataError(f"`{name}` must be a path in {root}, got {text!a:.80}: {reason}") from error
    if not path.is_relative_to(root):
        raise DataError(f"`{name}` must lie in {root}, got {text!r:.80}, which leaves it")
    return path


def _check_turns(messages: Sequence[MediaMessage]) -> None:
    start = 1 if messages[0].role == "system" else 0
    for index, message in enumerate(messages[start:]):
        expected = ("user", "assistant")[index % 2]
        if message.role != expected:
            raise DataError(f"`messages`: message {start + index + 1} must be of the {expected}, got {message.role}")
    if messages[-1].role != "assistant":
        raise DataError(f"`messages` must end with an answer of the assistant, got {messages[-1].role} at the end")
