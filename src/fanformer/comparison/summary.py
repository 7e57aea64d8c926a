"""What a comparison says: each architecture at its best learning rate, and the candidate against every baseline."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fanformer.comparison.architectures import family_and_size
from fanformer.comparison.compare import RATES, Comparison, Outcome, best_rate, sweep_of
from fanformer.comparison.ledger import EXACT, Figure, interval_over_seeds, ratio_over_seeds
from fanformer.comparison.rule_score import judged_by
from fanformer.machine.versions import hardware


@dataclass(frozen=True)
class Arm:
    """An architecture at one budget of tokens, or one side of a hole.

    Attributes:
        architecture: as it was asked for.
        variant: budget of tokens, or side of the hole.
        learning_rate: the best of the sweep.
        at_edge: whether that is the lowest or the highest that was tried, so that a better one may lie beyond.
        swept: what the trainings that the rate was chosen by came to, by learning rate from the lowest: bits per byte,
            a rule's training loss, or right answers on a task of their own; infinite where one diverged or failed.
        figures: over the seeds, each with its interval.
        outcomes: the trainings at the best learning rate.
        troubles: what went wrong, a line each.
        lost: the seeds at the best learning rate that diverged or failed; the figures are without them.
    """

    architecture: str
    variant: int
    learning_rate: float | None
    at_edge: bool
    swept: dict[float, float]
    figures: dict[str, Figure]
    outcomes: list[Outcome]
    troubles: list[str]
    lost: list[int]


@dataclass(frozen=True)
class Pair:
    """The candidate against a baseline.

    Attributes:
        candidate: as it was asked for.
        baseline: likewise.
        variant: of the candidate.
        figures: by name.
        baseline_variant: of the baseline: the same, or a smaller budget of tokens beside which the candidate had more.
    """

    candidate: str
    baseline: str
    variant: int
    figures: dict[str, Figure]
    baseline_variant: int


UNITS = {
    "loss": "nats per token",
    "bits_per_byte": "bits per byte",
    "tokens_per_second": "tokens/s",
    "seconds": "s",
    "train_accuracy": "share",
    "hole_accuracy": "share",
    "train_sampled_accuracy": "share",
    "hole_sampled_accuracy": "share",
    "solved_positions": "positions",
    "solved_linearity": "R^2",
    "late_right": "share",
    "late_right_at_twice": "share",
    "error_within_window": "standard deviations",
    "error_beyond_window": "standard deviations",
}
_COUNTED_RATIOS = {
    "size_ratio": "parameters",
    "size_ratio_without_embeddings": "parameters_without_embeddings",
    "training_operations_ratio": "training_operations_per_token",
}
"""Ratios of a pair that are counted, each with the figure of a training that they are of."""


def arms(comparison: Comparison, outcomes: Sequence[Outcome]) -> list[Arm]:
    """Return every architecture at every variant."""
    return [_arm(spec, variant, outcomes) for spec, variant in comparison.cells]


def _arm(spec: str, variant: int, everything: Sequence[Outcome]) -> Arm:
    outcomes = [one for one in everything if one.trial.architecture == spec and one.variant in (variant, RATES)]
    rate = best_rate(outcomes, spec, variant)
    shown = [one for one in outcomes if one.variant == variant]
    sweep = {one.trial.learning_rate: _shown(one) for one in sweep_of(outcomes, spec, variant)}
    chosen = [one for one in shown if one.trial.learning_rate == rate and math.isfinite(one.loss)]
    figures = {}
    for name, unit in UNITS.items():
        values = [one.figures[name] for one in chosen if name in one.figures]
        if values:
            figures[name] = interval_over_seeds(values, unit)
    troubles = [
        f"{one.trial.name}: {one.error or (one.result.message if one.result else '')}"
        for one in outcomes
        if not math.isfinite(one.loss)
    ]
    at_edge = len(sweep) > 1 and rate in (min(sweep), max(sweep))
    lost = [one.trial.seed for one in shown if one.trial.learning_rate == rate and one not in chosen]
    return Arm(spec, variant, rate, at_edge, dict(sorted(sweep.items())), figures, chosen, troubles, lost)


def _shown(outcome: Outcome) -> float:
    """Return the figure of a training of the sweep that a reader is shown."""
    language = "bits_per_byte" in outcome.figures
    name = "hole_accuracy" if outcome.variant == RATES else "bits_per_byte" if language else "loss"
    return outcome.figures.get(name, math.inf)


def pairs(comparison: Comparison, found: Sequence[Arm]) -> list[Pair]:
    """Return the first architecture's family against all others of equally named size.

    Both have the same variant. A budget of the candidate alone that is above all others stands beside the baselines'
    largest: it is what the candidate makes of the operations, or of the time, that they take.
    """
    candidate = family_and_size(comparison.architectures[0])[0]
    result = []
    for one in found:
        name, size = family_and_size(one.architecture)
        if name != candidate:
            continue
        families = [family_and_size(other.architecture) for other in found]
        sizes = {named for family, named in families if family != candidate}
        alone = comparison.rule is None and one.variant > max(comparison.tokens)
        beside = max(comparison.tokens) if alone else one.variant
        for other in found:
            other_name, other_size = family_and_size(other.architecture)
            comparable = other_size == size or size not in sizes
            if other_name != candidate and other.variant == beside and comparable:
                figures = _pair_figures(one, other, _budgets(found, one), _budgets(found, other))
                if figures:
                    result.append(Pair(one.architecture, other.architecture, one.variant, figures, other.variant))
    return result


def _budgets(found: Sequence[Arm], arm: Arm) -> list[Arm]:
    """Return an architecture at its budgets up to that of `arm`, in their order."""
    return [other for other in found if other.architecture == arm.architecture and other.variant <= arm.variant]


def _pair_figures(one: Arm, other: Arm, mine: Sequence[Arm], theirs: Sequence[Arm]) -> dict[str, Figure]:
    own = {outcome.trial.seed: outcome.figures for outcome in one.outcomes}
    theirs_by_seed = {outcome.trial.seed: outcome.figures for outcome in other.outcomes}
    matched = {seed: (own[seed], figures) for seed, figures in theirs_by_seed.items() if seed in own}
    if not matched:
        return {}

    def difference(name: str) -> Figure:
        return interval_over_seeds([a[name] - b[name] for a, b in matched.values()], UNITS[name])

    first, base = next(iter(matched.values()))
    if "hole_accuracy" in first:
        of_series = judged_by(first) == "error_beyond_window"
        names = ("error_beyond_window", "error_within_window") if of_series else ("hole_accuracy", "train_accuracy")
        return {f"{name}_difference": difference(name) for name in names}
    figures = {
        name: Figure(first[counted] / base[counted], "ratio", interval=EXACT)
        for name, counted in _COUNTED_RATIOS.items()
    }
    figures["bits_per_byte_difference"] = difference("bits_per_byte")
    speeds = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in matched.values()]
    is_one_machine = _on_one_machine([*one.outcomes, *other.outcomes])
    if is_one_machine:
        figures["train_tokens_per_second_ratio"] = ratio_over_seeds(speeds)
    if one.variant != other.variant:
        times = figures["training_operations_ratio"].value * one.variant / other.variant
        figures["whole_training_operations_ratio"] = Figure(times, "ratio", interval=EXACT)
        if is_one_machine:
            seconds = [one.variant / other.variant / speed for speed in speeds]
            figures["whole_training_seconds_ratio"] = ratio_over_seeds(seconds)
    curves = [(_over_tokens(mine, seed), _over_tokens(theirs, seed)) for seed in matched]
    ratios = [ratio for a, b in curves if (ratio := tokens_ratio(a, b)) is not None]
    if len(ratios) == len(matched):
        figures["tokens_ratio"] = ratio_over_seeds(ratios)
    return figures


def _on_one_machine(outcomes: Sequence[Outcome]) -> bool:
    """Whether trainings were done on one kind of machine; those that the ledger knew say on which."""
    here = hardware()
    machines = [one.result.details.get("hardware", here) for one in outcomes if one.result is not None]
    return all(machine == machines[0] for machine in machines)


def _over_tokens(budgets: Sequence[Arm], seed: int) -> list[dict[str, Any]]:
    """Return a seed's final points at every budget, where there are several, else the curve of its one training."""
    results = [one.result for arm in budgets for one in arm.outcomes if one.trial.seed == seed and one.result]
    finals = [result.curve[-1] for result in results if result.curve]
    return finals if len(finals) > 1 else results[-1].curve


def tokens_ratio(candidate: Sequence[dict[str, Any]], baseline: Sequence[dict[str, Any]]) -> float | None:
    """Return the tokens that the candidate needs over those that the baseline needs, for the worse one's final loss.

    Read off the two curves, by linear interpolation in the logarithm of the tokens. The points of one training before
    its learning rate has decayed lie above what a training of that length would reach, so the better one's gain is
    understated: a ratio below 1 is an upper bound, one above 1 a lower bound. The ends of trainings of several lengths
    give the ratio itself, unless the shortest is good enough already.

    Args:
        candidate: points with `tokens` and `val_loss`, of one training or of the ends of several.
        baseline: likewise.

    Returns:
        The ratio, None where a curve has fewer than two points.
    """
    if min(len(candidate), len(baseline)) < 2:
        return None
    if candidate[-1]["val_loss"] <= baseline[-1]["val_loss"]:
        return tokens_at(candidate, baseline[-1]["val_loss"]) / baseline[-1]["tokens"]
    return candidate[-1]["tokens"] / tokens_at(baseline, candidate[-1]["val_loss"])


def tokens_at(curve: Sequence[dict[str, Any]], loss: float) -> float:
    """Return the tokens at which a curve first falls to `loss`, which it does."""
    before = curve[0]
    for point in curve:
        if point["val_loss"] <= loss:
            if point is before or before["val_loss"] == point["val_loss"]:
                return float(point["tokens"])
            share = (before["val_loss"] - loss) / (before["val_loss"] - point["val_loss"])
            low, high = math.log(before["tokens"]), math.log(point["tokens"])
            return math.exp(low + share * (high - low))
        before = point
    return float(curve[-1]["tokens"])


def parameters_ratio(
    found: Sequence[Arm], comparison: Comparison, key: str = "parameters"
) -> dict[str, tuple[Figure, list[int]]]:
    """Return, by baseline arm, the candidate's parameters at that arm's loss over that arm's parameters.

    The candidate's loss at sizes between those that were trained is interpolated linearly in the logarithm of the
    parameters, for each seed that all of them share. Where the baseline's loss lies beyond theirs, the nearest trained
    size stands: the ratio is at least, or at most, what it gives.

    Args:
        found: the arms.
        comparison: whose first architecture's family is the candidate.
        key: "parameters" or "parameters_without_embeddings".

    Returns:
        The ratio over the seeds, and those seeds.
    """
    candidate, longest = family_and_size(comparison.architectures[0])[0], max(comparison.tokens)
    points: dict[bool, list[tuple[str, dict[int, tuple[float, float]]]]] = {True: [], False: []}
    for arm in found:
        if arm.variant == longest and "bits_per_byte" in arm.figures:
            mine = family_and_size(arm.architecture)[0] == candidate
            points[mine].append((arm.architecture, _by_seed(arm, key)))
    ladder = [by_seed for _, by_seed in points[True]]
    ratios = {}
    for name, baseline in points[False]:
        shared = [seed for seed in baseline if all(seed in rung for rung in ladder)]
        if shared and len(ladder) > 1:
            by_seed = [_ratio_at(baseline[seed], sorted(rung[seed] for rung in ladder)) for seed in shared]
            ratios[name] = (ratio_over_seeds(by_seed), shared)
    return ratios


def _by_seed(arm: Arm, key: str) -> dict[int, tuple[float, float]]:
    """Return parameters and bits per byte by seed."""
    return {one.trial.seed: (float(one.figures[key]), one.figures["bits_per_byte"]) for one in arm.outcomes}


def _ratio_at(baseline: tuple[float, float], ladder: Sequence[tuple[float, float]]) -> float:
    """Return the parameters at which the ladder has the baseline's loss, or its nearest rung's, over the baseline's."""
    parameters, loss = baseline
    if loss > max(rung_loss for _, rung_loss in ladder):
        return ladder[0][0] / parameters
    for (small, worse), (large, better) in itertools.pairwise(ladder):
        if better <= loss <= worse and better < worse:
            share = (worse - loss) / (worse - better)
            return math.exp(math.log(small) + share * math.log(large / small)) / parameters
    return ladder[-1][0] / parameters


def to_record(comparison: Comparison, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return the raw numbers of a comparison as plain values: what was asked for, every training, arms and pairs."""
    found = arms(comparison, outcomes)
    return {
        "comparison": asdict(comparison),
        "arms": [
            {
                **{name: getattr(arm, name) for name in ("architecture", "variant", "learning_rate", "at_edge")},
                "swept": [[rate, value if math.isfinite(value) else None] for rate, value in arm.swept.items()],
                "figures": {name: asdict(figure) for name, figure in arm.figures.items()},
                "troubles": arm.troubles,
            }
            for arm in found
        ],
        "pairs": [asdict(pair) for pair in pairs(comparison, found)],
        "parameters_to_equal_loss": {
            key: {name: asdict(figure) for name, (figure, _) in parameters_ratio(found, comparison, key).items()}
            for key in ("parameters", "parameters_without_embeddings")
        },
        "trainings": [
            {
                "name": one.trial.name,
                "architecture": one.trial.architecture,
                "variant": one.variant,
                "learning_rate": one.trial.learning_rate,
                "seed": one.trial.seed,
                "error": one.error,
                "result": None if one.result is None else asdict(one.result),
            }
            for one in outcomes
        ],
    }
