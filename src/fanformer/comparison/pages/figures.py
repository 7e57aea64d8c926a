"""What the pages of language and of rules have in common: short names, figures as text, and the tables of both."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fanformer.comparison.architectures import family_and_size
from fanformer.comparison.compare import RATES
from fanformer.report.charts import Chart, Line, clip_above
from fanformer.report.page import table

NOT_FINISHED = "no finished training"
DIGITS = {
    "loss": 4,
    "bits_per_byte": 4,
    "tokens_per_second": 0,
    "seconds": 1,
    "train_accuracy": 4,
    "hole_accuracy": 4,
    "error_within_window": 4,
    "error_beyond_window": 4,
}
"""Digits after the point of a training's figures."""
NO_BREAK = ",\u00a0"  # a comma and a space at which no line is broken
_LONGEST_NAME = 24


class Shown:
    """A comparison's record as its page shows it: each architecture has a short name, a colour and a dash.

    Attributes:
        record: with short names in place of architectures.
        names: short names by architecture.
        families: what has one colour, without its size.
    """

    def __init__(self, record: Mapping[str, Any]):
        asked = record["comparison"]["architectures"]
        self.names = {spec: _short_name(number, spec) for number, spec in enumerate(asked)}
        kept = ("comparison", "arms", "pairs", "parameters_to_equal_loss")
        trainings = [{**one, "architecture": self.names[one["architecture"]]} for one in record["trainings"]]
        self.record = {**record, **{key: self._renamed(record[key]) for key in kept}, "trainings": trainings}
        self.families = list(dict.fromkeys(family_and_size(spec)[0] for spec in asked))
        self.family = {name: self.families.index(family_and_size(spec)[0]) for spec, name in self.names.items()}
        self.arms = self.record["arms"]
        self.variants = list(dict.fromkeys(arm["variant"] for arm in self.arms))

    def _renamed(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {self.names.get(key, key): self._renamed(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._renamed(item) for item in value]
        return self.names.get(value, value) if isinstance(value, str) else value

    def line(self, name: str, x: Sequence[float], y: Sequence[float], **others: Any) -> Line:
        """Return a line in the colour of an architecture's family and the dash of its size."""
        several = [other for other in self.names.values() if self.family[other] == self.family[name]]
        return Line(name, self.family[name], several.index(name), x, y, **others)

    def best(self, arm: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """Return the finished trainings of an arm at its best learning rate, in the order of the record."""
        return [
            training
            for training in self.record["trainings"]
            if all(training[name] == arm[name] for name in ("architecture", "variant", "learning_rate"))
            and math.isfinite(final_figure(training, "loss"))
        ]

    def of_variant(self, arm: Mapping[str, Any]) -> str:
        """Return which budget or hole an arm is about, where there are several."""
        if len(self.variants) == 1:
            return ""
        return f" (hole {arm['variant']})" if self.record["comparison"]["rule"] else f" ({arm['variant']:,} tokens)"

    def sweep(self, lines: Sequence[Line], title: str, what: str, name: str, top: float | None = None) -> list[str]:
        """Return the chart of what learning rates were chosen by, where several were tried."""
        if max((len(line.x) for line in lines), default=0) < 2:
            return []
        top = clip_above(lines) if top is None else top
        return [Chart(lines, title, "peak learning rate", what, name, top=top, markers=True).html()]

    def trainings_table(self, variant: str, figures: Sequence[str]) -> str:
        """Return every training as a row of a table that opens on demand.

        Args:
            variant: what a variant is.
            figures: to show, as keys of `DIGITS`.
        """
        rows = []
        for training in self.record["trainings"]:
            result = training["result"]
            found = result["figures"] if result is not None else {}
            ended = training["error"] or (f"{result['status']} {result['message']}".strip() if result else "")
            shown = [f"{found[name]:,.{DIGITS[name]}f}" if name in found else "" for name in figures]
            where = "to choose a rate" if training["variant"] == RATES else f"{training['variant']:,}"
            told = [training["architecture"], where, f"{training['learning_rate']:g}", str(training["seed"])]
            rows.append([*told, *shown, ended])
        words = [name.replace("_", " ") for name in figures]
        header = ["architecture", variant, "learning rate", "seed", *words, "ended"]
        return f"<details><summary>{len(rows)} trainings</summary>{table(header, rows)}</details>"


def _short_name(number: int, spec: str) -> str:
    """Return a letter and what is told best of an architecture in few characters."""
    letter = chr(ord("A") + number) if number < 26 else str(number + 1)
    return f"{letter} {spec.partition(':')[0].rstrip('/').rpartition('/')[2][:_LONGEST_NAME]}"


def swept(arm: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Return the learning rates that an arm was tried at and what each came to; infinite where it has no result."""
    rates, values = zip(*arm["swept"], strict=True) if arm["swept"] else ((), ())
    return list(rates), [math.inf if value is None else value for value in values]


def final_figure(training: Mapping[str, Any], name: str) -> float:
    """Return a figure of a training, infinite where it diverged or failed."""
    result = training["result"]
    value = result["figures"].get(name, math.inf) if result is not None else math.inf
    return float(value) if math.isfinite(value) else math.inf


def figure_text(figure: Mapping[str, Any] | None, digits: int = 4, signed: bool = False, times: float = 1.0) -> str:
    """Return a figure of a record with its interval, in its own unit or so many times it."""
    if figure is None:
        return "not measured"
    sign = "+" if signed else ""
    value, *ends = (
        None if figure[name] is None else f"{times * figure[name]:{sign},.{digits}f}"
        for name in ("value", "low", "high")
    )
    return f"{value} [{NO_BREAK.join(map(str, ends))}]" if ends[0] is not None else str(value)


def interval_of(figures: Sequence[Mapping[str, Any] | None]) -> str:
    """Return in words what the intervals of figures are."""
    kinds = dict.fromkeys(figure["interval"] for figure in figures if figure is not None)
    known = [kind for kind in kinds if kind not in (None, "exact")]
    words = [f"in brackets: {kind}" for kind in known]
    return "; ".join([*words, *(["one seed has no interval"] if None in kinds else [])])


def verdict(difference: Mapping[str, Any], words: tuple[str, str]) -> str:
    """Return what a difference to the baseline decides.

    Args:
        difference: a figure of a pair.
        words: for a difference below 0 and for one above.
    """
    if difference["low"] is None:
        return "one seed: not decided"
    if difference["high"] < 0:
        return words[0]
    return words[1] if difference["low"] > 0 else "undecided at these seeds"
