"""Rows about real pictures and recordings for `multimodal.py`: what is learnt, what is held out, and the bar."""

import base64
import gzip
import io
import json
import wave
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Row = dict[str, Any]
LEARNT_TAKES_FROM = 5
"""Of each speaker and digit; the takes before are held out, as the data's authors split them."""


@dataclass(frozen=True)
class Task:
    """Something that is learnt and measured.

    Attributes:
        name: of the task.
        train: rows that are learnt.
        held_out: rows that are measured.
        bar: share of right answers that is asked for; None where it is to be above the blind twin's and a probe's.
        fields: of the run.
        by_words: whether the measure is one less the word error rate, answers being words.
    """

    name: str
    train: list[Row]
    held_out: list[Row]
    bar: float | None
    fields: Mapping[str, Any] = field(default_factory=dict)
    by_words: bool = False


def row(parts: list[dict[str, str]], question: str, answer: str) -> Row:
    """Return a conversation of one question and one answer."""
    asked = [*parts, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


def picture(pixels: np.ndarray) -> dict[str, str]:
    """Return a part of a message: pixels (height, width) or (height, width, 3), uint8, as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"type": "image", "base64": base64.b64encode(buffer.getvalue()).decode()}


def recording(samples: np.ndarray, rate: int = 8000) -> dict[str, str]:
    """Return a part of a message: samples (N,) int16 as wav."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", "not compressed"))
        file.writeframes(samples.astype("<i2").tobytes())
    return {"type": "audio", "base64": base64.b64encode(buffer.getvalue()).decode()}


def in_a_row(digits: list[np.ndarray]) -> np.ndarray:
    """Return pictures (28, 28) side by side in the middle of a black square of 112 pixels."""
    square = np.zeros((112, 112), dtype=np.uint8)
    left = (112 - 28 * len(digits)) // 2
    for place, digit in enumerate(digits):
        square[42:70, left + 28 * place : left + 28 * (place + 1)] = digit
    return square


class Sources:
    """The folder of real data, each set read once."""

    def __init__(self, folder: Path, limit: int | None) -> None:
        """Take the folder, and how many rows a task has at most."""
        self.folder, self.limit = folder, limit

    @cached_property
    def mnist(self) -> tuple[np.ndarray, np.ndarray]:
        """Pictures (10000, 28, 28) and labels (10000,)."""
        content = [
            gzip.decompress((self.folder / f"mnist-test/t10k-{name}-ubyte.gz").read_bytes())
            for name in ("images-idx3", "labels-idx1")
        ]
        return np.frombuffer(content[0], np.uint8, offset=16).reshape(-1, 28, 28), np.frombuffer(
            content[1], np.uint8, offset=8
        )

    @cached_property
    def spoken(self) -> list[tuple[np.ndarray, int, str, int]]:
        """Samples, digit, speaker and take of every recording."""
        with np.load(self.folder / "spoken-digits/fsdd.npz") as data:
            audio, places = data["audio"], data["offset"]
            told = zip(data["label"], data["speaker"], data["index"], strict=True)
            return [
                (audio[places[n] : places[n + 1]], int(digit), str(speaker), int(take))
                for n, (digit, speaker, take) in enumerate(told)
            ]

    @cached_property
    def emoji(self) -> list[tuple[np.ndarray, str, str]]:
        """Pixels (32, 32, 3), category and split of every emoji that has a category."""
        with np.load(self.folder / "emoji-captions/emoji32.npz") as data:
            images = data["images"]
        lines = (self.folder / "emoji-captions/captions.jsonl").read_text(encoding="utf-8").splitlines()
        rows = map(json.loads, lines)
        return [(images[one["i"]], str(one["category"]), str(one["split"])) for one in rows if one["category"]]


def naming(data: Sources) -> Task:
    """Name one digit."""
    images, labels = data.mnist

    def rows(start: int, stop: int) -> list[Row]:
        chosen = range(start, min(stop, start + (data.limit or stop)))
        return [row([picture(images[n])], "Which digit?", str(labels[n])) for n in chosen]

    return Task("naming", rows(0, 8000), rows(8000, 10000), 0.97, {"image_size": 32})


def reading(data: Sources) -> Task:
    """Read two to four digits as a number."""
    images, labels = data.mnist

    def rows(start: int, stop: int, count: int, seed: int) -> list[Row]:
        chooser, found = np.random.default_rng(seed), []
        for _ in range(min(count, data.limit or count)):
            chosen = chooser.integers(start, stop, chooser.integers(2, 5))
            shown = picture(in_a_row([images[n] for n in chosen]))
            found.append(row([shown], "Which number?", "".join(str(labels[n]) for n in chosen)))
        return found

    fields = {"image_size": 112, "patch_size": 7}
    return Task("reading", rows(0, 8000, 12000, 0), rows(8000, 10000, 2000, 1), 0.9, fields)


def emoji(data: Sources) -> Task:
    """Say an emoji's category; no concept is in both splits."""

    def rows(is_held: bool) -> list[Row]:
        chosen = [one for one in data.emoji if (one[2] != "train") == is_held][: data.limit]
        return [row([picture(pixels)], "Which category?", category) for pixels, category, _ in chosen]

    return Task("emoji", rows(False), rows(True), None, {"image_size": 32})


def _spoken(data: Sources, name: str, milliseconds: int, bar: float, unheard: str | None = None) -> Task:
    train, held_out = [], []
    for samples, digit, speaker, take in data.spoken:
        is_held = take < LEARNT_TAKES_FROM if unheard is None else speaker == unheard
        rows = held_out if is_held else train
        if data.limit is None or len(rows) < data.limit:
            rows.append(row([recording(samples)], "Which digit?", str(digit)))
    return Task(name, train, held_out, bar, {"audio_token_ms": milliseconds})


def unheard(data: Sources) -> list[Task]:
    """Name digits of a speaker who was not heard in training, each in turn."""
    speakers = sorted({speaker for _, _, speaker, _ in data.spoken})
    chosen = speakers if data.limit is None else speakers[:2]
    return [_spoken(data, "unheard-speaker", 80, 0.85, speaker) for speaker in chosen]


def connected(data: Sources) -> Task:
    """Write two to five digits of one speaker that were joined."""
    by_speaker: dict[tuple[str, bool], list[tuple[np.ndarray, int]]] = {}
    for samples, digit, speaker, take in data.spoken:
        by_speaker.setdefault((speaker, take < LEARNT_TAKES_FROM), []).append((samples, digit))

    def rows(is_held: bool, count: int, seed: int) -> list[Row]:
        chooser, found = np.random.default_rng(seed), []
        voices = [voice for (_, held), voice in sorted(by_speaker.items(), key=lambda item: item[0]) if held == is_held]
        for _ in range(min(count, data.limit or count)):
            voice = voices[chooser.integers(len(voices))]
            chosen = [voice[n] for n in chooser.integers(0, len(voice), chooser.integers(2, 6))]
            heard = recording(np.concatenate([samples for samples, _ in chosen]))
            found.append(row([heard], "Which digits?", " ".join(str(digit) for _, digit in chosen)))
        return found

    return Task("connected", rows(False, 8000, 0), rows(True, 600, 1), 0.9, {"audio_token_ms": 80}, by_words=True)


def both(data: Sources) -> Task:
    """Add a digit that is seen and one that is heard."""
    images, labels = data.mnist

    def rows(is_held: bool, count: int, seed: int) -> list[Row]:
        chooser, found = np.random.default_rng(seed), []
        voices = [(samples, digit) for samples, digit, _, take in data.spoken if (take < LEARNT_TAKES_FROM) == is_held]
        for _ in range(min(count, data.limit or count)):
            seen = chooser.integers(8000, 10000) if is_held else chooser.integers(0, 8000)
            samples, digit = voices[chooser.integers(len(voices))]
            parts = [picture(images[seen]), recording(samples)]
            found.append(row(parts, "What is the sum?", str(int(labels[seen]) + digit)))
        return found

    return Task("both", rows(False, 12000, 0), rows(True, 1000, 1), 0.8, {"image_size": 32, "audio_token_ms": 80})


def two_pictures(data: Sources) -> Task:
    """Add the digits of two pictures."""
    images, labels = data.mnist

    def rows(start: int, stop: int, count: int, seed: int) -> list[Row]:
        chooser, found = np.random.default_rng(seed), []
        for _ in range(min(count, data.limit or count)):
            one, other = chooser.integers(start, stop, 2)
            parts = [picture(images[one]), picture(images[other])]
            found.append(row(parts, "What is the sum?", str(int(labels[one]) + int(labels[other]))))
        return found

    return Task("two-pictures", rows(0, 8000, 12000, 0), rows(8000, 10000, 1000, 1), 0.8, {"image_size": 32})


TASKS: Mapping[str, Callable[[Sources], Task | list[Task]]] = {
    "naming": naming,
    "reading": reading,
    "emoji": emoji,
    "spoken": lambda data: _spoken(data, "spoken", 80, 0.95),
    "spoken-40ms": lambda data: _spoken(data, "spoken-40ms", 40, 0.95),
    "unheard-speaker": unheard,
    "connected": connected,
    "both": both,
    "two-pictures": two_pictures,
}
"""What makes the rows of each task, or of several whose mean counts."""
