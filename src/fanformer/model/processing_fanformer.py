"""What turns messages, pictures and recordings into the inputs of a FANformer that sees and hears."""

import http.client
import urllib.request
from typing import Any

import numpy as np
from transformers import BatchFeature, ProcessorMixin

from .media_fanformer import MOST_BYTES, base64_bytes, load_picture, load_recording

_FETCH_SECONDS = 30
_KEYS = {"image": ("image", "path", "url", "base64"), "audio": ("audio", "path", "url", "base64")}
"""For each kind of media, the keys of a message's part that may hold it."""


class FANformerProcessor(ProcessorMixin):
    """A tokenizer whose placeholders become as many tokens as pictures and recordings have, and what prepares these.

    Recordings are prepared one by one and end with silence up to a whole number of tokens, so that a batch holds of
    each what it is alone.
    """

    def __init__(
        self,
        image_processor: Any = None,
        feature_extractor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_seq_length: int = 16,
        frames_per_audio_token: int = 8,
    ) -> None:
        """Set up.

        Args:
            image_processor: makes pixel values of pictures.
            feature_extractor: makes log-mel spectrograms of recordings.
            tokenizer: with `image_token` and `audio_token`, or one of them.
            chat_template: how messages are written, in Jinja.
            image_seq_length: tokens of a picture.
            frames_per_audio_token: frames of the spectrogram that one token of a recording is made of.
        """
        self.image_seq_length, self.frames_per_audio_token = image_seq_length, frames_per_audio_token
        for kind in ("image", "audio"):
            token = getattr(tokenizer, f"{kind}_token", None)
            setattr(self, f"{kind}_token", token)
            setattr(self, f"{kind}_token_id", None if token is None else tokenizer.convert_tokens_to_ids(token))
        super().__init__(image_processor, feature_extractor, tokenizer, chat_template=chat_template)

    def __call__(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> Any:
        """Return `input_ids`, `attention_mask`, and where there are some `pixel_values` and `input_features`.

        Args:
            images: PIL images, paths, URLs or arrays, one or a list or a list of them for each text.
            text: texts with a placeholder for each picture and recording.
            videos: none.
            audio: arrays (samples,) at the feature extractor's rate, paths or URLs, one or a list.
            **kwargs: as in `ProcessorMixin`.

        Returns:
            `pixel_values` (N, 3, height, width); `input_features` (M, mel bands, frames) with `input_features_mask`
            (M, frames).

        Raises:
            ValueError: if there are more or fewer placeholders than media, or a picture or recording is bad.
        """
        if videos is not None:
            raise ValueError("`videos` must not be given, got some: only pictures and recordings are taken.")
        for kind, given in (("image", images), ("audio", audio)):
            if given is not None and getattr(self, f"{kind}_token") is None:
                raise ValueError(f"`{kind}` must not be given, got some: this model has no tower for it.")
        return super().__call__(
            images=None if images is None else _every(images, self.picture),
            text=text,
            audio=None if audio is None else _every(audio, self.recording),
            **kwargs,
        )

    def picture(self, source: Any, name: str | None = None) -> Any:
        """Return a picture from a PIL image, path, URL, data: URI or bytes; arrays as they are.

        Args:
            source: of it.
            name: what messages call it; None is what the source tells.
        """
        if _is_address(source):
            return load_picture(_fetched(source), name or source)
        return source if hasattr(source, "shape") else load_picture(source, name)

    def recording(self, source: Any, most_seconds: float | None = None, name: str | None = None) -> np.ndarray:
        """Return a recording (samples,) from an array, path, URL, data: URI or bytes.

        Args:
            source: of it.
            most_seconds: that it may last, None for the most that any may.
            name: what messages call it; None is what the source tells.
        """
        rate = self.feature_extractor.sampling_rate
        if _is_address(source):
            return load_recording(_fetched(source), rate, most_seconds, name or source)
        return load_recording(np.asarray(source) if hasattr(source, "shape") else source, rate, most_seconds, name)

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """Do what `ProcessorMixin.apply_chat_template` does, with media that are read as this class reads them.

        Args:
            conversation: messages, or several lists of them; what one says is a text or parts, each with a `type`:
                "text" with `text`; "image" or "audio" with the media itself under that name, or `path`, `url` or
                `base64`; or OpenAI's "image_url".
            *args: as there.
            **kwargs: as there.
        """
        several = bool(conversation) and not isinstance(conversation[0], dict)
        given = conversation if several else [conversation]
        read = [[self._with_media(message) for message in messages] for messages in given]
        return super().apply_chat_template(read if several else read[0], *args, **kwargs)

    def _with_media(self, message: dict[str, Any]) -> dict[str, Any]:
        if isinstance(message.get("content"), str) or not message.get("content"):
            return dict(message)
        return {**message, "content": [self._loaded(part) for part in message["content"]]}

    def _loaded(self, part: dict[str, Any]) -> dict[str, Any]:
        """Return a message's part with its picture or recording read."""
        if part.get("type") == "image_url":
            given = part.get("image_url")
            part = {"type": "image", "url": given.get("url") if isinstance(given, dict) else given}
        kind = str(part.get("type"))
        found = [key for key in _KEYS.get(kind, ()) if part.get(key) is not None]
        if not found:
            return part
        source = part[found[0]]
        if found[0] == "base64" and not str(source).startswith("data:"):
            source = base64_bytes(source)
        return {"type": kind, kind: self.picture(source) if kind == "image" else self.recording(source)}

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """Return the placeholders of one picture."""
        return self.image_token * self.image_seq_length

    def _process_audio(self, audio: Any, **kwargs: Any) -> tuple[dict[str, np.ndarray], list[str]]:
        features = [self.spectrogram(one, kwargs.get("sampling_rate")) for one in audio]
        padded, mask = pad_spectrograms(features)
        tokens = [one.shape[1] // self.frames_per_audio_token for one in features]
        data = BatchFeature({"input_features": padded, "input_features_mask": mask})
        return data, [self.audio_token * count for count in tokens]

    def spectrogram(self, samples: np.ndarray, rate: int | None = None) -> np.ndarray:
        """Return the log-mel spectrogram (mel bands, frames) of a recording (samples,), a whole number of tokens long.

        Args:
            samples: at the feature extractor's rate.
            rate: theirs, should they come with one; another one is refused.
        """
        extractor = self.feature_extractor
        period = extractor.hop_length * self.frames_per_audio_token
        whole = np.pad(samples, (0, -len(samples) % period))
        found = extractor(
            whole,
            sampling_rate=rate or extractor.sampling_rate,
            padding="longest",
            truncation=False,
            return_tensors="np",
        )
        return found["input_features"][0][:, : len(whole) // extractor.hop_length]


def pad_spectrograms(features: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return spectrograms (mel bands, frames) as one array (M, mel bands, frames), and a mask of frames (M, frames)."""
    most = max(one.shape[1] for one in features)
    padded = np.stack([np.pad(one, ((0, 0), (0, most - one.shape[1]))) for one in features]).astype(np.float32)
    mask = np.stack([(np.arange(most) < one.shape[1]).astype(np.int64) for one in features])
    return padded, mask


def _is_address(source: Any) -> bool:
    return isinstance(source, str) and source.startswith(("http://", "https://"))


def _fetched(address: str) -> bytes:
    """Return what an address answers: read by our own readers, a picture is the same from there and from a file."""
    asked = urllib.request.Request(address, headers={"user-agent": "fanformer"})
    try:
        with urllib.request.urlopen(asked, timeout=_FETCH_SECONDS) as answer:
            content: bytes = answer.read(MOST_BYTES + 1)
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f"cannot fetch {address}: {' '.join(str(error).split())[:120]}.") from error
    if len(content) > MOST_BYTES:
        raise ValueError(f"{address} must have at most {MOST_BYTES:,} bytes, got more.")
    return content


def _every(values: Any, read: Any) -> Any:
    """Return what `read` makes of every value of a list, of lists, or of a single value."""
    if isinstance(values, list | tuple):
        return [_every(value, read) for value in values]
    return read(values)


__all__ = ["FANformerProcessor", "pad_spectrograms"]
