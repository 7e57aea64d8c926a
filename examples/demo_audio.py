"""The demo that hears: a frozen language model learns to name digits that six people spoke, 3,000 recordings.

Fails if fewer than 90% of the 300 held-out recordings are named right (no bar is known for other data, which --data
names), or if a twin that hears nothing does as well.
"""

import json
from pathlib import Path

from hub_media import hub_examples
from multimodal_demo import Example, Recipe, run_demo

from fanformer.cli.failure import run_program
from fanformer.errors import ConfigError, import_extra

FIELDS = {
    "max_steps": 400,
    "sequence_length": 128,
    "batch_size": 4,
    "optimizer": "muon",
    "learning_rate": 3e-3,
    "audio_token_ms": 40,
    "tower_width": 96,
    "tower_layers": 3,
    "eval_steps": 250,
}
HELD_OUT_TAKES = 5
"""Of each speaker and digit, the first ones, as the data's authors split them."""


def make_recordings(folder: Path, data: str | None) -> tuple[list[Example], list[Example]]:
    """Write every recording as a wav; the first five takes of each speaker and digit are held out.

    Args:
        folder: to write into.
        data: a folder of wavs named DIGIT_SPEAKER_TAKE.wav, or hf:NAME, in place of those beside this file.

    Raises:
        ConfigError: if `data` is no such folder.
        DataError: if it is no such dataset.
    """
    if data is not None and data.startswith("hf:"):
        return hub_examples(data, folder, "audio")
    if data is not None:
        return named_recordings(folder, Path(data))
    soundfile = import_extra("soundfile", "reading sound", "multimodal")
    source = Path(__file__).parent / "data" / "spoken-digits"
    content = json.loads((source / "recordings.json").read_text(encoding="utf-8"))
    learnt, held_out = [], []
    for speaker, lengths in content["samples"].items():
        samples, place = soundfile.read(source / f"{speaker}.ogg", dtype="int16")[0], 0
        for number, length in enumerate(lengths):  # by digit, then by take
            digit, take = divmod(number, content["takes"])
            name = f"{digit}_{speaker}_{take}.wav"
            soundfile.write(folder / name, samples[place : place + length], content["rate"])
            place += length + content["gap_samples"]
            (held_out if take < HELD_OUT_TAKES else learnt).append((name, str(digit)))
    return learnt, held_out


def named_recordings(folder: Path, data: Path) -> tuple[list[Example], list[Example]]:
    """Copy recordings whose names say digit, speaker and take.

    Raises:
        ConfigError: if there are none, or one is named otherwise.
    """
    learnt, held_out = [], []
    for path in sorted(data.glob("*.wav")):
        parts = path.stem.split("_")
        if len(parts) != 3 or not (parts[0] + parts[2]).isdecimal():
            raise ConfigError(f"`--data` must hold files like 7_jackson_32.wav, or be hf:NAME, got {path}.")
        (folder / path.name).write_bytes(path.read_bytes())
        (held_out if int(parts[2]) < HELD_OUT_TAKES else learnt).append((path.name, parts[0]))
    if not learnt or not held_out:
        raise ConfigError(
            f"`--data` must hold takes below {HELD_OUT_TAKES} and others, or be hf:NAME, got {data}: name other data."
        )
    return learnt, held_out


def main() -> int:
    """Run the demo and return its exit code."""
    own, other = Recipe("Which digit?", FIELDS, bar=0.9), Recipe("What is said?", FIELDS)
    return run_demo("audio", own, other, make_recordings)


if __name__ == "__main__":
    run_program(main)
