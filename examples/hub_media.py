"""Pictures and recordings of a dataset on the hub, or of a local folder in its form, as examples of the demos."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fanformer.data.sources.hub import require_hub
from fanformer.errors import DataError, import_extra

Example = tuple[str, str]
"""A media file's name and the answer about it."""
MOST_LEARNT, MOST_HELD_OUT = 20_000, 2_000
ANSWERS = ("label", "labels", "answer", "caption", "text", "transcription")
"""Columns that may hold answers where none has the type of a label."""
RATE = 16_000
"""Samples a second of the recordings that are written."""


def hub_examples(spec: str, folder: Path, kind: str) -> tuple[list[Example], list[Example]]:
    """Write the media of a dataset into a folder; its test or validation rows are held out, else every fifth.

    Args:
        spec: hf:NAME or hf:NAME:CONFIG, NAME being that of the hub or a folder that `datasets` can load.
        folder: to write into.
        kind: "image" or "audio".

    Returns:
        What is learnt and what is held out, in a mixed order that is always the same.

    Raises:
        DataError: if it cannot be loaded, or has no single column of such media or no column of answers.
        DependencyError: if a package is not installed.
    """
    learnt, held_out = _splits(spec)
    media, answer = _columns(spec, learnt.features, kind)
    write = _write_picture if kind == "image" else _write_recording
    found = []
    for name, split, most in (("learnt", learnt, MOST_LEARNT), ("held-out", held_out, MOST_HELD_OUT)):
        chosen = split.shuffle(seed=0).select(range(min(most, len(split))))
        if len(chosen) < len(split):
            print(f"{spec}: {len(chosen):,} of {len(split):,} rows are {name}")
        found.append([(write(folder, f"{name}-{n:06}", content), said) for n, (content, said) in
                      enumerate(_rows(spec, chosen, media, answer))])  # fmt: skip
    return found[0], found[1]


def _splits(spec: str) -> tuple[Any, Any]:
    """Return what is learnt and what is held out, as datasets."""
    datasets = import_extra("datasets", f"`--data {spec}`")
    name, _, config = spec.removeprefix("hf:").partition(":")
    if not Path(name).is_dir():
        require_hub(f"`--data {spec}`", "name a folder with `--data DIR`")
    try:
        found = datasets.load_dataset(name, config or None)
    except Exception as error:  # anything may come out of a dataset's files
        raise DataError(f"`--data {spec}` cannot be loaded: {' '.join(str(error).split())[:200]}") from error
    if "train" not in found:
        raise DataError(f"`--data {spec}` must have a split `train`, got {', '.join(found)}: name another dataset.")
    held_out = next((found[name] for name in ("test", "validation", "valid") if name in found), None)
    if held_out is not None:
        return found["train"], held_out
    count = len(found["train"])
    parts = [[n for n in range(count) if (n % 5 == 4) == is_held] for is_held in (False, True)]
    return found["train"].select(parts[0]), found["train"].select(parts[1])


def _columns(spec: str, features: Any, kind: str) -> tuple[str, str]:
    """Return the column of media and that of answers."""
    datasets = import_extra("datasets", f"`--data {spec}`")
    there = f"got {', '.join(f'{name} ({type(one).__name__})' for name, one in features.items())}"
    wanted = datasets.Image if kind == "image" else datasets.Audio
    media = [name for name, one in features.items() if isinstance(one, wanted)]
    if len(media) != 1:
        raise DataError(f"`--data {spec}` must have one column of the type {wanted.__name__}, {there}.")
    labels = [name for name, one in features.items() if isinstance(one, datasets.ClassLabel)]
    answers = labels or [name for name in ANSWERS if name in features]
    if not answers:
        raise DataError(f"`--data {spec}` must have a column of labels, or one of {', '.join(ANSWERS)}, {there}.")
    return media[0], answers[0]


def _rows(spec: str, split: Any, media: str, answer: str) -> Iterator[tuple[bytes, str]]:
    """Yield the bytes of each row's picture or recording, undecoded, and its answer."""
    feature = split.features[answer]
    told: Callable[[Any], Any] = getattr(feature, "int2str", str)
    raw = split.cast_column(media, type(split.features[media])(decode=False))
    for number, row in enumerate(raw.select_columns([media, answer])):
        content = row[media]["bytes"]
        if content is None:
            content = Path(row[media]["path"]).read_bytes()
        said = str(told(row[answer])).strip()
        if not said:
            raise DataError(f"`--data {spec}`: row {number} must have an answer in `{answer}`, got an empty one.")
        yield content, said


def _write_picture(folder: Path, name: str, content: bytes) -> str:
    """Write a picture as PNG and return the file's name."""
    from fanformer.model.multimodal import load_picture

    try:
        load_picture(content).save(folder / f"{name}.png")
    except ValueError as error:
        raise DataError(f"{name}: {error}") from error
    return f"{name}.png"


def _write_recording(folder: Path, name: str, content: bytes) -> str:
    """Write a recording as wav and return the file's name."""
    from fanformer.model.multimodal import load_recording

    soundfile = import_extra("soundfile", "writing sound", "multimodal")
    try:
        soundfile.write(folder / f"{name}.wav", load_recording(content, RATE), RATE)
    except ValueError as error:
        raise DataError(f"{name}: {error}") from error
    return f"{name}.wav"
