"""The time a run has been training, and what follows from its progress: when to log, to measure, to save, to stop."""

import statistics
import time
from dataclasses import dataclass

from fanformer.training.schedule import RunLength
from fanformer.training.state import LoopState

SHARES = {"log": 100, "evaluate": 5, "save": 5}
"""Into how many parts each of these divides a run, where no number of steps is asked for."""
LONGEST_LOG_STEPS = 50


@dataclass(frozen=True)
class Due:
    """What is to follow a step."""

    log: bool
    evaluate: bool
    save: bool
    stop: bool


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
        self.save_seconds = 0.0
        self.reserved_seconds = 0.0

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
        now = {name: int(self.progress(state.step) * parts) for name, parts in SHARES.items()}
        self._marks = dict(state.marks) or now

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
        due = {name: stop or self._is_due(name, step) for name in SHARES}
        log = due["log"] or step == 1 or step % (self._steps["log"] or LONGEST_LOG_STEPS) == 0
        return Due(log=log, evaluate=due["evaluate"], save=due["save"], stop=stop)

    def _is_out_of_time(self) -> bool:
        limit = self.length.max_seconds
        if limit is None:
            return False
        if self.length.max_steps is None:
            return self.elapsed_seconds >= limit - self.reserved_seconds
        return time.monotonic() - self._started >= limit - self.reserved_seconds - self.save_seconds

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
        self.reserved_seconds = 1.1 * statistics.median(self._evaluation_rates) * tokens_of_the_last
