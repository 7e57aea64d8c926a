"""The parts of a comparison's page that are about a rule."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fanformer.report.charts import Line, chart
from fanformer.report.comparison_figures import figure_text, interval_of, of_variant, swept
from fanformer.report.page import picture, table, text
from fanformer.report.rules import plot_periods, plot_planes, rule_table
from fanformer.training.rule_learning import RuleResult


class RuleParts:
    """The parts of a page about a rule."""

    def __init__(self, record: Mapping[str, Any]):
        self.record, self.asked = record, record["comparison"]
        self.results = {spec: self._of(spec) for spec in self.asked["architectures"]}

    def _of(self, spec: str) -> list[RuleResult]:
        """Return an architecture's trainings at the best learning rate of each hole."""
        best = {arm["variant"]: arm["learning_rate"] for arm in self.record["arms"] if arm["architecture"] == spec}
        return [
            RuleResult.from_dict(training["result"]["details"]["rule"])
            for training in self.record["trainings"]
            if training["architecture"] == spec
            and training["result"] is not None
            and training["result"]["figures"]
            and training["learning_rate"] == best[training["variant"]]
        ]

    def parts(self) -> list[str]:
        """Return them."""
        if not any(self.results.values()):
            return ["<p>No training has finished yet.</p>"]
        shown = rule_table(self.results, "html")
        return ["<h2>Results</h2>", f'<div class="wide">{shown}</div>', *self._pairs(), *self._pictures()]

    def _pairs(self) -> list[str]:
        rows = [
            [
                pair["candidate"],
                pair["baseline"],
                str(pair["variant"] or ""),
                *(
                    figure_text(pair["figures"].get(f"{part}_accuracy_difference"), signed=True)
                    for part in ("train", "hole")
                ),
            ]
            for pair in self.record["pairs"]
        ]
        if not rows:
            return []
        used = [pair["figures"].get("hole_accuracy_difference") for pair in self.record["pairs"]]
        header = [
            "candidate",
            "baseline",
            "hole",
            "train accuracy, less the baseline's",
            "left out, less the baseline's",
        ]
        note = f"Shares; {interval_of(used)}. A comparison counts only where both learned what they were trained on."
        return ["<h2>Candidate against baselines</h2>", table(header, rows), f'<p class="quiet">{text(note)}</p>']

    def _pictures(self) -> list[str]:
        first = next(result for several in self.results.values() for result in several)
        found = []
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "picture.png"
            if first.score.grid is not None:
                plot_planes(self.results, first.rule.name, path)
                found.append(picture(path, "Every question a, b: how sure the model is of the right answer."))
            elif first.score.by_period is not None:
                plot_periods(self.results, path)
                found.append(picture(path, "Accuracy over the period of the pattern."))
        lines = [
            Line(
                spec,
                index,
                0,
                [point.step for point in result.curve],
                [100 * point.train_accuracy for point in result.curve],
            )
            for index, (spec, several) in enumerate(self.results.items())
            for result in several[:1]
        ]
        learned = chart(lines, "Training accuracy over steps", "steps", "right answers, %", "steps", logarithmic=False)
        variants = list(dict.fromkeys(arm["variant"] for arm in self.record["arms"]))
        sweeps = [
            swept(
                self.record,
                arm,
                arm["architecture"] + of_variant(self.record, arm),
                list(self.results).index(arm["architecture"]),
                variants.index(arm["variant"]),
            )
            for arm in self.record["arms"]
        ]
        over_rates = chart(
            sweeps, "Training loss over learning rate", "peak learning rate", "nats", "sweep", markers=True
        )
        many = len(self.asked["learning_rates"]) > 1
        return ["<h2>Pictures</h2>", *found, '<div class="charts">', learned, *([over_rates] if many else []), "</div>"]
