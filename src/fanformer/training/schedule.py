"""The course of a run: how far it is, which learning rate that calls for, what follows a step, and what stops it."""

import math
import os
import signal
import statistics
import sys
import threading
import time
from dataclasses import dataclass
from enum import IntFlag
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from fanformer.training.checkpoint import WEIGHTS_FILE, checkpoints, read_state
from fanformer.training.fields import RunConfig, ScheduleConfig
from fanformer.training.folder import RUN_FILE, read_records, read_run_file
from fanformer.training.state import LoopState


@dataclass(frozen=True)
class RunLength:
    """When a run ends: after so many steps, or, where only a time is given, when that time is over.

    Attributes:
        max_steps: optimizer steps, or None where time sets the length.
        max_seconds: wall-clock limit of training, evaluation and compilation together, or None.
    """

    max_steps: int | None
    max_seconds: float | None

    def progress(self, step: float, elapsed_seconds: float, reserved_seconds: float = 0.0) -> float:
        """Return the share of the run, in [0, 1], that is over.

        Args:
            step: steps done; half a step more for the middle of the step that follows.
            elapsed_seconds: wall-clock time of the run so far.
            reserved_seconds: time to keep for what follows the last step.
        """
        if self.max_steps is not None:
            return min(1.0, step / self.max_steps)
        assert self.max_seconds is not None, "a run has a length in steps or in time"
        return min(1.0, elapsed_seconds / max(1e-9, self.max_seconds - reserved_seconds))

    def is_over(self, step: int, finished_seconds: float | None) -> bool:
        """Return whether a run has ended as planned, all of its steps done or all of its time spent.

        Args:
            step: steps done.
            finished_seconds: as in LoopState.
        """
        if self.max_steps is not None:
            return step >= self.max_steps
        return finished_seconds is not None and self.max_seconds is not None and self.max_seconds <= finished_seconds


def run_length(config: RunConfig, rows: int) -> RunLength:
    """Return the length of a run over `rows` training rows; one epoch where the configuration names none."""
    steps = config.length.max_steps
    if config.length.tokens is not None:
        steps = max(1, round(config.length.tokens / config.batch.tokens_per_step))
    elif config.length.epochs is not None or (steps is None and config.length.max_time is None):
        steps = max(1, round((config.length.epochs or 1.0) * rows / config.batch.batch_size))
    return RunLength(steps, config.length.max_time)


def few_steps(config: RunConfig, length: RunLength) -> str:
    """Return a remark on epochs that are too few optimizer steps to teach much, "" where they are not."""
    steps = length.max_steps
    if config.length.epochs is None or steps is None or steps >= _FEW_STEPS:
        return ""
    return f"; {steps} optimizer steps in all, more --epochs or a smaller --batch-size would teach more"


def is_finished(folder: Path) -> bool:
    """Return whether the run in a folder was trained to its end and measured there.

    One that a signal or a limit of time stopped was not, though its folder holds a model too.

    Raises:
        CheckpointError: if run.yaml, metrics.jsonl or the newest checkpoint's state is damaged.
    """
    found = checkpoints(folder)
    if not found or not (folder / RUN_FILE).is_file() or not (folder / WEIGHTS_FILE).is_file():
        return False
    length, loop = RunLength(**read_run_file(folder)["length"]), read_state(found[-1])["loop"]
    is_measured = any("val_loss" in record and record["step"] == loop["step"] for record in read_records(folder))
    return is_measured and length.is_over(loop["step"], loop.get("finished_seconds"))


def learning_rate_factor(progress: float, config: ScheduleConfig) -> float:
    """Return the learning rate over its peak at `progress` in [0, 1] of the run.

    Both schedules rise linearly over `warmup_fraction`. "wsd" then stays at 1 and falls linearly over the last
    `decay_fraction` (arXiv:2404.06395, section 4.1); "cosine" falls as half a cosine over all the rest.
    """
    floor = config.min_learning_rate_ratio
    if progress < config.warmup_fraction:
        return progress / config.warmup_fraction
    if config.schedule == "cosine":
        share = (progress - config.warmup_fraction) / max(1e-12, 1 - config.warmup_fraction)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share))
    if progress <= 1 - config.decay_fraction:
        return 1.0
    return floor + (1 - floor) * (1 - progress) / config.decay_fraction


_FEW_STEPS = 20
"""With fewer, an optimizer has hardly moved anything."""
SHARES = {"log": 100, "evaluate": 5, "save": 5}
"""Into how many parts each of these divides a run, where no number of steps is asked for."""
LONGEST_LOG_STEPS = 50
MOST_OF_A_RUN = 0.2
"""Of a run whose length is a time, what its last evaluation may take."""


class Due(IntFlag):
    """What is to follow a step."""

    LOG = 1
    EVALUATE = 2
    SAVE = 4
    STOP = 8


class RunClock:
    """Counts a run's time over all its parts.

    A limit of time that sets the length of the run counts all parts together. One beside a number of steps is the
    limit of a job: it counts this process alone, from `started` on.
    """

    def __init__(self, length: RunLength, steps: dict[str, int | None], started: float) -> None:
        """Set up.

        Args:
            length: of the run.
            steps: for each name in SHARES, after how many steps it is due, or None for shares of the run.
            started: when the process began its work, on the clock of `time.monotonic`.
        """
        self.length, self._steps, self._started = length, steps, started
        self._earlier_seconds = 0.0
        self._training_since = time.monotonic()
        self.start_up_seconds = 0.0  # until the first step ended, compilation included: no progress of the run
        self._marks: dict[str, int] = {}
        self._evaluation_rates: list[float] = []  # seconds per held-out token
        self.save_seconds = self.sample_seconds = 0.0  # what a checkpoint, and an evaluation on a sample, take
        self.reserved_seconds = 0.0
        self.tokens_of_the_last: int | None = None  # where the time has no room for all of them

    @property
    def elapsed_seconds(self) -> float:
        """Seconds of training so far, evaluation and compilation among them."""
        return self._earlier_seconds + time.monotonic() - self._training_since

    def progress(self, step: float) -> float:
        """Return the share of the run, in [0, 1], that is over after `step` steps.

        Args:
            step: steps done; half a step more for the middle of the step that follows.
        """
        reserved = self.reserved_seconds + self.start_up_seconds
        return self.length.progress(step, self.elapsed_seconds - self.start_up_seconds, reserved)

    def begin(self, state: LoopState) -> None:
        """Begin to count, or go on from where a checkpoint was taken."""
        self._training_since = time.monotonic()
        self._earlier_seconds, self.start_up_seconds = state.elapsed_seconds, state.start_up_seconds
        # a run that was made longer is at an earlier share; of time, what is kept for the end is not known again yet
        slack = 0 if self.length.max_steps is not None else 1
        now = {name: int(self.progress(state.step) * parts) for name, parts in SHARES.items()}
        self._marks = {name: min(state.marks.get(name, mark), mark + slack) for name, mark in now.items()}

    def rewind(self, state: LoopState) -> None:
        """Return to what was due next when a checkpoint was taken; the time since then stays spent."""
        self._marks = dict(state.marks)

    def store(self, state: LoopState) -> None:
        """Write into a state what `begin` needs to go on."""
        state.elapsed_seconds, state.start_up_seconds = self.elapsed_seconds, self.start_up_seconds
        state.marks = dict(self._marks)

    def after_step(self, step: int, first_of_process: bool) -> Due:
        """Say what is to follow a step.

        Args:
            step: steps done.
            first_of_process: whether this process has done no step before; compilation falls into it.
        """
        if step == 1 and first_of_process:
            self.start_up_seconds = self.elapsed_seconds
        stop = (self.length.max_steps is not None and step >= self.length.max_steps) or self._is_out_of_time()
        due = Due.STOP if stop else Due(0)
        for name in SHARES:
            if stop or self._is_due(name, step):
                due |= Due[name.upper()]
        if step == 1 or step % (self._steps["log"] or LONGEST_LOG_STEPS) == 0:
            due |= Due.LOG
        return due

    def _is_out_of_time(self) -> bool:
        limit = self.length.max_seconds
        if limit is None:
            return False
        if self.length.max_steps is None:
            return self.elapsed_seconds >= limit - self.reserved_seconds
        return time.monotonic() - self._started >= limit - self.sample_seconds - self.save_seconds

    def _is_due(self, name: str, step: int) -> bool:
        every = self._steps[name]
        if every is not None:
            return step % every == 0
        before = self._marks[name]
        self._marks[name] = max(before, int(self.progress(step) * SHARES[name]))  # time kept back may shrink
        return self._marks[name] > before

    def note_evaluation(self, seconds: float, tokens: int, tokens_of_the_last: int) -> None:
        """Learn how long evaluation takes, to keep enough time for the last one.

        Args:
            seconds: what one took.
            tokens: held-out tokens that it measured.
            tokens_of_the_last: how many the last evaluation of the run will measure.
        """
        self._evaluation_rates.append(seconds / tokens)
        rate = 1.1 * statistics.median(self._evaluation_rates)
        self.sample_seconds, self.reserved_seconds = rate * tokens, rate * tokens_of_the_last
        if self.length.max_steps is None and self.length.max_seconds is not None:
            most = MOST_OF_A_RUN * self.length.max_seconds
            self.tokens_of_the_last = None if self.reserved_seconds <= most else max(1, int(most / rate))
            self.reserved_seconds = min(self.reserved_seconds, most)


STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGXCPU") if hasattr(signal, name)
)
"""What schedulers and terminals send: Slurm sends SIGTERM or, with --signal, another before its time limit."""


class StopRequest:
    """Remembers the first stop signal while a `with` block runs; a second one, or the end of the grace, exits at once.

    Exiting at once is safe at any moment: checkpoints get their name only when they are whole.
    """

    def __init__(self, grace_seconds: float) -> None:
        """Set up.

        Args:
            grace_seconds: longest time from the signal to the end of the block; then the process exits.
        """
        self.grace_seconds = grace_seconds
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._timer: threading.Timer | None = None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            self._exit("a second signal came")
        self.signal = signal.Signals(number)
        self._timer = threading.Timer(self.grace_seconds, self._exit, [f"{self.grace_seconds:g} s of grace are over"])
        self._timer.daemon = True
        self._timer.start()

    def _exit(self, why: str) -> None:
        assert self.signal is not None, "called after a signal only"
        print(  # noqa: T201  # nothing else can be relied on here
            f"{why}: stopped without a checkpoint of the last steps; the ones before are whole, go on with --resume.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(128 + self.signal)
