"""Pictures and recordings of a conversation: read within limits, and made what stands at their places in a text."""

import hashlib
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from fanformer.data.multimodal.media_rows import MediaStore
from fanformer.data.multimodal.messages import Media
from fanformer.errors import DataError, DependencyError
from fanformer.generation.media_model import MediaModel
from fanformer.server.messages import MediaPart
from fanformer.server.refusal import invalid
from fanformer.server.slots import Conversation, Shown


class MediaReader:
    """Reads what users show to a model with towers, one request at a time: a picture takes memory while it is read.

    A conversation that shows nothing waits for none of them.
    """

    def __init__(self, model: MediaModel, positions: int) -> None:
        """Begin.

        Args:
            model: whose towers look and listen.
            positions: tokens that a text may have.
        """
        self._model, self._positions = model, positions
        self._ids = model.wording.ids
        self._busy = threading.Lock()

    @property
    def kinds(self) -> tuple[str, ...]:
        """What the model takes besides text: "image", "audio" or both."""
        return tuple(self._ids)

    @property
    def places(self) -> tuple[int, ...]:
        """Ids that stand for places of pictures and recordings."""
        return tuple(self._ids.values())

    def read(self, messages: Sequence[Mapping[str, Any]], encoding: threading.Lock) -> Conversation:
        """Return a conversation, its pictures and recordings read and found right.

        Args:
            messages: `role` and `content` of each, the content a text or a list of texts and `MediaPart`.
            encoding: is held while the model's tokenizer is at work.

        Raises:
            RefusalError: if one is wrong, or too long.
        """
        store = self._model.new_store(self._positions)
        said, shown = [], []
        is_text = all(isinstance(message["content"], str) for message in messages)
        turn: AbstractContextManager[Any] = nullcontext() if is_text else self._busy
        with turn:
            for message in messages:
                parts = [message["content"]] if isinstance(message["content"], str) else message["content"]
                content = [part if isinstance(part, str) else _checked(part, store) for part in parts]
                shown += [part for part in content if isinstance(part, Media)]
                said.append({"role": message["role"], "content": content})
        with encoding:
            ids = self._model.encode_messages(said, store)
        return Conversation(ids, (lambda: self._look(ids, shown, store)) if shown else None)

    def _look(self, ids: list[int], media: Sequence[Media], store: MediaStore) -> Shown:
        """Return what stands at the places of pictures and recordings in `ids`."""
        places = [place for place, number in enumerate(ids) if number in self.places]
        with self._busy, torch.inference_mode():
            try:
                found = self._model.features(media, store)
            except ValueError as error:  # a tower that takes so much and no more
                raise invalid(f"`messages` show what the model cannot take: {error}", "messages") from error
        names = [
            _name(store.digest(one), index)
            for one, tokens in zip(media, found, strict=True)
            for index in range(len(tokens))
        ]
        modality = self._model.model.model.modality_ids(torch.tensor([ids]))
        return Shown(tuple(places), tuple(names), int(modality[0]), torch.cat(found))


def _checked(part: MediaPart, store: MediaStore) -> Media:
    media = Media(part.kind, part.content)
    try:
        store.tokens(media)
    except DataError as error:
        raise invalid(f"`{part.place}` cannot be read: {error}", part.place, "invalid_media") from error
    except DependencyError as error:
        raise invalid(f"`{part.place}` cannot be read here: {error}.", part.place, "unsupported_content") from error
    return media


def _name(digest: str, index: int) -> int:
    """Return the number of token `index` of what has this digest, far below 0."""
    return -(1 << 32) - int.from_bytes(hashlib.blake2b(f"{digest} {index}".encode(), digest_size=7).digest(), "big")
