"""The parts of a comparison's page that are about language."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fanformer.comparison.pages.figures import DIGITS, NOT_FINISHED, Shown, figure_text, interval_of, swept, verdict
from fanformer.comparison.summary import tokens_at
from fanformer.report.charts import Chart, Line, clip_above
from fanformer.report.page import bullets, table, text

_RATIOS = ("tokens_ratio", "size_ratio", "size_ratio_without_embeddings", "training_operations_ratio",
           "train_tokens_per_second_ratio")  # fmt: skip
_CURVES = (
    ("tokens", "tokens", "tokens trained on", "tokens"),
    ("operations", "computing", "training operations (FLOPs)", "operations"),
    ("seconds", "time", "training time at the median rate (s)", "seconds"),
)
_UNIT = "held-out bits per byte"
_READ = """<ul>
<li>All trainings read the same rows in the same order, with the same tokenizer, optimizer and schedule; each
architecture is shown at the learning rate with the lowest held-out loss at the first seed. Lines are means over the
seeds, bands their lowest and highest.</li>
<li>Bits per byte do not depend on the tokenizer; lower is better. Operations per token count every matrix product,
forward and backward, the output head included, and in attention every query against a whole row of keys.</li>
<li>Tokens to equal loss: the tokens that the candidate needs for the worse one's final loss, over those that the
baseline needs. Where it was trained for several budgets, read off the ends of those trainings. Else read off its
curve: before the learning rate has decayed it lies above what a training of that length would reach, so a ratio below 1
is an upper bound, and one above 1 a lower bound.</li>
<li>Time is the tokens over the median rate of the training steps, or of a recurrent depth, whose steps differ, over
their mean: start-up, compilation and evaluations do not count.</li>
</ul>"""


class LanguageParts:
    """The parts of a page about language."""

    def __init__(self, shown: Shown):
        self.shown, self.record = shown, shown.record
        self.longest = max(self.record["comparison"].get("tokens", shown.variants))
        self.pairs = [pair for pair in self.record["pairs"] if pair["variant"] == self.longest]
        self.longer = [pair for pair in self.record["pairs"] if pair["variant"] > self.longest]

    def parts(self) -> list[str]:
        """Return them."""
        return [
            *self._verdicts(),
            *self._beside_fewer_tokens(),
            *self._charts(),
            "<h2>Every architecture at its best learning rate</h2>",
            self._arms(),
            *self._equal_loss(),
            "<h2>Every training</h2>",
            self.shown.trainings_table("tokens", ("bits_per_byte", "tokens_per_second", "seconds")),
            "<h2>How to read this</h2>",
            _READ,
        ]

    def _verdicts(self) -> list[str]:
        if not self.pairs:
            return ["<p>No two architectures have a finished training at the same seed and budget yet.</p>"]
        header = ["candidate", "baseline", "bits per byte, less the baseline's", "verdict", "tokens to equal loss",
                  "parameters", "without embeddings", "operations per token", "training tokens/s"]  # fmt: skip
        rows = []
        for pair in self.pairs:
            figures, difference = pair["figures"], pair["figures"]["bits_per_byte_difference"]
            told = [figure_text(difference, signed=True), verdict(difference, ("better", "worse"))]
            ratios = [figure_text(figures.get(name), 3) for name in _RATIOS]
            rows.append([pair["candidate"], pair["baseline"], *told, *ratios])
        names = ("bits_per_byte_difference", "tokens_ratio")
        used = [pair["figures"].get(name) for pair in self.pairs for name in names]
        note = f"At {self.longest:,} tokens. Ratios are times the baseline's; {interval_of(used)}."
        return [
            "<h2>Candidate against baselines</h2>",
            bullets(_in_words(pair) for pair in self.pairs),
            table(header, rows),
            f'<p class="quiet">{text(note)}</p>',
        ]

    def _beside_fewer_tokens(self) -> list[str]:
        """Return the candidate at budgets that no baseline had, each beside the baselines at their largest."""
        if not self.longer:
            return []
        header = ["candidate", "its tokens", "baseline", "its tokens", "bits per byte, less the baseline's", "verdict",
                  "operations of the whole training", "seconds of it"]  # fmt: skip
        rows = []
        for pair in self.longer:
            figures, difference = pair["figures"], pair["figures"]["bits_per_byte_difference"]
            named = [pair["candidate"], f"{pair['variant']:,}", pair["baseline"], f"{pair['baseline_variant']:,}"]
            told = [figure_text(difference, signed=True), verdict(difference, ("better", "worse"))]
            whole = ("whole_training_operations_ratio", "whole_training_seconds_ratio")
            rows.append([*named, *told, *(figure_text(figures.get(name), 3) for name in whole)])
        words = "What the candidate makes of the operations, or of the time, that the baselines take."
        return ["<h2>The candidate at more tokens</h2>", f"<p>{words}</p>", table(header, rows)]

    def _charts(self) -> list[str]:
        arms = [arm for arm in self.shown.arms if arm["variant"] == self.longest and self.shown.best(arm)]
        if not arms:
            return []
        found = []
        for name, title, x_label, scale in _CURVES:
            lines = [self._curve(arm, scale) for arm in arms]
            found.append(Chart(lines, f"Loss over {title}", x_label, _UNIT, name, top=clip_above(lines)).html())
        found += [*self._equal_loss_charts({arm["architecture"]: arm for arm in arms}), *self._sweeps()]
        found += self._size_charts(arms)
        if len(self.shown.variants) > 1:
            lines = [line for name in self.shown.names.values() for line in self._budgets(name)]
            found.append(_points(lines, "Final loss over the budget", "tokens trained on", "budget"))
        return ["<h2>Charts</h2>", '<div class="charts">', *found, "</div>"]

    def _sweeps(self) -> list[str]:
        """Return, for each budget, the chart of the final loss over the learning rates."""
        found = []
        for variant in self.shown.variants:
            arms = [arm for arm in self.shown.arms if arm["variant"] == variant]
            lines = [self.shown.line(arm["architecture"], *swept(arm)) for arm in arms]
            budget = f", {variant:,} tokens" if len(self.shown.variants) > 1 else ""
            found += self.shown.sweep(lines, f"Final loss over learning rate{budget}", _UNIT, f"sweep-{variant}")
        return found

    def _size_charts(self, arms: Sequence[Mapping[str, Any]]) -> list[str]:
        """Return the charts of the final loss over parameters where a family has several sizes."""
        families = [
            (name, number, [arm for arm in arms if self.shown.family[arm["architecture"]] == number])
            for number, name in enumerate(self.shown.families)
        ]
        if all(len(several) < 2 for _, _, several in families):
            return []
        found = []
        for key in ("parameters_without_embeddings", "parameters"):
            lines = []
            for name, number, several in families:
                points = sorted((self._counted(arm, key), arm["figures"]["bits_per_byte"]["value"]) for arm in several)
                lines += [Line(name, number, 0, [x for x, _ in points], [y for _, y in points])] if points else []
            words = key.replace("_", " ")
            found.append(_points(lines, f"Final loss over {words}", words, key))
        return found

    def _counted(self, arm: Mapping[str, Any], key: str) -> float:
        return self.shown.best(arm)[0]["result"]["figures"][key]

    def _equal_loss_charts(self, arms: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Return the charts of tokens and of parameters to equal loss, as far as there is something to draw."""
        found = []
        drawn = [pair for pair in self.pairs if {pair["candidate"], pair["baseline"]} <= set(arms)]
        several = [self._token_ratios(arms[pair["candidate"]], arms[pair["baseline"]]) for pair in drawn]
        lines = [line for line in several if len(line.x) > 1]
        if lines:
            found.append(Chart(lines, "Tokens to equal loss", "tokens that the baseline was trained on",
                               "tokens, times the baseline's", "equal-tokens", level=1.0).html())  # fmt: skip
        lines = []
        for index, (key, named) in enumerate(self.record["parameters_to_equal_loss"].items()):
            if named:
                x, y = [self._counted(arms[name], key) for name in named], [one["value"] for one in named.values()]
                lines.append(Line(key.replace("_", " "), index, 0, x, y))
        if lines:
            found.append(Chart(lines, "Parameters to equal loss", "the baseline's parameters",
                               "parameters, times the baseline's", "equal-parameters", level=1.0,
                               markers=True).html())  # fmt: skip
        return found

    def _token_ratios(self, candidate: Mapping[str, Any], baseline: Mapping[str, Any]) -> Line:
        """Return, over a baseline's tokens, the share of them that the candidate needs to come as low."""
        own, other = self._curve(candidate, "tokens"), self._curve(baseline, "tokens")
        mine = [{"tokens": x, "val_loss": y} for x, y in zip(own.x, own.y, strict=True)]
        reached = [(x, y) for x, y in zip(other.x, other.y, strict=True) if own.y[-1] <= y <= own.y[0]]
        x, y = [tokens for tokens, _ in reached], [tokens_at(mine, loss) / tokens for tokens, loss in reached]
        return replace(other, x=x, y=y, low=None, high=None, label=f"{own.label} against {other.label}")

    def _curve(self, arm: Mapping[str, Any], scale: str) -> Line:
        """Return an arm's held-out loss, the mean over its seeds with their range."""
        results = [training["result"] for training in self.shown.best(arm)]
        curves = [result["curve"] for result in results]
        shortest = min(len(curve) for curve in curves)
        factor = 1.0
        if scale == "operations":
            factor = results[0]["figures"]["training_operations_per_token"]
        elif scale == "seconds":
            factor = len(results) / sum(result["figures"]["tokens_per_second"] for result in results)
        points = list(zip(*(curve[:shortest] for curve in curves), strict=True))
        values = [[point["val_bits_per_byte"] for point in several] for several in points]
        x, y = [point[0]["tokens"] * factor for point in points], [sum(seeds) / len(seeds) for seeds in values]
        band = {"low": list(map(min, values)), "high": list(map(max, values))} if len(curves) > 1 else {}
        return self.shown.line(arm["architecture"], x, y, **band)

    def _budgets(self, name: str) -> list[Line]:
        arms = [arm for arm in self.shown.arms if arm["architecture"] == name and "bits_per_byte" in arm["figures"]]
        values = [arm["figures"]["bits_per_byte"]["value"] for arm in arms]
        return [self.shown.line(name, [arm["variant"] for arm in arms], values)] if arms else []

    def _arms(self) -> str:
        header = ["architecture", "tokens", "parameters", "without embeddings", "learning rate", "seeds",
                  "nats per token", "bits per byte", "training tokens/s", "operations per token"]  # fmt: skip
        rows = []
        for arm in self.shown.arms:
            best, figures = self.shown.best(arm), arm["figures"]
            begin = [arm["architecture"], f"{arm['variant']:,}"]
            if not best:
                rows.append([*begin, NOT_FINISHED, *[""] * 7])
                continue
            first = best[0]["result"]["figures"]
            counted = [f"{first[name]:,}" for name in ("parameters", "parameters_without_embeddings")]
            asked = [f"{arm['learning_rate']:g}", ", ".join(str(training["seed"]) for training in best)]
            names = ("loss", "bits_per_byte", "tokens_per_second")
            measured = [figure_text(figures.get(name), DIGITS[name]) for name in names]
            rows.append([*begin, *counted, *asked, *measured, f"{first['training_operations_per_token']:.4g}"])
        return table(header, rows)

    def _equal_loss(self) -> list[str]:
        found = self.record["parameters_to_equal_loss"]
        names = dict.fromkeys(name for several in found.values() for name in several)
        if not names:
            return []
        rows = [[name, *(figure_text(several.get(name), 3) for several in found.values())] for name in names]
        header = ["baseline", *(key.replace("_", " ") for key in found)]
        note = "The candidate's parameters at each baseline's loss, as a share of the baseline's."
        return ["<h2>Parameters to equal loss</h2>", f"<p>{note}</p>", table(header, rows)]


def _in_words(pair: Mapping[str, Any]) -> str:
    """Return what a pair says in a sentence, to be seen where the table is too wide."""
    candidate, baseline, difference = pair["candidate"], pair["baseline"], pair["figures"]["bits_per_byte_difference"]
    shown = f"{figure_text(difference, signed=True)} bits per byte"
    decided = verdict(difference, ("better", "worse"))
    if decided in ("better", "worse"):
        return f"{candidate} is {decided} than {baseline}: {shown}."
    doubt = "one seed, no interval" if difference["low"] is None else decided
    return f"{candidate} against {baseline}: {doubt}, {shown}."


def _points(lines: Sequence[Line], title: str, x_label: str, name: str) -> str:
    """Return a chart of final losses, with those far above the others at its upper edge."""
    return Chart(lines, title, x_label, _UNIT, name, top=clip_above(lines), markers=True).html()
