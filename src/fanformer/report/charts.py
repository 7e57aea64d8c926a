"""Charts as inline SVG, in the colours of light and dark pages alike, or as PNG: curves, sweeps and sizes."""

import html
import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Told apart by every common kind of colour vision, on white and on black. Source: Okabe and Ito, Color Universal
# Design, 2008, without black and with the yellow left out.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ("-", "--", ":", "-.")
_MARKERS = "osD^vP"
_RISE = 0.5
"""How far above the lowest value, as a share of it, values are still drawn to scale where the highest are clipped."""
_WIDE_LABEL = 30  # characters; longer ones leave no place for a second column
_MOST_TOLD = 12
"""Lines of a chart whose ends are told in words."""
_DOTS_PER_INCH = 150
_TICKS = ((0.5, (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)), (2.5, (1.0, 2.0, 5.0)), (math.inf, (1.0,)))
"""Up to how many powers of ten on a logarithmic axis, at which multiples of each there are labels."""
_NEUTRAL = "#010203"  # stands for the page's own text colour, which is put in afterwards


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        label: for the legend; "" for a line that shares another one's colour and dash, and needs no entry.
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


@dataclass(frozen=True)
class Chart:
    """A chart, to be drawn into a page or as a picture of its own.

    Attributes:
        lines: what to draw.
        title: of the chart.
        x_label: what the horizontal axis counts.
        y_label: what the vertical axis counts.
        name: unlike those of the page's other charts.
        logarithmic: whether the horizontal axis is.
        top: values above it are marked at the upper edge; None shows all.
        markers: whether every point gets one.
        level: a value that a horizontal line shows.
        edge: a position that a vertical line shows.
    """

    lines: Sequence[Line]
    title: str
    x_label: str
    y_label: str
    name: str
    logarithmic: bool = True
    top: float | None = None
    markers: bool = False
    level: float | None = None
    edge: float | None = None

    def html(self) -> str:
        """Return the chart as a figure of a page; who does not see it is told where each line begins and ends."""
        with _figure(self._rows, self.name) as figure:
            self._draw(figure)
            svg = _svg(figure, self.name)
        note = "Triangles at the upper edge: higher, or diverged." if self.markers else "What lies higher is cut off."
        caption = f"<figcaption>{note}</figcaption>" if self._is_cut else ""
        return f'<figure><div role="img" aria-label="{html.escape(self.in_words())}">{svg}</div>{caption}</figure>'

    def png(self) -> bytes:
        """Return the chart as a picture of its own, black on white."""
        stream = io.BytesIO()
        with _figure(self._rows, self.name) as figure:
            self._draw(figure)
            figure.savefig(stream, format="png", dpi=_DOTS_PER_INCH, metadata={"Software": None})
        return stream.getvalue()

    def in_words(self) -> str:
        """Return what the chart shows, in words."""
        told = [
            f"{f'{line.label}: ' if line.label else ''}{_short(line.y[0])} at {_short(line.x[0])}, "
            f"{_short(line.y[-1])} at {_short(line.x[-1])}"
            for line in self.lines
            if len(line.x)
        ]
        shown = told[:_MOST_TOLD] + ([f"and {len(told) - _MOST_TOLD} more lines"] if len(told) > _MOST_TOLD else [])
        return f"{self.title}. {self.y_label} over {self.x_label}. {'; '.join(shown)}."

    @property
    def _rows(self) -> int:
        """Rows of the legend."""
        return math.ceil(len([line for line in self.lines if line.label]) / _columns(self.lines))

    @property
    def _finite(self) -> list[float]:
        return [value for line in self.lines for value in line.y if math.isfinite(value)]

    @property
    def _is_cut(self) -> bool:
        """Whether a value lies above the chart."""
        finite = self._finite
        is_above = self.top is not None and max(finite, default=self.top) > self.top
        return is_above or len(finite) < sum(len(line.y) for line in self.lines)

    def _draw(self, figure: Any) -> None:
        axes = figure.subplots()
        axes.set(xlabel=self.x_label, ylabel=self.y_label, title=self.title)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        _set_scale(axes, self.logarithmic, [place for line in self.lines for place in line.x])
        finite = self._finite
        limit = self.top if self.top is not None else max(finite, default=1.0)
        floor = min(finite, default=0.0)
        if self.level is not None:
            limit, floor = max(limit, self.level), min(floor, self.level)
            axes.axhline(self.level, color=_NEUTRAL, linewidth=0.8)
        if self.edge is not None:
            axes.axvline(self.edge, color=_NEUTRAL, linewidth=0.8)
        margin = 0.06 * max(limit - floor, 1e-6 * max(abs(limit), 1e-6))
        axes.set_ylim(floor - margin, limit + margin)
        width = min(6, 60 / max(1, len(self.lines)))  # points from one line's triangles to the next one's
        places = [width * (index - (len(self.lines) - 1) / 2) for index in range(len(self.lines))]
        drawn = [
            _draw_line(axes, line, limit, self.markers, aside) for line, aside in zip(self.lines, places, strict=True)
        ]
        _add_legend(axes, drawn, self.lines)


def clip_above(lines: Sequence[Line]) -> float | None:
    """Return the highest value that is still drawn to scale, so that what diverged does not flatten the rest.

    Args:
        lines: of a chart; values that are not finite do not count.

    Returns:
        The highest value that is at most half again as high as the lowest, or None where all are.
    """
    finite = [value for line in lines for value in line.y if math.isfinite(value)]
    drawn = [value for value in finite if value <= (1 + _RISE) * min(finite)]
    return max(drawn) if len(drawn) < len(finite) else None


def _set_scale(axes: "Axes", logarithmic: bool, places: Sequence[float]) -> None:
    """Label the axes in few characters, such as 200k; a logarithmic one of these places at round numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if logarithmic:
        axes.set_xscale("log")
        decades = math.log10(max(places) / min(places)) if places and min(places) > 0 else 0.0
        axes.xaxis.set_major_locator(LogLocator(subs=next(subs for most, subs in _TICKS if decades <= most)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))


def _short(value: float) -> str:
    """Return a number in few characters: 200k, 2M, 5e+15; what is not finite stands for a training that diverged."""
    if not math.isfinite(value):
        return "diverged"
    for size, suffix in ((1e15, None), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value:.4g}" if suffix is None else f"{value / size:.4g}{suffix}"
    return f"{value:.4g}"


def _draw_line(axes: "Axes", line: Line, limit: float, markers: bool, aside: float) -> Any:
    """Draw a line, its triangles so many points beside their place, and return it for the legend."""
    from matplotlib.transforms import ScaledTranslation

    color = COLORS[line.family % len(COLORS)]
    style = line.style + line.family // len(COLORS)  # where the colours begin again, dashes differ
    dash, marker = _DASHES[style % len(_DASHES)], _MARKERS[style % len(_MARKERS)] if markers else None
    # A curve enters the chart from above; a marker has its place or its triangle.
    shown = [(x, y) for x, y in zip(line.x, line.y, strict=True) if (y <= limit if markers else math.isfinite(y))]
    outside = [x for x, y in zip(line.x, line.y, strict=True) if not y <= limit]
    drawn_x, drawn_y = [x for x, _ in shown], [y for _, y in shown]
    (drawn,) = axes.plot(drawn_x, drawn_y, dash, color=color, marker=marker, markersize=4.5, linewidth=1.6)
    if line.low is not None and line.high is not None:
        axes.fill_between(line.x, line.low, line.high, color=color, alpha=0.18, linewidth=0)
    if markers and outside:
        beside = axes.transData + ScaledTranslation(aside / 72, 0, axes.figure.dpi_scale_trans)
        axes.plot(outside, [limit] * len(outside), "^", color=color, markersize=6, transform=beside)
        axes.update_datalim([(x, limit) for x in outside])  # the axis does not see what is set beside its place
        axes.autoscale_view(scaley=False)
    return drawn


def _columns(lines: Sequence[Line]) -> int:
    return 2 if max((len(line.label) for line in lines), default=0) <= _WIDE_LABEL else 1


def _add_legend(axes: "Axes", drawn: Sequence[Any], lines: Sequence[Line]) -> None:
    """Name the lines below the chart, where they hide nothing of it."""
    named = [(handle, line.label) for handle, line in zip(drawn, lines, strict=True) if line.label]
    if not named:
        return
    handles, numbers = [handle for handle, _ in named], [str(number) for number in range(len(named))]
    style = {"loc": "outside lower center", "frameon": False, "fontsize": 8, "labelcolor": _NEUTRAL}
    legend = axes.figure.legend(handles, numbers, ncols=_columns(lines), **style)
    for entry, (_, label) in zip(legend.get_texts(), named, strict=True):
        entry.set_text(label)  # given at once, a label that begins with "_" would be left out


@contextmanager
def _figure(rows: int, name: str) -> Iterator[Any]:
    """Give a figure in the page's colours, with place for a legend of so many rows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings = {
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _NEUTRAL),
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "text.parse_math": False,  # a path may hold "$"
        "font.size": 9,
        "axes.titlesize": 10,
    }
    with matplotlib.rc_context(settings):
        figure = pyplot.figure(figsize=(5.0, 3.2 + 0.18 * rows), layout="constrained")
        try:
            yield figure
        finally:
            pyplot.close(figure)


def _svg(figure: Any, name: str) -> str:
    """Return a figure as SVG that can stand in a page beside others."""
    stream = io.StringIO()
    figure.savefig(
        stream, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
    )
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :].replace(_NEUTRAL, "currentColor")
    # names are shared by all pictures of a page
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    return re.sub(r"\n\s*", "\n", re.sub(r"<metadata>.*?</metadata>|<defs>\s*</defs>", "", svg, flags=re.DOTALL))
