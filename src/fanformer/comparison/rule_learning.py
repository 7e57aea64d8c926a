"""Train a small model from scratch on a rule, by the trainer that language has, and measure what it made of it."""

import dataclasses
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from fanformer.comparison.rule_score import RuleScore, accuracy_and_loss, score
from fanformer.comparison.rules import RuleTask
from fanformer.errors import ConfigError, refuse_unknown
from fanformer.training.checkpoint import WEIGHTS_FILE, Fill
from fanformer.training.depth import OF_DEPTH
from fanformer.training.environment import decide
from fanformer.training.events import Listener, Record, note_to, silent
from fanformer.training.fields import RunConfig
from fanformer.training.folder import METRICS_FILE, read_records
from fanformer.training.parallel import Processes
from fanformer.training.run_model import law_of_depth
from fanformer.training.schedule import run_length
from fanformer.training.trainer import Trainer, agreed_checkpoint

LENGTHS = ("max_steps", "epochs", "max_time")
FIELDS = (
    *LENGTHS, "batch_size", "eval_steps", "seed", "threads", "device", "precision",
    "optimizer", "learning_rate", "embedding_learning_rate_scale", "muon_learning_rate_scale", "muon_scaling",
    "muon_momentum", "weight_decay", "beta1", "beta2", "max_grad_norm", "max_skipped_steps",
    "schedule", "warmup_fraction", "decay_fraction", "min_learning_rate_ratio", *OF_DEPTH,
)  # fmt: skip
"""Fields of RunConfig that the training of a rule takes; a row is an example, a batch so many of them."""

_DEFAULTS: Mapping[str, Any] = {
    "batch_size": 336,
    "beta2": 0.98,
    "schedule": "cosine",
    "warmup_fraction": 0.01,
    "device": "cpu",
    "precision": "float32",
    "optimizer": "muon",
    "muon_scaling": "spectral",
    "muon_learning_rate_scale": 2.26,  # leaves a square matrix of 128 as AdamW's scaling has it
    "learning_rate": 0.005,
}
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "modular-addition": {"max_steps": 1500, "weight_decay": 1.0},
    "linear-regression": {"max_steps": 1000, "weight_decay": 1.0},
    "periodic": {"max_steps": 400, "batch_size": 96},
    "series": {"max_steps": 600, "batch_size": 16},
    "s3-product": {"max_steps": 3000, "batch_size": 128},
    "a5-product": {"max_steps": 3000, "batch_size": 128},
    "pointer-chasing": {"max_steps": 3000, "batch_size": 128},
}
"""For each task what differs from _DEFAULTS, with which FANformer and Llama learn its examples."""
_EVALUATIONS = 20
_WATCHED_ROWS = 256  # training rows whose answers the curve follows


def rule_fields(task: RuleTask, **fields: Any) -> dict[str, Any]:
    """Return the fields of RunConfig with which a task is trained, the given ones in the recipe's place.

    A length that is given replaces the recipe's own.

    Raises:
        ConfigError: if a field is not of FIELDS (the nearest is offered), or no length is given.
    """
    refuse_unknown(fields, FIELDS, "a setting of rule learning")
    recipe = dict(RECIPES.get(task.name, {}))
    if any(fields.get(name) is not None for name in LENGTHS):
        recipe = {key: value for key, value in recipe.items() if key not in LENGTHS}
    merged: dict[str, Any] = {**_DEFAULTS, **recipe, **fields}
    if all(merged.get(name) is None for name in LENGTHS):
        raise ConfigError(f"the length of a training must be given, got none: set {', '.join(LENGTHS)}.")
    if merged.get("max_steps") is not None:
        merged.setdefault("eval_steps", max(1, merged["max_steps"] // _EVALUATIONS))
    return merged


def rule_config(task: RuleTask, folder: Path | str, resume: bool = False, **fields: Any) -> RunConfig:
    """Return the run that trains a task in `folder`; fields as in `rule_fields`, which says what is raised."""
    merged = rule_fields(task, **fields)
    place = {"data": f"rule:{task.name}", "output_dir": str(folder), "resume": resume}
    kept = {"log_steps": merged.get("eval_steps"), "keep_last": 1, "keep_best": False}
    return RunConfig.from_fields({**merged, **place, **kept, "sequence_length": task.prompt_tokens})


@dataclass(frozen=True)
class RulePoint:
    """A point of the curve.

    Attributes:
        step: optimizer steps done.
        loss: nats per answer, mean over the steps since the last point.
        train_accuracy: greedy, on 256 of the training rows.
        test_accuracy: greedy, on what training leaves out.
        learning_rate: of the last step.
        seconds: since training began.
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
        settings: of the training, the fields of RunConfig.
        model_type: as in the model's configuration, such as "fanformer" or "llama".
        parameters: all of them.
        block_parameters: all but embedding and LM head.
        steps: optimizer steps done.
        reached_end: False where `max_time` ended a training whose length is in steps, or a signal did.
        stopped_by: name of that signal, or None; the same call with `resume` goes on.
        seconds: of training, over all parts of the run.
        examples_per_second: trained on, median over the points of the curve.
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
    stopped_by: str | None
    seconds: float
    examples_per_second: float
    curve: list[RulePoint]
    score: RuleScore

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values that JSON can hold."""
        return {**dataclasses.asdict(self), "score": self.score.to_dict()}


def train_rule(task: RuleTask, model: PreTrainedModel, config: RunConfig, listener: Listener = silent) -> RuleResult:
    """Train `model` on a task and measure it.

    With a length in steps or epochs the result is the same bit for bit for the same weights, settings, machine and
    number of threads, stopped and resumed or not.

    Args:
        task: one of `fanformer.comparison.rules.TASKS`.
        model: a causal language model with fresh weights, built with `model_fields(task)`; trained in place.
        config: of `rule_config`; its folder gets checkpoints and metrics.jsonl.
        listener: hears what the training does.

    Raises:
        ConfigError: if the model has fewer tokens or positions than the task needs.
        DivergenceError: if the loss does not stay finite.
    """
    started = time.monotonic()
    _check_model(task, model)
    config.folder.mkdir(parents=True, exist_ok=True)
    if not config.output.resume:
        for stale in (*config.folder.glob("checkpoint-*"), *config.folder.glob(METRICS_FILE)):
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    rows, length = RuleRows(task), run_length(config, len(task.train))
    environment = decide(config.machine, 0.0 if length.max_steps is not None else None, length.max_seconds)
    environment.apply()
    processes = Processes(config.machine.parallel, environment.device)
    checkpoint = agreed_checkpoint(config.folder, processes, note_to(listener)) if config.output.resume else None
    run = _RuleRun(task, model)
    with torch.random.fork_rng():  # dropout's seed is the run's, the caller's generator stays as it was
        trainer = Trainer(
            model,
            rows,
            config=config,
            length=length,
            environment=environment,
            processes=processes,
            listener=listener,
            evaluate=run.evaluate,
            save_model=run.save,
            held_out_tokens=len(task.test),
            started=started,
            depth_law=law_of_depth(model, config),
        )
        outcome = trainer.run(checkpoint)
    model.eval()
    head = model.get_output_embeddings().weight
    outer = {id(weight): weight.numel() for weight in (model.get_input_embeddings().weight, head)}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    records = read_records(config.folder)
    return RuleResult(
        task=task.to_dict(),
        settings=config.to_dict(),
        model_type=str(model.config.model_type),
        parameters=parameters,
        block_parameters=parameters - sum(outer.values()),
        steps=outcome.step,
        reached_end=outcome.reached_end,
        stopped_by=outcome.stopped_by,
        seconds=max((record.get("elapsed_seconds", 0.0) for record in records), default=0.0),
        examples_per_second=statistics.median(record["tokens_per_second"] for record in records)
        / config.batch.sequence_length,
        curve=[_point(record) for record in records if "test_accuracy" in record],
        score=score(model, task),
    )


def _point(record: Mapping[str, Any]) -> RulePoint:
    figures = {name: record[name] for name in ("step", "train_accuracy", "test_accuracy", "learning_rate")}
    return RulePoint(**figures, loss=record.get("loss", float("nan")), seconds=record["elapsed_seconds"])


class RuleRows:
    """A task's training examples as the trainer reads rows."""

    digested = ("input_ids",)

    def __init__(self, task: RuleTask):
        self._examples = task.train

    def __len__(self) -> int:
        return len(self._examples)

    def batch(self, indices: list[int]) -> dict[str, Tensor]:
        """Return `input_ids`, `labels` and `position_ids` of examples, each (B, T) int64."""
        chosen = self._examples[indices]
        positions = torch.arange(chosen.input_ids.shape[1]).expand_as(chosen.input_ids)
        return {"input_ids": chosen.input_ids, "labels": chosen.labels, "position_ids": positions}


@dataclass(frozen=True)
class _Measured:
    """What `Trainer` keeps of an evaluation."""

    loss: float
    tokens: int
    train_accuracy: float
    test_accuracy: float

    def record(self) -> Record:
        return {"val_loss": self.loss, "train_accuracy": self.train_accuracy, "test_accuracy": self.test_accuracy}


@dataclass(frozen=True)
class _RuleRun:
    """What the loop asks of the training of a rule."""

    task: RuleTask
    model: PreTrainedModel

    def evaluate(self, everything: bool, between_batches: Callable[[], None], most_tokens: int | None) -> _Measured:
        """Measure accuracy on training rows and on what training leaves out, always on all of it."""
        between_batches()
        train, _ = accuracy_and_loss(self.model, self.task, self.task.train[:_WATCHED_ROWS])
        test, loss = accuracy_and_loss(self.model, self.task, self.task.test)
        return _Measured(loss, test.answers, train.greedy, test.greedy)

    def save(self, weights: dict[str, Tensor], step: int) -> Fill:
        """Return what writes the model's part of a checkpoint."""

        def fill(folder: Path) -> None:
            self.model.config.save_pretrained(folder)
            save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})

        return fill


def _check_model(task: RuleTask, model: PreTrainedModel) -> None:
    for name, needed in (("vocab_size", len(task.vocabulary)), ("max_position_embeddings", task.prompt_tokens)):
        value = getattr(model.config, name, None)
        if value is not None and value < needed:
            raise ConfigError(
                f"`{name}` of the model must be at least {needed} for the rule {task.name}, got {value}: "
                "build it with model_fields(task)."
            )
