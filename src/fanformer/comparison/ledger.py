"""The ledger: two files with a JSON object a line for every run that was measured; the evidence page is made of them.

A line says what was measured, by which command, with which seeds, configuration and data, on which hardware and with
which versions. Nothing here imports torch or transformers, so that pages and checks read the ledger at once.
"""

import dataclasses
import json
import math
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from fanformer.errors import DataError, did_you_mean
from fanformer.files.durable import replace_text
from fanformer.files.locking import hold
from fanformer.machine.versions import command_line, hardware, versions

TRAININGS_FILE, MEASUREMENTS_FILE, LOCK_FILE = "trainings.jsonl", "measurements.jsonl", ".ledger.lock"
Kind = Literal["comparison", "ablation", "rule", "training", "evaluation", "benchmark"]
EXACT = "exact"
"""The interval of a figure without spread: one that was counted, or that every repetition gives alike."""
LOST_SEEDS = "lost_seeds"
"""Of an entry's details: trainings at the chosen rates that came to nothing, and that its figures therefore lack."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Attributes:
        value: the number; for several measurements their mean or median.
        unit: what it counts.
        low: lower end of the interval.
        high: upper end of the interval.
        interval: what the interval is, such as "95% t-interval over 3 seeds"; `EXACT`, without ends, for a number
            without spread; None for a single measurement, of whose spread nothing is known.
    """

    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    interval: str | None = None


@dataclass(frozen=True)
class Entry:
    """What one run measured, and how.

    Attributes:
        name: the only one in the ledger.
        what: one sentence.
        kind: which table of the evidence page it belongs to.
        command: measures it again.
        date: of the measurement, YYYY-MM-DD.
        seeds: of everything random; empty where nothing is.
        configuration: the settings that decide the result.
        data: `source` and `fingerprint` of the data; None where none is read.
        hardware: as `hardware` returns it.
        versions: as `versions` returns them.
        result: the figures by name.
        curve: points on the way, such as {"tokens": 1024, "bits_per_byte": 2.5}.
        details: everything else, for people.
    """

    name: str
    what: str
    kind: Kind
    command: str
    date: str
    seeds: list[int]
    configuration: dict[str, Any]
    data: dict[str, Any] | None
    hardware: dict[str, Any]
    versions: dict[str, str]
    result: dict[str, Figure]
    curve: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    details: dict[str, Any] = dataclasses.field(default_factory=dict)


def measured_today(name: str, **fields: Any) -> Entry:
    """Return the entry of what this process measured: by its command, today, on this machine, with its versions.

    Args:
        name: of the entry; "{date}" in it becomes the day.
        **fields: of the entry, `what`, `configuration` and `result` at least; the others may replace what is known.
    """
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    known = {"command": command_line(["python", *sys.argv]), "hardware": hardware(), "versions": versions()}
    usual: dict[str, Any] = {"kind": "benchmark", "date": day, "seeds": [], "data": None}
    return Entry(**{"name": name.replace("{date}", day), **known, **usual, **fields})


def write_entry(folder: Path, *entries: Entry) -> Path:
    """Write entries into a ledger, in place of earlier ones of their names; processes that write at once take turns.

    Args:
        folder: of the ledger; made if need be.
        entries: of one kind of file: trainings, or other measurements.

    Returns:
        The file that they are in.

    Raises:
        DataError: if a field is empty, of the wrong type, or holds a number that is not finite, or if the file cannot
            be read or written.
    """
    (path,) = {folder / (TRAININGS_FILE if entry.kind == "training" else MEASUREMENTS_FILE) for entry in entries}
    contents = {entry.name: dataclasses.asdict(entry) for entry in entries}
    for name, content in contents.items():
        parse_entry(content, f"{path.absolute()}, {name}")
    folder.mkdir(parents=True, exist_ok=True)
    with hold(folder / LOCK_FILE, f"the ledger {folder.absolute()}", wait=True):
        known = {name: content for name, (_, content) in _read_file(path).items()} | contents
        lines = [json.dumps(known[name], separators=(",", ":")) for name in sorted(known)]
        replace_text(path, "\n".join(lines) + "\n")
    return path


def read_entry(folder: Path, name: str) -> Entry | None:
    """Read one entry of a ledger, None where it has none of that name.

    Raises:
        DataError: if it cannot be read, or a field is missing, unknown, empty, of the wrong type or not finite.
    """
    where, content = _read_files(folder).get(name, ("", None))
    return parse_entry(content, where) if where else None


def read_ledger(folder: Path) -> list[Entry]:
    """Read every entry of a ledger.

    Returns:
        The entries in the order of their names.

    Raises:
        DataError: if the folder is missing, a line is malformed, or two entries have the same name.
    """
    if not folder.is_dir():
        raise DataError(
            f"no ledger at {folder.absolute()}: expected a folder with {TRAININGS_FILE} or {MEASUREMENTS_FILE}."
        )
    return [parse_entry(content, where) for _, (where, content) in sorted(_read_files(folder).items())]


def _read_files(folder: Path) -> dict[str, tuple[str, Any]]:
    """Return what the lines of a ledger hold by the entries' names, each with its place."""
    if any((folder / "trainings").glob("*.json")):
        raise DataError(
            f"{folder.absolute()} holds a file for each entry, as older versions wrote them: take them over with "
            f"`python benchmarks/import_results.py {folder} {folder}`, and delete its *.json and `trainings`."
        )
    trainings, others = (_read_file(folder / name) for name in (TRAININGS_FILE, MEASUREMENTS_FILE))
    for name in trainings.keys() & others.keys():
        raise DataError(f"{trainings[name][0]} and {others[name][0]} have the same name {name!r}: delete one.")
    return trainings | others


def _read_file(path: Path) -> dict[str, tuple[str, Any]]:
    found: dict[str, tuple[str, Any]] = {}
    if not path.is_file():
        return found
    where = str(path.absolute())
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, start=1):
            where = f"{path.absolute()}, line {number}"
            content = json.loads(line)
            if not isinstance(content, dict) or not isinstance(content.get("name"), str):
                parse_entry(content, where)  # says what is wrong with it
            name = content["name"]
            if name in found:
                raise DataError(f"{found[name][0]} and line {number} have the same name {name!r}: delete one.")
            found[name] = (where, content)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read {where} ({type(error).__name__}: {error}): expected an entry of the ledger in JSON."
        ) from error
    return found


def interval_over_seeds(values: Sequence[float], unit: str) -> Figure:
    """Return the mean over seeds with Student's 95% t-interval; a single value has none.

    Args:
        values: one measurement for each seed.
        unit: what they count.

    Raises:
        DataError: if there are no values.
    """
    _need_values(values)
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Figure(mean, unit)
    half = t_quantile(0.95, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Figure(mean, unit, mean - half, mean + half, f"95% t-interval over {len(values)} seeds")


def ratio_over_seeds(ratios: Sequence[float]) -> Figure:
    """Return the geometric mean of ratios over seeds with the t-interval of their logarithms; a single one has none.

    Args:
        ratios: one for each seed, above 0.

    Raises:
        DataError: if there are none.
    """
    logarithm = interval_over_seeds([math.log(ratio) for ratio in ratios], "ratio")
    if logarithm.low is None or logarithm.high is None:
        return Figure(ratios[0], "ratio")
    ends = (math.exp(logarithm.value), math.exp(logarithm.low), math.exp(logarithm.high))
    return Figure(ends[0], "ratio", ends[1], ends[2], f"95% t-interval of the logarithm over {len(ratios)} seeds")


def range_of(values: Sequence[float], unit: str) -> Figure:
    """Return the median of repetitions with the lowest and the highest; a single value has no range.

    Raises:
        DataError: if there are no values.
    """
    _need_values(values)
    median = statistics.median(values)
    if len(values) == 1:
        return Figure(median, unit)
    return Figure(median, unit, min(values), max(values), f"range of {len(values)} repetitions")


def t_quantile(confidence: float, degrees: int) -> float:
    """Return the t that |T| stays below with probability `confidence`, for whole degrees of freedom.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4: with theta = atan(t / sqrt(n))
    the probability is a finite sum of powers of cos(theta); it grows with theta, so that halving finds the angle.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if _probability_within(middle, degrees) < confidence else (low, middle)
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def _probability_within(angle: float, degrees: int) -> float:
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = degrees % 2
    term, total = cosine if odd else 1.0, 0.0
    for exponent in range(odd, degrees - 1, 2):
        total += term
        term *= (exponent + 1) / (exponent + 2) * cosine**2
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def _need_values(values: Sequence[float]) -> None:
    if not values:
        raise DataError("`values` must hold at least one measurement, got none.")


def _wrong(where: str, field: str, expected: str, got: Any) -> DataError:
    shown = repr(got)
    return DataError(f"{where}: `{field}` must be {expected}, got {shown if len(shown) <= 60 else shown[:57] + '...'}.")


def parse_entry(content: Any, where: str) -> Entry:
    """Return the entry that a JSON object holds, once every field has been checked.

    Raises:
        DataError: if a field is missing, unknown, empty, of the wrong type or not finite; it begins with `where`.
    """
    fields = {field.name: field for field in dataclasses.fields(Entry)}
    _check_keys(content, "", list(fields), list(fields), where)
    for name in ("name", "what", "kind", "command", "date"):
        if not isinstance(content[name], str) or not content[name].strip():
            raise _wrong(where, name, "a text that is not empty", content[name])
    if not _NAME.fullmatch(content["name"]):
        raise _wrong(where, "name", "letters, digits, dots, dashes and underscores", content["name"])
    if content["kind"] not in get_args(Kind):
        raise _wrong(where, "kind", f"one of {', '.join(get_args(Kind))}", content["kind"])
    _check_date(content["date"], where)
    seeds = content["seeds"]
    if not isinstance(seeds, list) or any(type(seed) is not int for seed in seeds):
        raise _wrong(where, "seeds", "a list of whole numbers", seeds)
    for name in ("configuration", "hardware", "versions", "result", "details"):
        if not isinstance(content[name], dict):
            raise _wrong(where, name, "an object", content[name])
    for name in ("hardware", "versions", "result"):
        if not content[name]:
            raise _wrong(where, name, "an object that is not empty", content[name])
    if content["data"] is not None:
        _check_keys(content["data"], "data.", ["source", "fingerprint"], None, where)
    curve = content["curve"]
    if not isinstance(curve, list) or any(not isinstance(point, dict) for point in curve):
        raise _wrong(where, "curve", "a list of objects", curve)
    _check_values(content, "", where)
    result = {name: _figure(figure, f"result.{name}", where) for name, figure in content["result"].items()}
    return Entry(**{**content, "result": result})


def _check_keys(content: Any, prefix: str, needed: list[str], known: list[str] | None, where: str) -> None:
    if not isinstance(content, dict):
        raise _wrong(where, prefix.rstrip(".") or "the line", f"an object with {', '.join(needed)}", content)
    for name in needed:
        if name not in content:
            raise DataError(f"{where}: `{prefix}{name}` is missing: expected {', '.join(needed)}.")
    for name in content:
        if known is not None and name not in known:
            raise DataError(f"{where}: `{prefix}{name}` is not a field: {did_you_mean(name, known)}")


def _check_date(text: str, where: str) -> None:
    try:
        date.fromisoformat(text if len(text) == len("YYYY-MM-DD") else "")
    except ValueError:
        raise _wrong(where, "date", "a day as YYYY-MM-DD", text) from None


def _check_values(value: Any, field: str, where: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise _wrong(where, field, "a finite number", value)
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise _wrong(where, field, "an object whose names are texts", value)
            _check_values(item, f"{field}.{key}" if field else key, where)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            _check_values(item, f"{field}.{number}", where)
    elif not (value is None or isinstance(value, str | int | float)):
        raise _wrong(where, field, "a text, number, truth value, list, object or null", value)


def _figure(content: Any, field: str, where: str) -> Figure:
    """Return one figure of a result, checked: an interval has both ends or is exact, and holds the value."""
    _check_keys(content, f"{field}.", ["value", "unit"], [item.name for item in dataclasses.fields(Figure)], where)
    figure = Figure(**content)
    value, low, high, interval = figure.value, figure.low, figure.high, figure.interval
    for name, number in (("value", value), ("low", low), ("high", high)):
        if type(number) not in (int, float) and not (number is None and name != "value"):
            raise _wrong(where, f"{field}.{name}", "a number", number)
    for name, words in (("unit", figure.unit), ("interval", interval)):
        if not (isinstance(words, str) and words) and not (words is None and name == "interval"):
            expected = "a text that is not empty" + ", or null" * (name == "interval")
            raise _wrong(where, f"{field}.{name}", expected, words)
    if low is None or high is None:
        if (low, high) != (None, None) or interval not in (None, EXACT):
            expected = f"both ends with what they are, or neither with null or {EXACT!r}"
            raise _wrong(where, f"{field}.interval", expected, [low, high, interval])
    elif interval in (None, EXACT):
        raise _wrong(where, f"{field}.interval", "what its ends are, such as 'range of 3 repetitions'", interval)
    elif not low <= value <= high:
        raise _wrong(where, f"{field}.value", f"between its ends {low} and {high}", value)
    return figure
