"""How far a run is, and what learning rate that calls for: two pure functions and the run's length."""

import math
from dataclasses import dataclass

from fanformer.training.fields import RunConfig, ScheduleConfig


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


def run_length(config: RunConfig, rows: int) -> RunLength:
    """Return the length of a run over `rows` training rows; one epoch where the configuration names none."""
    steps = config.length.max_steps
    if config.length.tokens is not None:
        steps = max(1, round(config.length.tokens / config.batch.tokens_per_step))
    elif config.length.epochs is not None or (steps is None and config.length.max_time is None):
        steps = max(1, round((config.length.epochs or 1.0) * rows / config.batch.batch_size))
    return RunLength(steps, config.length.max_time)


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
