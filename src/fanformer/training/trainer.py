"""The training loop: rows in a fixed order, one optimizer step after another, and nothing that a kill could lose.

Everything that decides a step is a function of the run's configuration and of the state that a checkpoint holds, so
that a resumed run computes the very same numbers. The loop is our own since each part of HF's `Trainer` that touches
this (order, random numbers, loss scale, schedule, records, saving, loading, stopping) would have to be replaced.
"""

import contextlib
import math
import statistics
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from signal import Signals
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fanformer.data.packing import rows_of_run
from fanformer.errors import CheckpointError, DivergenceError
from fanformer.training.attention import document_bounds
from fanformer.training.checkpoint import (
    CheckpointWriter,
    checkpoint_name,
    checkpoints,
    newest_intact,
    read_state,
    step_of,
    write_state,
)
from fanformer.training.chunked_loss import TokenLoss
from fanformer.training.environment import Environment
from fanformer.training.events import Evaluate, Event, Listener, Loss, Record, Rows, SaveModel, note_to, silent
from fanformer.training.fields import RunConfig
from fanformer.training.folder import RecordFile, read_records
from fanformer.training.optimizers import create_optimizer
from fanformer.training.parallel import Processes, whole
from fanformer.training.schedule import MOST_OF_A_RUN, Due, RunClock, RunLength, StopRequest, learning_rate_factor
from fanformer.training.state import LoopState, Snapshot, restore_model, restore_optimizer, seed_pass

if TYPE_CHECKING:
    from fanformer.training.depth import DepthLaw

_SPIKE_WINDOW = 32
"""Steps whose losses say what is usual; half of them must be known before a spike is seen."""
_HOW_TO_GO_ON = "a longer one goes on with --resume and a new --max-steps, --tokens, --epochs or --max-time"
_DIGEST_BITS = 40  # so that sums over processes stay exact in float64


class _StopAskedError(Exception):
    """A signal came in the middle of an evaluation."""


@dataclass(frozen=True)
class Outcome:
    """How training ended.

    Attributes:
        step: optimizer steps done.
        checkpoint: the checkpoint after the last of them.
        reached_end: False where a limit of time or a signal ended it before its steps were done.
        stopped_by: name of the signal that ended it, such as "SIGTERM", or None.
    """

    step: int
    checkpoint: Path
    reached_end: bool
    stopped_by: str | None


def agreed_checkpoint(folder: Path, processes: Processes, note: Callable[[str], None]) -> Path | None:
    """Return the newest intact checkpoint of a run, which one process looks for and reads for all."""
    found = newest_intact(folder, note) if processes.is_main else None
    step = int(processes.exchange([-1 if found is None else step_of(found)])[0][0])
    return None if step < 0 else folder / checkpoint_name(step)


def _digest(index: int, tensors: list[np.ndarray]) -> int:
    """Return a number that a row has, given its index and what tells it apart: (T,) each."""
    digest = index & 0xFFFFFFFF
    for values in tensors:
        digest = zlib.crc32(values.tobytes(), digest)
    return digest * 251


class Trainer:
    """Trains a causal language model on packed rows, from the beginning or from a checkpoint, to the run's end."""

    def __init__(
        self,
        model: PreTrainedModel,
        rows: Rows,
        *,
        config: RunConfig,
        length: RunLength,
        environment: Environment,
        processes: Processes,
        listener: Listener,
        evaluate: Evaluate,
        save_model: SaveModel,
        held_out_tokens: int,
        started: float,
        loss: Loss | None = None,
        depth_law: "DepthLaw | None" = None,
    ):
        """Set up; the model is spread over the processes in place.

        Args:
            model: on the CPU, the same in every process.
            rows: what to train on.
            config: the run.
            length: of the run.
            environment: the run's decisions about the machine.
            processes: that train together.
            listener: hears what the loop does; of several processes only in the first.
            evaluate: measures the model.
            save_model: saves it.
            held_out_tokens: that the last evaluation measures.
            started: when this process began its work, on the clock of `time.monotonic`.
            loss: that the model has been made to compute; None is that of the rows' labels.
            depth_law: how many steps a recurrent depth takes; None for a plain model.
        """
        self.loss = loss or TokenLoss()
        self.config, self.length, self.processes = config, length, processes
        self.evaluate, self.save_model, self.records = evaluate, save_model, RecordFile(config.folder)
        self.listener = listener if processes.is_main else silent
        self._note = note_to(self.listener)
        self.rows, self.held_out_tokens = rows, held_out_tokens
        self.depth_law = depth_law
        self.device = torch.device(environment.device)
        self.autocast_dtype = torch.bfloat16 if environment.precision == "bfloat16" else None
        measured, saving = config.evaluation, config.saving
        steps = {"log": measured.log_steps, "evaluate": measured.eval_steps, "save": saving.save_steps}
        self.clock = RunClock(length, steps, started)
        self.model = model.to(self.device).train()
        self.wrapped = processes.wrap(self.model)
        self.optimizer = create_optimizer(self.model, config.optimizer)
        self.peak_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.state = LoopState()
        self.snapshot = Snapshot(keep=processes.is_main)
        self.writer = CheckpointWriter(config.folder, saving.keep_last, background=saving.background_save)
        self.save_error: Exception | None = None
        self.best: tuple[float, int] | None = None  # held-out loss, step, of those that have a checkpoint
        self.last_log = (0, 0.0)  # step, seconds
        self.is_evaluated = False
        self.micro_batch = config.batch.rows_per_pass(processes.count)
        self.grad_norm = self.learning_rate = math.nan
        self.saved_step: int | None = None  # after which a checkpoint holds the state as it is
        self.request = StopRequest(config.length.grace_seconds)

    def run(self, checkpoint: Path | None) -> Outcome:
        """Train from the beginning, or from a checkpoint folder, to the run's end.

        Raises:
            CheckpointError: if the checkpoint is of another run, or the last one cannot be written.
            DivergenceError: if too many steps in a row have no finite gradient.
        """
        if checkpoint is not None:
            self._restore(checkpoint)
        self.clock.begin(self.state)
        self.last_log = (self.state.step, self.clock.elapsed_seconds)
        with self.request:
            try:
                return self._loop(resumed=checkpoint is not None)
            finally:
                self.writer.wait()

    def _loop(self, resumed: bool) -> Outcome:
        stop, first = self._is_at_end(), True
        if stop:
            self._note(f"this run is finished, after {self.state.step} steps: {_HOW_TO_GO_ON}")
        signal = self._catch_up(stop) if resumed else 0
        while not stop and not signal:
            due, signal = self._step(first)
            first, stop = False, Due.STOP in due
            self.state.record = self._close_window() if Due.LOG in due else {}
            self.state.evaluation_due = Due.EVALUATE in due
            if stop and self.length.max_steps is None:
                self.state.finished_seconds = self.length.max_seconds
            if Due.SAVE in due or stop or signal:
                self._save()
            self._hear_of_saves()
            signal = signal or self._report(everything=stop and self._is_at_end())
        if not self.is_evaluated and not signal:  # resumed after its last step: nothing was left to train
            signal = 0 if self._evaluate(everything=self._is_at_end()) else int(self.request.signal or 0)
        if signal and self.saved_step != self.state.step:
            self._save()
        return self._end(signal)

    def _is_at_end(self) -> bool:
        """Whether the run is over as planned, all of its steps done or all of its time spent."""
        return self.length.is_over(self.state.step, self.state.finished_seconds)

    def _report(self, everything: bool) -> int:
        """Evaluate where that is due and hand the step's figures on.

        Returns:
            The signal that came during the evaluation, 0 for none; the figures are then left to the resumed run.
        """
        record = dict(self.state.record)
        if self.state.evaluation_due:
            figures = self._evaluate(everything)
            if figures is None:
                return int(self.request.signal or 0)
            record |= figures
        if record and self.processes.is_main:
            self.records.append(record)
            self.listener(Event("record", share=self.clock.progress(self.state.step), figures=record))
        return 0

    def _catch_up(self, at_end: bool) -> int:
        """Evaluate and report what a kill between a checkpoint and its evaluation left out."""
        known = any(record["step"] == self.state.step for record in read_records(self.config.folder))
        return 0 if self.processes.exchange([float(known)])[0][0] else self._report(everything=at_end)

    def _step(self, first: bool) -> tuple[Due, int]:
        """Do one optimizer step; return what is to follow it, and the signal that asks to stop or 0."""
        state, clock, processes = self.state, self.clock, self.processes
        passes = self._passes()
        count = sum(self.loss.count(batch) for batch, _ in passes)
        digest = sum(part for _, part in passes) % (1 << _DIGEST_BITS)
        everyone = processes.exchange([count, clock.progress(state.step + 0.5), digest])
        count_of_step = max(1, int(sum(row[0] for row in everyone)))
        progress = everyone[0][1]  # by one clock
        if self.depth_law is not None:
            self.depth_law.set_steps(self.model, self.depth_law.steps(state.step, progress))
        factor = learning_rate_factor(progress, self.config.schedule)
        self.learning_rate = self.config.optimizer.learning_rate * factor
        for group, peak in zip(self.optimizer.param_groups, self.peak_rates, strict=True):
            group["lr"] = peak * factor

        loss, *figures = self._forward_and_backward([batch for batch, _ in passes], count_of_step)
        parameters = list(self.model.parameters())
        total = torch.nn.utils.get_total_norm([one.grad for one in parameters if one.grad is not None])
        norm = float(whole(total))
        due = clock.after_step(state.step + 1, first) if processes.is_main else Due(0)
        gathered = processes.exchange([loss, due, int(self.request.signal or 0), *figures])
        loss, _, _, *figures = (sum(column) for column in zip(*gathered, strict=True))
        due, signal = Due(int(gathered[0][1])), max(int(row[2]) for row in gathered)

        state.step += 1
        state.place += self.config.batch.batch_size
        state.window_rows = (state.window_rows + int(sum(row[2] for row in everyone))) % (1 << _DIGEST_BITS)
        if math.isfinite(loss) and math.isfinite(norm):
            if self._is_spike(loss):
                self._roll_back(loss)
                return Due(0), signal
            limit = self.config.optimizer.max_grad_norm
            if limit:
                torch.nn.utils.clip_grads_with_norm_(parameters, limit, total)
            self.optimizer.step()
            self._count_good_step(loss, norm, figures)
        else:
            self._count_skipped_step(loss, norm)
        self.optimizer.zero_grad(set_to_none=True)
        tokens = state.step * self.config.batch.tokens_per_step
        now = {"step": state.step, "tokens": tokens, "elapsed_seconds": clock.elapsed_seconds}
        self.listener(Event("step", share=clock.progress(state.step), figures=now))
        return due, signal

    def _passes(self) -> list[tuple[dict[str, Tensor], int]]:
        """Return this process's micro-batches of the next step, each with a digest of its rows and their tokens."""
        config, state, processes = self.config, self.state, self.processes
        places = np.arange(state.place, state.place + config.batch.batch_size)
        indices = rows_of_run(config.seed, places, len(self.rows))
        together = self.micro_batch * processes.count
        passes = []
        for begin in range(processes.rank * self.micro_batch, config.batch.batch_size, together):
            chosen = indices[begin : begin + self.micro_batch].tolist()
            batch = self.rows.batch(chosen)
            told = [batch[name].numpy() for name in self.rows.digested]
            passes.append((batch, sum(_digest(index, rows) for index, *rows in zip(chosen, *told, strict=True))))
        return passes

    def _forward_and_backward(self, batches: list[dict[str, Tensor]], count_of_step: int) -> list[float]:
        """Add up the gradient of the step's mean loss; return this process's share of that loss and of its figures."""
        config, processes = self.config, self.processes
        autocast: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        losses, figures = [], []
        for number, batch in enumerate(batches):
            seed_pass(config.seed, self.state.step, number, processes.rank)
            given = batch | document_bounds(self.model, batch["position_ids"])
            inputs = {
                name: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
                for name, value in given.items()
            }
            if self.autocast_dtype is not None:
                autocast = torch.autocast(self.device.type, dtype=self.autocast_dtype)
            with processes.accumulating(self.wrapped, last=number == len(batches) - 1):
                with autocast:
                    output = self.wrapped(
                        **inputs, shift_labels=inputs["labels"], num_items_in_batch=count_of_step, use_cache=False
                    )
                if output.loss.requires_grad:  # rows without media touch nothing that learns beside resting weights
                    (output.loss * processes.count).backward()  # the processes' gradients will be averaged
            losses.append(output.loss.detach())
            figures += [output.figures] if self.loss.figures else []
        more: list[float] = torch.stack(figures).sum(0).tolist() if figures else []
        return [float(torch.stack(losses).sum()), *more]

    def _count_good_step(self, loss: float, norm: float, figures: list[float]) -> None:
        state = self.state
        state.window_loss += loss
        for name, value in zip(self.loss.figures, figures, strict=True):
            state.window_figures[name] = state.window_figures.get(name, 0.0) + value
        state.window_steps += 1
        state.skipped_in_row = 0
        state.recent_losses = [*state.recent_losses, loss][-_SPIKE_WINDOW:]
        self.grad_norm = norm

    def _count_skipped_step(self, loss: float, norm: float) -> None:
        """Leave the weights as they are.

        Raises:
            DivergenceError: if that happened too often in a row.
        """
        state, config = self.state, self.config
        state.skipped += 1
        state.skipped_in_row += 1
        broken = [
            name
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None and not bool(torch.isfinite(whole(parameter.grad)).all())
        ]
        where = f"`{broken[0]}` and {len(broken) - 1} more of its parameters" if broken else "no single parameter"
        what = f"step {state.step} left out: loss {loss:.4g}, gradient norm {norm:.4g}, not finite in {where}"
        self._note(f"{what} ({state.skipped} left out so far)")
        if state.skipped_in_row < config.divergence.max_skipped_steps:
            return
        recent = f"{state.recent_losses[-1]:.4f}" if state.recent_losses else "not known"
        raise DivergenceError(
            f"{what}, {state.skipped_in_row} in a row, at learning rate {self.learning_rate:.3g}; the "
            f"last finite loss was {recent}",
            f"go on from the last checkpoint in {config.folder.absolute()} with --resume and a lower --learning-rate, "
            "--set max_grad_norm=0.5 or --set precision=float32.",
        )

    def _is_spike(self, loss: float) -> bool:
        factor, recent = self.config.divergence.spike_rollback, self.state.recent_losses
        if factor is None or len(recent) < _SPIKE_WINDOW // 2:
            return False
        return loss > statistics.fmean(recent) + factor * max(statistics.stdev(recent), 1e-3)

    def _roll_back(self, loss: float) -> None:
        """Return to the newest checkpoint and leave out the rows since then.

        Raises:
            DivergenceError: if that happened too often, or there is no checkpoint.
        """
        state, config = self.state, self.config
        self.optimizer.zero_grad(set_to_none=True)
        self.writer.wait()
        checkpoint = agreed_checkpoint(config.folder, self.processes, self._note)
        usual = statistics.fmean(state.recent_losses)
        what = f"the loss of step {state.step} is {loss:.4f}, usual is {usual:.4f}"
        if checkpoint is None or state.rollbacks >= config.divergence.max_rollbacks:
            times = f"the run went back {state.rollbacks} times already"
            why = "there is no checkpoint" if checkpoint is None else times
            raise DivergenceError(f"{what}, and {why}", "use a lower --learning-rate or a larger spike_rollback.")
        place, rollbacks, skipped = state.place, state.rollbacks + 1, state.skipped
        left_out = place - self._restore(checkpoint)
        self.saved_step = None  # the rows that follow are others than the checkpoint's
        self.state.place, self.state.rollbacks, self.state.skipped = place, rollbacks, skipped
        self.clock.rewind(self.state)
        self.last_log = (self.state.step, self.clock.elapsed_seconds)
        if self.processes.is_main:
            self.records.forget_after(self.state.step)
        self._note(f"{what}: back to {checkpoint.name}, the {left_out} rows since then are left out")

    def _restore(self, checkpoint: Path) -> int:
        """Take over a checkpoint's state and return how many rows it had used."""
        restore_model(self.model, checkpoint)
        restore_optimizer(self.model, self.optimizer, checkpoint)
        self.state = LoopState(**read_state(checkpoint)["loop"])
        self.saved_step = self.state.step
        self.best = self._best_so_far()
        return self.state.place

    def _best_so_far(self) -> tuple[float, int] | None:
        kept = {step for step in map(step_of, checkpoints(self.config.folder)) if step <= self.state.step}
        measured = [one for one in read_records(self.config.folder) if math.isfinite(one.get("val_loss", math.nan))]
        return min(((one["val_loss"], int(one["step"])) for one in measured if one["step"] in kept), default=None)

    def _save(self) -> None:
        """Copy the state and let it be written in the background; training goes on once it is copied."""
        self.saved_step = self.state.step
        self.listener(Event("wait", "saving"))
        self.writer.wait()  # the copy before is written before its memory is used again
        self.snapshot.take(self.model, self.optimizer)
        self.clock.store(self.state)
        if not self.processes.is_main:
            return
        state = {"loop": asdict(self.state), "processes": self.processes.count}
        fill_model = self.save_model(self.snapshot.weights, self.state.step)
        best = self.best[1] if self.best is not None and self.config.saving.keep_best else None

        def fill(folder: Path) -> None:
            self.records.sync()  # none may be older than a checkpoint that was written after it
            fill_model(folder)
            self.snapshot.save_optimizer(folder)
            write_state(folder, state)

        self.writer.submit(self.state.step, fill, self.snapshot.num_bytes, best)

    def _hear_of_saves(self) -> None:
        for written in self.writer.collect():
            self.save_error = written.error
            self.clock.save_seconds = max(self.clock.save_seconds, written.seconds)
            if written.error is not None:
                self.best = self._best_so_far()  # the one that is not there may have been it
                if not isinstance(written.error, (OSError, CheckpointError)):
                    raise written.error  # a mistake of ours, which the next attempt would meet again
                self._note(f"{written.error} Training goes on, and the next checkpoint is tried at its time.")

    def _evaluate(self, everything: bool) -> Record | None:
        """Measure the held-out loss; None where a signal to stop came first."""
        started = time.monotonic()
        self.listener(Event("wait", "evaluating"))
        depth = self._depth_to_measure()
        try:
            figures = self.evaluate(everything, self._stop_if_asked, self._room_for_the_last() if everything else None)
        except _StopAskedError:
            return None
        seconds = time.monotonic() - started
        self.is_evaluated = True
        self.clock.note_evaluation(seconds, figures.tokens, self.held_out_tokens)
        step, log_seconds = self.last_log
        self.last_log = (step, log_seconds + seconds)  # the rate counts training only
        if self.saved_step == self.state.step and figures.loss < (self.best or (math.inf, 0))[0]:  # never one of NaN
            self.best = (figures.loss, self.state.step)
        tokens = self.state.step * self.config.batch.tokens_per_step
        return {"step": self.state.step, "tokens": tokens, **figures.record(), **depth}

    def _room_for_the_last(self) -> int | None:
        """Return how many held-out tokens the run's time leaves room for at its end; None for all."""
        most = int(self.processes.exchange([float(self.clock.tokens_of_the_last or 0)])[0][0])
        if most:
            why = f"all of them would take more than {MOST_OF_A_RUN:.0%} of the run's time"
            self._note(f"the last evaluation measures {most:,} of {self.held_out_tokens:,} held-out tokens: {why}")
        return most or None

    def _depth_to_measure(self) -> Record:
        """Set how many steps of a recurrent depth an evaluation takes and return them; nothing for a plain model."""
        if self.depth_law is None:
            return {}
        progress = self.processes.exchange([self.clock.progress(self.state.step - 0.5)])[0][0]
        num_steps = self.depth_law.measured_steps(progress)
        self.depth_law.set_steps(self.model, num_steps)
        return {"num_steps": num_steps}

    def _stop_if_asked(self) -> None:
        if self.request.signal and self.processes.count == 1:  # several must stop at the same place
            raise _StopAskedError

    def _close_window(self) -> Record:
        """Return the figures since the last record and begin anew."""
        state, seconds, tokens = self.state, self.clock.elapsed_seconds, self.config.batch.tokens_per_step
        last_step, last_seconds = self.last_log
        record: Record = {
            "step": state.step,
            "tokens": state.step * tokens,
            "learning_rate": self.learning_rate,
            "tokens_per_second": (state.step - last_step) * tokens / max(1e-9, seconds - last_seconds),
            "elapsed_seconds": seconds,
            "rows": f"{state.window_rows:010x}",
        }
        if state.window_steps:
            record |= {"loss": state.window_loss / state.window_steps, "grad_norm": self.grad_norm}
            record |= {name: value / state.window_steps for name, value in state.window_figures.items()}
        if state.skipped:
            record["skipped_steps"] = state.skipped
        self.last_log = (state.step, seconds)
        state.window_loss, state.window_steps, state.window_rows, state.window_figures = 0.0, 0, 0, {}
        return record

    def _end(self, signal: int) -> Outcome:
        """Wait for the last checkpoint and say how it went.

        Raises:
            Exception: what kept the last checkpoint from being written.
        """
        self.listener(Event("wait", "saving"))
        self.writer.wait()
        self._hear_of_saves()
        failed = self.processes.sum([float(self.save_error is not None)])[0]
        if self.save_error is not None:
            raise self.save_error
        if failed:
            raise SystemExit(2)  # the main process says why
        name = Signals(signal).name if signal else None
        checkpoint = self.config.folder / checkpoint_name(self.state.step)
        if self.processes.is_main and checkpoint not in checkpoints(self.config.folder):
            raise CheckpointError(f"{checkpoint.absolute()} was written and is gone: what deleted it? Train again.")
        return Outcome(self.state.step, checkpoint, self._is_at_end() and not signal, name)
