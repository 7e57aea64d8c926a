"""What becomes of the updates of a round: who counts, how much, and why not; the defence against false ones.

Updates that are not finite or not of the asked-for shapes are dropped. Norms are clipped against the median. Members
weigh by their tokens, of which no more count than twice the median. From five updates on, those that lie far from the
others do not count either: multi-Krum (arXiv:1703.02757), or a trimmed mean (arXiv:1803.01498),
coordinate by coordinate. What this does not stop, docs/community.md says.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fanformer.community.updates import Shapes, Source, Update
from fanformer.errors import ConfigError

Method = Literal["multi-krum", "trimmed-mean", "mean"]
_COORDINATES = 1 << 20
"""Of a tensor that are joined at once."""


@dataclass(frozen=True)
class Defence:
    """Settings of the defence; plain JSON.

    Attributes:
        largest_norm: of an update, over the low median; a larger one is scaled down to it.
        largest_weight: tokens that count, over the low median.
        robust_from: updates from which on `method` is used; fewer give a plain mean.
        method: how updates are joined then.
        largest_share: of members that may be false.
        krum_margin: how far beyond the median an update's distance to the others must be before multi-Krum drops it,
            as a share of the median; 0 always drops as many as `largest_share` allows, as published.
    """

    largest_norm: float = 2.0
    largest_weight: float = 2.0
    robust_from: int = 5
    method: Method = "multi-krum"
    largest_share: float = 0.2
    krum_margin: float = 0.1

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ConfigError(f"`method` must be one of {', '.join(get_args(Method))}, got {self.method!r}.")
        if not 0 <= self.largest_share < 0.5:
            raise ConfigError(
                f"`largest_share` must be in [0, 0.5), got {self.largest_share}: a majority of false members cannot "
                "be told from a true one."
            )
        for name in ("largest_norm", "largest_weight"):
            if not 1 <= getattr(self, name) < math.inf:
                raise ConfigError(f"`{name}` must be a finite number from 1 on, got {getattr(self, name)}.")
        if self.robust_from < 3 or self.krum_margin < 0:
            raise ConfigError(
                "`robust_from` must be at least 3 and `krum_margin` at least 0, got "
                f"{self.robust_from} and {self.krum_margin}."
            )


@dataclass(frozen=True)
class Verdict:
    """What became of a member's report; plain JSON by `dataclasses.asdict`.

    Attributes:
        member: name.
        counted: whether it is part of the mean.
        reason: why not, or what was changed; empty where it counted as it came.
        tokens: that the member says it trained on.
        weight: share of the mean.
        norm: of the update, before clipping.
        scale: that it was multiplied with.
        inner_loss: that the member says it had.
        digest: of the coded tensors.
        sources: of the tokens.
    """

    member: str
    counted: bool
    reason: str
    tokens: int = 0
    weight: float = 0.0
    norm: float = 0.0
    scale: float = 1.0
    inner_loss: float | None = None
    digest: str = ""
    sources: tuple[Source, ...] = ()


@dataclass(frozen=True)
class Aggregate:
    """What updates come to.

    Attributes:
        tensors: the mean pseudo-gradient, float32 by name; None where no update was usable.
        verdicts: one for every update, in their order.
    """

    tensors: dict[str, Tensor] | None
    verdicts: tuple[Verdict, ...]


@dataclass
class _Report:
    """An update on its way to its verdict."""

    update: Update
    norm: float = 0.0
    reason: str = ""
    scale: float = 1.0
    weight: float = 0.0
    counted: bool = True

    def verdict(self) -> Verdict:
        update = self.update
        return Verdict(
            update.member, self.counted, self.reason, update.tokens, self.weight, self.norm, self.scale,
            update.inner_loss, update.digest, update.sources,
        )  # fmt: skip

    def drop(self, reason: str) -> None:
        self.counted, self.weight, self.reason = False, 0.0, reason


def aggregate(updates: Sequence[Update], like: Shapes, defence: Defence) -> Aggregate:
    """Judge updates of one round and base, and join those that count.

    Args:
        updates: of different members, tensors of any shape.
        like: shapes that they must have.
        defence: the settings.

    Returns:
        The mean, and what became of each; the same for the same updates in the same order.
    """
    reports = [_Report(update) for update in updates]
    for report in reports:
        _measure(report, like)
    usable = [report for report in reports if report.counted]
    tensors = None
    if usable:
        _clip(usable, defence.largest_norm)
        _weigh(usable, defence.largest_weight)
        is_robust = len(usable) >= defence.robust_from
        doubtful = max(1, math.floor(defence.largest_share * len(usable))) if is_robust else 0
        if doubtful and defence.method == "multi-krum":
            _drop_far(usable, like, doubtful, defence.krum_margin)
            usable = [report for report in usable if report.counted]
        total = sum(report.weight for report in usable)
        for report in usable:
            report.weight /= total
        trimmed = doubtful if defence.method == "trimmed-mean" else 0
        tensors = {name: _join(usable, name, shape, trimmed) for name, shape in like.items()}
    return Aggregate(tensors, tuple(report.verdict() for report in reports))


def _measure(report: _Report, like: Shapes) -> None:
    """Work out the norm of an update, or drop it where there is none."""
    tensors = report.update.tensors
    if set(tensors) != set(like):
        report.drop(f"malformed: {len(tensors)} tensors, other than the {len(like)} that were asked for")
        return
    total = 0.0
    for name, shape in like.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != tuple(shape):
            report.drop(f"malformed: `{name}` has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
            return
        total += float(tensor.double().square().sum())
    if not math.isfinite(total):
        report.drop("not finite")
        return
    report.norm = math.sqrt(total)


def _clip(reports: Sequence[_Report], largest: float) -> None:
    """Scale down what is larger than `largest` times the low median of the norms.

    The low median, so that of two the smaller counts: one that says much cannot make room for itself.
    """
    limit = largest * statistics.median_low([report.norm for report in reports])
    for report in reports:
        if report.norm > limit:
            report.scale = limit / report.norm
            report.reason = f"clipped: norm {report.norm:.3g}, {largest:g} times the median is {limit:.3g}"


def _weigh(reports: Sequence[_Report], largest: float) -> None:
    """Let each weigh as its tokens, so many times the low median at most."""
    limit = largest * statistics.median_low([report.update.tokens for report in reports])
    for report in reports:
        report.weight = min(float(report.update.tokens), limit)


def _drop_far(reports: Sequence[_Report], like: Shapes, doubtful: int, margin: float) -> None:
    """Drop at most `doubtful` updates: those farthest from their nearest neighbours, where they stand out.

    The score of an update is the sum of its squared distances to the nearest n - doubtful - 2 others.
    """
    count = len(reports)
    products = torch.zeros(count, count, dtype=torch.float64)
    for name in like:
        for part in _stacked(reports, name):
            products += part.double() @ part.double().mT
    squares = products.diagonal()
    distances = (squares[:, None] + squares[None, :] - 2 * products).clamp(min=0)
    distances.fill_diagonal_(math.inf)
    nearest = distances.sort(dim=1).values[:, : max(1, count - doubtful - 2)]
    scores = nearest.sum(dim=1).tolist()
    limit = (1 + margin) * statistics.median_low(scores)
    worst = sorted(range(count), key=lambda index: (-scores[index], index))[:doubtful]
    for index in worst:
        if scores[index] > limit or margin == 0:
            ratio = scores[index] / max(statistics.median_low(scores), 1e-300)
            reports[index].drop(f"far from the others: {ratio:.3g} times the median distance")


def _stacked(reports: Sequence[_Report], name: str) -> Iterator[Tensor]:
    """Yield the scaled tensors of all reports side by side, (n, at most _COORDINATES) at a time."""
    flat = [report.update.tensors[name].reshape(-1) for report in reports]
    scales = torch.tensor([report.scale for report in reports], dtype=torch.float32)[:, None]
    for begin in range(0, flat[0].numel(), _COORDINATES):
        yield torch.stack([tensor[begin : begin + _COORDINATES].float() for tensor in flat]) * scales


def _join(reports: Sequence[_Report], name: str, shape: Sequence[int], trimmed: int) -> Tensor:
    """Return the weighted mean of a tensor, (*shape) float32, without the `trimmed` ends of every coordinate."""
    weights = torch.tensor([report.weight for report in reports], dtype=torch.float32)
    parts = []
    for part in _stacked(reports, name):
        if trimmed:
            ordered, order = part.sort(dim=0, stable=True)
            kept = slice(trimmed, len(reports) - trimmed)
            shares = weights[order[kept]]
            parts.append((ordered[kept] * shares).sum(dim=0) / shares.sum(dim=0))
        else:
            parts.append((part * weights[:, None]).sum(dim=0))
    return torch.cat(parts).view(tuple(shape)) if parts else torch.zeros(tuple(shape))


def counted_tokens(verdicts: Sequence[Verdict]) -> int:
    """Return the tokens of those that counted."""
    return sum(verdict.tokens for verdict in verdicts if verdict.counted)


def is_gate_open(loss: float, best: float | None, tolerance: float) -> bool:
    """Return whether a round may be accepted: its held-out loss is finite, and not much above the lowest so far.

    Args:
        loss: of the weights that the round would end with, in nats per token.
        best: the lowest of the accepted rounds, or None.
        tolerance: how much higher it may be, as a share.
    """
    return math.isfinite(loss) and (best is None or loss <= best * (1 + tolerance))


def as_verdict(content: Mapping[str, object]) -> Verdict:
    """Return the verdict that `dataclasses.asdict` made plain JSON of."""
    fields = dict(content)
    sources = fields.pop("sources")
    assert isinstance(sources, Sequence), "a verdict names its sources in a list"
    return Verdict(**fields, sources=tuple(Source(**source) for source in sources))  # type: ignore[arg-type]
