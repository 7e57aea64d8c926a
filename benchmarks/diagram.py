"""Draw docs/block.svg, a block of the default model: `python benchmarks/diagram.py`.

What it says of widths and ranks comes from the default configuration, so it changes with it.
"""

from collections.abc import Mapping
from html import escape
from pathlib import Path

from fanformer.model import FANformerConfig

TARGET = Path(__file__).parents[1] / "docs" / "block.svg"
WIDTH, MIDDLE, BOX, GAP = 760, 380, 40, 22
FONT = "font-family='system-ui, sans-serif'"
COLOURS = {"low-rank": "#dbeafe", "fan": "#fde68a", "norm": "#dcfce7", "plain": "#f3f4f6", "gate": "#fce7f3"}


def box(x: float, y: float, width: float, text: str, kind: str, small: str = "") -> str:
    """Return a box with a line of text, and a smaller one below it."""
    middle, height = x + width / 2, BOX + (16 if small else 0)
    parts = [
        f"<rect x='{x}' y='{y}' width='{width}' height='{height}' rx='6' fill='{COLOURS[kind]}' stroke='#6b7280'/>"
    ]
    parts.append(f"<text x='{middle}' y='{y + 25}' text-anchor='middle' font-size='14' {FONT}>{escape(text)}</text>")
    if small:
        parts.append(
            f"<text x='{middle}' y='{y + 44}' text-anchor='middle' font-size='11' fill='#374151' {FONT}>"
            f"{escape(small)}</text>"
        )
    return "".join(parts)


def arrow(x: float, y: float, to_x: float, to_y: float) -> str:
    """Return an arrow of straight lines."""
    return f"<path d='M{x} {y} L{to_x} {to_y}' stroke='#374151' fill='none' marker-end='url(#tip)'/>"


class Column:
    """A drawing that grows downwards around the middle of the picture.

    Attributes:
        parts: of the picture so far.
        y: where the next part begins, an arrow's length below the last one.
    """

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.y = 20.0

    def put(self, width: float, text: str, kind: str, small: str = "") -> None:
        """Add an arrow and a box."""
        self.parts += [
            arrow(MIDDLE, self.y - GAP, MIDDLE, self.y),
            box(MIDDLE - width / 2, self.y, width, text, kind, small),
        ]
        self.y += BOX + (16 if small else 0) + GAP

    def put_beside(self, boxes: Mapping[str, str]) -> None:
        """Add boxes side by side, with what stands small in each, and arrows to and from all of them."""
        for number, (text, small) in enumerate(boxes.items()):
            x = 110 + number * 190
            self.parts += [arrow(MIDDLE, self.y - GAP, x + 85, self.y), box(x, self.y, 170, text, "fan", small)]
            self.parts.append(arrow(x + 85, self.y + BOX + 16, MIDDLE, self.y + BOX + 16 + GAP))
        self.y += BOX + 16 + GAP

    def add(self, begin: float, label: str) -> None:
        """Add the sum with the residual stream that left the column at `begin`, past it on the left."""
        y = self.y + 12
        self.parts += [
            arrow(MIDDLE, self.y - GAP, MIDDLE, self.y),
            f"<circle cx='{MIDDLE}' cy='{y}' r='12' fill='white' stroke='#374151'/>"
            f"<text x='{MIDDLE}' y='{y + 6}' text-anchor='middle' font-size='18' {FONT}>+</text>",
            f"<path d='M{MIDDLE} {begin} H60 V{y} H366' stroke='#9ca3af' stroke-width='2' fill='none' "
            "marker-end='url(#tip)'/>"
            f"<text x='68' y='{(begin + y) / 2}' font-size='12' fill='#4b5563' {FONT}>{escape(label)}</text>",
        ]
        self.y = y + 12 + GAP


def diagram(config: FANformerConfig) -> str:
    """Return the picture."""
    heads, groups, head = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    column = Column()
    column.parts.append(
        f"<text x='{MIDDLE}' y='20' text-anchor='middle' font-size='14' {FONT}>x ({config.hidden_size})</text>"
    )
    column.y += 8 + GAP
    column.put(360, "RMSNorm, in the first block alone", "norm")
    first = f"u = silu(RMSNorm(W x)), rank {config.qkv_rank}"
    column.put(360, first, "low-rank", "one first factor for Q, K and V")
    small = {}
    for name, count in {"Q": heads, "K": groups, "V": groups}.items():
        periodic = config.periodic_width(count * head)
        small[f"{name} = [cos p, sin p, g]"] = f"{periodic} cos, {periodic} sin, {count * head - 2 * periodic} linear"
    column.put_beside(small)
    column.put(470, f"RMSNorm per head; RoPE on Q, K; attention, {heads} heads on {groups}", "norm")
    column.put(360, f"O: W (h + silu(h)), rank {config.o_rank}", "low-rank")
    column.put(220, "times sigmoid(gate)", "gate")
    column.add(36, "x")
    column.put(360, "z = RMSNorm", "norm")
    after = column.y - GAP + 6
    together = f"first factor together, rank {config.gate_up_rank}, {config.intermediate_size} wide each"
    column.put(360, "silu(gate(z)) times up(z)", "low-rank", together)
    column.put(360, f"down: W (h + silu(h)), rank {config.down_rank}", "low-rank")
    column.put(220, "times sigmoid(gate)", "gate")
    column.add(after, "z, after its norm")
    column.parts.append(arrow(MIDDLE, column.y - GAP, MIDDLE, column.y))
    return page(column, f"A block of the default model, one of {config.num_hidden_layers}")


def page(column: Column, title: str) -> str:
    """Return a column as an SVG file."""
    tip = (
        "<defs><marker id='tip' viewBox='0 0 8 8' refX='8' refY='4' markerWidth='7' markerHeight='7' orient='auto'>"
        "<path d='M0 0 L8 4 L0 8 z' fill='#374151'/></marker></defs>"
    )
    height, body, told = f"{column.y + 10:g}", "\n".join(column.parts), f"<title>{title}</title>{tip}"
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height}' role='img'>{told}\n"
        f"<rect width='{WIDTH}' height='{height}' fill='white'/>\n{body}\n</svg>\n"
    )


if __name__ == "__main__":
    TARGET.write_text(diagram(FANformerConfig()), encoding="utf-8")
