"""The outer step of DiLoCo: Nesterov's momentum on the mean pseudo-gradient of a round (arXiv:2311.08105).

Where fragments take turns (arXiv:2501.18512), a step moves the fragment whose gradient there is, and leaves the
weights and the momentum of the others as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fanformer.errors import CheckpointError, ConfigError, DataError

_WEIGHTS, _MOMENTUM = "weights|", "momentum|"


@dataclass(frozen=True)
class OuterSettings:
    """How far and how steadily the weights follow the members; the published values of DiLoCo.

    Attributes:
        learning_rate: of the outer step; 1 without momentum is a plain mean of the members' weights.
        momentum: of the outer step, Nesterov's.
    """

    learning_rate: float = 0.7
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate <= 2:
            raise ConfigError(f"the outer `learning_rate` must be in (0, 2], got {self.learning_rate}.")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"the outer `momentum` must be in [0, 1), got {self.momentum}.")


@dataclass(frozen=True)
class OuterState:
    """What outer steps go on from; a step returns another one and leaves this as it is.

    Attributes:
        weights: float32 by name, of any shape.
        momentum: the running sum of pseudo-gradients, float32 by name; what never moved has none.
    """

    weights: Mapping[str, Tensor]
    momentum: Mapping[str, Tensor]

    def save(self, path: Path) -> None:
        """Write a safetensors file; the caller syncs it and gives it its name."""
        tensors = {_WEIGHTS + name: tensor for name, tensor in self.weights.items()}
        save_file(tensors | {_MOMENTUM + name: tensor for name, tensor in self.momentum.items()}, path)

    @classmethod
    def load(cls, path: Path) -> "OuterState":
        """Read a file that `save` wrote; the same bits.

        Raises:
            CheckpointError: if it cannot be read, or is another.
        """
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"cannot read {path.absolute()} ({type(error).__name__}): go back to an earlier round."
            ) from error
        parts: dict[str, dict[str, Tensor]] = {_WEIGHTS: {}, _MOMENTUM: {}}
        for key, tensor in tensors.items():
            kind, separator, name = key.partition("|")
            if kind + separator not in parts:
                raise CheckpointError(f"{path.absolute()} holds `{key}`, expected the state of a host: name another.")
            parts[kind + separator][name] = tensor
        return cls(parts[_WEIGHTS], parts[_MOMENTUM])


def outer_begin(weights: Mapping[str, Tensor]) -> OuterState:
    """Return the state before the first step.

    Args:
        weights: of any shape; copied, in float32.
    """
    copied = {name: tensor.detach().to("cpu", torch.float32, copy=True) for name, tensor in weights.items()}
    return OuterState(copied, {})


def outer_step(state: OuterState, gradient: Mapping[str, Tensor], settings: OuterSettings) -> OuterState:
    """Return the state after v <- m v + g, w <- w - rate (g + m v).

    Args:
        state: before.
        gradient: g, mean pseudo-gradients by name, in the shapes of the weights; of a fragment only its names.
        settings: m and the rate.

    Raises:
        DataError: if a gradient has no weight of its name and shape.
    """
    weights, momentum = dict(state.weights), dict(state.momentum)
    for name, slope in gradient.items():
        if name not in weights or weights[name].shape != slope.shape:
            raise DataError(f"`{name}` of a pseudo-gradient has no weight of its shape {tuple(slope.shape)}.")
        before = momentum.get(name)
        running = slope.clone() if before is None else settings.momentum * before + slope
        momentum[name] = running
        weights[name] = weights[name] - settings.learning_rate * (slope + settings.momentum * running)
    return OuterState(weights, momentum)
