"""The parts of a comparison's page that are about a rule of many steps: how far each gets, over its depth."""

import statistics
from collections.abc import Mapping
from typing import Any

from fanformer.comparison.depth_score import SOLVED_FROM, solved_positions
from fanformer.comparison.ledger import interval_over_seeds
from fanformer.comparison.pages.figures import figure_text
from fanformer.comparison.pages.rule import RuleParts
from fanformer.report.charts import Chart, Line
from fanformer.report.page import table

_SHARES = ("train_accuracy", "late_right", "late_right_at_twice")
_COUNTS = ("solved_positions", "solved_linearity")


class DepthParts(RuleParts):
    """The parts of a page about a rule of many steps.

    What an architecture cannot learn of the trained positions is a result here: a model of fixed depth answers the
    first few, and no comparison is left out for that.
    """

    difference_note = "Shares; {intervals}."
    read = f"""<ul>
<li>Every position asks for one step of the rule more than the one before. Training rows have the first positions alone,
test rows all of them; recurrent depths are measured at every number of steps.</li>
<li>A position is solved from {SOLVED_FROM:.0%} right answers on, counted from the first to the first that is not. Late
positions are those behind the trained ones, as many again, at the most steps that training took and at twice as many; a
model of fixed depth has its one. R^2 is that of the straight line through the solved positions over the steps, up to
where all are solved.</li>
<li>Each architecture is shown at the learning rate {{chosen}} at the first seed.</li>
</ul>"""

    def _counts(self, training: Mapping[str, Any]) -> bool:
        return True

    def _table(self) -> str:
        header = ["architecture", "parameters in the blocks", "learning rate", "seeds", "trained positions, %",
                  "late positions, %", "at twice the steps, %", "solved positions", "R^2 over the steps"]  # fmt: skip
        rows = []
        for arm, trainings in self.best:
            if trainings:
                rule = trainings[0]["result"]["details"]["rule"]
                size, rate = f"{rule['block_parameters']:,}", f"{arm['learning_rate']:g}"
                told = [figure_text(arm["figures"].get(name), 1, times=100) for name in _SHARES]
                told += [figure_text(arm["figures"].get(name), 2) for name in _COUNTS]
                rows.append([arm["architecture"], size, rate, str(len(trainings)), *told])
        return table(header, rows)

    def _learned(self, rules: list[tuple[Mapping[str, Any], list[dict[str, Any]]]]) -> list[str]:
        """Return the charts of what was learned."""
        return ['<div class="charts">', self._solved(rules), *self._positions(rules), "</div>"]

    def _solved(self, rules: list[tuple[Mapping[str, Any], list[dict[str, Any]]]]) -> str:
        """Return the chart of the solved positions over the steps taken, the mean over the seeds with its interval.

        A model of fixed depth is a level line.
        """
        lines, most = [], max(len(rule["score"]["by_steps"]) for _, several in rules for rule in several)
        for arm, several in rules:
            scores = [rule["score"]["by_steps"] for rule in several]
            steps = sorted(scores[0], key=int)
            solved = [[solved_positions(one[each]) for one in scores] for each in steps]
            points = [interval_over_seeds(counts, "positions") for counts in solved]
            x = [int(each) for each in steps]
            if len(x) == 1 < most:
                x, points = [1, most], 2 * points
            low = [point.value if point.low is None else point.low for point in points]
            high = [point.value if point.high is None else point.high for point in points]
            lines.append(self.shown.line(arm["architecture"], x, [one.value for one in points], low=low, high=high))
        trained = rules[0][1][0]["task"]["trained_positions"]
        title = f"Solved positions over steps, trained on the first {trained}"
        return Chart(lines, title, "steps of the core", "solved positions", "solved", logarithmic=False).html()

    def _positions(self, rules: list[tuple[Mapping[str, Any], list[dict[str, Any]]]]) -> list[str]:
        """Return the charts of right answers over the position, one an architecture, lines for 1, 2, 4 ... steps."""
        charts = []
        for number, (arm, several) in enumerate(rules):
            scores, lines = [rule["score"]["by_steps"] for rule in several], []
            for index, each in enumerate(key for key in sorted(scores[0], key=int) if int(key) & (int(key) - 1) == 0):
                shares = [100 * statistics.fmean(place) for place in zip(*(one[each] for one in scores), strict=True)]
                words = f"{each} step{'s' if each != '1' else ''}"
                lines.append(Line(words, index, 0, list(range(1, len(shares) + 1)), shares))
            title, edge = (
                f"Right answers over the position, {arm['architecture']}",
                several[0]["task"]["trained_positions"],
            )
            chart = Chart(
                lines, title, "position", "right answers (%)", f"positions-{number}", logarithmic=False, edge=edge
            )
            charts.append(chart.html())
        return charts
