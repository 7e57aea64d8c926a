"""Rows about real pictures and recordings for `multimodal.py`: what is learnt in which stage, what is held out."""

import base64
import dataclasses
import gzip
import io
import itertools
import json
import wave
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Row = dict[str, Any]
Recording = tuple[np.ndarray, int, str, int]
"""Samples, digit, speaker and take."""
LEARNT_TAKES_FROM = 5
"""Of each speaker and digit; the takes before are held out, as the data's authors split them."""
LEARNT_DIGITS = 8000
"""Of MNIST's test pictures; those behind are held out."""
LEAST_KEYWORD_USES = 20
"""Of a keyword in the pictures that are learnt; rarer ones are not asked for."""
TASK_FILE = "task.json"
TUNING = {"optimizer": "adamw", "learning_rate": 2e-3}
"""Fields of a stage in which adapters learn."""
BY_PATCHES_OF_7 = {"image_size": 28, "patch_size": 7}
BLANK_MARGIN = 0.05
"""What an answer may be right above chance where one medium is blank."""


@dataclass(frozen=True)
class Stage:
    """One training of a task; the first aligns, a second tunes.

    Attributes:
        file: of the rows.
        steps: of the optimizer.
        fields: of the run, beside the task's.
    """

    file: str
    steps: int
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class HeldOut:
    """Rows that are measured.

    Attributes:
        file: of the rows.
        score: one of `multimodal_measures.SCORES`.
        bar: that the score is to reach; None where there is a probe or a chance.
        chance: of being right for who knows all but what is blank in these rows; None where nothing is.
        probed: whether the score is to reach that of a linear probe on the same tower.
    """

    file: str
    score: str = "exact"
    bar: float | None = None
    chance: float | None = None
    probed: bool = False


@dataclass(frozen=True)
class Task:
    """Something that is learnt and measured.

    Attributes:
        stages: in their order.
        held_out: by name.
        fields: of all its runs.
    """

    stages: list[Stage]
    held_out: dict[str, HeldOut]
    fields: dict[str, Any] = field(default_factory=dict)


def write_task(folder: Path, task: Task) -> None:
    """Write what a task is beside its rows."""
    (folder / TASK_FILE).write_text(json.dumps(dataclasses.asdict(task), indent=1) + "\n", encoding="utf-8")


def read_task(folder: Path) -> Task:
    """Read what `write_task` wrote."""
    content = json.loads((folder / TASK_FILE).read_text(encoding="utf-8"))
    stages = [Stage(**one) for one in content["stages"]]
    return Task(stages, {name: HeldOut(**one) for name, one in content["held_out"].items()}, content["fields"])


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


def moved(pixels: np.ndarray, chooser: np.random.Generator) -> np.ndarray:
    """Return a picture moved by up to two pixels each way; what comes in has the colour of its first corner."""
    down, right = (int(n) for n in chooser.integers(0, 5, 2))
    margins = ((2, 2), (2, 2), *[(0, 0)] * (pixels.ndim - 2))
    padded = np.pad(pixels, margins, mode="edge")
    padded[:2], padded[-2:], padded[:, :2], padded[:, -2:] = (pixels[0, 0],) * 4
    return padded[down : down + pixels.shape[0], right : right + pixels.shape[1]]


def in_a_row(digits: list[np.ndarray]) -> np.ndarray:
    """Return pictures (28, 28) side by side in the middle of a black square of 112 pixels."""
    square = np.zeros((112, 112), dtype=np.uint8)
    left = (112 - 28 * len(digits)) // 2
    for place, digit in enumerate(digits):
        square[42:70, left + 28 * place : left + 28 * (place + 1)] = digit
    return square


def commonest_share(values: Iterable[Any]) -> float:
    """Return the share of the commonest value."""
    counts = Counter(values)
    return max(counts.values()) / counts.total()


class Sources:
    """The folder of real data, each set read once, and the folder that rows are written into."""

    def __init__(self, folder: Path, place: Path, limit: int | None) -> None:
        """Take the data, the place of a task's files, and how many rows a file has at most."""
        self.folder, self.place, self.limit = folder, place, limit

    def write(self, name: str, rows: Iterable[Row]) -> str:
        """Write rows into a file of the task, and return its name."""
        with (self.place / name).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(one) + "\n" for one in itertools.islice(rows, self.limit))
        return name

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
    def spoken(self) -> list[Recording]:
        """Every recording, in a mixed order that is always the same."""
        with np.load(self.folder / "spoken-digits/fsdd.npz") as data:
            audio, places = data["audio"], data["offset"]
            told = list(zip(data["label"], data["speaker"], data["index"], strict=True))
        found = [
            (audio[places[n] : places[n + 1]], int(digit), str(speaker), int(take))
            for n, (digit, speaker, take) in enumerate(told)
        ]
        return [found[n] for n in np.random.default_rng(0).permutation(len(found))]

    @cached_property
    def emoji(self) -> list[tuple[np.ndarray, dict[str, Any]]]:
        """Pixels (32, 32, 3) of every emoji and what is told of it, in a mixed order that is always the same."""
        with np.load(self.folder / "emoji-captions/emoji32.npz") as data:
            images = data["images"]
        lines = (self.folder / "emoji-captions/captions.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        return [(images[rows[n]["i"]], rows[n]) for n in np.random.default_rng(0).permutation(len(rows))]


def _digits(data: Sources, start: int, stop: int, copies: int = 1) -> Iterator[Row]:
    """Yield rows that name one digit; copies behind the first are moved."""
    images, labels = data.mnist
    chooser = np.random.default_rng(0)
    for copy in range(copies):
        for n in range(start, stop):
            shown = moved(images[n], chooser) if copy else images[n]
            yield row([picture(shown)], "Which digit?", str(labels[n]))


def naming(data: Sources) -> Task:
    """Name one digit."""
    stage = Stage(data.write("align.jsonl", _digits(data, 0, LEARNT_DIGITS, 4)), 1500)
    measured = data.write("right.jsonl", _digits(data, LEARNT_DIGITS, 10000))
    return Task([stage], {"right": HeldOut(measured, bar=0.97)}, {**BY_PATCHES_OF_7})


def reading(data: Sources) -> Task:
    """Read two to four digits as a number."""
    images, labels = data.mnist

    def rows(start: int, stop: int, count: int, seed: int) -> Iterator[Row]:
        chooser = np.random.default_rng(seed)
        for _ in range(count):
            chosen = chooser.integers(start, stop, chooser.integers(2, 5))
            digits = [images[n] if start else moved(images[n], chooser) for n in chosen]
            yield row([picture(in_a_row(digits))], "Which number?", "".join(str(labels[n]) for n in chosen))

    learnt = data.write("align.jsonl", rows(0, LEARNT_DIGITS, 12000, 0))
    measured = data.write("right.jsonl", rows(LEARNT_DIGITS, 10000, 2000, 1))
    stages = [Stage(learnt, 2500), Stage(learnt, 500, TUNING)]
    return Task(stages, {"right": HeldOut(measured, bar=0.9)}, {"image_size": 112, "patch_size": 14})


def emoji(data: Sources) -> Task:
    """Say an emoji's category and its keywords; no concept, and no picture, is both learnt and held out."""
    held_out = [one for one in data.emoji if one[1]["split"] != "train"]
    known = {pixels.tobytes() for pixels, _ in held_out}  # some concepts share their picture, across the data's split
    learnt = [one for one in data.emoji if one[1]["split"] == "train" and one[0].tobytes() not in known]
    uses = Counter(word for _, told in learnt for word in set(told["keywords"]))
    asked = {word for word, count in uses.items() if count >= LEAST_KEYWORD_USES}

    def about(pixels: np.ndarray, told: Mapping[str, Any], what: str) -> Iterator[Row]:
        keywords = [word for word in dict.fromkeys(told["keywords"]) if word in asked]
        if what == "category" and told["category"]:
            yield row([picture(pixels)], "Which category?", told["category"])
        if what == "keywords" and keywords:
            yield row([picture(pixels)], "Which keywords?", ", ".join(keywords))

    def train() -> Iterator[Row]:
        chooser = np.random.default_rng(0)
        for copy in range(3):
            for pixels, told in learnt:
                for what in ("category", "keywords"):
                    yield from about(moved(pixels, chooser) if copy else pixels, told, what)

    sets = {}
    for what, score in (("category", "exact"), ("keywords", "keywords")):
        rows = itertools.chain.from_iterable(about(pixels, told, what) for pixels, told in held_out)
        sets[what] = HeldOut(data.write(f"{what}.jsonl", rows), score, probed=True)
    return Task([Stage(data.write("align.jsonl", train()), 1000)], sets, {"image_size": 32})


def _heard(voices: Iterable[Recording]) -> Iterator[Row]:
    """Yield rows that name one digit that somebody speaks."""
    for samples, digit, _, _ in voices:
        yield row([recording(samples)], "Which digit?", str(digit))


def _is_held(voice: Recording) -> bool:
    return voice[3] < LEARNT_TAKES_FROM


def _spoken(data: Sources, milliseconds: int, bar: float, is_held: Callable[[Recording], bool]) -> Task:
    learnt = data.write("align.jsonl", _heard(voice for voice in data.spoken if not is_held(voice)))
    measured = data.write("right.jsonl", _heard(voice for voice in data.spoken if is_held(voice)))
    return Task([Stage(learnt, 400)], {"right": HeldOut(measured, bar=bar)}, {"audio_token_ms": milliseconds})


def unheard(data: Sources, speaker: str) -> Task:
    """Name digits of a speaker who was not heard in training."""
    return _spoken(data, 80, 0.85, lambda voice: voice[2] == speaker)


def connected(data: Sources) -> Task:
    """Write two to five digits of one speaker that were joined."""
    voices: dict[tuple[bool, str], list[Recording]] = {}
    for voice in data.spoken:
        voices.setdefault((_is_held(voice), voice[2]), []).append(voice)
    speakers = sorted({speaker for _, speaker in voices})

    def rows(is_held: bool, count: int, seed: int) -> Iterator[Row]:
        chooser = np.random.default_rng(seed)
        for _ in range(count):
            mine = voices[is_held, speakers[chooser.integers(len(speakers))]]
            chosen = [mine[n] for n in chooser.integers(0, len(mine), chooser.integers(2, 6))]
            heard = recording(np.concatenate([voice[0] for voice in chosen]))
            yield row([heard], "Which digits?", " ".join(str(voice[1]) for voice in chosen))

    learnt = data.write("align.jsonl", rows(False, 5000, 0))
    measured = data.write("words.jsonl", rows(True, 600, 1))
    fields = {"audio_token_ms": 80, "sequence_length": 256, "batch_size": 4}
    return Task([Stage(learnt, 1000), Stage(learnt, 400, TUNING)], {"words": HeldOut(measured, "words", 0.9)}, fields)


def both(data: Sources) -> Task:
    """Add a digit that is seen and one that is heard; towers are aligned on one at a time."""
    images, labels = data.mnist
    spoken = {held: [voice for voice in data.spoken if _is_held(voice) == held] for held in (False, True)}

    def alone() -> Iterator[Row]:
        seen, heard = _digits(data, 0, LEARNT_DIGITS, 2), itertools.cycle(_heard(spoken[False]))
        for number, one in enumerate(seen):
            yield one
            if number % 2:
                yield next(heard)

    def pairs(is_held: bool, count: int, seed: int) -> Iterator[tuple[int, Recording]]:
        chooser = np.random.default_rng(seed)
        span = (LEARNT_DIGITS, 10000) if is_held else (0, LEARNT_DIGITS)
        for _ in range(count):
            yield int(chooser.integers(*span)), spoken[is_held][chooser.integers(len(spoken[is_held]))]

    def sums(chosen: Iterable[tuple[int, Recording]], blank: str = "") -> Iterator[Row]:
        for seen, (samples, digit, _, _) in chosen:
            shown = np.zeros_like(images[seen]) if blank == "picture" else images[seen]
            heard = np.zeros_like(samples) if blank == "recording" else samples
            yield row([picture(shown), recording(heard)], "What is the sum?", str(int(labels[seen]) + digit))

    measured = list(itertools.islice(pairs(True, 1000, 1), data.limit))
    chances = {
        "picture": commonest_share(int(labels[seen]) for seen, _ in measured),
        "recording": commonest_share(voice[1] for _, voice in measured),
    }
    sets = {"right": HeldOut(data.write("right.jsonl", sums(measured)), bar=0.8)}
    for what, chance in chances.items():
        file = data.write(f"without-{what}.jsonl", sums(measured, what))
        sets[f"without_{what}"] = HeldOut(file, chance=chance)
    learnt = data.write("tune.jsonl", sums(pairs(False, 12000, 0)))
    stages = [Stage(data.write("align.jsonl", alone()), 1200), Stage(learnt, 800, TUNING)]
    return Task(stages, sets, {**BY_PATCHES_OF_7, "audio_token_ms": 80})


def two_pictures(data: Sources) -> Task:
    """Write the digits of two pictures in their order."""
    images, labels = data.mnist

    def pairs(start: int, stop: int, count: int, seed: int) -> list[tuple[int, int]]:
        chosen = np.random.default_rng(seed).integers(start, stop, (count, 2))
        return [(int(one), int(other)) for one, other in chosen[: data.limit]]

    def rows(chosen: Iterable[tuple[int, int]], blank: int | None = None) -> Iterator[Row]:
        for pair in chosen:
            shown = [np.zeros_like(images[n]) if place == blank else images[n] for place, n in enumerate(pair)]
            yield row([picture(one) for one in shown], "Which digits?", " ".join(str(labels[n]) for n in pair))

    measured = pairs(LEARNT_DIGITS, 10000, 1000, 1)
    sets = {"right": HeldOut(data.write("right.jsonl", rows(measured)), bar=0.9)}
    for place, name in enumerate(("first", "second")):
        chance = commonest_share(int(labels[pair[place]]) for pair in measured)
        file = data.write(f"without-{name}.jsonl", rows(measured, place))
        sets[f"without_{name}"] = HeldOut(file, chance=chance)
    learnt = data.write("tune.jsonl", rows(pairs(0, LEARNT_DIGITS, 12000, 0)))
    stages = [Stage(data.write("align.jsonl", _digits(data, 0, LEARNT_DIGITS, 2)), 800), Stage(learnt, 600, TUNING)]
    return Task(stages, sets, {**BY_PATCHES_OF_7})


SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
UNHEARD = {f"unheard-{name}": partial(unheard, speaker=name) for name in SPEAKERS}
TASKS: Mapping[str, Callable[[Sources], Task]] = {
    "naming": naming,
    "reading": reading,
    "emoji": emoji,
    "spoken": partial(_spoken, milliseconds=80, bar=0.95, is_held=_is_held),
    "spoken-40ms": partial(_spoken, milliseconds=40, bar=0.95, is_held=_is_held),
    **UNHEARD,
    "connected": connected,
    "both": both,
    "two-pictures": two_pictures,
}
"""What writes the rows of each task."""
GROUPS: Mapping[str, tuple[str, ...]] = {
    **{name: (name,) for name in ("naming", "reading", "emoji", "spoken", "spoken-40ms")},
    "unheard": tuple(UNHEARD),
    **{name: (name,) for name in ("connected", "both", "two-pictures")},
}
"""What is asked for and told together: a task, or several whose mean counts."""
