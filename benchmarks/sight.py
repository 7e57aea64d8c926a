"""Draw docs/sight.svg: what a model with a vision tower sees, and where its answers look.

    python benchmarks/sight.py runs/demo-image/model runs/demo-image/media/held-out.jsonl [--output docs/sight.svg]

Of each answer in the rows, it takes the first picture: as the tower gets it, cut into patches; the share of attention
that goes from the answer to each patch; and what the model read.
"""

import argparse
import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fanformer.data.multimodal.messages import MediaExample, read_media_examples
from fanformer.files.durable import replace_text
from fanformer.generation.media_model import MediaModel, load_media_model
from fanformer.generation.settings import GenerationSettings

TARGET = Path(__file__).parents[1] / "docs" / "sight.svg"
COLUMNS, MOST = 5, 10
SIDE, GAP, MARGIN, WORDS = 72, 6, 14, 58
"""Pixels of a picture's side, between its two, around a card, and of the words below."""
FONT = "font-family='system-ui, sans-serif'"
GROUND, EDGE, TEXT, QUIET, WRONG, HEAT = "#ffffff", "#d0d7de", "#1f2328", "#57606a", "#b42318", "#f97316"


@dataclass(frozen=True)
class Sight:
    """A picture, and what an answer about it looks at.

    Attributes:
        pixels: (height, width, 3) uint8, as the tower gets them.
        shares: (side, side), of the attention to the picture, by patch; they add up to 1.
        at_picture: share of the answer's attention that goes to the picture, the rest being to the text.
        said: what the model answers.
        right: what it should.
    """

    pixels: np.ndarray
    shares: np.ndarray
    at_picture: float
    said: str
    right: str


@contextmanager
def kept_weights(modules: Sequence[Any]) -> Iterator[list[Tensor]]:
    """Keep the attention weights (rows, heads, T, S) that modules give while the block runs, in their order."""
    found: list[Tensor] = []
    with ExitStack() as stack:
        for module in modules:
            handle = module.register_forward_hook(lambda _, inputs, output: found.append(output[1]))
            stack.callback(handle.remove)
        yield found


def rollout(weights: Sequence[Tensor]) -> Tensor:
    """Return how much of each input is in each output of layers of attention with residuals: (P, P), rows sum to 1.

    Source: attention rollout, arXiv:2005.00928, section 3.

    Args:
        weights: of each layer, (1, heads, P, P).
    """
    found = torch.eye(weights[0].shape[-1])
    for layer in weights:
        found = (0.5 * torch.eye(len(found)) + 0.5 * layer[0].mean(0)) @ found
    return found


@torch.no_grad()
def look(model: MediaModel, example: MediaExample, said: str) -> Sight:
    """Return what an answer looks at: attention of the place that writes its first token, mean over layers and heads.

    Args:
        model: with attention that gives its weights ("eager").
        example: a question about one picture.
        said: the answer.
    """
    whole, config = model.model.model, model.model.config
    inputs = model.store.inputs(example.media)
    ids = torch.tensor([model.encode_messages([{"role": "user", "content": list(example.messages[0].parts)}])])
    decoder = [layer.self_attn for layer in whole.language_model.layers]
    tower = [one for one in whole.vision_tower.modules() if type(one).__name__ == "SiglipAttention"]
    with kept_weights(tower) as of_tower, kept_weights(decoder) as of_decoder:
        model.model(ids, **inputs)
    looks = torch.stack([layer[0, :, -1].mean(0) for layer in of_decoder]).mean(0)  # (T,)
    of_tokens = looks[ids[0] == config.image_token_id]
    parts = rollout(of_tower)  # (P, P)
    n, side = config.image_downsample, int(len(parts) ** 0.5)
    grid = parts.unflatten(0, (side // n, n, side // n, n)).mean((1, 3)).flatten(0, 1)  # (tokens of a picture, P)
    shares = (of_tokens / of_tokens.sum()) @ grid
    values = inputs["pixel_values"][0].permute(1, 2, 0).numpy()
    prepared = model.store.processor.image_processor
    pixels = (values * np.array(prepared.image_std) + np.array(prepared.image_mean)) * 255
    return Sight(
        pixels=np.clip(np.rint(pixels), 0, 255).astype(np.uint8),
        shares=shares.unflatten(0, (side, side)).numpy(),
        at_picture=float(of_tokens.sum()),
        said=said,
        right=example.answer,
    )


def sights(folder: Path, rows: Path) -> list[Sight]:
    """Return what a model sees of the first picture of each answer in a file of rows."""
    firsts: dict[str, MediaExample] = {}
    for example in read_media_examples(rows):
        if [media.kind for media in example.media] == ["image"]:
            firsts.setdefault(example.answer, example)
    chosen = [firsts[answer] for answer in sorted(firsts)][:MOST]
    model = load_media_model(folder, "cpu", "float32")
    questions = [str(example.messages[0].parts[-1]) for example in chosen]
    settings = GenerationSettings(max_length=8, temperature=0.0)
    said = [one.text for one in model.ask(questions, [one.media for one in chosen], settings)]
    model.model.set_attn_implementation("eager")
    return [look(model, example, text) for example, text in zip(chosen, said, strict=True)]


def picture(sight: Sight, x: float, y: float) -> str:
    """Return a picture with the edges of its patches."""
    buffer = io.BytesIO()
    Image.fromarray(sight.pixels).save(buffer, "PNG")
    content = base64.b64encode(buffer.getvalue()).decode()
    side = len(sight.shares)
    places = [round(number * SIDE / side, 2) for number in range(1, side)]
    lines = "".join(f"M{x + place} {y}V{y + SIDE}M{x} {y + place}H{x + SIDE}" for place in places)
    return (
        f"<image x='{x}' y='{y}' width='{SIDE}' height='{SIDE}' style='image-rendering:pixelated' "
        f"href='data:image/png;base64,{content}'/>"
        f"<path d='{lines}' stroke='{QUIET}' stroke-width='0.5' fill='none'/>"
    )


def card(sight: Sight, x: float, y: float) -> str:
    """Return a picture, the same under the shares of its patches, and what was read."""
    side, second, below = len(sight.shares), x + SIDE + GAP, y + SIDE
    size, least, most = round(SIDE / side, 2), float(sight.shares.min()), float(sight.shares.max())
    parts = [picture(sight, x, y), picture(sight, second, y)]
    for (row, column), share in np.ndenumerate(sight.shares):
        left, top = round(second + column * SIDE / side, 2), round(y + row * SIDE / side, 2)
        parts.append(
            f"<rect x='{left}' y='{top}' width='{size}' height='{size}' fill='{HEAT}' "
            f"fill-opacity='{0.9 * (share - least) / max(most - least, 1e-9):.2f}'><title>{share:.1%}</title></rect>"
        )
    is_right = sight.said == sight.right
    read = f"reads {sight.said}" if is_right else f"reads {sight.said}, is {sight.right}"
    parts.append(
        f"<text x='{x}' y='{below + 18}' font-size='14' font-weight='600' fill='{TEXT if is_right else WRONG}' {FONT}>"
        f"{escape(read)}</text>"
        + "".join(
            f"<text x='{x}' y='{below + line}' font-size='11' fill='{QUIET}' {FONT}>{words}</text>"
            for line, words in (
                (34, f"{sight.at_picture:.0%} at the picture,"),
                (49, f"a patch {100 * least:.0f} to {most:.0%} of it"),
            )
        )
    )
    return "".join(parts)


def drawing(found: Sequence[Sight]) -> str:
    """Return the whole as SVG, on a ground of its own, so that it reads on light and dark pages."""
    step_x, step_y = 2 * SIDE + GAP + 2 * MARGIN, SIDE + WORDS + MARGIN
    columns = min(COLUMNS, len(found))
    width, height = columns * step_x, -(-len(found) // columns) * step_y + MARGIN
    cards = [
        card(sight, MARGIN + number % columns * step_x, MARGIN + number // columns * step_y)
        for number, sight in enumerate(found)
    ]
    words = "Pictures in their patches, beside them how an answer's attention is spread over the patches. " + " ".join(
        f"{sight.right} is read as {sight.said}." for sight in found
    )
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' role='img' "
        f"aria-label='{escape(words, quote=True)}'>"
        f"<rect width='{width}' height='{height}' rx='8' fill='{GROUND}' stroke='{EDGE}'/>{''.join(cards)}</svg>\n"
    )


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a model that sees")
    parser.add_argument("rows", type=Path, help="file of rows, each a question about one picture")
    parser.add_argument("--output", type=Path, default=TARGET)
    asked = parser.parse_args()
    found = sights(asked.folder, asked.rows)
    replace_text(asked.output, drawing(found))
    right = sum(sight.said == sight.right for sight in found)
    print(f"{asked.output}: {len(found)} pictures, {right} read right, {asked.output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
