"""What the pages of language and of rules have in common: figures as text, and which training belongs to what."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fanformer.comparison.compare import RATES
from fanformer.report.charts import Line
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


def of_variant(record: Mapping[str, Any], arm: Mapping[str, Any]) -> str:
    """Return which budget or hole an arm is about, where there are several."""
    if len({other["variant"] for other in record["arms"]}) == 1:
        return ""
    return f" (hole {arm['variant']})" if record["comparison"]["rule"] else f" ({arm['variant']:,} tokens)"


def of_arm(training: Mapping[str, Any], arm: Mapping[str, Any]) -> bool:
    """Return whether a training is one of an arm, at whatever learning rate."""
    return (training["architecture"], training["variant"]) == (arm["architecture"], arm["variant"])


def tried(record: Mapping[str, Any], arm: Mapping[str, Any]) -> list[float]:
    """Return the learning rates that an arm was trained at, whatever came of it, from the lowest."""
    choosing = {**arm, "variant": RATES}
    found = [training for training in record["trainings"] if of_arm(training, choosing)]
    found = found or [training for training in record["trainings"] if of_arm(training, arm)]
    return sorted({training["learning_rate"] for training in found})


def final_figure(training: Mapping[str, Any], name: str) -> float:
    """Return a figure of a training, infinite where it diverged or failed."""
    result = training["result"]
    value = result["figures"].get(name, math.inf) if result is not None else math.inf
    return float(value) if math.isfinite(value) else math.inf


def best_trainings(record: Mapping[str, Any], arm: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the finished trainings of an arm at its best learning rate, in the order of the record."""
    return [
        training
        for training in record["trainings"]
        if of_arm(training, arm)
        and training["learning_rate"] == arm["learning_rate"]
        and math.isfinite(final_figure(training, "loss"))
    ]


def swept(record: Mapping[str, Any], arm: Mapping[str, Any], name: str, line: Line) -> Line:
    """Return a line with an arm's figure at every learning rate of the sweep; infinite where it diverged or failed."""
    seed = record["comparison"]["seeds"][0]
    at_seed = [training for training in record["trainings"] if of_arm(training, arm) and training["seed"] == seed]
    points = sorted((training["learning_rate"], final_figure(training, name)) for training in at_seed)
    return replace(line, x=[rate for rate, _ in points], y=[value for _, value in points])


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


def trainings_table(record: Mapping[str, Any], variant: str, names: Sequence[str]) -> str:
    """Return every training as a row of a table that opens on demand.

    Args:
        record: of the comparison.
        variant: what a variant is.
        names: of the figures to show, as keys of `DIGITS`.
    """
    rows = []
    for training in record["trainings"]:
        result = training["result"]
        figures = result["figures"] if result is not None else {}
        ended = training["error"] or (f"{result['status']} {result['message']}".strip() if result else "")
        shown = [f"{figures[name]:,.{DIGITS[name]}f}" if name in figures else "" for name in names]
        rate = f"{training['learning_rate']:g}"
        where = "to choose a rate" if training["variant"] == RATES else f"{training['variant']:,}"
        rows.append([training["architecture"], where, rate, str(training["seed"]), *shown, ended])
    header = ["architecture", variant, "learning rate", "seed", *(name.replace("_", " ") for name in names), "ended"]
    return f"<details><summary>{len(rows)} trainings</summary>{table(header, rows)}</details>"
