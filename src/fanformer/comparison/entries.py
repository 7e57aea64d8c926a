"""A comparison as entries of the ledger: one for every training, and one for what they say together."""

import base64
import json
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fanformer.comparison.architectures import family_and_size
from fanformer.comparison.compare import Comparison, Outcome
from fanformer.comparison.ledger import (
    EXACT,
    LOST_SEEDS,
    Entry,
    Figure,
    Kind,
    interval_over_seeds,
    measured_today,
    read_entry,
    write_entry,
)
from fanformer.comparison.series_score import horizon_of, over_seeds
from fanformer.comparison.summary import UNITS, Arm, Pair, arms, pairs, parameters_ratio
from fanformer.comparison.trial import MADE, Result, Trial
from fanformer.data.prepared import PreparedData

_COUNTED = {
    "parameters": "parameters",
    "parameters_without_embeddings": "parameters",
    "training_operations_per_token": "floating-point operations",
    "trained_tokens": "tokens",
    "tokens": "tokens",
    "bytes": "bytes",
}
"""Figures of a training that are counted, with their units; `tokens` and `bytes` are those held out."""
_SIZE_92M = (92_150_000, 92_250_000)  # parameters of the published size


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
    units = {name: unit for name, unit in {**UNITS, **_COUNTED}.items() if name in result.figures}
    counted = dict.fromkeys(_COUNTED, EXACT)
    figures = {name: Figure(result.figures[name], unit, interval=counted.get(name)) for name, unit in units.items()}
    if result.status != "finished":
        figures = {"diverged": Figure(1, "trainings", interval=EXACT)}
    content = measured_today(
        trial.name,
        command=command,
        what=f"{trial.architecture} at learning rate {trial.learning_rate:g}, {_trained_on(trial, outcome.variant)}",
        kind="training",
        seeds=[trial.seed],
        configuration=_configuration(trial, result.figures.get("parameters")),
        data=None if data is None else {"source": spec, "fingerprint": data.fingerprint},
        result=figures,
        curve=result.curve,
        **_made([outcome]),
        details={
            "part_of": "comparisons",
            "status": result.status,
            "message": result.message,
            **_digests(trial),
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
    details: dict[str, Any] = {name: getattr(entry, name) for name in MADE}
    if trial.rule is not None and figures:
        if "rule" not in entry.details:
            return None
        details["rule"] = _unpack(entry.details["rule"])
    return Result(entry.details["status"], entry.details["message"], figures, entry.curve, details)


def _digests(trial: Trial) -> dict[str, str]:
    """Return what of a training's name its settings don't tell: digests of the files that it read."""
    known = {"architecture_digest": trial.architecture_digest, "eval_digest": trial.eval_digest}
    return {name: digest for name, digest in known.items() if digest}


def _pack(content: dict[str, Any]) -> str:
    """Return plain values as text: JSON, compressed (zlib), in base64; a rule's answers are thousands of numbers."""
    return base64.b64encode(zlib.compress(json.dumps(content).encode(), 9)).decode()


def _unpack(text: str) -> dict[str, Any]:
    """Return the values that `_pack` wrote."""
    return json.loads(zlib.decompress(base64.b64decode(text)))


def write_comparison(
    folder: Path,
    name: str,
    command: str,
    comparison: Comparison,
    outcomes: Sequence[Outcome],
    data: PreparedData | None,
) -> None:
    """Write what the trainings say together: an entry for each candidate beside its baselines, or each rule's arm.

    Entries whose numbers the ledger holds already stay as they are.

    Args:
        folder: of the ledger.
        name: of the comparison; the entries' names begin with it.
        command: that measures it again.
        comparison: what was compared.
        outcomes: all trainings that ended.
        data: that they read, None for a rule.
    """
    read = None if data is None else {"source": comparison.data, "fingerprint": data.fingerprint}
    for entry in _Together(name, command, comparison, arms(comparison, outcomes), read).entries():
        _write(folder, entry)


@dataclass(frozen=True)
class _Together:
    """What the trainings of a comparison say together, as entries."""

    name: str
    command: str
    comparison: Comparison
    arms: Sequence[Arm]
    data: dict[str, Any] | None

    def entries(self) -> Iterator[Entry]:
        """Yield them."""
        if self.comparison.rule is not None:
            yield from (self._rule(arm) for arm in self.arms if arm.outcomes)
        elif self.comparison.ablation:
            for variant in self.comparison.variants:
                default, *changed = [arm for arm in self.arms if arm.variant == variant]
                if default.outcomes:
                    yield self._ablation(default, changed)
        else:
            together = pairs(self.comparison, self.arms)
            for arm in self.arms:
                against = [one for one in together if (one.candidate, one.variant) == (arm.architecture, arm.variant)]
                if against:
                    yield self._candidate(arm, against)
            yield from self._ladder()

    def _entry(self, suffix: str, what: str, kind: Kind, arm: Arm, result: dict[str, Figure], **others: Any) -> Entry:
        """Return an entry of what was trained as `arm`, over its seeds; others replace fields."""
        trial, name = arm.outcomes[0].trial, f"{self.name}{suffix}"
        configuration = _configuration(trial, arm.outcomes[0].figures["parameters"]) | others.pop("rates", {})
        fields = {"seeds": _seeds(arm), "configuration": configuration, "data": self.data, "result": result, **others}
        fields = _made([outcome for one in self.arms for outcome in one.outcomes]) | fields
        return measured_today(name, command=self.command, what=what, kind=kind, **fields)

    def _candidate(self, arm: Arm, against: Sequence[Pair]) -> Entry:
        """Return a candidate beside all its baselines; the claims' figures are those against the best one."""
        budget = against[0].baseline_variant
        baselines = {one.architecture: one for one in self.arms if one.variant == budget}
        best = min(against, key=lambda pair: baselines[pair.baseline].figures["bits_per_byte"].value)
        # the speed of trainings says nothing here: they may have shared the machine; benchmarks/ measures it in turns
        timed = ("train_tokens_per_second_ratio", "whole_training_seconds_ratio")
        figures = {name: figure for name, figure in best.figures.items() if name not in timed}
        shown = [arm, *(baselines[pair.baseline] for pair in against)]
        for one in shown:
            # an arm that lost a seed has its own entries only: its figure would be over other seeds than the entry's
            if _seeds(one) == _seeds(arm):
                figures[f"bits_per_byte_of_{_slug(one.architecture)}"] = one.figures["bits_per_byte"]
        name = "bits_per_byte_difference"
        figures |= {f"{name}_to_{_slug(one.baseline)}": one.figures[name] for one in against if one is not best}
        candidates = [one for one in self.arms if _family(one.architecture) == self.family]
        several = len(self.comparison.variants) > 1 or len(candidates) > 1
        suffix = f"-{_slug(arm.architecture)}-{arm.variant}" if several else ""
        beside = ", ".join(one.architecture for one in shown[1:])
        fewer = "" if budget == arm.variant else f", of which {beside} had {budget:,}"
        return self._entry(
            suffix,
            f"{arm.architecture} beside {beside} at {arm.variant:,} tokens{fewer}",
            "comparison",
            arm,
            figures,
            rates=_rates(shown),
            curve=[{**point, "arm": one.architecture} for one in shown for point in _curve(one)],
            details={
                "comparison": f"{self.name}{suffix}",
                "candidate": arm.architecture,
                "better_baseline": best.baseline,
                "best_learning_rate_at_the_edge_of_the_sweep": [one.architecture for one in shown if one.at_edge],
                "troubles": [line for one in shown for line in one.troubles],
                **_lost(shown),
            },
        )

    def _ablation(self, default: Arm, changed: Sequence[Arm]) -> Entry:
        """Return a default beside what changes it; arms that lack a seed of the default's are left out."""
        shown = {_slug(arm.architecture): arm for arm in [default, *changed] if _seeds(arm) == _seeds(default)}
        losses = {slug: [one.figures["bits_per_byte"] for one in arm.outcomes] for slug, arm in shown.items()}
        base, key = _slug(default.architecture), "parameters_without_embeddings"
        figures = {}
        for slug, arm in shown.items():
            figures[f"bits_per_byte_of_{slug}"] = arm.figures["bits_per_byte"]
            if slug != base:
                differences = [mine - its for mine, its in zip(losses[slug], losses[base], strict=True)]
                figures[f"difference_of_{slug}"] = interval_over_seeds(differences, "bits per byte")
        return self._entry(
            f"-{default.variant}" if len(self.comparison.variants) > 1 else "",
            f"{default.architecture} with one thing changed, at {default.variant:,} tokens",
            "ablation",
            default,
            figures,
            rates=_rates(list(shown.values())),
            details={
                "default": base,
                "arms": {slug: arm.architecture for slug, arm in shown.items()},
                key: {slug: arm.outcomes[0].figures[key] for slug, arm in shown.items()},
                "block": default.outcomes[0].trial.block,
                "troubles": [line for arm in [default, *changed] for line in arm.troubles],
                **_lost([default]),
            },
        )

    def _ladder(self) -> Iterator[Entry]:
        """Yield for every baseline the parameters to equal loss."""
        found: dict[str, dict[str, Figure]] = {}
        seeds = {}
        for key in ("parameters", "parameters_without_embeddings"):
            for name, (ratio, over) in parameters_ratio(self.arms, self.comparison, key).items():
                found.setdefault(name, {})[key.replace("parameters", "parameters_ratio")] = ratio
                seeds[name] = over
        longest = {arm.architecture: arm for arm in self.arms if arm.variant == max(self.comparison.tokens)}
        for name, result in found.items():
            suffix, what = f"-parameters-{_slug(name)}", f"parameters of {self.family} at the loss of {name}"
            details = {"baseline": name}
            yield self._entry(suffix, what, "comparison", longest[name], result, seeds=seeds[name], details=details)

    def _rule(self, arm: Arm) -> Entry:
        task = self.comparison.rule_task(arm.variant).name
        suffix = ("" if task in self.name else f"-{task}") + (f"-hole{arm.variant}" if arm.variant else "")
        rates = {"rates_on": dict(self.comparison.rates_on), "tried": _tried(arm)} if self.comparison.rates_on else {}
        details = {"part_of": self.name, **rates, "at_edge": arm.at_edge, "troubles": arm.troubles, **_lost([arm])}
        name, what = f"{suffix}-{_slug(arm.architecture)}", f"the rule {task} learned by {arm.architecture}"
        curve, horizon = _over_horizon(arm)
        return self._entry(name, what, "rule", arm, arm.figures, details={**details, **horizon}, curve=curve)

    @property
    def family(self) -> str:
        """What the candidates have in common."""
        return _family(self.comparison.architectures[0])


def _write(folder: Path, entry: Entry) -> None:
    """Write an entry, unless the same numbers are there: they keep the day and the machine of their measurement.

    So does a training of an earlier version, which kept fewer of its figures.
    """
    before = read_entry(folder, entry.name) if folder.is_dir() else None
    fields = ("curve", "seeds", "configuration", "details")
    if before is not None and all(getattr(before, name) == getattr(entry, name) for name in fields):
        known, figures = before.result, entry.result
        grown = entry.kind == "training" and known.items() <= figures.items()
        if _digest(before.data) == _digest(entry.data) and (known == figures or grown):
            return
    write_entry(folder, entry)


def _digest(data: dict[str, Any] | None) -> Any:
    """Return what tells data apart, wherever they lie."""
    return None if data is None else data["fingerprint"]


def _configuration(trial: Trial, parameters: float | None) -> dict[str, Any]:
    """Return the settings of a training; `scale` is the published size's name, or the number of parameters."""
    published = parameters is not None and _SIZE_92M[0] <= parameters <= _SIZE_92M[1]
    scale = "92m" if published else "not known" if parameters is None else f"{parameters / 1e6:.3g}M parameters"
    rule = {} if trial.rule is None else {"rule": dict(trial.rule)}
    own = {"architecture": trial.architecture, "learning_rate": trial.learning_rate, "scale": scale}
    return {**trial.settings, **rule, **own}


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


def _curve(arm: Arm) -> list[dict[str, Any]]:
    """Return the curve of the sweep's seed."""
    result = arm.outcomes[0].result
    return [] if result is None else result.curve


def _over_horizon(arm: Arm) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the errors of a series' continuations over its horizon, means over the seeds, and the naive forecasts'."""
    rules = [one.result.details["rule"] for one in arm.outcomes if one.result is not None]
    if not rules or not rules[0]["score"].get("horizon"):
        return [], {}
    horizons = list(map(horizon_of, rules))
    curve = [
        {"step": step, "error": round(error, 5), "low": round(low, 5), "high": round(high, 5)}
        for step, (error, low, high) in enumerate(over_seeds(horizons), start=1)
    ]
    naive = {name: [round(error, 5) for error in errors] for name, errors in horizons[0].baselines.items()}
    return curve, {"horizon": {"trained_steps": horizons[0].trained_steps, "baselines": naive}}


def _family(spec: str) -> str:
    return family_and_size(spec)[0]


def _seeds(arm: Arm) -> list[int]:
    return [outcome.trial.seed for outcome in arm.outcomes]


def _made(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return day, machine and versions of the latest of some trainings; nothing where none tells its own."""
    told = [one.result.details for one in outcomes if one.result is not None and "date" in one.result.details]
    latest = max(told, key=lambda details: str(details["date"]), default=None)
    return {} if latest is None else {name: latest[name] for name in MADE}


def _lost(shown: Sequence[Arm]) -> dict[str, Any]:
    """Return what an entry's details say of seeds that came to nothing; nothing where there are none."""
    lost = [f"{arm.architecture}, seed {seed}" for arm in shown for seed in arm.lost]
    return {LOST_SEEDS: lost} if lost else {}


def _slug(spec: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", spec).strip("-")
