"""Pictures and recordings as what the towers take, and rows for training that hold them."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from fanformer.data.conversations.rows import ConversationRows, MaskedDocument
from fanformer.data.multimodal.messages import Media, MediaExample
from fanformer.data.multimodal.wording import Wording
from fanformer.errors import DataError, DependencyError
from fanformer.model.multimodal import FANformerProcessor, media_bytes, pad_spectrograms

_KEPT_BYTES = 2 << 30
"""Of prepared media that are kept in memory; more are read anew each time."""


class MediaStore:
    """Reads pictures and recordings, checks them, and prepares each for its tower."""

    def __init__(self, processor: FANformerProcessor, most_tokens: int | None = None) -> None:
        """Begin without any.

        Args:
            processor: of the model.
            most_tokens: what a recording may have, so that a longer one need not be decoded; None is what the processor
                takes.
        """
        self.processor = processor
        extractor = processor.feature_extractor
        self._most_seconds: float | None = None
        if most_tokens is not None and extractor is not None:
            samples = most_tokens * processor.frames_per_audio_token * extractor.hop_length
            self._most_seconds = samples / extractor.sampling_rate
        self._kept: dict[Media, np.ndarray] = {}
        self._tokens: dict[Media, int] = {}
        self._digests: dict[Media, str] = {}
        self._bytes = 0

    def prepared(self, media: Media) -> np.ndarray:
        """Return a picture (3, height, width) or a spectrogram (mel bands, frames), float32.

        Raises:
            DataError: if the model has no tower for it, it is missing, damaged or of another kind, or a file holds
                something else than when it was read before.
            DependencyError: if sound needs a package that is not installed.
        """
        kept = self._kept.get(media)
        if kept is not None:
            return kept
        try:
            content = media_bytes(media.source)
            made = np.asarray(self._made(media, content), dtype=np.float32)
        except ImportError as error:
            raise DependencyError(str(error)) from error
        except ValueError as error:
            raise DataError(str(error)) from error
        digest = hashlib.sha256(content).hexdigest()[:16]
        if self._digests.setdefault(media, digest) != digest:
            raise DataError(f"{_named(media)} is another one than when it was read before: leave files as they are.")
        self._tokens[media] = self._count(media.kind, made)
        if self._bytes + made.nbytes <= _KEPT_BYTES:
            self._kept[media] = made
            self._bytes += made.nbytes
        return made

    def _made(self, media: Media, content: bytes) -> np.ndarray:
        if media.kind == "image":
            picture = self.processor.picture(content, media.called)
            return self.processor.image_processor(picture, return_tensors="np")["pixel_values"][0]
        return self.processor.spectrogram(self.processor.recording(content, self._most_seconds, media.called))

    def _count(self, kind: str, made: np.ndarray) -> int:
        if kind == "image":
            return int(self.processor.image_seq_length)
        return made.shape[1] // int(self.processor.frames_per_audio_token)

    def tokens(self, media: Media) -> int:
        """Return how many tokens a picture or recording has; raises as `prepared`."""
        token = getattr(self.processor, f"{media.kind}_token")
        if token is None:
            what = "sees" if media.kind == "image" else "hears"
            raise DataError(f"{_named(media)} must not be there: the model {what} nothing, it has no tower for it")
        if media not in self._tokens:
            self.prepared(media)
        return self._tokens[media]

    def digest(self, media: Media) -> str:
        """Return what tells the content of a picture or recording apart from others."""
        if media not in self._digests:
            self.prepared(media)
        return self._digests[media]

    def forget(self, media: Iterable[Media]) -> None:
        """Keep nothing of these any more."""
        for one in media:
            made = self._kept.pop(one, None)
            self._bytes -= 0 if made is None else made.nbytes
            self._tokens.pop(one, None)
            self._digests.pop(one, None)

    def inputs(self, media: Sequence[Media]) -> dict[str, torch.Tensor]:
        """Return what the model is given of media, in their order.

        Returns:
            `pixel_values` (N, 3, height, width) where there are pictures, `input_features` (M, mel bands, frames) and
            `input_features_mask` (M, frames) where there are recordings.
        """
        found: dict[str, torch.Tensor] = {}
        pictures = [self.prepared(one) for one in media if one.kind == "image"]
        if pictures:
            found["pixel_values"] = torch.from_numpy(np.stack(pictures))
        recordings = [self.prepared(one) for one in media if one.kind == "audio"]
        if recordings:
            padded, mask = pad_spectrograms(recordings)
            found |= {"input_features": torch.from_numpy(padded), "input_features_mask": torch.from_numpy(mask)}
        return found


def _named(media: Media) -> str:
    what = "the picture" if media.kind == "image" else "the recording"
    return what if media.called is None else f"{what} {media.called}"


def masked_media_document(wording: Wording, example: MediaExample, counts: Sequence[int]) -> MaskedDocument:
    """Return a conversation's tokens as inputs and labels, up to the last one that is learnt.

    Args:
        wording: writes it.
        example: a conversation.
        counts: tokens of each picture and recording, in their order.
    """
    encoded = wording.encode(example.messages, counts)
    trained = np.array(encoded.trained, dtype=bool)
    last = int(np.flatnonzero(trained)[-1])
    said = [part for message in example.messages if message.role == "assistant" for part in message.parts]
    num_bytes = sum(len(part.encode()) for part in said if isinstance(part, str))
    return MaskedDocument(np.array(encoded.ids[: last + 1], dtype=np.int32), trained[1 : last + 1], num_bytes)


class MediaRows(ConversationRows):
    """Rows of T tokens with their media; what shares a row has the same kinds of media, and so the same adapters."""

    def __init__(
        self, examples: Sequence[MediaExample], wording: Wording, store: MediaStore, sequence_length: int
    ) -> None:
        """Read all media, and pack the examples.

        Args:
            examples: the conversations.
            wording: writes them.
            store: prepares their media.
            sequence_length: T, tokens per row.

        Raises:
            DataError: if a picture or recording is wrong, or an example longer than a row; the message names its place.
        """
        self._media = [example.media for example in examples]
        self._store = store
        documents = []
        for example, media in zip(examples, self._media, strict=True):
            try:
                counts = [store.tokens(one) for one in media]
            except DataError as error:
                raise DataError(f"{example.place or 'an example'}: {error}") from error
            document = masked_media_document(wording, example, counts)
            if len(document) > sequence_length:
                raise DataError(
                    f"{example.place or 'an example'}: it must have at most {sequence_length} tokens, got "
                    f"{len(document)}, {sum(counts)} of them pictures and recordings, which are never cut: use a "
                    "larger `--sequence-length`"
                )
            documents.append((document,))
        groups = [sum({"image": 1, "audio": 2}[kind] for kind in {one.kind for one in media}) for media in self._media]
        super().__init__(documents, sequence_length, wording.end_id, groups)

    @property
    def fingerprint(self) -> str:
        """A digest of all rows and media: equal where they are."""
        digest = hashlib.sha256(super().fingerprint.encode())
        for media in self._media:
            digest.update(",".join(self._store.digest(one) for one in media).encode() + b";")
        return digest.hexdigest()

    def batch(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """Return several rows, each tensor (B, T) int64, and their media as `MediaStore.inputs` gives them."""
        media = [one for index in indices for example in self.examples_of(index) for one in self._media[example]]
        return super().batch(indices) | self._store.inputs(media)
