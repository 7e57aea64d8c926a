"""How well a model knows a rule: greedy answers, and the paper's sampled decoding as its exact expectation."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from fanformer.comparison.depth_rules import DepthTask
from fanformer.comparison.depth_score import depths, figures_of_depth
from fanformer.comparison.rule_base import IGNORED, Examples, RuleTask
from fanformer.comparison.rules import HoleTask, PeriodicContinuation
from fanformer.comparison.series import SeriesContinuation
from fanformer.comparison.series_score import Horizon, score_horizon
from fanformer.errors import ConfigError
from fanformer.generation.depth import chosen_depth
from fanformer.training.depth import most_steps

SAMPLING_TEMPERATURE = 0.5  # FANformer, arXiv:2502.21309, section 4.4.3, with 10 samples per point


@dataclass(frozen=True)
class Accuracy:
    """Shares of right answers, in [0, 1].

    Attributes:
        greedy: of the most probable tokens.
        sampled: that samples at temperature 0.5 reach on average; the paper draws 10 samples per point, whose mean
            share has exactly this expectation.
        answers: how many were asked for.
    """

    greedy: float
    sampled: float
    answers: int


@dataclass(frozen=True)
class Grid:
    """The (a, b) plane of a hole task, row a, column b.

    Attributes:
        hole: first and last a, and b, of the hole.
        percent: probability of the right answer at temperature 0.5, in whole percent.
        correct: for each a a text of one sign for each b, "1" where the greedy answer is right, else "0".
    """

    hole: tuple[int, int]
    percent: list[list[int]]
    correct: list[str]


@dataclass(frozen=True)
class RuleScore:
    """What a model knows of a task.

    Attributes:
        train: on training examples: of a hole task all of them, of `periodic` the first `MAX_TRAIN_ROWS` rows, of
            `series` a tenth as many.
        test: on what training left out: the hole, the longer periods together, or the later part of the series, where
            every next value is predicted from the measured ones.
        grid: of a hole task the plane.
        by_period: of `periodic` the accuracy for each period, trained ones (with new patterns) and longer ones.
        horizon: of `series` the errors of continuations that read back what they said.
        by_steps: of a rule of many steps the share of right answers at each position, for each number of steps that a
            recurrent depth takes; "1" alone for a plain model.
        of_depth: of such a rule what `figures_of_depth` makes of them.
    """

    train: Accuracy
    test: Accuracy
    grid: Grid | None = None
    by_period: dict[int, Accuracy] | None = None
    horizon: Horizon | None = None
    by_steps: dict[str, list[float]] | None = None
    of_depth: dict[str, float] | None = None

    def figures(self) -> dict[str, float]:
        """Return what a comparison keeps of it, by name."""
        errors = {} if self.horizon is None else self.horizon.figures()
        return {
            "train_accuracy": self.train.greedy,
            "hole_accuracy": self.test.greedy,
            "train_sampled_accuracy": self.train.sampled,
            "hole_sampled_accuracy": self.test.sampled,
            **errors,
            **(self.of_depth or {}),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain values that JSON can hold."""
        figures = asdict(self)
        if self.by_period is not None:
            figures["by_period"] = {str(period): asdict(accuracy) for period, accuracy in self.by_period.items()}
        return figures


def judged_by(figures: Collection[str]) -> str:
    """Return which of a rule's figures says how well it was learned: a series's error, else the share of answers."""
    return "error_beyond_window" if "error_beyond_window" in figures else "hole_accuracy"


def lacking(figures: Mapping[str, float]) -> tuple[float, float]:
    """Return what keeps `figures` from perfect: errors beyond and within the window, or wrong answers, sampled too."""
    if judged_by(figures) == "error_beyond_window":
        return figures["error_beyond_window"], figures["error_within_window"]
    return 1 - figures["hole_accuracy"], 1 - figures["hole_sampled_accuracy"]


MAX_TRAIN_ROWS = 1200  # rows of `periodic` that stand for all its training rows; 16 answers each


@torch.no_grad()
def answers(model: PreTrainedModel, examples: Examples, batch_size: int = 2048) -> tuple[Tensor, Tensor, Tensor]:
    """Compare a model's predictions with the labels.

    Args:
        model: a causal language model; its training mode is restored.
        examples: N rows.
        batch_size: rows per forward pass; the last batch is smaller.

    Returns:
        Whether the most probable token is the label, (N, T) bool, the probability of the label at temperature 0.5 and
        its surprise in nats at temperature 1, (N, T) float32; False and 0 where there is no label.

    Raises:
        ConfigError: if the model has fewer tokens than the examples.
    """
    highest = int(torch.maximum(examples.input_ids.max(), examples.labels.max()))
    if model.config.vocab_size <= highest:
        raise ConfigError(
            f"`vocab_size` of the model must be above the task's highest token {highest}, got "
            f"{model.config.vocab_size}: build it with model_fields(task)."
        )
    was_training = model.training
    model.eval()
    right, probability, nats = [], [], []
    with torch.compiler.set_stance("force_eager"):  # another batch size would be compiled once more
        for start in range(0, len(examples), batch_size):
            batch = examples[start : start + batch_size]
            labels = batch.labels.to(model.device)
            asked = labels != IGNORED
            logits = model(input_ids=batch.input_ids.to(model.device), use_cache=False).logits.float()  # (B, T, V)
            wanted = labels.clamp(min=0)[..., None]
            right.append(((logits.argmax(-1, keepdim=True) == wanted)[..., 0] & asked).cpu())
            chances = F.softmax(logits / SAMPLING_TEMPERATURE, dim=-1).gather(-1, wanted)[..., 0]
            probability.append((chances * asked).cpu())
            nats.append((-F.log_softmax(logits, dim=-1).gather(-1, wanted)[..., 0] * asked).cpu())
    model.train(was_training)
    return torch.cat(right), torch.cat(probability), torch.cat(nats)


def _accuracy(right: Tensor, probability: Tensor, labels: Tensor) -> Accuracy:
    """Return the shares over all labels; the three tensors have one shape."""
    count = int((labels != IGNORED).sum())
    return Accuracy(int(right.sum()) / count, float(probability.double().sum()) / count, count)


def score(model: PreTrainedModel, task: RuleTask) -> RuleScore:
    """Measure what `model` knows of `task`.

    Args:
        model: a causal language model whose token ids are the task's; its training mode is restored.
        task: one of `fanformer.comparison.rules.TASKS`.

    Raises:
        ConfigError: if the model has fewer tokens than the task.
    """
    if isinstance(task, HoleTask):
        return _score_hole(model, task)
    if isinstance(task, SeriesContinuation):
        return _score_series(model, task)
    if isinstance(task, DepthTask):
        return _score_steps(model, task)
    assert isinstance(task, PeriodicContinuation), f"no score is known for {type(task).__name__}"
    return _score_periods(model, task)


def accuracy_and_loss(model: PreTrainedModel, task: RuleTask, examples: Examples) -> tuple[Accuracy, float]:
    """Return the accuracy on a task's examples, as `score` does, and the loss in nats per answer."""
    examples = _scored(task, examples)
    right, probability, nats = answers(model, examples)
    accuracy = _accuracy(right, probability, examples.labels)
    return accuracy, float(nats.double().sum()) / accuracy.answers


def _score_hole(model: PreTrainedModel, task: HoleTask) -> RuleScore:
    everything = task.everything
    right, probability, _ = answers(model, everything)
    parts = {
        inside: _accuracy(right[rows], probability[rows], everything.labels[rows])
        for inside, rows in ((True, task.in_hole), (False, ~task.in_hole))
    }
    shape = (task.size, task.size)
    percent = (100 * probability[:, -1]).round().int().view(shape).tolist()
    correct = ["".join(str(int(answer)) for answer in row) for row in right[:, -1].view(shape).tolist()]
    return RuleScore(parts[False], parts[True], grid=Grid(task.hole, percent, correct))


def _score_series(model: PreTrainedModel, task: SeriesContinuation) -> RuleScore:
    parts = (task.train[: MAX_TRAIN_ROWS // 10], task.test)
    train, test = (accuracy_and_loss(model, task, examples)[0] for examples in parts)
    return RuleScore(train, test, horizon=score_horizon(model, task))


def _scored(task: RuleTask, examples: Examples) -> Examples:
    """Return the examples without the labels at positions that are not scored."""
    if not isinstance(task, PeriodicContinuation):
        return examples
    labels = examples.labels.clone()
    labels[:, : task.scored_from] = IGNORED
    return Examples(examples.input_ids, labels, examples.keys)


def _score_periods(model: PreTrainedModel, task: PeriodicContinuation) -> RuleScore:
    def measure(examples: Examples) -> tuple[Accuracy, dict[int, Accuracy]]:
        examples = _scored(task, examples)
        right, probability, _ = answers(model, examples)
        periods = {}
        for period in examples.keys.unique().tolist():
            rows = examples.keys == period
            periods[period] = _accuracy(right[rows], probability[rows], examples.labels[rows])
        return _accuracy(right, probability, examples.labels), periods

    train, _ = measure(task.train[:MAX_TRAIN_ROWS])
    _, trained = measure(task.fresh)
    test, longer = measure(task.test)
    return RuleScore(train, test, by_period={**trained, **longer})


def _score_steps(model: PreTrainedModel, task: DepthTask) -> RuleScore:
    """Measure the answers at the mean of training, and those of the test rows at every number of steps."""
    recurrence = getattr(model.config, "recurrence", None)
    mean = None if recurrence is None else recurrence.mean_steps
    with chosen_depth(model, mean):
        train, test = (accuracy_and_loss(model, task, part)[0] for part in (task.train[:MAX_TRAIN_ROWS], task.test))
    asked = task.test.labels[0] != IGNORED
    shares = {}
    for steps in depths(model):
        with chosen_depth(model, steps):
            right, _, _ = answers(model, task.test)
        shares[str(steps or 1)] = right[:, asked].double().mean(0).tolist()
    trained = 1 if recurrence is None else most_steps(recurrence)
    return RuleScore(train, test, by_steps=shares, of_depth=figures_of_depth(shares, task.trained_positions, trained))
