"""The parts of a comparison's page that are about a rule."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fanformer.comparison.compare import RATES
from fanformer.comparison.pages.figures import (
    NOT_FINISHED,
    best_trainings,
    figure_text,
    final_figure,
    interval_of,
    of_variant,
    swept,
    trainings_table,
    verdict,
)
from fanformer.comparison.pages.rules import COUNTS_FROM_TRAIN_ACCURACY, plot_periods, plot_planes, rule_table
from fanformer.comparison.rule_learning import RuleResult
from fanformer.report.charts import Line, chart
from fanformer.report.page import bullets, picture, table, text

_READ = """<ul>
<li>A rule is trained on generated examples, of which some are left out: a hole in the plane of all questions, or longer
periods. Right answers there show that the rule was learned, and not the examples.</li>
<li>Each architecture is shown at the learning rate {chosen} at the first seed; what the trainings shown left out has no
part in that choice. Accuracy is that of the most probable answer; "sampled" is what sampling at temperature 0.5
reaches on average.</li>
<li>A comparison counts only where every seed has learned at least 99% of its training examples.</li>
</ul>"""


class RuleParts:
    """The parts of a page about a rule.

    Attributes:
        differences: figures of a pair to show, the one that decides last.
        difference_words: for each of them.
        difference_note: below them.
        verdict_words: for a difference below 0 and for one above.
        shown: figures of every training.
        sweep_words: title and vertical axis of the sweep where rates were chosen elsewhere.
        chosen_elsewhere: what chose them.
        read: how to read the page.
    """

    differences = ("train_accuracy_difference", "hole_accuracy_difference")
    difference_words = ("train accuracy, less the baseline's", "left out, less the baseline's")
    difference_note = "Shares; {intervals}. A comparison counts only where both learned what they were trained on."
    verdict_words = ("worse", "better")
    shown = ("loss", "train_accuracy", "hole_accuracy", "seconds")
    sweep_words = ("Left out right over learning rate", "right answers (share)")
    chosen_elsewhere = "with the most right answers to what was left out of trainings of their own"
    read = _READ

    def __init__(self, record: Mapping[str, Any]):
        self.record, self.asked = record, record["comparison"]
        self.variants = list(dict.fromkeys(arm["variant"] for arm in record["arms"]))
        self.results = {spec: self._of(spec) for spec in self.asked["architectures"]}

    def _of(self, spec: str) -> list[RuleResult]:
        """Return an architecture's finished trainings at the best learning rate of each hole."""
        return [
            RuleResult.from_dict(training["result"]["details"]["rule"])
            for arm in self.record["arms"]
            if arm["architecture"] == spec
            for training in best_trainings(self.record, arm)
        ]

    def parts(self) -> list[str]:
        """Return them."""
        results = ["<p>No training has finished yet.</p>"]
        pictures = []
        if any(self.results.values()):
            results = [f'<div class="wide">{self._table()}</div>']
            pictures = ["<h2>Pictures</h2>", *self._pictures()]
        return [
            "<h2>Results</h2>",
            *results,
            *self._without_result(),
            *self._pairs(),
            *pictures,
            "<h2>Every training</h2>",
            trainings_table(self.record, "hole", self.shown),
            "<h2>How to read this</h2>",
            self.read.format(chosen=self._chosen()),
        ]

    def _chosen(self) -> str:
        """Return in words what a learning rate was chosen by."""
        if not self.asked.get("rates_on"):
            return "with the lowest training loss"
        where = ", ".join(f"{name} = {value}" for name, value in self.asked["rates_on"].items())
        return f"{self.chosen_elsewhere} ({text(where)})"

    def _table(self) -> str:
        return rule_table(self.results, "html").replace(" +- ", "\u00a0\u00b1\u00a0")

    def _without_result(self) -> list[str]:
        lines = [
            f"{arm['architecture']}{of_variant(self.record, arm)}: {NOT_FINISHED}"
            for arm in self.record["arms"]
            if not best_trainings(self.record, arm)
        ]
        return [bullets(lines)] if lines else []

    def _pairs(self) -> list[str]:
        if not self.record["pairs"]:
            return []
        rows = [
            [
                pair["candidate"],
                pair["baseline"],
                str(pair["variant"] or ""),
                *(figure_text(pair["figures"].get(name), signed=True) for name in self.differences),
                self._verdict(pair),
            ]
            for pair in self.record["pairs"]
        ]
        used = [pair["figures"].get(self.differences[-1]) for pair in self.record["pairs"]]
        header = ["candidate", "baseline", "hole", *self.difference_words, "verdict"]
        note = self.difference_note.format(intervals=interval_of(used))
        return ["<h2>Candidate against baselines</h2>", table(header, rows), f'<p class="quiet">{text(note)}</p>']

    def _verdict(self, pair: Mapping[str, Any]) -> str:
        """Return what a pair decides, which is nothing where either did not learn its training examples."""
        for arm in self.record["arms"]:
            if arm["variant"] == pair["variant"] and arm["architecture"] in (pair["candidate"], pair["baseline"]):
                trainings = best_trainings(self.record, arm)
                if not all(map(self._counts, trainings)):
                    return "does not count"
        return verdict(pair["figures"][self.differences[-1]], self.verdict_words)

    def _counts(self, training: Mapping[str, Any]) -> bool:
        """Return whether a training learned enough for a comparison of it to count."""
        return final_figure(training, "train_accuracy") >= COUNTS_FROM_TRAIN_ACCURACY

    def _pictures(self) -> list[str]:
        return [*self._drawn(), '<div class="charts">', *self._learning(), *self._sweep(), "</div>"]

    def _drawn(self) -> list[str]:
        """Return the pictures of what was learned."""
        first = next(result for several in self.results.values() for result in several)
        found = []
        import matplotlib

        with tempfile.TemporaryDirectory() as scratch, matplotlib.rc_context({"text.parse_math": False}):
            path = Path(scratch) / "picture.png"
            if first.score.grid is not None:
                plot_planes(self.results, first.rule.name, path)
                found.append(picture(path, "Every question a, b: how sure the model is of the right answer."))
            elif first.score.by_period is not None:
                plot_periods(self.results, path)
                found.append(picture(path, "Accuracy over the period of the pattern."))
        return found

    def _learning(self) -> list[str]:
        """Return, for each hole, the chart of the accuracies over the steps; every seed has a line of its own.

        A rule is often learned of a sudden, at another step with each seed, of which a mean would show nothing.
        """
        found = []
        for variant in self.variants:
            lines = []
            for index, spec in enumerate(self.results):
                arms = [a for a in self.record["arms"] if (a["architecture"], a["variant"]) == (spec, variant)]
                curves = [
                    one["result"]["details"]["rule"]["curve"] for a in arms for one in best_trainings(self.record, a)
                ]
                for style, (part, words) in enumerate((("train", "trained"), ("test", "left out"))):
                    for number, curve in enumerate(curves):
                        steps = [point["step"] for point in curve]
                        shares = [100 * point[f"{part}_accuracy"] for point in curve]
                        lines.append(Line(f"{spec}, {words}" if number == 0 else "", index, style, steps, shares))
            if lines:
                where = f", hole {variant} x {variant}" if len(self.variants) > 1 else ""
                title = f"Accuracy over steps{where}"
                found.append(
                    chart(lines, title, "optimizer steps", "right answers (%)", f"steps-{variant}", logarithmic=False)
                )
        return found

    def _sweep(self) -> list[str]:
        """Return the chart of what the learning rates were chosen by over them, for all holes."""
        figure, title, words = "loss", "Training loss over learning rate", "training loss (nats per answer)"
        arms = self.record["arms"]
        if self.asked.get("rates_on"):
            figure, (title, words) = self.differences[-1].removesuffix("_difference"), self.sweep_words
            arms = [{"architecture": spec, "variant": RATES} for spec in self.results]
        lines = []
        for arm in arms:
            label = arm["architecture"] + ("" if arm["variant"] == RATES else of_variant(self.record, arm))
            dash = 0 if arm["variant"] == RATES else self.variants.index(arm["variant"])
            family = list(self.results).index(arm["architecture"])
            lines.append(swept(self.record, arm, figure, Line(label, family, dash, [], [])))
        if max(len(line.x) for line in lines) < 2:
            return []
        begun = [result.curve[0].loss for several in self.results.values() for result in several if result.curve]
        return [
            chart(
                lines,
                title,
                "peak learning rate",
                words,
                "sweep",
                top={"loss": max(begun, default=None), "hole_accuracy": 1.0}.get(figure),
                markers=True,
            )
        ]
