"""A comparison as entries of the ledger: one for every training, and one for what they say together."""

import base64
import json
import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fanformer.comparison.architectures import family_and_size
from fanformer.comparison.compare import Comparison, Outcome
from fanformer.comparison.ledger import EXACT, Entry, Figure, interval_over_seeds, read_entry, write_entry
from fanformer.comparison.summary import (
    UNITS,
    Arm,
    Pair,
    arms,
    pairs,
    parameters_ratio,
)
from fanformer.comparison.trial import Result, Trial
from fanformer.data.prepared import PreparedData
from fanformer.machine.versions import hardware, versions

_COUNTED = {
    "parameters": "parameters",
    "parameters_without_embeddings": "parameters",
    "training_operations_per_token": "floating-point operations",
}
"""Figures of a training that are counted, with their units."""
_SIZE_92M = (92_150_000, 92_250_000)  # parameters of the published size


@dataclass(frozen=True)
class Provenance:
    """What every entry of a comparison says about where it comes from.

    Attributes:
        name: of the comparison; entries' names begin with it.
        command: that measures it again.
    """

    name: str
    command: str


def write_training(folder: Path, command: str, outcome: Outcome, data: PreparedData | None, spec: str) -> None:
    """Write the entry of one training, unless the ledger holds it already; one that could not be done has none.

    It is named after what was trained, not after a comparison: several may have it in common.

    Args:
        folder: of the ledger.
        command: that trains it again.
        outcome: of the training.
        data: that it read, None for a rule.
        spec: of these data, as it was asked for.
    """
    result, trial = outcome.result, outcome.trial
    if result is None:
        return
    figures = {name: Figure(result.figures[name], unit) for name, unit in UNITS.items() if name in result.figures}
    figures |= {
        name: Figure(result.figures[name], unit, interval=EXACT)
        for name, unit in _COUNTED.items()
        if name in result.figures
    }
    if result.status != "finished":
        figures = {"diverged": Figure(1, "trainings", interval=EXACT)}
    content = _entry(
        command,
        name=trial.name,
        what=f"{trial.architecture} at learning rate {trial.learning_rate:g}, {_trained_on(trial, outcome.variant)}",
        kind="training",
        seeds=[trial.seed],
        configuration=_configuration(trial, result.figures.get("parameters")),
        data=None if data is None else {"source": spec, "fingerprint": data.fingerprint},
        result=figures,
        curve=result.curve,
        details={
            "part_of": "comparisons",
            "status": result.status,
            "message": result.message,
            **({"rule": _pack(result.details["rule"])} if "rule" in result.details else {}),
        },
    )
    _write(folder, content)


def read_training(folder: Path, trial: Trial) -> Result | None:
    """Return what the ledger says of a training, None where it does not know it.

    Nor does it know a rule's training where an older entry lacks the answers, which a picture needs.
    """
    entry = read_entry(folder, trial.name)
    if entry is None:
        return None
    figures = {name: figure.value for name, figure in entry.result.items() if name != "diverged"}
    details: dict[str, Any] = {"versions": entry.versions}
    if trial.rule is not None and figures:
        if "rule" not in entry.details:
            return None
        details["rule"] = _unpack(entry.details["rule"])
    return Result(entry.details["status"], entry.details["message"], figures, entry.curve, details)


def _pack(content: dict[str, Any]) -> str:
    """Return plain values as text: JSON, compressed (zlib), in base64; a rule's answers are thousands of numbers."""
    return base64.b64encode(zlib.compress(json.dumps(content).encode(), 9)).decode()


def _unpack(text: str) -> dict[str, Any]:
    """Return the values that `_pack` wrote."""
    return json.loads(zlib.decompress(base64.b64decode(text)))


def write_comparison(
    folder: Path,
    origin: Provenance,
    comparison: Comparison,
    outcomes: Sequence[Outcome],
    data: PreparedData | None,
) -> None:
    """Write what the trainings say together: an entry for each candidate beside its baselines, or each rule's arm.

    Entries whose numbers the ledger holds already stay as they are.
    """
    found = arms(comparison, outcomes)
    if comparison.rule is not None:
        for arm in found:
            if arm.outcomes:
                _write(folder, _rule_entry(origin, comparison, arm))
        return
    read = None if data is None else {"source": comparison.data, "fingerprint": data.fingerprint}
    if comparison.ablation:
        for variant in comparison.variants:
            default, *changed = [arm for arm in found if arm.variant == variant]
            if default.outcomes:
                _write(folder, _ablation_entry(origin, comparison, default, changed, read))
        return
    together = pairs(comparison, found)
    for arm in found:
        against = [pair for pair in together if (pair.candidate, pair.variant) == (arm.architecture, arm.variant)]
        if against:
            _write(folder, _candidate_entry(origin, comparison, arm, against, found, read))
    for entry in _ladder_entries(origin, comparison, found, read):
        _write(folder, entry)


def _candidate_entry(
    origin: Provenance,
    comparison: Comparison,
    arm: Arm,
    against: Sequence[Pair],
    found: Sequence[Arm],
    data: dict[str, Any] | None,
) -> Entry:
    """Return the entry of a candidate beside all its baselines; the claims' figures are those against the best one."""
    baselines = {one.architecture: one for one in found if one.variant == arm.variant}
    best = min(against, key=lambda pair: baselines[pair.baseline].figures["bits_per_byte"].value)
    # the speed of trainings says nothing here: they may have shared the machine; benchmarks/ measures it in turns
    figures = {name: figure for name, figure in best.figures.items() if name != "train_tokens_per_second_ratio"}
    shown = [arm, *(baselines[pair.baseline] for pair in against)]
    seeds = [outcome.trial.seed for outcome in arm.outcomes]
    for one in shown:
        slug = _slug(one.architecture)
        # an arm that lost a seed has its own entries only: its figure would be over other seeds than the entry's
        if [outcome.trial.seed for outcome in one.outcomes] == seeds:
            figures[f"bits_per_byte_of_{slug}"] = one.figures["bits_per_byte"]
    for pair in against:
        if pair is not best:
            name = "bits_per_byte_difference"
            figures[f"{name}_to_{_slug(pair.baseline)}"] = pair.figures[name]
    several = len(comparison.variants) > 1 or sum(_is_candidate(comparison, one) for one in found) > 1
    suffix = f"-{_slug(arm.architecture)}-{arm.variant}" if several else ""
    return _entry(
        origin.command,
        name=f"{origin.name}{suffix}",
        what=f"{arm.architecture} beside {', '.join(one.architecture for one in shown[1:])} at {arm.variant:,} tokens",
        kind="comparison",
        seeds=seeds,
        configuration=_configuration(arm.outcomes[0].trial, _parameters(arm)) | _rates(shown),
        data=data,
        result=figures,
        curve=[{**point, "arm": one.architecture} for one in shown for point in _curve(one)],
        details={
            "comparison": f"{origin.name}{suffix}",
            "candidate": arm.architecture,
            "better_baseline": best.baseline,
            "best_learning_rate_at_the_edge_of_the_sweep": [one.architecture for one in shown if one.at_edge],
            "troubles": [line for one in shown for line in one.troubles],
        },
    )


def _ablation_entry(
    origin: Provenance, comparison: Comparison, default: Arm, changed: Sequence[Arm], data: dict[str, Any] | None
) -> Entry:
    """Return the entry of a default beside what changes it; arms that lack a seed of the default's are left out."""
    seeds = [outcome.trial.seed for outcome in default.outcomes]
    shown = {
        _slug(arm.architecture): arm
        for arm in [default, *changed]
        if [outcome.trial.seed for outcome in arm.outcomes] == seeds
    }
    base = [one.result.figures["bits_per_byte"] for one in default.outcomes if one.result is not None]
    figures = {}
    for slug, arm in shown.items():
        figures[f"bits_per_byte_of_{slug}"] = arm.figures["bits_per_byte"]
        if arm is not default:
            own = [one.result.figures["bits_per_byte"] for one in arm.outcomes if one.result is not None]
            differences = [mine - its for mine, its in zip(own, base, strict=True)]
            figures[f"difference_of_{slug}"] = interval_over_seeds(differences, "bits per byte")
    suffix = f"-{default.variant}" if len(comparison.variants) > 1 else ""
    return _entry(
        origin.command,
        name=f"{origin.name}{suffix}",
        what=f"{default.architecture} with one thing changed, at {default.variant:,} tokens",
        kind="ablation",
        seeds=seeds,
        configuration=_configuration(default.outcomes[0].trial, _parameters(default)) | _rates(list(shown.values())),
        data=data,
        result=figures,
        details={
            "default": _slug(default.architecture),
            "arms": {slug: arm.architecture for slug, arm in shown.items()},
            "parameters_without_embeddings": {slug: _parameters(arm, True) for slug, arm in shown.items()},
            "block": default.outcomes[0].trial.block,
            "troubles": [line for arm in [default, *changed] for line in arm.troubles],
        },
    )


def _ladder_entries(
    origin: Provenance, comparison: Comparison, found: Sequence[Arm], data: dict[str, Any] | None
) -> list[Entry]:
    """Return, for every baseline whose loss lies between the candidate's, the parameters to equal loss."""
    total = parameters_ratio(found, comparison, "parameters")
    inner = parameters_ratio(found, comparison, "parameters_without_embeddings")
    longest = {arm.architecture: arm for arm in found if arm.variant == max(comparison.tokens)}
    return [
        _entry(
            origin.command,
            name=f"{origin.name}-parameters-{_slug(name)}",
            what=f"parameters of {family_and_size(comparison.architectures[0])[0]} at the loss of {name}",
            kind="comparison",
            seeds=seeds,
            configuration=_configuration(longest[name].outcomes[0].trial, _parameters(longest[name])),
            data=data,
            result={
                **({"parameters_ratio": total[name][0]} if name in total else {}),
                **({"parameters_ratio_without_embeddings": inner[name][0]} if name in inner else {}),
            },
            details={"baseline": name},
        )
        for name, (_, seeds) in {**total, **inner}.items()
    ]


def _rule_entry(origin: Provenance, comparison: Comparison, arm: Arm) -> Entry:
    task = comparison.rule_task(arm.variant)
    hole = f"-hole{arm.variant}" if arm.variant else ""
    name = "" if task.name in origin.name else f"-{task.name}"
    return _entry(
        origin.command,
        name=f"{origin.name}{name}{hole}-{_slug(arm.architecture)}",
        what=f"the rule {task.name} learned by {arm.architecture}",
        kind="rule",
        seeds=[outcome.trial.seed for outcome in arm.outcomes],
        configuration=_configuration(arm.outcomes[0].trial, _parameters(arm)),
        data=None,
        result=arm.figures,
        details={
            "part_of": origin.name,
            **({"rates_on": dict(comparison.rates_on), "tried": _tried(arm)} if comparison.rates_on else {}),
            "at_edge": arm.at_edge,
            "troubles": arm.troubles,
        },
    )


def _entry(command: str, **fields: Any) -> Entry:
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    return Entry(command=command, date=date, hardware=hardware(), versions=versions(), **fields)


def _write(folder: Path, entry: Entry) -> None:
    """Write an entry, unless the same numbers are there: they keep the day and the machine of their measurement."""
    before = read_entry(folder, entry.name) if folder.is_dir() else None
    fields = ("result", "curve", "seeds", "configuration", "data", "details")
    if before is not None and all(getattr(before, name) == getattr(entry, name) for name in fields):
        return
    write_entry(folder, entry)


def _configuration(trial: Trial, parameters: float | None) -> dict[str, Any]:
    """Return the settings of a training; `scale` is the published size's name, or the number of parameters."""
    published = parameters is not None and _SIZE_92M[0] <= parameters <= _SIZE_92M[1]
    scale = "92m" if published else "not known" if parameters is None else f"{parameters / 1e6:.3g}M parameters"
    settings = dict(trial.settings)
    rule = {} if trial.rule is None else {"rule": dict(trial.rule)}
    own = {"architecture": trial.architecture, "learning_rate": trial.learning_rate}
    return {**settings, **rule, **own, "scale": scale}


def _rates(shown: Sequence[Arm]) -> dict[str, Any]:
    return {"learning_rates": {arm.architecture: {"best": arm.learning_rate, "tried": _tried(arm)} for arm in shown}}


def _tried(arm: Arm) -> list[float]:
    """Return the learning rates at which a training of the sweep finished."""
    return [rate for rate, value in arm.swept.items() if math.isfinite(value)]


def _trained_on(trial: Trial, variant: int) -> str:
    if trial.rule is None:
        return f"{variant:,} tokens"
    side = trial.rule.get("hole_side")
    return f"rule {trial.rule['task']}" + (f", hole {side} x {side}" if side else "")


def _parameters(arm: Arm, without_embeddings: bool = False) -> float | None:
    result = arm.outcomes[0].result
    name = "parameters_without_embeddings" if without_embeddings else "parameters"
    return None if result is None else result.figures[name]


def _curve(arm: Arm) -> list[dict[str, Any]]:
    """Return the curve of the sweep's seed."""
    result = arm.outcomes[0].result
    return [] if result is None else result.curve


def _is_candidate(comparison: Comparison, arm: Arm) -> bool:
    return family_and_size(arm.architecture)[0] == family_and_size(comparison.architectures[0])[0]


def _slug(spec: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", spec).strip("-")
