"""The demo that sees: a frozen language model learns to name scikit-learn's 1,797 scanned digits, 8 x 8 pixels each.

Fails if fewer than 95% of the held-out fifth are named right (no bar is known for other data, which --data names), or
if a twin that sees nothing does as well.
"""

from pathlib import Path

import numpy as np
from hub_media import hub_examples
from multimodal_demo import Example, Recipe, run_demo
from PIL import Image

from fanformer.cli.failure import run_program
from fanformer.errors import ConfigError

FIELDS = {
    "max_steps": 400,
    "sequence_length": 128,
    "batch_size": 4,
    "learning_rate": 2e-3,
    "image_size": 16,
    "patch_size": 4,
    "tower_width": 96,
    "tower_layers": 3,
    "eval_steps": 150,
}


def make_pictures(folder: Path, data: str | None) -> tuple[list[Example], list[Example]]:
    """Write every digit as a PNG; of each five, in the data's order, the last is held out.

    Args:
        folder: to write into.
        data: a folder with a sub-folder of pictures for each name, or hf:NAME, in place of scikit-learn's digits.

    Raises:
        ConfigError: if `data` is no such folder.
        DataError: if it is no such dataset.
    """
    if data is not None and data.startswith("hf:"):
        return hub_examples(data, folder, "image")
    if data is not None:
        return named_pictures(folder, Path(data))
    from sklearn.datasets import load_digits

    digits = load_digits()
    examples = []
    for index, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        name = f"{index:04}.png"
        Image.fromarray(np.rint(pixels * (255 / 16)).astype(np.uint8), "L").save(folder / name)
        examples.append((name, str(label)))
    return [one for n, one in enumerate(examples) if n % 5 != 4], examples[4::5]


def named_pictures(folder: Path, data: Path) -> tuple[list[Example], list[Example]]:
    """Copy pictures whose folders are their names.

    Raises:
        ConfigError: if there are none.
    """
    found = sorted(path for path in data.glob("*/*") if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if len(found) < 10:
        raise ConfigError(
            f"`--data` must be a folder with a sub-folder of pictures for each name, or hf:NAME, got {data}."
        )
    examples = []
    for index, path in enumerate(found):
        name = f"{index:06}{path.suffix.lower()}"
        (folder / name).write_bytes(path.read_bytes())
        examples.append((name, path.parent.name))
    return [one for n, one in enumerate(examples) if n % 5 != 4], examples[4::5]


def main() -> int:
    """Run the demo and return its exit code."""
    own, other = Recipe("Which digit?", FIELDS, bar=0.95), Recipe("What is this?", {**FIELDS, "image_size": 32})
    return run_demo("image", own, other, make_pictures)


if __name__ == "__main__":
    run_program(main)
