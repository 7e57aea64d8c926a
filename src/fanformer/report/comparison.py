"""A comparison as one HTML page: who is better by how much, every curve and sweep, and the numbers behind them."""

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fanformer.data.durable import replace_text
from fanformer.report.charts import Line, chart
from fanformer.report.page import bullets, page, picture, table, text
from fanformer.report.rules import plot_periods, plot_planes, rule_table
from fanformer.training.comparison_summary import family_and_size
from fanformer.training.rule_learning import RuleResult

NO_BREAK = ",\u00a0"  # a comma and a space at which no line is broken
_RISE = 0.5
"""How far above the best final loss, as a share of it, a sweep or a curve's beginning is still drawn to scale."""


def write_comparison_page(record: Mapping[str, Any], path: Path) -> None:
    """Write the report of a comparison as one file that needs no other.

    Args:
        record: as `comparison_summary.to_record` returns it, with `name`, `command`, `date`, `hardware`, `versions`,
            `data`, `planned` and `finished` on top where they are known.
        path: of the page.
    """
    title = str(record.get("name", "comparison"))
    content = _Rule(record) if record["comparison"]["rule"] is not None else _Language(record)
    body = [
        f"<h1>{text(title)}</h1>",
        f'<p class="quiet">{text(_summary(record))}</p>',
        *_unfinished(record),
        *content.parts(),
        *_troubles(record),
        *_configuration(record),
    ]
    replace_text(path, page(title, body, record, f"{title}.json"))


def _summary(record: Mapping[str, Any]) -> str:
    asked = record["comparison"]
    what = f"rule {asked['rule']}" if asked["rule"] else f"data {asked['data']}"
    seeds, when = len(asked["seeds"]), record.get("date")
    several = f"{seeds} seed{'s' if seeds > 1 else ''}, {len(asked['learning_rates'])} learning rates each"
    return ", ".join([what, several, *([str(when)] if when else [])])


def _unfinished(record: Mapping[str, Any]) -> list[str]:
    planned, finished = record.get("planned"), record.get("finished", len(record["trainings"]))
    if planned is None or finished >= planned:
        return []
    return [
        f'<p class="warn">{finished} of {planned} trainings have ended; the same command goes on with the others.</p>'
    ]


def _troubles(record: Mapping[str, Any]) -> list[str]:
    lines = [line for arm in record["arms"] for line in arm["troubles"]]
    edges = [
        f"{arm['architecture']}{_of_variant(record, arm)}: its best learning rate, {arm['learning_rate']:g}, is the "
        f"{'lowest' if arm['learning_rate'] == min(_tried(record, arm)) else 'highest'} that was tried; a better one "
        "may lie beyond: give more of them, or --extend 2"
        for arm in record["arms"]
        if arm["at_edge"]
    ]
    parts = []
    if edges:
        parts += ["<h2>Best at the edge of the sweep</h2>", bullets(dict.fromkeys(edges))]
    if lines:
        parts += ["<h2>Diverged or failed</h2>", bullets(lines)]
    return parts


def _of_variant(record: Mapping[str, Any], arm: Mapping[str, Any]) -> str:
    """Return which budget or hole an arm is about, where there are several."""
    if len({other["variant"] for other in record["arms"]}) == 1:
        return ""
    return f" (hole {arm['variant']})" if record["comparison"]["rule"] else f" ({arm['variant']:,} tokens)"


def _tried(record: Mapping[str, Any], arm: Mapping[str, Any]) -> list[float]:
    return [
        training["learning_rate"]
        for training in record["trainings"]
        if (training["architecture"], training["variant"]) == (arm["architecture"], arm["variant"])
    ]


def _configuration(record: Mapping[str, Any]) -> list[str]:
    about = {name: record[name] for name in ("data", "hardware", "versions") if record.get(name)}
    command = [f"<p>Measured by <code>{text(record['command'])}</code></p>"] if record.get("command") else []
    shown = json.dumps({"comparison": record["comparison"], **about}, indent=2)
    return [
        "<h2>Configuration</h2>",
        *command,
        f"<details><summary>All settings</summary><pre>{text(shown)}</pre></details>",
    ]


def figure_text(figure: Mapping[str, Any] | None, digits: int = 4, signed: bool = False) -> str:
    """Return a figure of a record with its interval."""
    if figure is None:
        return "not measured"
    sign = "+" if signed else ""
    value = f"{figure['value']:{sign},.{digits}f}"
    if figure["low"] is None:
        return value
    ends = (f"{figure[end]:{sign},.{digits}f}" for end in ("low", "high"))
    return f"{value} [{NO_BREAK.join(ends)}]"


def interval_of(figures: Sequence[Mapping[str, Any] | None]) -> str:
    """Return in words what the intervals of figures are."""
    kinds = dict.fromkeys(figure["interval"] for figure in figures if figure is not None)
    known = [kind for kind in kinds if kind not in (None, "exact")]
    words = [f"in brackets: {kind}" for kind in known]
    return "; ".join([*words, *(["one seed has no interval"] if None in kinds else [])])


class _Language:
    """The parts of a page about language."""

    def __init__(self, record: Mapping[str, Any]):
        self.record, self.asked = record, record["comparison"]
        self.longest = max(arm["variant"] for arm in record["arms"])
        specs = self.asked["architectures"]
        self.families = list(dict.fromkeys(family_and_size(spec)[0] for spec in specs))
        self.styles = {
            spec: [other for other in specs if family_and_size(other)[0] == family_and_size(spec)[0]].index(spec)
            for spec in specs
        }

    def parts(self) -> list[str]:
        """Return them."""
        return [
            *self._verdicts(),
            *self._charts(),
            "<h2>Every architecture at its best learning rate</h2>",
            self._arms(),
            *self._equal_loss(),
            "<h2>Every training</h2>",
            f"<details><summary>{len(self.record['trainings'])} trainings</summary>{self._trainings()}</details>",
            "<h2>How to read this</h2>",
            _READ,
        ]

    def _verdicts(self) -> list[str]:
        pairs = [pair for pair in self.record["pairs"] if pair["variant"] == self.longest]
        if not pairs:
            return ["<p>No two architectures have a finished training at the same seed and budget yet.</p>"]
        header = ["candidate", "baseline", "bits per byte, less the baseline's", "verdict", "tokens to equal loss",
                  "parameters", "without embeddings", "operations per token", "training tokens/s"]  # fmt: skip
        rows = []
        for pair in pairs:
            figures = pair["figures"]
            ratios = [figure_text(figures.get(name), 3) for name in _RATIOS]
            difference = figures["bits_per_byte_difference"]
            rows.append(
                [
                    pair["candidate"],
                    pair["baseline"],
                    figure_text(difference, signed=True),
                    _verdict(difference),
                    *ratios,
                ]
            )
        used = [pair["figures"].get(name) for pair in pairs for name in ("bits_per_byte_difference", "tokens_ratio")]
        note = f"At {self.longest:,} tokens. Ratios are times the baseline's; {interval_of(used)}."
        return ["<h2>Candidate against baselines</h2>", table(header, rows), f'<p class="quiet">{text(note)}</p>']

    def _best(self, arm: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """Return the finished trainings of an arm at its best learning rate, by seed."""
        return [
            training
            for training in self.record["trainings"]
            if (training["architecture"], training["variant"], training["learning_rate"])
            == (arm["architecture"], arm["variant"], arm["learning_rate"])
            and training["result"] is not None
            and training["result"]["figures"]
        ]

    def _charts(self) -> list[str]:
        arms = [arm for arm in self.record["arms"] if arm["variant"] == self.longest and self._best(arm)]
        if not arms:
            return []
        finals = [arm["figures"]["bits_per_byte"]["value"] for arm in arms]
        top = (1 + _RISE) * min(finals) if max(finals) < (1 + _RISE) * min(finals) else max(finals)
        unit = "held-out bits per byte"
        found = []
        for name, title, x_label, scale in _CURVES:
            lines = [self._curve(arm, scale) for arm in arms]
            highest = max((value for line in lines for value in line.y), default=top)
            found.append(chart(lines, f"Loss over {title}", x_label, unit, name, top=min(top, highest)))
        if len(self.asked["learning_rates"]) > 1:
            lines = [self._sweep(arm) for arm in arms]
            found.append(chart(lines, "Final loss over learning rate", "peak learning rate", "held-out nats per token",
                               "sweep", top=_top(lines), markers=True))  # fmt: skip
        sizes = {
            family: [arm for arm in arms if family_and_size(arm["architecture"])[0] == family]
            for family in self.families
        }
        if any(len(several) > 1 for several in sizes.values()):
            for key, words in (
                ("parameters_without_embeddings", "parameters without embeddings"),
                ("parameters", "parameters"),
            ):
                lines = [self._sizes(family, several, key) for family, several in sizes.items() if several]
                found.append(chart(lines, f"Final loss over {words}", words, unit, key, markers=True))
        if len({arm["variant"] for arm in self.record["arms"]}) > 1:
            lines = [line for spec in self.asked["architectures"] for line in self._budgets(spec)]
            found.append(chart(lines, "Final loss over the budget", "tokens trained on", unit, "budget", markers=True))
        return ["<h2>Charts</h2>", '<div class="charts">', *found, "</div>"]

    def _curve(self, arm: Mapping[str, Any], scale: str) -> Line:
        """Return an arm's held-out loss, the mean over its seeds with their range."""
        trainings = self._best(arm)
        curves = [training["result"]["curve"] for training in trainings]
        shortest = min(len(curve) for curve in curves)
        factor = 1.0
        if scale == "operations":
            factor = trainings[0]["result"]["figures"]["training_operations_per_token"]
        elif scale == "seconds":
            rates = [training["result"]["figures"]["tokens_per_second"] for training in trainings]
            factor = 1 / (sum(rates) / len(rates))
        points = list(zip(*(curve[:shortest] for curve in curves), strict=True))
        values = [[point["val_bits_per_byte"] for point in several] for several in points]
        several = len(curves) > 1
        return Line(
            arm["architecture"],
            self._family(arm["architecture"]),
            self.styles[arm["architecture"]],
            [point[0]["tokens"] * factor for point in points],
            [sum(seeds) / len(seeds) for seeds in values],
            [min(seeds) for seeds in values] if several else None,
            [max(seeds) for seeds in values] if several else None,
        )

    def _family(self, spec: str) -> int:
        return self.families.index(family_and_size(spec)[0])

    def _sweep(self, arm: Mapping[str, Any]) -> Line:
        spec = arm["architecture"]
        return _swept(self.record, arm, spec, self._family(spec), self.styles[spec])

    def _sizes(self, family: str, arms: Sequence[Mapping[str, Any]], key: str) -> Line:
        points = sorted(
            (self._best(arm)[0]["result"]["figures"][key], arm["figures"]["bits_per_byte"]["value"]) for arm in arms
        )
        return Line(family, self.families.index(family), 0, [x for x, _ in points], [y for _, y in points])

    def _budgets(self, spec: str) -> list[Line]:
        arms = [arm for arm in self.record["arms"] if arm["architecture"] == spec and "bits_per_byte" in arm["figures"]]
        values = [arm["figures"]["bits_per_byte"]["value"] for arm in arms]
        return (
            [Line(spec, self._family(spec), self.styles[spec], [arm["variant"] for arm in arms], values)]
            if arms
            else []
        )

    def _arms(self) -> str:
        header = ["architecture", "tokens", "parameters", "without embeddings", "learning rate", "seeds",
                  "nats per token", "bits per byte", "training tokens/s", "operations per token"]  # fmt: skip
        rows = []
        for arm in self.record["arms"]:
            best, figures = self._best(arm), arm["figures"]
            if not best:
                rows.append([arm["architecture"], f"{arm['variant']:,}", *["no finished training"] + [""] * 7])
                continue
            first = best[0]["result"]["figures"]
            rows.append(
                [
                    arm["architecture"],
                    f"{arm['variant']:,}",
                    f"{first['parameters']:,}",
                    f"{first['parameters_without_embeddings']:,}",
                    f"{arm['learning_rate']:g}",
                    ", ".join(str(training["seed"]) for training in best),
                    figure_text(figures.get("loss")),
                    figure_text(figures.get("bits_per_byte")),
                    figure_text(figures.get("tokens_per_second"), 0),
                    f"{first['training_operations_per_token']:.4g}",
                ]
            )
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

    def _trainings(self) -> str:
        rows = []
        for training in self.record["trainings"]:
            result = training["result"]
            loss = result["figures"].get("bits_per_byte") if result is not None else None
            ended = training["error"] or (f"{result['status']} {result['message']}".strip() if result else "")
            rows.append(
                [
                    training["architecture"],
                    f"{training['variant']:,}",
                    f"{training['learning_rate']:g}",
                    str(training["seed"]),
                    "" if loss is None else f"{loss:.4f}",
                    ended,
                ]
            )
        return table(["architecture", "tokens", "learning rate", "seed", "bits per byte", "ended"], rows)


class _Rule:
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
            _swept(
                self.record,
                arm,
                arm["architecture"] + _of_variant(self.record, arm),
                list(self.results).index(arm["architecture"]),
                variants.index(arm["variant"]),
            )
            for arm in self.record["arms"]
        ]
        swept = chart(sweeps, "Training loss over learning rate", "peak learning rate", "nats", "sweep", markers=True)
        many = len(self.asked["learning_rates"]) > 1
        return ["<h2>Pictures</h2>", *found, '<div class="charts">', learned, *([swept] if many else []), "</div>"]


def _swept(record: Mapping[str, Any], arm: Mapping[str, Any], label: str, family: int, style: int) -> Line:
    """Return an arm's loss over the learning rates that were tried; one that diverged is infinite."""
    losses = dict(map(tuple, arm["swept"]))
    rates = sorted({*losses, *_tried(record, arm)})
    return Line(label, family, style, rates, [losses.get(rate, math.inf) for rate in rates])


def _top(lines: Sequence[Line]) -> float | None:
    """Return where a sweep's chart ends: some way above the best, so that what diverged does not flatten the rest."""
    values = [value for line in lines for value in line.y if math.isfinite(value)]
    if not values or max(values) < (1 + _RISE) * min(values):
        return None
    return max(value for value in values if value < (1 + _RISE) * min(values))


def _verdict(difference: Mapping[str, Any]) -> str:
    if difference["low"] is None:
        return "one seed: not decided"
    if difference["high"] < 0:
        return "better"
    return "worse" if difference["low"] > 0 else "undecided at these seeds"


_RATIOS = ("tokens_ratio", "size_ratio", "size_ratio_without_embeddings", "training_operations_ratio",
           "train_tokens_per_second_ratio")  # fmt: skip
_CURVES = (
    ("tokens", "tokens", "tokens trained on", "tokens"),
    ("operations", "computing", "training operations (FLOPs)", "operations"),
    ("seconds", "time", "training time at the median rate (s)", "seconds"),
)
_READ = """<ul>
<li>All trainings read the same rows in the same order, with the same tokenizer, optimizer and schedule; each
architecture is shown at the learning rate with the lowest held-out loss at the first seed. Lines are means over the
seeds, bands their lowest and highest.</li>
<li>Bits per byte do not depend on the tokenizer; lower is better. Operations per token count every matrix product,
forward and backward, the output head included.</li>
<li>Tokens to equal loss: the tokens that the candidate needs for the worse one's final loss, over those that the
baseline needs, read off the curves. A curve before its learning rate has decayed lies above what a training of that
length would reach, so a ratio below 1 is an upper bound, and one above 1 a lower bound.</li>
<li>Time is the tokens over the median rate of the training steps: start-up, compilation and evaluations do not
count.</li>
</ul>"""
