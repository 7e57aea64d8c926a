"""What a run is made of between two steps: weights and optimizer as whole tensors, and the loop's own numbers.

All of it is independent of how many processes train. There is no state of a random number generator: the numbers that
dropout draws are a function of seed, step, micro-batch and process (`seed_pass`), as the order of the rows is.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from fanformer.errors import CheckpointError
from fanformer.training.checkpoint import ADAPTER_FOLDER, OPTIMIZER_FILE
from fanformer.training.optimizers import inner_optimizers
from fanformer.training.parallel import part_like, whole

_SEPARATOR = "|"  # between a parameter's name and a name of its optimizer state


@dataclass
class LoopState:
    """The training loop's numbers after `step` steps; every one is plain JSON.

    Attributes:
        step: optimizer steps done, those whose gradient was left out among them.
        place: rows taken from the order so far; more than step * batch_size where a rollback left rows out.
        elapsed_seconds: wall-clock time of training, over all parts of the run.
        start_up_seconds: of these until the first step ended, compilation included.
        marks: shares of the run at which figures were last logged, measured and saved.
        window_loss: sum of the step losses since the last record.
        window_steps: how many these are.
        window_rows: digest of the rows trained on since the last record.
        window_figures: sums of the steps' other figures since the last record.
        skipped: steps left out since their loss or gradient was not finite.
        skipped_in_row: of these, the last ones without a good one between.
        rollbacks: how often the run went back to a checkpoint after a spike.
        recent_losses: of the last steps, to tell a spike from noise.
        evaluation_due: whether a held-out evaluation follows this step.
        record: the figures logged at this step, empty where none are.
        finished_seconds: the planned time at whose end the run finished, None while it goes on or counts steps.
    """

    step: int = 0
    place: int = 0
    elapsed_seconds: float = 0.0
    start_up_seconds: float = 0.0
    marks: dict[str, int] = field(default_factory=dict)
    window_loss: float = 0.0
    window_steps: int = 0
    window_rows: int = 0
    window_figures: dict[str, float] = field(default_factory=dict)
    skipped: int = 0
    skipped_in_row: int = 0
    rollbacks: int = 0
    recent_losses: list[float] = field(default_factory=list)
    evaluation_due: bool = False
    record: dict[str, Any] = field(default_factory=dict)
    finished_seconds: float | None = None


def seed_pass(seed: int, step: int, micro_step: int, rank: int) -> None:
    """Make the random numbers of one forward and backward pass a function of these four.

    Args:
        seed: of the run.
        step: optimizer steps done before this one.
        micro_step: number of the pass within the step.
        rank: number of the process.
    """
    digest = hashlib.blake2b(f"{seed},{step},{micro_step},{rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what a model's state dict holds, a tied weight once only, under the first of its names."""
    first_names = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    return {name: tensor for name, tensor in model.state_dict().items() if name in first_names}


def parameter_names(model: nn.Module) -> dict[nn.Parameter, str]:
    """Return every parameter's name; a tied one has its first."""
    return {parameter: name for name, parameter in model.named_parameters()}


def _state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Yield the optimizer's tensors under names that say which parameter they belong to, in a fixed order."""
    names = parameter_names(model)
    for part in inner_optimizers(optimizer):
        for group in part.param_groups:
            for parameter in group["params"]:
                for key, value in sorted(part.state.get(parameter, {}).items()):
                    yield f"{names[parameter]}{_SEPARATOR}{key}", value


class Snapshot:
    """A copy of weights and optimizer in main memory, that a background thread can write while training goes on.

    The memory is allocated once and used again by the next copy, so a copy must be written before the next is taken.
    """

    def __init__(self, keep: bool) -> None:
        """Set up.

        Args:
            keep: whether this process keeps what it gathers; all processes must take part in gathering.
        """
        self._keep = keep
        self.weights: dict[str, Tensor] = {}
        self.optimizer: dict[str, Tensor] = {}

    def take(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Copy the model's and the optimizer's tensors as they are now."""
        self.weights = self._copy(iter(model_tensors(model).items()), self.weights)
        self.optimizer = self._copy(_state_tensors(model, optimizer), self.optimizer)

    @torch.no_grad()
    def _copy(self, tensors: Iterator[tuple[str, Tensor]], before: dict[str, Tensor]) -> dict[str, Tensor]:
        copies: dict[str, Tensor] = {}
        for name, tensor in tensors:
            full = whole(tensor.detach())
            if not self._keep:
                continue
            target = before.get(name)
            if target is None or target.shape != full.shape or target.dtype != full.dtype:
                target = torch.empty(full.shape, dtype=full.dtype, pin_memory=full.is_cuda)
            copies[name] = target.copy_(full)
        return copies

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(
            tensor.numel() * tensor.element_size() for tensor in [*self.weights.values(), *self.optimizer.values()]
        )

    def save_optimizer(self, folder: Path) -> None:
        """Write the optimizer's tensors."""
        save_file(self.optimizer, folder / OPTIMIZER_FILE)


@torch.no_grad()
def restore_model(model: PreTrainedModel, checkpoint: Path) -> None:
    """Put a checkpoint's weights into a model, which may be spread over processes.

    Raises:
        CheckpointError: if they are those of another model.
    """
    if (checkpoint / ADAPTER_FOLDER).is_dir():
        from fanformer.training.adapters import restore_adapter

        restore_adapter(model, checkpoint / ADAPTER_FOLDER)
        return
    saved: dict[str, Tensor] = {}
    for path in sorted(checkpoint.glob("model*.safetensors")):
        saved |= load_file(path)
    wanted = model_tensors(model)
    differing = sorted(
        name
        for name in saved.keys() | wanted.keys()
        if name not in saved or name not in wanted or saved[name].shape != wanted[name].shape
    )
    if differing:
        raise CheckpointError(
            f"the weights in {checkpoint} do not fit this model, `{differing[0]}` first: "
            "resume with the model that the run began with."
        )
    for name, tensor in wanted.items():
        tensor.copy_(part_like(saved[name].to(tensor.device), tensor))


@torch.no_grad()
def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Put a checkpoint's optimizer state back, spread as the parameters are now.

    Raises:
        CheckpointError: if it belongs to other parameters.
    """
    tensors = load_file(checkpoint / OPTIMIZER_FILE)
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parameter, _, key = name.rpartition(_SEPARATOR)
        by_parameter.setdefault(parameter, {})[key] = tensor
    names = parameter_names(model)
    for part in inner_optimizers(optimizer):
        part.state.clear()
        for group in part.param_groups:
            for parameter in group["params"]:
                state = by_parameter.pop(names[parameter], None)
                if state is not None:
                    part.state[parameter] = {key: _placed(value, parameter) for key, value in state.items()}
    if by_parameter:
        raise CheckpointError(
            f"{checkpoint / OPTIMIZER_FILE} holds state of `{next(iter(by_parameter))}`, which is not trained here: "
            "resume with the model and optimizer that the run began with."
        )


def _placed(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """Return a tensor of the optimizer where its parameter is, in memory of its own.

    All tensors of a file are parts of one buffer, aligned as they happen to lie in it, and products of a matrix that
    lies elsewhere may be summed in another order.
    """
    value = value.to(parameter.device, copy=True)
    return value if value.ndim == 0 else part_like(value, parameter)
