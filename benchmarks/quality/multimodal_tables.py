"""The results of multimodal.py as figures of the ledger, and the ledger's as tables in docs/multimodal.md."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from multimodal_data import BLANK_MARGIN, GROUPS, Task

from fanformer.comparison.ledger import EXACT, Entry, Figure, interval_over_seeds
from fanformer.files.durable import replace_text

Results = dict[str, dict[str, list[dict[str, Any]]]]
"""By task and twin, what each seed gave."""
BEGIN, END = "<!-- made by benchmarks/quality/multimodal.py --tables -->", "<!-- end -->"
HEAD = ("task", "asked for", "right", "blind twin", "held out", "tokens")
_WORDS = {
    "naming": "name a handwritten digit",
    "reading": "read 2 to 4 handwritten digits",
    "emoji": "emoji",
    "spoken": "name a spoken digit",
    "spoken-40ms": "the same at 40 ms a token",
    "unheard": "the same of a speaker who was not heard, mean over six",
    "connected": "write 2 to 5 spoken digits that were joined",
    "both": "add a digit seen and one heard",
    "two-pictures": "read two pictures in their order",
}
_MEASURES = {
    "category": "category",
    "keywords": "share of keywords named",
    "words": "one less the word error rate",
    "without_picture": "picture blank",
    "without_recording": "recording blank",
    "without_first": "first picture blank",
    "without_second": "second picture blank",
}
_UNITS = {"exact": "share of answers", "words": "one less the word error rate", "keywords": "share of keywords"}


def figures(tasks: Mapping[str, Task], results: Results) -> dict[str, Figure]:
    """Return the figures of what is told together: means over its tasks and seeds, with intervals over seeds.

    `over_blind` is the least over its held-out sets, `blank_over_chance` the highest over what was blank.

    Args:
        tasks: by name, each measured alike.
        results: of each of them.
    """
    shape, found = next(iter(tasks.values())), {}

    def over_tasks(twin: str, kind: str, name: str) -> list[float]:
        return [fmean(several) for several in zip(*_values(results, twin, kind, name), strict=True)]

    over: dict[str, list[list[float]]] = {"blind": [], "chance": [], "probe": []}
    for name, held_out in shape.held_out.items():
        ours, unit = over_tasks("model", "scores", name), _UNITS[held_out.score]
        found[name] = interval_over_seeds(ours, unit)
        if held_out.score == "words":
            found["word_error_rate"] = interval_over_seeds([1 - one for one in ours], "errors over words")
        others = {"probe": _probed(results, name)}
        if held_out.chance is None:
            others["blind"] = over_tasks("blind", "scores", name)
            found[f"{name}_blind"] = interval_over_seeds(others["blind"], unit)
        else:
            others["chance"] = [held_out.chance] * len(ours)
        if others["probe"]:
            found[f"{name}_probe"] = interval_over_seeds(others["probe"], unit)
        for other, values in others.items():
            if values:
                over[other].append([one - two for one, two in zip(ours, values, strict=True)])
                found[f"{name}_over_{other}"] = interval_over_seeds(over[other][-1], unit)
    found["over_blind"] = interval_over_seeds([min(one) for one in zip(*over["blind"], strict=True)], "share")
    if over["chance"]:
        highest = [max(one) for one in zip(*over["chance"], strict=True)]
        found["blank_over_chance"] = interval_over_seeds(highest, "share of answers")
    if len(tasks) > 1:
        for task in tasks:
            values = [one["scores"]["right"] for one in results[task]["model"]]
            found[f"right_{task.rpartition('-')[2]}"] = interval_over_seeds(values, _UNITS["exact"])
    every = [one for twins in results.values() for several in twins.values() for one in several]
    for key, unit in (("tokens_per_picture", "tokens"), ("tokens_per_second_of_sound", "tokens")):
        if key in every[0]:
            found[key] = Figure(every[0][key], unit, interval=EXACT)
    bits = [one["text_bits_per_byte"] for one in every]
    largest = max(abs(one["with_towers"] - one["base"]) for one in bits)
    found["text_bits_per_byte_difference"] = Figure(largest, "bits per byte", interval=EXACT)
    return found


def _values(results: Results, twin: str, kind: str, name: str) -> list[list[float]]:
    """Return a measure of each task, of each seed."""
    return [[one[kind][name] for one in twins[twin]] for twins in results.values()]


def _probed(results: Results, name: str) -> list[float]:
    """Return what the probe of each seed reaches; what has one is a task by itself."""
    return [one["probes"][name] for one in next(iter(results.values()))["model"] if name in one["probes"]]


def tables(entries: Sequence[Entry]) -> str:
    """Return what entries of multimodal.py say, as tables in Markdown, for each base and size of towers."""
    ours = [entry for entry in entries if entry.name.startswith("multimodal-")]
    kinds = dict.fromkeys((entry.configuration["base"], entry.configuration["scale"]) for entry in ours)
    parts = []
    for base, scale in kinds:
        of_kind = [one for one in ours if (one.configuration["base"], one.configuration["scale"]) == (base, scale)]
        by_task = {entry.configuration["task"]: entry for entry in of_kind}
        measured = [by_task[group] for group in GROUPS if group in by_task]
        if measured:
            rows = [row for entry in measured for row in _rows(entry)]
            parts += [_introduction(measured), _table(HEAD, rows)]
        if {"spoken", "spoken-40ms"} <= by_task.keys():
            parts.append(_forty_and_eighty(by_task["spoken"], by_task["spoken-40ms"]))
        if "adapters" in by_task:
            parts.append(_of_adapters(by_task["adapters"]))
    return "\n\n".join(parts) or "Not measured yet."


def _introduction(entries: Sequence[Entry]) -> str:
    dates = sorted({entry.date for entry in entries})
    cores = sorted({f"{entry.hardware['cores']} cores of {entry.hardware['cpu']}" for entry in entries})
    seeds = sorted({len(entry.seeds) for entry in entries})
    counted = f"{' or '.join(map(str, seeds))} seed{'s' * (seeds[-1] > 1)}"
    days = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    largest = max(entry.result["text_bits_per_byte_difference"].value for entry in entries)
    base, scale = (entries[0].configuration[name] for name in ("base", "scale"))
    return (
        f"Measured {days} on {', '.join(cores)}; base `{base}`, {scale} towers, {counted}, in brackets 95% intervals "
        f"over seeds. The bits per byte of the base on the beginning of docs/math.md change by {largest:g} at most."
    )


def _rows(entry: Entry) -> list[list[str]]:
    """Return the lines of a task: one for each held-out set."""
    found, result, group = [], entry.result, entry.configuration["task"]
    for name, held_out in entry.details["held_out"].items():
        what = _WORDS[group] if name == "right" else f"{_WORDS[group]}: {_MEASURES[name]}"
        bar, chance = held_out["bar"], held_out["chance"]
        asked = "" if bar is None else f"at least {bar:.0%}"
        if chance is not None:
            asked = f"at most {chance + BLANK_MARGIN:.1%}"
        if f"{name}_probe" in result:
            asked = f"at least a linear probe's {_share(result[f'{name}_probe'])}"
        first = next(iter(entry.details["results"].values()))["model"]
        count = sum(twins["model"][0]["held_out"][name] for twins in entry.details["results"].values())
        tokens = [
            f"{_number(first[0][key])} {words}"
            for key, words in (("tokens_per_picture", "a picture"), ("tokens_per_second_of_sound", "a second"))
            if key in first[0]
        ]
        blind = f"{name}_blind"
        found.append(
            [
                what,
                f"{asked}: {'met' if _is_met(name, entry) else 'missed'}",
                _share(result[name]),
                _share(result[blind]) if blind in result else "-",
                f"{count:,}",
                ", ".join(tokens),
            ]
        )
    return found


def _is_met(name: str, entry: Entry) -> bool:
    """Return whether a mean reaches what is asked for, and is above the blind twin's by more than the interval."""
    held_out, result = entry.details["held_out"][name], entry.result
    if held_out["chance"] is not None:
        return result[f"{name}_over_chance"].value <= BLANK_MARGIN
    over = result[f"{name}_over_blind"]
    least = held_out["bar"] if held_out["bar"] is not None else result[f"{name}_probe"].value
    return result[name].value >= least and (over.low if over.low is not None else over.value) > 0


def _forty_and_eighty(eighty: Entry, forty: Entry) -> str:
    values = [
        [one["scores"]["right"] for one in next(iter(entry.details["results"].values()))["model"]]
        for entry in (forty, eighty)
    ]
    over = interval_over_seeds([100 * (one - two) for one, two in zip(*values, strict=False)], "points")
    ends = "" if over.low is None or over.high is None else f" ({over.low:+.1f} to {over.high:+.1f})"
    return f"Spoken digits at 40 ms a token less those at 80 ms: {over.value:+.1f} points{ends}, for twice the tokens."


def _of_adapters(entry: Entry) -> str:
    result = entry.result
    head = ["rows that hold", "reading 4 x 64 tokens", "a step of writing"]
    rows = [
        [name, *(_ratio(result[f"{kind}_time_{name}"]) for kind in ("prefill", "decode"))]
        for name in ("text", "picture", "recording", "both")
    ]
    parts = ("language_model", "towers", "projectors", "adapters")
    language_model, towers, projectors, adapters = (f"{result[f'{name}_parameters'].value:,.0f}" for name in parts)
    share, rank = result["adapters_over_language_model"].value, entry.configuration["adapter_rank"]
    return (
        f"Beside {language_model} parameters of the language model, towers for both media have {towers}, projectors "
        f"{projectors} and adapters of rank {rank} {adapters}, {share:.1%} of the language model's memory. Time over "
        f"that of the base, in turns, with the range of the rounds:\n\n{_table(head, rows)}"
    )


def write_page(page: Path, entries: Sequence[Entry]) -> None:
    """Write the tables of the ledger's entries between the two marks of a document."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    replace_text(page, f"{before}{BEGIN}\n\n{tables(entries)}\n\n{END}{after}")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _share(figure: Figure) -> str:
    ends = "" if figure.low is None or figure.high is None else f" ({figure.low:.1%} to {figure.high:.1%})"
    return f"{figure.value:.1%}{ends}"


def _ratio(figure: Figure) -> str:
    ends = "" if figure.low is None or figure.high is None else f" ({figure.low:.2f} to {figure.high:.2f})"
    return f"{figure.value:.2f}{ends}"


def _number(value: float) -> str:
    return f"{value:g}"
