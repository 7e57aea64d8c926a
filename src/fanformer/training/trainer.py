"""The trainer: Hugging Face's `Trainer` with our data order, schedule, evaluation and checkpoints."""

import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from fanformer.data.order import RunSampler
from fanformer.evaluation.loss import HeldOutLoss
from fanformer.training.configuration import RunConfig
from fanformer.training.environment import Environment
from fanformer.training.folder import checkpoints
from fanformer.training.optimizers import create_optimizer
from fanformer.training.schedule import RunLength, learning_rate_factor

# Steps that the data order is asked for where only time ends the run: more than any run takes.
_UNBOUNDED_STEPS = 10**9
PROGRESS_FILE = "progress.json"


class RunClock(TrainerCallback):
    """The time a run has been training, over all its parts, and the signals that follow from its progress.

    Figures are logged, measured on held-out data and saved every so many steps where that is asked for, else every
    so large a share of the run; the last step does all three.
    """

    SHARES = {"log": 100, "eval": 5, "save": 5}
    LONGEST_LOG_STEPS = 50

    def __init__(self, length: RunLength, steps: dict[str, int | None]):
        self.length, self.steps = length, steps
        self.earlier_seconds = 0.0
        self.started = time.monotonic()
        self.start_up_seconds = 0.0  # until the first step ended, compilation included: no progress of the run
        self.reserved_seconds = 0.0
        self.marks: dict[str, int] = {}

    @property
    def elapsed_seconds(self) -> float:
        """Seconds of training so far, evaluation and compilation among them."""
        return self.earlier_seconds + time.monotonic() - self.started

    def progress(self, step: float) -> float:
        """Return the share of the run, in [0, 1], that is over after `step` steps."""
        elapsed = self.elapsed_seconds - self.start_up_seconds
        return self.length.progress(step, elapsed, self.reserved_seconds + self.start_up_seconds)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to count."""
        self.started = time.monotonic()
        self.marks = {name: int(self.progress(state.global_step) * parts) for name, parts in self.SHARES.items()}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say what is to follow the step that ended."""
        step, limit = state.global_step, self.length.max_seconds
        if step == 1:
            self.start_up_seconds = self.elapsed_seconds
        out_of_time = limit is not None and self.elapsed_seconds >= limit - self.reserved_seconds
        if out_of_time or step == self.length.max_steps:
            control.should_training_stop = True
        due = {name: control.should_training_stop or self._is_due(name, step) for name in self.SHARES}
        control.should_log |= due["log"] or step == 1 or step % (self.steps["log"] or self.LONGEST_LOG_STEPS) == 0
        control.should_evaluate |= due["eval"]
        control.should_save |= due["save"]

    def _is_due(self, name: str, step: int) -> bool:
        every = self.steps[name]
        if every is not None:
            return step % every == 0
        before = self.marks[name]
        self.marks[name] = max(before, int(self.progress(step) * self.SHARES[name]))  # time kept back may shrink
        return self.marks[name] > before


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack rows into a batch whose labels are known to be shifted already."""
    batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    batch["shift_labels"] = batch["labels"]
    return batch


class FANformerTrainer(Trainer):
    """Trains a causal language model on packed rows.

    What differs from `Trainer`: rows come in an order that is a function of seed and step alone; the learning rate
    follows the run's progress; the held-out loss is exact; a checkpoint is written aside and renamed, before the
    evaluation of the same step; and each step's figures go to `on_record` as one record.
    """

    optimizer: Any
    lr_scheduler: Any
    control: Any

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Dataset[dict[str, Tensor]],
        *,
        config: RunConfig,
        length: RunLength,
        environment: Environment,
        evaluate_held_out: Callable[[bool], HeldOutLoss],
        held_out_tokens: int,
        on_record: Callable[[dict[str, float]], None],
        on_checkpoint: Callable[[Path], None],
        callbacks: list[TrainerCallback],
    ):
        self.config, self.length = config, length
        self.clock = RunClock(length, {"log": config.log_steps, "eval": config.eval_steps, "save": config.save_steps})
        self.evaluate_held_out, self.on_record, self.on_checkpoint = evaluate_held_out, on_record, on_checkpoint
        self.held_out_tokens = held_out_tokens
        self.evaluation_rates: list[float] = []  # seconds per held-out token
        self.first_step = 0
        self.random_state_from: Path | None = None
        self.record: dict[str, float] = {}
        self.last_log = (0, 0.0)
        self.staging: Path | None = None
        micro_batch = config.micro_batch_size or config.batch_size
        world = int(os.environ.get("WORLD_SIZE", "1"))
        arguments = TrainingArguments(
            output_dir=str(config.folder),
            max_steps=length.max_steps or _UNBOUNDED_STEPS,
            per_device_train_batch_size=micro_batch // world,
            gradient_accumulation_steps=config.batch_size // micro_batch,
            max_grad_norm=config.max_grad_norm,
            seed=config.seed,
            bf16=environment.precision == "bfloat16",
            use_cpu=environment.device == "cpu",
            logging_strategy="no",
            save_strategy="no",
            eval_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cache=True,
            remove_unused_columns=False,
            ignore_data_skip=True,
            dataloader_pin_memory=environment.device == "cuda",
            average_tokens_across_devices=True,
        )
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=rows,
            processing_class=tokenizer,
            data_collator=collate,
            callbacks=[self.clock, *callbacks],
        )
        for unwanted in (PrinterCallback, ProgressCallback):
            self.remove_callback(unwanted)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step, over all processes."""
        return self.config.batch_size * self.config.sequence_length

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        rows = len(self.train_dataset)
        steps = self.length.max_steps or _UNBOUNDED_STEPS
        return RunSampler(
            rows, self.config.seed, total=steps * self.config.batch_size, start=self.first_step * self.config.batch_size
        )

    def run(self, checkpoint: Path | None) -> None:
        """Train from the beginning, or from a checkpoint folder, to the run's end."""
        self.random_state_from = checkpoint
        if checkpoint is not None:
            state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
            self.first_step = int(state["global_step"])
            progress = json.loads((checkpoint / PROGRESS_FILE).read_text(encoding="utf-8"))
            self.clock.earlier_seconds = progress["earlier_seconds"]
            self.clock.start_up_seconds = progress["start_up_seconds"]
            self.last_log = (self.first_step, self.clock.earlier_seconds)
        self.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
        self.flush_record()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the run's optimizer over the bare model's parameters."""
        if self.optimizer is None:
            self.optimizer = create_optimizer(self.model, self.config)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create the schedule that asks the run for its progress at every step."""
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer,
                lambda step: learning_rate_factor(self.clock.progress(step + 0.5), self.config),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Do one forward and backward pass; a resumed run's first one begins with the checkpoint's random state."""
        if self.random_state_from is not None:  # making the data iterator has drawn from the state loaded before
            self._load_rng_state(str(self.random_state_from))
            self.random_state_from = None
        return super().training_step(*args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the loss, without making a cache that training has no use for."""
        return super().compute_loss(model, {**inputs, "use_cache": False}, *args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0: the run reports its operations itself, once."""
        return 0

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, *args: Any, **kwargs: Any) -> None:
        save, self.control.should_save = self.control.should_save, False
        evaluate, self.control.should_evaluate = self.control.should_evaluate, False
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)  # the log line
        paused = self.clock.elapsed_seconds
        if save:  # before the evaluation: a crash there must not lose the work
            self._save_checkpoint(self.model, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        if evaluate:
            self.evaluate()
        self.flush_record()
        step, seconds = self.last_log
        self.last_log = (step, seconds + self.clock.elapsed_seconds - paused)  # the rate counts training only

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Collect one step's figures; HF's closing summary is left out."""
        if "loss" not in logs:
            return
        step, seconds = self.state.global_step, self.clock.elapsed_seconds
        last_step, last_seconds = self.last_log
        self.record.update(
            step=step,
            tokens=step * self.tokens_per_step,
            loss=logs["loss"],
            learning_rate=logs["learning_rate"],
            grad_norm=logs.get("grad_norm", float("nan")),
            tokens_per_second=(step - last_step) * self.tokens_per_step / max(1e-9, seconds - last_seconds),
            elapsed_seconds=seconds,
        )
        self.last_log = (step, seconds)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure the held-out loss: on a sample of it during the run, on all of it at the end."""
        started = time.monotonic()
        figures = self.evaluate_held_out(self.control.should_training_stop)
        self.evaluation_rates.append((time.monotonic() - started) / figures.tokens)
        self.clock.reserved_seconds = 1.1 * statistics.median(self.evaluation_rates) * self.held_out_tokens
        values = {"val_loss": figures.loss, "val_bits_per_byte": figures.bits_per_byte}
        self.record.update(step=self.state.global_step, tokens=self.state.global_step * self.tokens_per_step, **values)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, values)
        return values

    def flush_record(self) -> None:
        """Hand the collected figures on."""
        if self.record:
            self.on_record(self.record)
            self.record = {}

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.staging) if self.staging is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write checkpoint-N beside the others under another name, then rename it: it is there whole or not at all."""
        run_folder = Path(self.args.output_dir)
        self.staging = run_folder / ".unfinished"
        shutil.rmtree(self.staging, ignore_errors=True)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            staging, self.staging = self.staging, None
        name = f"checkpoint-{self.state.global_step}"
        (staging / name / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
        clock = self.clock
        progress = json.dumps({"earlier_seconds": clock.elapsed_seconds, "start_up_seconds": clock.start_up_seconds})
        (staging / name / PROGRESS_FILE).write_text(progress, encoding="utf-8")
        self.on_checkpoint(staging / name)
        shutil.rmtree(run_folder / name, ignore_errors=True)
        os.replace(staging / name, run_folder / name)
        staging.rmdir()
        for old in checkpoints(run_folder)[: -self.config.keep_last]:
            shutil.rmtree(old)
