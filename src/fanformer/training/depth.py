"""How deep a recurrent model thinks in each step of its training: once at first, then as often as a law draws."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from fanformer.errors import ConfigError
from fanformer.loading import load_config
from fanformer.model.configuration_fanformer import Recurrence
from fanformer.training.fields import RunConfig

OF_DEPTH = ("one_step_fraction", "core_learning_rate_scale")
"""Fields of RunConfig for models with recurrent depth alone."""
_ONE_STEP_FRACTION = 0.45
_NEVER = 1e-6
"""What is drawn less often than this is not told."""
_HALVINGS = 200  # of an interval: more than float64 has digits


@dataclass(frozen=True)
class DepthLaw:
    """The number of steps as a function of the run's seed, the optimizer step and the share of the run that is over.

    Attributes:
        seed: of the run.
        one_step_fraction: share of the run in which the core runs once.
        mean: of the number that is drawn afterwards, the model's default.
        probabilities: of 1, 2, ... steps.
    """

    seed: int
    one_step_fraction: float
    mean: int
    probabilities: tuple[float, ...]

    def steps(self, step: int, progress: float) -> int:
        """Return how many steps of the core the optimizer step after `step` others trains.

        Args:
            step: optimizer steps done.
            progress: share of the run that is over, in [0, 1].
        """
        if progress < self.one_step_fraction:
            return 1
        digest = hashlib.blake2b(f"{self.seed},{step},depth".encode(), digest_size=8).digest()
        left = int.from_bytes(digest, "little") / 2**64
        for count, probability in enumerate(self.probabilities, 1):
            left -= probability
            if left < 0:
                return count
        return len(self.probabilities)

    def measured_steps(self, progress: float) -> int:
        """Return how many steps the held-out loss is measured with: those that training has had on average."""
        return 1 if progress < self.one_step_fraction else self.mean

    def in_words(self) -> str:
        """Return the law in one line."""
        drawn = [count for count, probability in enumerate(self.probabilities, 1) if probability > _NEVER]
        law = f"{drawn[0]} to {drawn[-1]} steps, {self.mean} on average" if len(drawn) > 1 else f"{self.mean} steps"
        first = f"one step for {self.one_step_fraction:.0%} of the run, then " if self.one_step_fraction else ""
        return f"recurrent depth: {first}{law}"

    def set_steps(self, model: PreTrainedModel, num_steps: int) -> None:
        """Let every call of `model` that names no number of steps take this one."""
        decoder = model.get_decoder()
        decoder.depth = decoder.depth.changed(decoder.config, num_steps=num_steps)

    def to_dict(self) -> dict[str, Any]:
        """Return the law as run.yaml has it."""
        return asdict(self) | {"probabilities": list(self.probabilities)}


def flattest(largest: int, mean: float) -> tuple[float, ...]:
    """Return the probabilities of 1 ... `largest` with that mean and the largest entropy: a geometric series.

    Of 8 steps and a mean of 4 no number is drawn less often than one time in 12, and 1 to 4 more often than one in 8.
    """

    def series(q: float) -> list[float]:
        weights = [q**count if q <= 1 else q ** (count - largest) for count in range(1, largest + 1)]
        return [weight / sum(weights) for weight in weights]

    low, high = 0.0, 1.0
    while _mean(series(high)) < mean and high < 1e9:
        low, high = high, high * 2
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if _mean(series(middle)) < mean else (low, middle)
    return tuple(series(high))


def _mean(probabilities: Sequence[float]) -> float:
    return sum(count * probability for count, probability in enumerate(probabilities, 1))


def most_steps(recurrence: Recurrence) -> int:
    """Return the largest number of steps that training draws: twice the mean, or the largest that there is."""
    return min(2 * recurrence.mean_steps, recurrence.largest_steps)


def depth_law(model: PreTrainedModel, config: RunConfig, usual: float | None = None) -> DepthLaw:
    """Return the law of a run that has a recurrent depth, or asks for one by a field of the law.

    Args:
        model: that of the run.
        config: the run.
        usual: `one_step_fraction` where the run does not name it; None is that of a new run.

    Raises:
        ConfigError: if a field of the law is set where it has no effect.
    """
    recurrence = getattr(model.config, "recurrence", None)
    fraction, scale = config.schedule.one_step_fraction, config.optimizer.core_learning_rate_scale
    if recurrence is None:
        asked = ("core_learning_rate_scale", scale) if fraction is None else ("one_step_fraction", fraction)
        raise ConfigError(
            f"`{asked[0]}` needs a model with recurrent depth, got {asked[1]} for a plain one: leave it out, or take "
            "a preset such as nano-recurrent."
        )
    mean = recurrence.mean_steps
    if config.corpus.objective == "preferences":  # leaving the base counts, which is measured at its mean
        if fraction is not None:
            raise ConfigError(
                f"`one_step_fraction` has no effect on preferences, got {fraction}: leave it out, all steps are taken."
            )
        return DepthLaw(config.seed, 0.0, mean, (0.0,) * (mean - 1) + (1.0,))
    if fraction is None:
        fraction = usual
    if fraction is None:
        fraction = _ONE_STEP_FRACTION if config.init_from is None or not _has_depth(config.init_from) else 0.0
    return DepthLaw(config.seed, fraction, mean, flattest(most_steps(recurrence), mean))


def _has_depth(folder: str) -> bool:
    """Whether a saved model has a recurrent depth of its own, which it has learnt to use."""
    return getattr(load_config(folder), "recurrence", None) is not None


def core_parameters(model: PreTrainedModel) -> set[int]:
    """Return the ids of the parameters that every step uses: those of the core's blocks."""
    recurrence = getattr(model.config, "recurrence", None)
    if recurrence is None:
        return set()
    blocks: Sequence[nn.Module] = [model.get_decoder().layers[index] for index in recurrence.core]
    return {id(parameter) for block in blocks for parameter in block.parameters()}
