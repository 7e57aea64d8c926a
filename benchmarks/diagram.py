"""Draw docs/block.svg, a block of the default model: `python benchmarks/diagram.py`.

What it says of widths and ranks comes from the default configuration, so it changes with it.
"""

from html import escape
from pathlib import Path

from fanformer.model import FANformerConfig

TARGET = Path(__file__).parents[1] / "docs" / "block.svg"
WIDTH, BOX, GAP = 760, 40, 22
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


def stream(y: float, to_y: float, label: str) -> str:
    """Return the residual stream past a branch, on the left."""
    return (
        f"<path d='M380 {y} H60 V{to_y} H366' stroke='#9ca3af' stroke-width='2' fill='none' marker-end='url(#tip)'/>"
        f"<text x='68' y='{(y + to_y) / 2}' font-size='12' fill='#4b5563' {FONT}>{escape(label)}</text>"
    )


def diagram(config: FANformerConfig) -> str:
    """Return the picture."""
    d, heads, groups, head = (
        config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
    )  # fmt: skip
    widths = {"Q": heads * head, "K": groups * head, "V": groups * head}
    parts, y = [], 20.0
    parts.append(f"<text x='380' y='{y}' text-anchor='middle' font-size='14' {FONT}>x ({d})</text>")
    begin = y + 10
    y += 34
    parts += [arrow(380, begin, 380, y), box(200, y, 360, "RMSNorm, in the first block alone", "norm")]
    y += BOX + GAP
    parts += [
        arrow(380, y - GAP, 380, y),
        box(
            200,
            y,
            360,
            f"u = silu(RMSNorm(W x)), rank {config.qkv_rank}",
            "low-rank",
            "one first factor for Q, K and V",
        ),
    ]
    y += BOX + 16 + GAP
    for number, (name, outputs) in enumerate(widths.items()):
        periodic = config.periodic_width(outputs)
        x = 110 + number * 190
        small = f"{periodic} cos, {periodic} sin, {outputs - 2 * periodic} linear"
        parts += [arrow(380, y - GAP, x + 85, y), box(x, y, 170, f"{name} = [cos p, sin p, g]", "fan", small)]
        parts.append(arrow(x + 85, y + BOX + 16, 380, y + BOX + 16 + GAP))
    y += BOX + 16 + GAP
    text = f"RMSNorm per head; RoPE on Q, K; attention, {heads} heads on {groups}"
    parts.append(box(145, y, 470, text, "norm"))
    y += BOX + GAP
    parts += [arrow(380, y - GAP, 380, y), box(200, y, 360, f"O: W (h + silu(h)), rank {config.o_rank}", "low-rank")]
    y += BOX + GAP
    parts += [arrow(380, y - GAP, 380, y), box(270, y, 220, "times sigmoid(gate)", "gate")]
    y += BOX + GAP
    parts += [arrow(380, y - GAP, 380, y + 4), _sum(380, y + 16), stream(begin + 6, y + 16, "x")]
    y += 32 + GAP
    parts += [arrow(380, y - GAP, 380, y), box(200, y, 360, "z = RMSNorm", "norm")]
    after = y + BOX + 6
    y += BOX + GAP
    small = f"first factor together, rank {config.gate_up_rank}, {config.intermediate_size} wide each"
    parts += [arrow(380, y - GAP, 380, y), box(200, y, 360, "silu(gate(z)) times up(z)", "low-rank", small)]
    y += BOX + 16 + GAP
    text = f"down: W (h + silu(h)), rank {config.down_rank}"
    parts += [arrow(380, y - GAP, 380, y), box(200, y, 360, text, "low-rank")]
    y += BOX + GAP
    parts += [arrow(380, y - GAP, 380, y), box(270, y, 220, "times sigmoid(gate)", "gate")]
    y += BOX + GAP
    parts += [arrow(380, y - GAP, 380, y + 4), _sum(380, y + 16), stream(after, y + 16, "z, after its norm")]
    y += 32 + GAP
    parts += [arrow(380, y - GAP, 380, y)]
    tip = (
        "<defs><marker id='tip' viewBox='0 0 8 8' refX='8' refY='4' markerWidth='7' markerHeight='7' orient='auto'>"
        "<path d='M0 0 L8 4 L0 8 z' fill='#374151'/></marker></defs>"
    )
    title = f"<title>A block of the default model, one of {config.num_hidden_layers}</title>"
    body = "\n".join(parts)
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {y + 10:g}' role='img'>{title}{tip}\n"
        f"<rect width='{WIDTH}' height='{y + 10:g}' fill='white'/>\n{body}\n</svg>\n"
    )


def _sum(x: float, y: float) -> str:
    return (
        f"<circle cx='{x}' cy='{y}' r='12' fill='white' stroke='#374151'/>"
        f"<text x='{x}' y='{y + 6}' text-anchor='middle' font-size='18' {FONT}>+</text>"
    )


if __name__ == "__main__":
    TARGET.write_text(diagram(FANformerConfig()), encoding="utf-8")
