"""Charts of a comparison as inline SVG: curves, sweeps and sizes, in the colours of light and dark pages alike."""

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fanformer.report.page import text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Told apart by every common kind of colour vision, on white and on black. Source: Okabe and Ito, Color Universal
# Design, 2008, without black and with the yellow left out.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ("-", "--", ":", "-.")
_MARKERS = "osD^vP"
_NEUTRAL = "#010203"  # stands for the page's own text colour, which is put in afterwards


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        label: for the legend.
        family: lines of one family have one colour.
        style: which dash and marker, from 0.
        x: positions.
        y: values; one that is infinite is marked at the upper edge.
        low: lower end of a band, or None.
        high: upper end.
    """

    label: str
    family: int
    style: int
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def chart(
    lines: Sequence[Line],
    title: str,
    x_label: str,
    y_label: str,
    name: str,
    logarithmic: bool = True,
    top: float | None = None,
    markers: bool = False,
    level: float | None = None,
) -> str:
    """Return a chart as a figure of a page.

    Args:
        lines: what to draw.
        title: of the chart.
        x_label: what the horizontal axis counts.
        y_label: what the vertical axis counts.
        name: unlike those of the page's other charts.
        logarithmic: whether the horizontal axis is.
        top: values above it are marked at the upper edge; None shows all.
        markers: whether every point gets one.
        level: a value that a horizontal line shows.
    """
    values = [value for line in lines for value in line.y if math.isfinite(value)]
    beyond = any(value > top for line in lines for value in line.y) if top is not None else False
    beyond = beyond or any(not math.isfinite(value) for line in lines for value in line.y)
    with _axes(name, title, x_label, y_label) as (axes, done):
        if logarithmic:
            _set_logarithmic(axes)
        limit = top if top is not None else max(values, default=1.0)
        floor = min(values, default=0.0)
        if level is not None:
            limit, floor = max(limit, level), min(floor, level)
            axes.axhline(level, color=_NEUTRAL, linewidth=0.8)
        margin = 0.06 * max(limit - floor, 1e-6)
        axes.set_ylim(floor - margin, limit + margin)
        for line in lines:
            _draw(axes, line, limit, markers)
        if len(lines) <= 12:
            axes.legend(frameon=False, fontsize=8, labelcolor=_NEUTRAL)
        svg = done()
    note = "Triangles at the upper edge: higher, or diverged." if markers else "What lies higher is cut off."
    caption = f"<figcaption>{note}</figcaption>" if beyond else ""
    return f'<figure role="img" aria-label="{text(title)}">{svg}{caption}</figure>'


def _set_logarithmic(axes: "Axes") -> None:
    """Make the horizontal axis logarithmic, with labels such as 200k at 1, 2 and 5 times the powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _short(value: float) -> str:
    """Return a number in few characters: 200k, 2M, 5e+15."""
    for size, suffix in ((1e15, None), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value:.3g}" if suffix is None else f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def _draw(axes: "Axes", line: Line, limit: float, markers: bool) -> None:
    color, dash = COLORS[line.family % len(COLORS)], _DASHES[line.style % len(_DASHES)]
    marker = _MARKERS[line.style % len(_MARKERS)] if markers else None
    inside = [(x, y) for x, y in zip(line.x, line.y, strict=True) if y <= limit]
    outside = [x for x, y in zip(line.x, line.y, strict=True) if not y <= limit]
    drawn_x, drawn_y = [x for x, _ in inside], [y for _, y in inside]
    axes.plot(drawn_x, drawn_y, dash, color=color, marker=marker, markersize=4.5, linewidth=1.6, label=line.label)
    if line.low is not None and line.high is not None:
        axes.fill_between(line.x, line.low, line.high, color=color, alpha=0.18, linewidth=0)
    if markers and outside:
        axes.plot(outside, [limit] * len(outside), "^", color=color, markersize=6)


@contextmanager
def _axes(name: str, title: str, x_label: str, y_label: str) -> Iterator[tuple["Axes", "_Done"]]:
    """Give axes in the page's colours, and what turns them into SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings = {
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _NEUTRAL),
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": 9,
        "axes.titlesize": 10,
    }
    with matplotlib.rc_context(settings):
        figure, axes = pyplot.subplots(figsize=(6.2, 3.9), layout="constrained")
        axes.set(xlabel=x_label, ylabel=y_label, title=title)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        try:
            yield axes, _Done(figure, name)
        finally:
            pyplot.close(figure)


class _Done:
    """Turns a figure into SVG that can stand in a page beside others."""

    def __init__(self, figure: object, name: str):
        self.figure, self.name = figure, name

    def __call__(self) -> str:
        stream = io.StringIO()
        self.figure.savefig(  # type: ignore[attr-defined]  # matplotlib is imported at use
            stream, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
        svg = stream.getvalue()
        svg = svg[svg.index("<svg") :].replace(_NEUTRAL, "currentColor")
        # names are shared by all pictures of a page
        svg = re.sub(r'\bid="', f'id="{self.name}-', svg)
        svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{self.name}-", svg)
        return re.sub(r"\n\s*", "\n", re.sub(r"<metadata>.*?</metadata>|<defs>\s*</defs>", "", svg, flags=re.DOTALL))
