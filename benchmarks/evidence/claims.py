"""What FANformer claims, and what the ledger says to it: every verdict is computed from measured intervals."""

import dataclasses
import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fanformer.comparison.ledger import EXACT, LOST_SEEDS, Entry, Figure
from fanformer.errors import ConfigError, DataError, refuse_unknown

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
FEWEST_SEEDS = 3
_OF_TRAININGS = ("comparison", "ablation", "rule")
"""Kinds of entries whose figures are over seeds."""
NOT_MEASURED, OTHER_SCALE, NOT_COUNTED = "not measured", "not measured at this scale", "does not count"
# whether the whole of an interval from `low` to `high` is on the good, or the bad, side of a limit
_HOLDS: dict[str, Callable[[float, float, float], bool]] = {
    "at_least": lambda low, high, limit: low >= limit,
    "at_most": lambda low, high, limit: high <= limit,
    "more_than": lambda low, high, limit: low > limit,
    "less_than": lambda low, high, limit: high < limit,
}
_FAILS: dict[str, Callable[[float, float, float], bool]] = {
    "at_least": lambda low, high, limit: high < limit,
    "at_most": lambda low, high, limit: low > limit,
    "more_than": lambda low, high, limit: high <= limit,
    "less_than": lambda low, high, limit: low >= limit,
}


@dataclass(frozen=True)
class Claim:
    """One row of claims.yaml.

    Attributes:
        id: short name.
        claim: in words.
        command: measures it.
        entry: pattern of the names of the ledger's entries that measure it, as in a shell.
        figure: name of the figure in their results.
        at_least: the claim is that the figure is not lower.
        at_most: the claim is that the figure is not higher.
        more_than: the claim is that the figure is higher.
        less_than: the claim is that the figure is lower.
        aim: a further goal, shown but not judged.
        kind: entries of this kind only.
        gpu: entries of machines with a GPU only, or without one only; None is both.
        scale: `configuration.scale`, or else `configuration.preset`, of the entries that it is about; None is any.
        candidate: for the difference of two entries, the word in the name of the first ...
        baseline: ... and what stands in its place in the name of the second.
        counts_from: figures that must reach a value, in both entries, for the difference to count.
        against: what it is compared with, where the claim does not say so.
        limit: figure of the same entry that says how near it is to what the machine can do.
        group: what a reader asks that it belongs to, one of those that evidence.py shows.
    """

    id: str
    claim: str
    command: str
    entry: str
    figure: str
    at_least: float | None = None
    at_most: float | None = None
    more_than: float | None = None
    less_than: float | None = None
    aim: str | None = None
    kind: str | None = None
    gpu: bool | None = None
    scale: str | None = None
    candidate: str | None = None
    baseline: str | None = None
    counts_from: Mapping[str, float] = dataclasses.field(default_factory=dict)
    against: str | None = None
    limit: str | None = None
    group: str | None = None


@dataclass(frozen=True)
class Row:
    """A claim beside one entry that measures it, or beside none; `figure` is what is judged."""

    claim: Claim
    verdict: str
    figure: Figure | None = None
    entry: Entry | None = None


def load_claims(path: Path) -> list[Claim]:
    """Read claims.yaml.

    Raises:
        ConfigError: if a field is missing or unknown, a claim has no threshold, or two have one id.
    """
    rows = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"{path.name} must be a list of claims, each with its fields.")
    fields = {field.name: field for field in dataclasses.fields(Claim)}
    needed = [name for name, field in fields.items() if name in ("id", "claim", "command", "entry", "figure")]
    claims: dict[str, Claim] = {}
    for number, row in enumerate(rows, 1):
        name = row.get("id", f"number {number}")
        refuse_unknown(row, fields, "a field", f"{path.name}: claim {name}: ")
        for key in needed:
            if not isinstance(row.get(key), str) or not row[key]:
                raise ConfigError(f"{path.name}: claim {name}: `{key}` must be a text, got {row.get(key)!r}.")
        claim = Claim(**row)
        if not thresholds(claim):
            raise ConfigError(
                f"{path.name}: claim {name} needs one of {', '.join(_HOLDS)}: nothing is claimed without."
            )
        if claim.id in claims:
            raise ConfigError(f"{path.name}: two claims are called {name}: rename one.")
        claims[claim.id] = claim
    return list(claims.values())


def thresholds(claim: Claim) -> dict[str, float]:
    """Return the thresholds that a claim has, by their direction."""
    return {name: getattr(claim, name) for name in _HOLDS if getattr(claim, name) is not None}


def scale_of(entry: Entry) -> str | None:
    """Return the scale that an entry was measured at, as its configuration says."""
    scale = entry.configuration.get("scale", entry.configuration.get("preset"))
    return None if scale is None else str(scale)


def judge(claims: Sequence[Claim], entries: Sequence[Entry]) -> list[Row]:
    """Return every claim with every entry that measures it, in the order of the claims, newest entries first."""
    rows: list[Row] = []
    for claim in claims:
        found = sorted(_measured(claim, entries), key=lambda pair: (pair[0].date, pair[0].name), reverse=True)
        rows += [Row(claim, verdict(claim, figure, entry), figure, entry) for entry, figure in found]
        if not found:
            rows.append(Row(claim, NOT_MEASURED))
    return rows


def verdict(claim: Claim, figure: Figure, entry: Entry) -> str:
    """Return what a figure says to a claim: the whole interval on one side of the threshold decides, nothing less.

    Raises:
        DataError: if the claim is about one scale and the entry does not say its own.
    """
    scale = scale_of(entry)
    if claim.scale is not None and scale is None:
        raise DataError(
            f"entry {entry.name} measures claim {claim.id}, which is about scale {claim.scale}: "
            "`configuration.scale` or `configuration.preset` must say which it was measured at."
        )
    if claim.scale not in (None, scale):
        return OTHER_SCALE
    if any(entry.result[name].value < least for name, least in claim.counts_from.items()):
        return NOT_COUNTED
    low, high = (figure.value, figure.value) if figure.interval == EXACT else (figure.low, figure.high)
    if low is None or high is None or (figure.interval != EXACT and _lacks_seeds(entry)):
        return UNDECIDED
    limits = thresholds(claim)
    if all(_HOLDS[name](low, high, limit) for name, limit in limits.items()):
        return HOLDS
    return FAILS if any(_FAILS[name](low, high, limit) for name, limit in limits.items()) else UNDECIDED


def _lacks_seeds(entry: Entry) -> bool:
    """Whether too few seeds were trained to decide, or some diverged, without which the figures look better."""
    return entry.kind in _OF_TRAININGS and (len(entry.seeds) < FEWEST_SEEDS or bool(entry.details.get(LOST_SEEDS)))


def _measured(claim: Claim, entries: Sequence[Entry]) -> Iterator[tuple[Entry, Figure]]:
    by_name = {entry.name: entry for entry in entries}
    for entry in entries:
        if not fnmatch.fnmatchcase(entry.name, claim.entry) or claim.figure not in entry.result:
            continue
        if claim.kind not in (None, entry.kind) or claim.gpu not in (None, bool(entry.hardware.get("gpus"))):
            continue
        if claim.candidate is None or claim.baseline is None:
            yield entry, entry.result[claim.figure]
        elif claim.candidate in entry.name:
            other = by_name.get(entry.name.replace(claim.candidate, claim.baseline))
            if other is not None and claim.figure in other.result:
                yield _both(claim, entry, other), _difference(entry.result[claim.figure], other.result[claim.figure])


def _both(claim: Claim, entry: Entry, other: Entry) -> Entry:
    """Return the candidate's entry with the lower one of what must be reached in both, and the fewer seeds."""
    least: dict[str, Any] = {}
    for name in claim.counts_from:
        if name not in entry.result or name not in other.result:
            raise DataError(f"claim {claim.id} needs `result.{name}` in {entry.name} and {other.name}.")
        least[name] = min(entry.result[name], other.result[name], key=lambda figure: figure.value)
    command = " && ".join(dict.fromkeys([entry.command, other.command]))
    lost = [*entry.details.get(LOST_SEEDS, []), *other.details.get(LOST_SEEDS, [])]
    return dataclasses.replace(
        entry,
        command=command,
        seeds=min(entry.seeds, other.seeds, key=len),
        result={**entry.result, **least},
        details={**entry.details, **({LOST_SEEDS: lost} if lost else {})},
    )


def _difference(one: Figure, other: Figure) -> Figure:
    """Return one figure less another; the interval holds whatever both of theirs allow."""
    value = one.value - other.value
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return Figure(value, one.unit, interval=EXACT if one.interval == other.interval == EXACT else None)
    return Figure(value, one.unit, one.low - other.high, one.high - other.low, f"from {one.interval} of each")


def problems(rows: Sequence[Row], entries: Sequence[Entry]) -> list[str]:
    """Return what the page must not lack: command, seeds, interval and hardware of every row."""
    found = []
    for entry in entries:
        hardware = entry.hardware
        if not entry.command.strip():
            found.append(f"entry {entry.name} lacks its command")
        if not all(hardware.get(name) for name in ("cpu", "cores")):
            found.append(f"entry {entry.name} lacks its hardware: `cpu` and `cores` are needed")
        if not entry.seeds and entry.kind != "benchmark":
            found.append(f"entry {entry.name} lacks its seeds: only benchmarks may have nothing random")
        for name, figure in entry.result.items():
            if figure.interval is None and len(entry.seeds) > 1:
                found.append(f"entry {entry.name} lacks the interval of `{name}` over its {len(entry.seeds)} seeds")
    for row in rows:
        if row.verdict in (HOLDS, FAILS) and (row.figure is None or row.figure.interval is None):
            found.append(f"claim {row.claim.id} is judged without an interval")
    return found
