"""What the pages of language and of rules have in common: figures as text, and which training belongs to what."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fanformer.report.charts import Line

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


def tried(record: Mapping[str, Any], arm: Mapping[str, Any]) -> list[float]:
    """Return the learning rates that an arm was trained at, whatever came of it."""
    return [
        training["learning_rate"]
        for training in record["trainings"]
        if (training["architecture"], training["variant"]) == (arm["architecture"], arm["variant"])
    ]


def swept(record: Mapping[str, Any], arm: Mapping[str, Any], label: str, family: int, style: int) -> Line:
    """Return an arm's loss over the learning rates that were tried; one that diverged is infinite."""
    losses = dict(map(tuple, arm["swept"]))
    rates = sorted({*losses, *tried(record, arm)})
    return Line(label, family, style, rates, [losses.get(rate, math.inf) for rate in rates])
