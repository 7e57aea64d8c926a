"""The results of tuning.py as figures of the ledger and as tables for people."""

from collections.abc import Mapping, Sequence
from typing import Any

from tuning_data import SETS

from fanformer.comparison.ledger import Figure, interval_over_seeds, ratio_over_seeds

Results = Mapping[str, Sequence[Mapping[str, Any]]]
"""By part, what each seed gave."""
Rules = Mapping[str, Mapping[str, Any]]
LEAST_ENDED, MOST_FORGOTTEN = 0.98, 0.02
_SHOWN = {
    "fairytale": ("f1", "exact_match", "explicit_f1", "explicit_exact_match"),
    "arxiv": ("f1", "exact_match"),
    "arc": ("exact_match",),
    "openbookqa": ("exact_match",),
    "instructions": ("followed",),
}
"""What is shown of each set; a letter's F1 is its exact match."""


def figures(results: Results, before: Mapping[str, float], rules: Rules) -> dict[str, Figure]:
    """Return the figures of the ledger: means over seeds with their intervals, and `full` less each other part's.

    Args:
        results: of the tunings.
        before: bits per byte of the bases, as `base` and `llama`.
        rules: of each set, what each rule without a model reaches on the same questions.
    """
    found: dict[str, Figure] = {}
    for part, seeds in results.items():
        name = "llama" if part == "llama" else "base"
        ratios = [seed["bits_per_byte"] / before[name] for seed in seeds]
        found[f"{part}_bits_per_byte_ratio"] = ratio_over_seeds(ratios)
        if part == "preferences":
            for key, unit in (("margin", "nats"), ("accuracy", "share of pairs"), ("loss", "nats per pair")):
                found[f"{part}_{key}"] = interval_over_seeds([seed[key] for seed in seeds], unit)
            continue
        found[f"{part}_ended"] = interval_over_seeds([seed["ended"] for seed in seeds], "share of answers")
        found[f"{part}_unasked"] = interval_over_seeds([seed["unasked"] for seed in seeds], "questions")
        for chosen, keys in _SHOWN.items():
            for key in keys:
                values = [seed[chosen][key] for seed in seeds if key in seed[chosen]]
                if values:
                    found[f"{part}_{chosen}_{key}"] = interval_over_seeds(values, "mean over questions")
        found |= _differences(results, part)
        overlap = rules.get("fairytale", {}).get("best overlap", {}).get("explicit_f1")
        answered = [seed["fairytale"].get("explicit_f1") for seed in seeds if "fairytale" in seed]
        if overlap is not None and answered and None not in answered:
            beyond = [value - overlap for value in answered]
            found[f"{part}_less_best_overlap_explicit_f1"] = interval_over_seeds(beyond, "mean over questions")
    return found


def _differences(results: Results, part: str) -> dict[str, Figure]:
    """Return what `full` has more than another part, seed by seed."""
    found = {}
    for chosen, keys in _SHOWN.items() if part != "full" and "full" in results else ():
        for key in keys:
            pairs = [(one[chosen], other[chosen]) for one, other in zip(results["full"], results[part], strict=True)]
            values = [one[key] - other[key] for one, other in pairs if key in one and key in other]
            if values:
                found[f"full_less_{part}_{chosen}_{key}"] = interval_over_seeds(values, "mean over questions")
    return found


def tables(results: Results, before: Mapping[str, float], rules: Rules) -> str:
    """Return the tables: a row for each part, and of what rules reach.

    Args:
        results: of the tunings.
        before: as `figures` takes it.
        rules: likewise.
    """
    columns = [(name, key) for name in SETS for key in _SHOWN[name]]
    lines = [["", *(f"{name} {key.replace('_', ' ')}" for name, key in columns), "ended", "bits per byte"]]
    lines.extend(
        [rule, *(_number(rules[name].get(rule, {}).get(key)) for name, key in columns), "-", "-"]
        for rule in dict.fromkeys(rule for given in rules.values() for rule in given)
    )
    found = figures(results, before, rules)
    for part in results:
        if part != "preferences":
            names = [*(f"{part}_{name}_{key}" for name, key in columns), f"{part}_ended"]
            lines.append([part, *(_figure(found.get(name)) for name in names), _change(found, part)])
    for part in results:
        less = [found.get(f"full_less_{part}_{name}_{key}") for name, key in columns]
        if any(less):
            lines.append([f"full less {part}", *map(_figure, less), "-", "-"])
    if "preferences" in results:
        shown = (f"{key} {_figure(found[f'preferences_{key}'])}" for key in ("margin", "accuracy", "loss"))
        told = f"preferences, held-out pairs: {', '.join(shown)}, bits per byte {_change(found, 'preferences')}"
        return f"{_aligned(lines)}\n{told}"
    return _aligned(lines)


def aims(results: Results, before: Mapping[str, float]) -> str:
    """Return for the parts that are products whether they met what was set: answers that end, and little forgotten."""
    found, lines = figures(results, before, {}), []
    for part in (part for part in ("full", "lora") if part in results):
        ended, ratio = found[f"{part}_ended"].value, found[f"{part}_bits_per_byte_ratio"].value
        ends = f"{ended:.1%} of answers end (aim at least {LEAST_ENDED:.0%}, {_met(ended >= LEAST_ENDED)})"
        if unasked := found[f"{part}_unasked"].value:
            ends += f", {unasked:g} questions left no room for one"
        keeps = f"bits per byte {100 * (ratio - 1):+.2f}% (aim at most {MOST_FORGOTTEN:+.0%}, "
        lines.append(f"{part}: {ends}; {keeps}{_met(ratio <= 1 + MOST_FORGOTTEN)})")
    return "\n".join(lines)


def _met(holds: bool) -> str:
    return "met" if holds else "missed"


def _change(found: Mapping[str, Figure], part: str) -> str:
    return f"{100 * (found[f'{part}_bits_per_byte_ratio'].value - 1):+.2f}%"


def _figure(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    ends = "" if figure.low is None or figure.high is None else f" ({figure.low:.3f} to {figure.high:.3f})"
    return f"{figure.value:.3f}{ends}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
