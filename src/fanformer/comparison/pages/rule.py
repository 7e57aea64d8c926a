"""The parts of a comparison's page that are about a rule: table, pictures of what was left out, learning over steps."""

import io
from collections.abc import Mapping
from typing import Any

from fanformer.comparison.ledger import interval_over_seeds
from fanformer.comparison.pages.figures import (
    NOT_FINISHED,
    Shown,
    figure_text,
    final_figure,
    interval_of,
    swept,
    verdict,
)
from fanformer.report.charts import Chart, Line
from fanformer.report.page import bullets, picture, table, text

# A comparison counts only where every training example was learned, or nearly: else the hole says nothing of the rule.
COUNTS_FROM_TRAIN_ACCURACY = 0.99
_ACCURACIES = ("train_accuracy", "hole_accuracy", "hole_sampled_accuracy")
_PARTS = {"train": "trained", "test": "left out"}
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
        figures: of every training.
        sweep_words: title and vertical axis of the sweep where rates were chosen elsewhere.
        chosen_elsewhere: what chose them.
        read: how to read the page.
    """

    differences = ("train_accuracy_difference", "hole_accuracy_difference")
    difference_words = ("train accuracy, less the baseline's", "left out, less the baseline's")
    difference_note = "Shares; {intervals}. A comparison counts only where both learned what they were trained on."
    verdict_words = ("worse", "better")
    figures = ("loss", "train_accuracy", "hole_accuracy", "seconds")
    sweep_words = ("Left out right over learning rate", "right answers (share)")
    sweep_top: float | None = 1.0
    chosen_elsewhere = "with the most right answers to what was left out of trainings of their own"
    read = _READ

    def __init__(self, shown: Shown):
        self.shown, self.asked = shown, shown.record["comparison"]
        self.best = [(arm, shown.best(arm)) for arm in shown.arms]

    def parts(self) -> list[str]:
        """Return them."""
        results = ["<p>No training has finished yet.</p>"]
        pictures = []
        if any(trainings for _, trainings in self.best):
            results = [self._table()]
            pictures = ["<h2>Pictures</h2>", *self._pictures()]
        without = [
            f"{arm['architecture']}{self.shown.of_variant(arm)}: {NOT_FINISHED}" for arm, best in self.best if not best
        ]
        return [
            "<h2>Results</h2>",
            *results,
            *([bullets(without)] if without else []),
            *self._pairs(),
            *pictures,
            "<h2>Every training</h2>",
            self.shown.trainings_table("hole", self.figures),
            "<h2>How to read this</h2>",
            self.read.format(chosen=self._chosen()),
        ]

    def _chosen(self) -> str:
        """Return in words what a learning rate was chosen by."""
        if not self.asked.get("rates_on"):
            return "with the lowest training loss"
        where = ", ".join(f"{name} = {value}" for name, value in self.asked["rates_on"].items())
        return f"{self.chosen_elsewhere} ({text(where)})"

    def _doubtful(self, variant: int) -> list[str]:
        """Return the architectures that did not learn what they were trained on."""
        return [
            arm["architecture"]
            for arm, trainings in self.best
            if arm["variant"] == variant and not all(map(self._counts, trainings))
        ]

    def _counts(self, training: Mapping[str, Any]) -> bool:
        """Return whether a training learned enough for a comparison of it to count."""
        return final_figure(training, "train_accuracy") >= COUNTS_FROM_TRAIN_ACCURACY

    def _table(self) -> str:
        header = ["architecture", "left out", "parameters in the blocks", "learning rate", "seeds", "train, %",
                  "left out right, %", "left out, sampled at T = 0.5, %", "counts"]  # fmt: skip
        rows = []
        for arm, trainings in self.best:
            doubtful = self._doubtful(arm["variant"])
            doubt = f"does not count: train accuracy below 99% ({', '.join(doubtful)})"
            if trainings:
                rule = trainings[0]["result"]["details"]["rule"]
                size, rate = f"{rule['block_parameters']:,}", f"{arm['learning_rate']:g}"
                shares = [figure_text(arm["figures"].get(name), 1, times=100) for name in _ACCURACIES]
                told = [arm["architecture"], _left_out(rule), size, rate, str(len(trainings)), *shares]
                rows.append([*told, doubt if doubtful else "yes"])
        return table(header, rows)

    def _pairs(self) -> list[str]:
        pairs = self.shown.record["pairs"]
        if not pairs:
            return []
        header = ["candidate", "baseline", "hole", *self.difference_words, "verdict"]
        rows = []
        for pair in pairs:
            doubtful = {pair["candidate"], pair["baseline"]} & set(self._doubtful(pair["variant"]))
            decided = verdict(pair["figures"][self.differences[-1]], self.verdict_words)
            differences = [figure_text(pair["figures"].get(name), signed=True) for name in self.differences]
            names = [pair["candidate"], pair["baseline"], str(pair["variant"] or "")]
            rows.append([*names, *differences, "does not count" if doubtful else decided])
        used = [pair["figures"].get(self.differences[-1]) for pair in pairs]
        note = self.difference_note.format(intervals=interval_of(used))
        return ["<h2>Candidate against baselines</h2>", table(header, rows), f'<p class="quiet">{text(note)}</p>']

    def _pictures(self) -> list[str]:
        rules = [(arm, [one["result"]["details"]["rule"] for one in trainings]) for arm, trainings in self.best]
        rules = [(arm, several) for arm, several in rules if several]
        learning = [self._learning(rules, variant) for variant in self.shown.variants]
        return [*self._learned(rules), '<div class="charts">', *learning, *self._sweep(), "</div>"]

    def _learned(self, rules: list[tuple[Mapping[str, Any], list[dict[str, Any]]]]) -> list[str]:
        """Return the pictures of what was learned."""
        if rules[0][1][0]["score"].get("grid") is None:
            return ['<div class="charts">', self._periods(rules), "</div>"]
        caption = "Every question a, b, the hole outlined: how sure the models are of the right answer."
        return [picture(draw_planes(rules), caption)]

    def _periods(self, rules: list[tuple[Mapping[str, Any], list[dict[str, Any]]]]) -> str:
        """Return the chart of the accuracy over the period, the mean over the seeds with its 95% t-interval."""
        lines = []
        for arm, several in rules:
            scores = [rule["score"]["by_period"] for rule in several]
            periods = sorted(scores[0], key=int)
            points = [
                interval_over_seeds([100 * score[period]["greedy"] for score in scores], "%") for period in periods
            ]
            x, y = [int(period) for period in periods], [point.value for point in points]
            low = [max(0.0, point.value if point.low is None else point.low) for point in points]
            high = [min(100.0, point.value if point.high is None else point.high) for point in points]
            lines.append(self.shown.line(arm["architecture"], x, y, low=low, high=high))
        longest = rules[0][1][0]["task"]["trained_period"]
        title = f"Accuracy over the period of the pattern, trained up to {longest}"
        return Chart(lines, title, "period (symbols)", "right continuations (%)", "periods", logarithmic=False).html()

    def _learning(self, rules: list[tuple[Mapping[str, Any], list[dict[str, Any]]]], variant: int) -> str:
        """Return the chart of the accuracies over the steps for a hole; every seed has a line of its own.

        A rule is often learned of a sudden, at another step with each seed, of which a mean would show nothing.
        """
        lines = []
        for index, name in enumerate(self.shown.names.values()):
            mine = [several for arm, several in rules if (arm["architecture"], arm["variant"]) == (name, variant)]
            for style, (part, words) in enumerate(_PARTS.items()):
                for number, rule in enumerate(rule for several in mine for rule in several):
                    steps = [point["step"] for point in rule["curve"]]
                    shares = [100 * point[f"{part}_accuracy"] for point in rule["curve"]]
                    lines.append(Line(f"{name}, {words}" if number == 0 else "", index, style, steps, shares))
        if not lines:
            return ""
        where = f", hole {variant} x {variant}" if len(self.shown.variants) > 1 else ""
        title = f"Accuracy over steps{where}"
        return Chart(lines, title, "optimizer steps", "right answers (%)", f"steps-{variant}", logarithmic=False).html()

    def _sweep(self) -> list[str]:
        """Return the chart of what the learning rates were chosen by over them, for all holes."""
        names, own = list(self.shown.names.values()), bool(self.asked.get("rates_on"))
        arms = list({arm["architecture"]: arm for arm in self.shown.arms}.values()) if own else self.shown.arms
        lines = []
        for arm in arms:
            dash = 0 if own else self.shown.variants.index(arm["variant"])
            label = arm["architecture"] + ("" if own else self.shown.of_variant(arm))
            lines.append(Line(label, names.index(arm["architecture"]), dash, *swept(arm)))
        if own:
            return self.shown.sweep(lines, *self.sweep_words, "sweep", top=self.sweep_top)
        curves = [one["result"]["details"]["rule"]["curve"] for _, trainings in self.best for one in trainings]
        begun = max((curve[0]["loss"] for curve in curves if curve), default=None)
        return self.shown.sweep(
            lines, "Training loss over learning rate", "training loss (nats per answer)", "sweep", top=begun
        )


def _left_out(rule: Mapping[str, Any]) -> str:
    if rule["score"].get("grid") is None:
        return f"periods {rule['task']['trained_period'] + 1} to {rule['task']['longest_period']}"
    first, last = rule["score"]["grid"]["hole"]
    return f"hole {last - first + 1} x {last - first + 1}"


def draw_planes(rules: list[tuple[Mapping[str, Any], list[dict[str, Any]]]]) -> bytes:
    """Draw the (a, b) plane of a hole task as PNG, a row of pictures for each architecture, a column for each hole.

    The colour is the probability of the right answer at temperature 0.5, the mean over the seeds.

    Args:
        rules: for each arm of a record what its trainings came to.
    """
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    names, variants = (list(dict.fromkeys(arm[key] for arm, _ in rules)) for key in ("architecture", "variant"))
    content = io.BytesIO()
    with matplotlib.rc_context({"text.parse_math": False}):
        size = (1.3 + 2.9 * len(variants), 0.7 + 3.0 * len(names))
        figure, grid = pyplot.subplots(
            len(names), len(variants), figsize=size, dpi=150, squeeze=False, sharex=True, sharey=True,
            layout="constrained",
        )  # fmt: skip
        for axes in grid.flat:
            axes.set_axis_off()
        for arm, several in rules:
            axes = grid[names.index(arm["architecture"])][variants.index(arm["variant"])]
            axes.set_axis_on()
            plane = np.mean([rule["score"]["grid"]["percent"] for rule in several], axis=0) / 100  # (a, b)
            image = axes.imshow(plane.T, origin="lower", vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
            first, last = several[0]["score"]["grid"]["hole"]
            # a whole pair outside the hole, so that the line hides none of its pairs
            corner, length = (first - 1.5, first - 1.5), last - first + 3
            outline = Rectangle(corner, length, length, fill=False, edgecolor="white", linewidth=1.0)
            outline.set_path_effects([withStroke(linewidth=2.2, foreground="black")])
            axes.add_patch(outline)
            axes.set_title(f"{arm['architecture']}\n{_left_out(several[0])}", fontsize=8)
            axes.set(xlabel="a", ylabel="b")
            axes.tick_params(labelsize=8)
        bar = figure.colorbar(image, ax=grid, shrink=0.8, ticks=[0, 0.25, 0.5, 0.75, 1])
        bar.set_label("probability of the right answer, T = 0.5")
        figure.savefig(content, format="png")
        pyplot.close(figure)
    return content.getvalue()
