"""The parts of a comparison's page that are about a series: errors over the horizon, beside naive forecasts."""

from collections.abc import Mapping
from typing import Any

from fanformer.comparison.ledger import Figure, interval_over_seeds
from fanformer.comparison.pages.figures import figure_text
from fanformer.comparison.pages.rule import RuleParts
from fanformer.comparison.pages.rules import Results
from fanformer.comparison.series_score import Horizon
from fanformer.report.charts import Line, chart
from fanformer.report.page import table

_UNIT = "standard deviations"


def _horizons(results: Results) -> dict[str, list[Horizon]]:
    """Return every architecture's continuations, a seed each; architectures without any are left out."""
    found = {
        spec: [one.score.horizon for one in several if one.score.horizon is not None]
        for spec, several in results.items()
    }
    return {spec: several for spec, several in found.items() if several}


def _text(figure: Figure) -> str:
    return figure_text({"value": figure.value, "low": figure.low, "high": figure.high}, 3)


def horizon_chart(results: Results) -> str:
    """Return the chart of the errors over the horizon as SVG, a line each with the 95% t-interval over the seeds.

    Naive forecasts are dashed; the vertical line is the end of the training window.
    """
    lines, horizons = [], _horizons(results)
    for index, (spec, several) in enumerate(horizons.items()):
        points = [interval_over_seeds(list(step), _UNIT) for step in zip(*(one.errors for one in several), strict=True)]
        means = [point.value for point in points]
        low, high = (
            [
                mean if getattr(point, end) is None else getattr(point, end)
                for mean, point in zip(means, points, strict=True)
            ]
            for end in ("low", "high")
        )
        label = f"{spec} ({len(several)} seed{'s' if len(several) > 1 else ''})"
        lines.append(Line(label, index, 0, range(1, len(means) + 1), means, low, high))
    first = next(iter(horizons.values()))[0]
    for index, (name, errors) in enumerate(first.baselines.items(), len(lines)):
        lines.append(Line(name, index, 1, range(1, len(errors) + 1), errors))
    return chart(
        lines,
        "Error over the horizon",
        "steps after what is given; right of the line beyond the training window",
        "mean absolute error (standard deviations)",
        "horizon",
        logarithmic=False,
        edge=first.trained_steps + 0.5,
    )


class SeriesParts(RuleParts):
    """The parts of a page about a series."""

    differences = ("error_within_window_difference", "error_beyond_window_difference")
    difference_words = ("within the window, less the baseline's", "beyond it, less the baseline's")
    difference_note = "Standard deviations; {intervals}. A comparison counts only where both learned the series."
    verdict_words = ("better", "worse")
    shown = ("loss", "error_within_window", "error_beyond_window", "seconds")
    sweep_words = ("Error beyond the window over learning rate", "error (standard deviations)")
    chosen_elsewhere = "with the lowest error beyond the window in trainings of their own"
    read = """<ul>
<li>The earlier part of a measured series is trained on. In the later part a model is given a row's beginning and
continues it, reading back what it said, first as far as training rows reach, then beyond.</li>
<li>An error is absolute, the mean over the rows, in standard deviations of the part that is trained on. Persistence
repeats the last value that is given, "a PERIOD ago" the last period, and "the mean" is that of the part that is trained
on.</li>
<li>Each architecture is shown at the learning rate {chosen} at the first seed.</li>
<li>A comparison counts only where every seed's error within the window is below that of repeating the shortest
period.</li>
</ul>"""

    def _table(self) -> str:
        rows = []
        for spec, several in _horizons(self.results).items():
            results = self.results[spec]
            parts = (Horizon.within, Horizon.beyond)
            errors = [interval_over_seeds([part(one, one.errors) for one in several], _UNIT) for part in parts]
            rates = sorted({result.settings["learning_rate"] for result in results})
            size = f"{results[0].block_parameters:,}"
            rows.append([spec, size, ", ".join(f"{rate:g}" for rate in rates), str(len(several)), *map(_text, errors)])
        first = next(iter(_horizons(self.results).values()))[0]
        for name, errors_of_it in first.baselines.items():
            ends = (f"{part(errors_of_it):.3f}" for part in (first.within, first.beyond))
            rows.append([name, "", "", "", *ends])
        header = [
            "forecast",
            "parameters in the blocks",
            "learning rate",
            "seeds",
            "error within the window",
            "beyond it",
        ]
        return table(header, rows)

    def _counts(self, training: Mapping[str, Any]) -> bool:
        return Horizon(**training["result"]["details"]["rule"]["score"]["horizon"]).learned

    def _drawn(self) -> list[str]:
        return [f'<div class="wide">{horizon_chart(self.results)}</div>']
