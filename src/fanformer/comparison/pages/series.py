"""The parts of a comparison's page that are about a series: errors over the horizon, beside naive forecasts."""

from collections.abc import Mapping
from typing import Any

from fanformer.comparison.ledger import interval_over_seeds
from fanformer.comparison.pages.figures import figure_text
from fanformer.comparison.pages.rule import RuleParts
from fanformer.comparison.series_score import UNIT, Horizon, horizon_of, over_seeds
from fanformer.report.charts import Chart, Line
from fanformer.report.page import table


class SeriesParts(RuleParts):
    """The parts of a page about a series."""

    differences = ("error_within_window_difference", "error_beyond_window_difference")
    difference_words = ("within the window, less the baseline's", "beyond it, less the baseline's")
    difference_note = "Standard deviations; {intervals}. A comparison counts only where both learned the series."
    verdict_words = ("better", "worse")
    figures = ("loss", "error_within_window", "error_beyond_window", "seconds")
    sweep_words = ("Error beyond the window over learning rate", "error (standard deviations)")
    sweep_top = None
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
        header = ["forecast", "parameters in the blocks", "learning rate", "seeds", "error within the window",
                  "beyond it"]  # fmt: skip
        rows, naive = [], {}
        for arm, trainings in self.best:
            rules = [one["result"]["details"]["rule"] for one in trainings]
            if not rules:
                continue
            horizons = [horizon_of(rule) for rule in rules]
            errors = [
                interval_over_seeds([part(one, one.errors) for one in horizons], UNIT)
                for part in (Horizon.within, Horizon.beyond)
            ]
            naive = {
                name: [part(errors_of_it) for part in (horizons[0].within, horizons[0].beyond)]
                for name, errors_of_it in horizons[0].baselines.items()
            }
            size, rate = f"{rules[0]['block_parameters']:,}", f"{arm['learning_rate']:g}"
            told = [figure_text({"value": one.value, "low": one.low, "high": one.high}, 3) for one in errors]
            rows.append([arm["architecture"], size, rate, str(len(rules)), *told])
        rows += [[name, "", "", "", *(f"{end:.3f}" for end in ends)] for name, ends in naive.items()]
        return table(header, rows)

    def _counts(self, training: Mapping[str, Any]) -> bool:
        return horizon_of(training["result"]["details"]["rule"]).learned

    def _learned(self, rules: list[tuple[Mapping[str, Any], list[dict[str, Any]]]]) -> list[str]:
        """Return the chart of the errors over the horizon, a line each with the 95% t-interval over the seeds.

        Naive forecasts are dashed; the vertical line is the end of the training window.
        """
        lines, first = [], horizon_of(rules[0][1][0])
        for index, (arm, several) in enumerate(rules):
            means, low, high = map(list, zip(*over_seeds(list(map(horizon_of, several))), strict=True))
            lines.append(Line(arm["architecture"], index, 0, range(1, len(means) + 1), means, low, high))
        for index, (name, errors) in enumerate(first.baselines.items(), len(lines)):
            lines.append(Line(name, index, 1, range(1, len(errors) + 1), errors))
        words = "steps after what is given; right of the line beyond the training window"
        error, edge = "mean absolute error (standard deviations)", first.trained_steps + 0.5
        drawn = Chart(lines, "Error over the horizon", words, error, "horizon", logarithmic=False, edge=edge).html()
        return [f'<div class="wide">{drawn}</div>']
