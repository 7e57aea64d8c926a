"""How well a model continues a series: its error over the horizon, beside naive forecasts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fanformer.comparison.ledger import interval_over_seeds
from fanformer.comparison.series import SeriesContinuation
from fanformer.model.recurrence_fanformer import CACHE

UNIT = "standard deviations"


@dataclass(frozen=True)
class Horizon:
    """Mean absolute errors over the test rows for each step of the horizon, in standard deviations of the series.

    Attributes:
        trained_steps: steps that training rows reach.
        errors: of the model.
        baselines: of naive forecasts, by name, as `SeriesContinuation.baselines` orders them.
    """

    trained_steps: int
    errors: list[float]
    baselines: dict[str, list[float]]

    @property
    def learned(self) -> bool:
        """Whether the model beats the repetition of the shortest period within the training window.

        Persistence would be no measure: the mean of the series beats it.
        """
        shortest = list(self.baselines.values())[1]
        return self.within(self.errors) < self.within(shortest)

    def figures(self) -> dict[str, float]:
        """Return the model's mean errors within the training window and beyond it, by name."""
        return {"error_within_window": self.within(self.errors), "error_beyond_window": self.beyond(self.errors)}

    def within(self, errors: list[float]) -> float:
        """Return the mean over the steps that training rows reach."""
        return sum(errors[: self.trained_steps]) / self.trained_steps

    def beyond(self, errors: list[float]) -> float:
        """Return the mean over the steps after those."""
        return sum(errors[self.trained_steps :]) / (len(errors) - self.trained_steps)


def horizon_of(rule: Mapping[str, Any]) -> Horizon:
    """Return the continuations of a training, of what its record says of the rule."""
    return Horizon(**rule["score"]["horizon"])


def over_seeds(horizons: Sequence[Horizon]) -> list[tuple[float, float, float]]:
    """Return the mean error of every step and the ends of its 95% t-interval, all three alike of a single training."""
    found = [interval_over_seeds(list(step), UNIT) for step in zip(*(one.errors for one in horizons), strict=True)]
    return [
        (one.value, one.value, one.value) if one.low is None or one.high is None else (one.value, one.low, one.high)
        for one in found
    ]


@torch.no_grad()
def continue_series(model: PreTrainedModel, task: SeriesContinuation) -> Tensor:
    """Return a model's continuation of every test row's context, read back token by token: (N, horizon) float64.

    Each value is the median of the predicted distribution, which no other value beats in expected absolute error. A
    cache keeps what was read. The model's training mode is restored.
    """
    was_training = model.training
    model.eval()
    read, cache, levels = task.test.input_ids[:, : task.context].to(model.device), None, []
    with torch.compiler.set_stance("force_eager"):  # every length would be compiled once more
        for _ in range(task.horizon):
            output = model(input_ids=read, use_cache=True, **{CACHE: cache})
            cache = output[CACHE]
            below = output.logits[:, -1].float().softmax(-1).cumsum(-1)  # (N, V)
            read = (below < 0.5).sum(-1, keepdim=True).clamp(max=task.levels - 1)
            levels.append(read.cpu())
    model.train(was_training)
    return task.decode(torch.cat(levels, -1))


def score_horizon(model: PreTrainedModel, task: SeriesContinuation) -> Horizon:
    """Measure how far a model's continuations lie from the held-out part of the series."""
    truth = task.test_values[:, task.context :]
    error = {name: (said - truth).abs().mean(0).tolist() for name, said in task.baselines().items()}
    return Horizon(task.trained_horizon, (continue_series(model, task) - truth).abs().mean(0).tolist(), error)
