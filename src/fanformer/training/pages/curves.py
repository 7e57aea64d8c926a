"""The charts of runs: what metrics.jsonl holds, over tokens and over time."""

import math
from collections.abc import Sequence

from fanformer.report.charts import Chart, Line, clip_above
from fanformer.training.pages.runs import SeenRun
from fanformer.training.publishing import loss_unit

_TIMES = ((2 * 86400, 86400, "days"), (2 * 3600, 3600, "hours"), (600, 60, "minutes"), (0, 1, "seconds"))
"""From how many seconds on, how many of them are one of which unit."""
_SINGLE = (
    ("val_margin", "Held-out margin", "nats per pair", "margin"),
    ("val_exact", "Held-out answers that are right to the letter", "share", "right-answers"),
    ("val_accuracy", "Held-out pairs whose better answer is ahead", "share", "pairs-ahead"),
    ("learning_rate", "Learning rate", "learning rate", "learning-rate"),
    ("grad_norm", "Gradient norm", "norm before clipping", "gradient-norm"),
    ("tokens_per_second", "Throughput", "tokens per second", "throughput"),
)
"""Figures that have a chart of their own over the tokens: key, title, axis, name."""


def run_charts(runs: Sequence[SeenRun]) -> list[Chart]:
    """Return the charts of runs, as far as they have figures."""
    longest = max((run.last("elapsed_seconds") or 0.0 for run in runs), default=0.0)
    _, seconds, unit = next(one for one in _TIMES if longest >= one[0])
    losses = _losses(runs, "tokens")
    over_time = _losses(runs, "elapsed_seconds", 1 / seconds)
    bits = _figure(runs, "val_bits_per_byte")
    loss = " or ".join(dict.fromkeys(loss_unit(run.described) for run in runs))
    charts = [
        Chart(losses, "Loss over tokens", "tokens", loss, "loss-tokens", False, _top(losses)),
        Chart(over_time, "Loss over time", unit, loss, "loss-time", False, _top(over_time)),
        Chart(bits, "Held-out bits per byte", "tokens", "bits per byte", "bits-per-byte", False, _top(bits)),
    ]
    for key, title, axis, name in _SINGLE:
        lines = _figure(runs, key)
        charts.append(Chart(lines, title, "tokens", axis, name, False, _spike(lines) if key == "grad_norm" else None))
    return [chart for chart in charts if chart.lines]


def _losses(runs: Sequence[SeenRun], x: str, scale: float = 1.0) -> list[Line]:
    """Return training and held-out loss of every run, the second dashed."""
    lines = []
    for number, run in enumerate(runs):
        for style, (key, words) in enumerate((("loss", "training"), ("val_loss", "held out"))):
            places, values = run.points(x, key)
            if values:
                label = words if len(runs) == 1 else f"{run.name}, {words}"
                lines.append(Line(label, number, style, [place * scale for place in places], values))
    return lines


def _top(lines: Sequence[Line]) -> float | None:
    """Return where a chart of losses ends: the first steps must not flatten the rest, and no line's end be cut off."""
    top = clip_above(lines)
    return None if top is None else max(top, *(line.y[-1] for line in lines))


def _figure(runs: Sequence[SeenRun], key: str) -> list[Line]:
    found = [(number, run, *run.points("tokens", key)) for number, run in enumerate(runs)]
    return [Line(run.name if len(runs) > 1 else "", number, 0, x, y) for number, run, x, y in found if y]


def _spike(lines: Sequence[Line]) -> float | None:
    """Return three times the median of the values where some are higher: spikes must not flatten the rest."""
    values = sorted(value for line in lines for value in line.y)
    top = 3 * values[len(values) // 2] if values else math.inf
    return top if values and values[-1] > top else None
