"""Train a small model from scratch on a rule and measure what it made of it."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from fanformer.comparison.rule_score import RuleScore, accuracy_on_test, score
from fanformer.comparison.rules import IGNORED, RuleTask
from fanformer.errors import ConfigError, DivergenceError, refuse_unknown
from fanformer.training.environment import keep_freed_memory
from fanformer.training.fields import FIELDS, RunConfig
from fanformer.training.optimizers import create_optimizer
from fanformer.training.schedule import RunLength, learning_rate_factor


@dataclass(frozen=True)
class RuleSettings:
    """How a rule is trained; fields named as in `RunConfig` mean the same.

    Attributes:
        max_steps: optimizer steps; this, `epochs` or `max_seconds` sets the length.
        epochs: passes over the training examples.
        max_seconds: length of the training in time where neither of the others is given, else a limit. A length in
            time depends on the machine: the same seed then gives other weights.
        batch_size: examples per step; the last batch of an epoch is filled from the next one.
        records: points of the curve.
        seed: of the order of the examples and of dropout; the model's own initialisation is its builder's.
        compile: compile the model; pays from several minutes on.
    """

    max_steps: int | None = None
    epochs: float | None = None
    max_seconds: float | None = None
    batch_size: int = 336
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 3e-3
    embedding_learning_rate_scale: float = 1.0
    muon_learning_rate_scale: float = 1.0
    muon_scaling: Literal["adamw", "spectral"] = "adamw"
    weight_decay: float = 0.1
    beta2: float = 0.98
    max_grad_norm: float = 1.0
    schedule: Literal["wsd", "cosine"] = "cosine"
    warmup_fraction: float = 0.01
    min_learning_rate_ratio: float = 0.0
    records: int = 20
    seed: int = 0
    compile: bool = False

    def __post_init__(self) -> None:
        if self.max_steps is None and self.epochs is None and self.max_seconds is None:
            raise ConfigError("the length of a training must be given, got none: set max_steps, epochs or max_seconds.")
        if self.records < 1:
            raise ConfigError(f"`records` must be at least 1, got {self.records}: the last step is always recorded.")
        self.run_config()  # checks what it shares with a training run

    def run_config(self) -> RunConfig:
        """Return the part that optimizer and schedule read."""
        shared = FIELDS.keys() & {field.name for field in dataclasses.fields(self)}
        values = {name: getattr(self, name) for name in shared - {"compile"}}
        return RunConfig.from_fields({**values, "max_time": self.max_seconds})

    def length(self, examples: int) -> RunLength:
        """Return when a training on so many examples ends."""
        steps = self.max_steps
        if self.epochs is not None:
            steps = max(1, round(self.epochs * examples / self.batch_size))
        return RunLength(steps, self.max_seconds)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields."""
        return dataclasses.asdict(self)


_MUON = {
    "optimizer": "muon",
    "muon_scaling": "spectral",
    "muon_learning_rate_scale": 2.26,  # leaves a square matrix of 128 as AdamW's scaling has it
    "learning_rate": 0.005,
    "weight_decay": 1.0,
}
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "modular-addition": {"max_steps": 1500, **_MUON},
    "linear-regression": {"max_steps": 1000, **_MUON},
    "periodic": {"max_steps": 400, "batch_size": 96},
    "series": {"max_steps": 600, "batch_size": 16, "records": 10},
}
"""For each task settings with which FANformer and Llama learn its examples; what they leave out has its default."""


def rule_settings(task: RuleTask, **fields: Any) -> RuleSettings:
    """Return the settings of RECIPES for a task, with the given fields in their place.

    A length that is given replaces the recipe's own.

    Raises:
        ConfigError: if a field does not exist (the nearest is offered) or has a wrong value.
    """
    refuse_unknown(fields, (field.name for field in dataclasses.fields(RuleSettings)), "a setting of rule learning")
    lengths = ("max_steps", "epochs", "max_seconds")
    recipe = dict(RECIPES.get(task.name, {}))
    if any(fields.get(name) is not None for name in lengths):
        recipe = {key: value for key, value in recipe.items() if key not in lengths}
    return RuleSettings(**{**recipe, **fields})


@dataclass(frozen=True)
class RulePoint:
    """A point of the curve.

    Attributes:
        step: optimizer steps done.
        loss: nats per answer, mean over the steps since the last point.
        train_accuracy: greedy, over the same steps, before each was learned from.
        test_accuracy: greedy, on what training leaves out.
        learning_rate: of the last step.
        seconds: since training began, without evaluation.
    """

    step: int
    loss: float
    train_accuracy: float
    test_accuracy: float
    learning_rate: float
    seconds: float


@dataclass(frozen=True)
class RuleResult:
    """A rule that was trained.

    Attributes:
        task: name and fields.
        settings: of the training.
        model_type: as in the model's configuration, such as "fanformer" or "llama".
        parameters: all of them.
        block_parameters: all but embedding and LM head.
        steps: optimizer steps done.
        reached_end: False where `max_seconds` ended a training whose length is in steps.
        seconds: of training, without evaluation.
        examples_per_second: trained on, over the same time.
        curve: loss and accuracies along the way.
        score: of the final weights.
    """

    task: dict[str, Any]
    settings: dict[str, Any]
    model_type: str
    parameters: int
    block_parameters: int
    steps: int
    reached_end: bool
    seconds: float
    examples_per_second: float
    curve: list[RulePoint]
    score: RuleScore

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values that JSON can hold."""
        return {**dataclasses.asdict(self), "score": self.score.to_dict()}


@dataclass
class _Window:
    """Sums since the last point of the curve."""

    loss: Tensor
    right: Tensor
    answers: int = 0
    steps: int = 0


class _Order:
    """The examples in epochs, each shuffled by (seed, epoch)."""

    def __init__(self, count: int, batch_size: int, seed: int):
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.epoch, self.rest = 0, torch.empty(0, dtype=torch.int64)

    def next(self) -> Tensor:
        """Return the next `batch_size` indices."""
        while len(self.rest) < self.batch_size:
            generator = torch.Generator().manual_seed((self.seed << 32) + self.epoch)
            self.rest = torch.cat((self.rest, torch.randperm(self.count, generator=generator)))
            self.epoch += 1
        chosen, self.rest = self.rest.split((self.batch_size, len(self.rest) - self.batch_size))
        return chosen


def train_rule(
    task: RuleTask,
    model: PreTrainedModel,
    settings: RuleSettings,
    on_point: Callable[[RulePoint, float], None] | None = None,
) -> RuleResult:
    """Train `model` on a task and measure it.

    With a length in steps or epochs the result is the same bit for bit for the same weights, settings, machine and
    number of threads.

    Args:
        task: one of `fanformer.comparison.rules.TASKS`.
        model: a causal language model with fresh weights, built with `model_fields(task)`; trained in place.
        settings: of the training.
        on_point: hears every point of the curve and the share of the training that is over, in [0, 1].

    Raises:
        ConfigError: if the model has fewer tokens or positions than the task needs.
        DivergenceError: if the loss does not stay finite.
    """
    _check_model(task, model)
    keep_freed_memory()
    with torch.random.fork_rng():  # dropout's seed is ours, the caller's generator stays as it was
        torch.manual_seed(settings.seed)
        loop = _Loop(task, model, settings, on_point)
        loop.run()
    head = model.get_output_embeddings().weight
    outer = {id(weight): weight.numel() for weight in (model.get_input_embeddings().weight, head)}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return RuleResult(
        task=task.to_dict(),
        settings=settings.to_dict(),
        model_type=str(model.config.model_type),
        parameters=parameters,
        block_parameters=parameters - sum(outer.values()),
        steps=loop.step,
        reached_end=loop.length.progress(loop.step, loop.seconds) >= 1,
        seconds=loop.seconds,
        examples_per_second=loop.step * settings.batch_size / loop.seconds,
        curve=loop.curve,
        score=score(model, task),
    )


class _Loop:
    """One training; `run` does it."""

    def __init__(
        self,
        task: RuleTask,
        model: PreTrainedModel,
        settings: RuleSettings,
        on_point: Callable[[RulePoint, float], None] | None,
    ):
        self.task, self.model, self.settings, self.on_point = task, model, settings, on_point
        self.config = settings.run_config()
        self.length = settings.length(len(task.train))
        self.optimizer = create_optimizer(model, self.config.optimizer)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.forward = torch.compile(model) if settings.compile else model
        self.curve: list[RulePoint] = []
        self.step, self.seconds, self.factor = 0, 0.0, 0.0
        self.window = self._new_window()

    def run(self) -> None:
        """Train to the end."""
        order = _Order(len(self.task.train), self.settings.batch_size, self.settings.seed)
        self.model.train()
        began = time.perf_counter()
        while not self._is_over():
            self._train_on(order.next())
            self.seconds += time.perf_counter() - began
            progress = self._progress()
            if progress >= (len(self.curve) + 1) / self.settings.records or self._is_over():
                self._record(progress)
            began = time.perf_counter()
        self.model.eval()

    def _progress(self) -> float:
        return self.length.progress(self.step, self.seconds)

    def _is_over(self) -> bool:
        limit = self.settings.max_seconds
        return self._progress() >= 1 or (limit is not None and self.seconds >= limit)

    def _train_on(self, rows: Tensor) -> None:
        device = self.model.device
        batch = self.task.train[rows]
        labels = batch.labels.to(device)
        self.factor = learning_rate_factor(self.length.progress(self.step + 0.5, self.seconds), self.config.schedule)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * self.factor
        logits = self.forward(input_ids=batch.input_ids.to(device), use_cache=False).logits  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)
        loss.backward()
        limit = self.settings.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit if limit > 0 else math.inf)
        if not (loss.isfinite() and norm.isfinite()):
            raise DivergenceError(
                f"the loss of step {self.step + 1} of the rule {self.task.name} is {loss.item():.4g} with a gradient "
                f"norm of {norm.item():.4g}",
                f"both must stay finite; use a lower learning_rate than {self.settings.learning_rate:g}.",
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.window.loss += loss.detach().double()
        self.window.right += (logits.detach().argmax(-1) == labels).sum()
        self.window.answers += int((batch.labels != IGNORED).sum())
        self.window.steps += 1

    def _new_window(self) -> _Window:
        device = self.model.device
        return _Window(torch.zeros((), dtype=torch.float64, device=device), torch.zeros((), device=device))

    def _record(self, progress: float) -> None:
        window, self.window = self.window, self._new_window()
        point = RulePoint(
            step=self.step,
            loss=float(window.loss) / window.steps,
            train_accuracy=float(window.right) / window.answers,
            test_accuracy=accuracy_on_test(self.model, self.task),
            learning_rate=self.settings.learning_rate * self.factor,
            seconds=self.seconds,
        )
        self.curve.append(point)
        if self.on_point is not None:
            self.on_point(point, progress)


def _check_model(task: RuleTask, model: PreTrainedModel) -> None:
    for name, needed in (("vocab_size", len(task.vocabulary)), ("max_position_embeddings", task.prompt_tokens)):
        value = getattr(model.config, name, None)
        if value is not None and value < needed:
            raise ConfigError(
                f"`{name}` of the model must be at least {needed} for the rule {task.name}, got {value}: "
                "build it with model_fields(task)."
            )
