"""The ledger: one JSON file for every run that was measured, from which the evidence page is made.

A file says what was measured, by which command, with which seeds, configuration and data, on which hardware and with
which versions. Nothing here imports torch or transformers, so that pages and checks read the ledger at once.
"""

import dataclasses
import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal, get_args

from fanformer.errors import ConfigError, DataError, did_you_mean
from fanformer.files.durable import replace_json

Kind = Literal["comparison", "ablation", "rule", "training", "evaluation", "benchmark"]
EXACT = "exact"
"""The interval of a figure without spread: one that was counted, or that every repetition gives alike."""
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
        name: of the file, without .json; the only one in the ledger.
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


def write_entry(folder: Path, entry: Entry) -> Path:
    """Write an entry as `folder`/NAME.json, in place of an earlier one of that name.

    Returns:
        The file's path.

    Raises:
        DataError: if a field is empty, of the wrong type, or holds a number that is not finite.
    """
    path = folder / f"{entry.name}.json"
    content = dataclasses.asdict(entry)
    _parse(content, path)
    folder.mkdir(parents=True, exist_ok=True)
    replace_json(path, content)
    return path


def read_entry(path: Path) -> Entry:
    """Read one file of the ledger.

    Raises:
        DataError: if it cannot be read, or a field is missing, unknown, empty, of the wrong type or not finite.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot read {path.absolute()} ({type(error).__name__}: {error}): expected an entry of the ledger in JSON."
        ) from error
    entry = _parse(content, path)
    if entry.name != path.stem:
        raise _wrong(path, "name", f"the file's name without .json, {path.stem!r}", entry.name)
    return entry


def read_ledger(folder: Path) -> list[Entry]:
    """Read every .json file below a folder.

    Returns:
        The entries in the order of their names.

    Raises:
        DataError: if the folder is missing, a file is malformed, or two have the same name.
    """
    if not folder.is_dir():
        raise DataError(f"no ledger at {folder.absolute()}: expected a folder of .json files, one for each run.")
    paths: dict[str, Path] = {}
    entries = []
    for path in sorted(folder.rglob("*.json")):
        if path.stem in paths:
            raise DataError(
                f"{path.absolute()} and {paths[path.stem].absolute()} have the same name: rename one, `name` too."
            )
        paths[path.stem] = path
        entries.append(read_entry(path))
    return sorted(entries, key=lambda entry: entry.name)


def interval_over_seeds(values: Sequence[float], unit: str, confidence: float = 0.95) -> Figure:
    """Return the mean over seeds with Student's t-interval; a single value has none.

    Args:
        values: one measurement for each seed.
        unit: what they count.
        confidence: of the interval, between 0 and 1.

    Raises:
        ConfigError: if `confidence` is not between 0 and 1.
        DataError: if there are no values.
    """
    if not 0 < confidence < 1:
        raise ConfigError(f"`confidence` must be between 0 and 1, got {confidence}: 0.95 is usual.")
    _need_values(values)
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Figure(mean, unit)
    half = t_quantile(confidence, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Figure(mean, unit, mean - half, mean + half, f"{100 * confidence:g}% t-interval over {len(values)} seeds")


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


def _wrong(path: Path, field: str, expected: str, got: Any) -> DataError:
    shown = repr(got)
    return DataError(
        f"{path.absolute()}: `{field}` must be {expected}, got {shown if len(shown) <= 60 else shown[:57] + '...'}."
    )


def _parse(content: Any, path: Path) -> Entry:
    """Return the entry that a JSON object holds, once every field has been checked."""
    fields = {field.name: field for field in dataclasses.fields(Entry)}
    _check_keys(content, "", list(fields), list(fields), path)
    for name in ("name", "what", "kind", "command", "date"):
        if not isinstance(content[name], str) or not content[name].strip():
            raise _wrong(path, name, "a text that is not empty", content[name])
    if not _NAME.fullmatch(content["name"]):
        raise _wrong(path, "name", "letters, digits, dots, dashes and underscores", content["name"])
    if content["kind"] not in get_args(Kind):
        raise _wrong(path, "kind", f"one of {', '.join(get_args(Kind))}", content["kind"])
    _check_date(content["date"], path)
    seeds = content["seeds"]
    if not isinstance(seeds, list) or any(type(seed) is not int for seed in seeds):
        raise _wrong(path, "seeds", "a list of whole numbers", seeds)
    for name in ("configuration", "hardware", "versions", "result", "details"):
        if not isinstance(content[name], dict):
            raise _wrong(path, name, "an object", content[name])
    for name in ("hardware", "versions", "result"):
        if not content[name]:
            raise _wrong(path, name, "an object that is not empty", content[name])
    if content["data"] is not None:
        _check_keys(content["data"], "data.", ["source", "fingerprint"], None, path)
    curve = content["curve"]
    if not isinstance(curve, list) or any(not isinstance(point, dict) for point in curve):
        raise _wrong(path, "curve", "a list of objects", curve)
    _check_values(content, "", path)
    result = {name: _figure(figure, f"result.{name}", path) for name, figure in content["result"].items()}
    return Entry(**{**content, "result": result})


def _check_keys(content: Any, prefix: str, needed: list[str], known: list[str] | None, path: Path) -> None:
    if not isinstance(content, dict):
        raise _wrong(path, prefix.rstrip(".") or "the file", f"an object with {', '.join(needed)}", content)
    for name in needed:
        if name not in content:
            raise DataError(f"{path.absolute()}: `{prefix}{name}` is missing: expected {', '.join(needed)}.")
    for name in content if known is not None else ():
        if name not in (known or ()):
            raise DataError(f"{path.absolute()}: `{prefix}{name}` is not a field: {did_you_mean(name, known or ())}")


def _check_date(text: str, path: Path) -> None:
    try:
        date.fromisoformat(text if len(text) == len("YYYY-MM-DD") else "")
    except ValueError:
        raise _wrong(path, "date", "a day as YYYY-MM-DD", text) from None


def _check_values(value: Any, field: str, path: Path) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise _wrong(path, field, "a finite number", value)
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise _wrong(path, field, "an object whose names are texts", value)
            _check_values(item, f"{field}.{key}" if field else key, path)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            _check_values(item, f"{field}.{number}", path)
    elif not (value is None or isinstance(value, str | int | float)):
        raise _wrong(path, field, "a text, number, truth value, list, object or null", value)


def _figure(content: Any, field: str, path: Path) -> Figure:
    """Return one figure of a result, checked: an interval has both ends or is exact, and holds the value."""
    _check_keys(content, f"{field}.", ["value", "unit"], [item.name for item in dataclasses.fields(Figure)], path)
    figure = Figure(**content)
    numbers = {"value": figure.value, "low": figure.low, "high": figure.high}
    for name, number in numbers.items():
        if type(number) not in (int, float) and not (number is None and name != "value"):
            raise _wrong(path, f"{field}.{name}", "a number", number)
    if not isinstance(figure.unit, str) or not figure.unit:
        raise _wrong(path, f"{field}.unit", "a text that is not empty", figure.unit)
    if figure.interval is not None and (not isinstance(figure.interval, str) or not figure.interval):
        raise _wrong(path, f"{field}.interval", "a text that is not empty, or null", figure.interval)
    if figure.low is None or figure.high is None:
        if figure.low is not None or figure.high is not None or figure.interval not in (None, EXACT):
            expected = f"both ends with what they are, or neither with null or {EXACT!r}"
            raise _wrong(path, f"{field}.interval", expected, [figure.low, figure.high, figure.interval])
    elif figure.interval in (None, EXACT):
        raise _wrong(path, f"{field}.interval", "what its ends are, such as 'range of 3 repetitions'", figure.interval)
    elif not figure.low <= figure.value <= figure.high:
        raise _wrong(path, f"{field}.value", f"between its ends {figure.low} and {figure.high}", figure.value)
    return figure
