"""AdamW and Muon over a model's parameters, as one optimizer whose groups carry their own learning rates."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fanformer.training.fields import OptimizerConfig
from fanformer.training.parallel import part_like, whole

# Newton-Schulz iteration x <- a x + (b A + c A^2) x with A = x x^T. Source: Muon, kellerjordan.github.io/posts/muon.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5
# What an orthogonalised update of m outputs by n inputs is multiplied with. Sources: AdamW's size, arXiv:2502.16982,
# section 2.2; the spectral condition, under which all layers change their outputs alike, arXiv:2310.17813, section 3.
_SCALINGS: dict[str, Callable[[int, int], float]] = {
    "adamw": lambda outputs, inputs: 0.2 * max(outputs, inputs) ** 0.5,
    "spectral": lambda outputs, inputs: (outputs / inputs) ** 0.5,
}


_READERS = {
    "qkv_input": ("q_proj", "k_proj", "v_proj"),
    "gate_up_input": ("gate_proj", "up_proj"),
    "input": ("output",),
}
"""What holds a first factor, and the layers beside it that read what that gives."""


def orthogonalize(matrices: Tensor) -> Tensor:
    """Bring the singular values of each matrix near 1 by five Newton-Schulz iterations.

    Args:
        matrices: (n, rows, columns), in the dtype to compute in.

    Returns:
        (n, rows, columns), singular values between about 0.7 and 1.2 where they were not tiny.
    """
    a, b, c = _NEWTON_SCHULZ
    x = matrices / torch.linalg.matrix_norm(matrices, keepdim=True).clamp(min=1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class BlockMuon(torch.optim.Muon):
    """torch's Muon, but stored factors are blocks of their own, equal shapes go as one batch, and updates are scaled.

    CoLA factors that read the same input are stored as one weight; a group's `blocks` says how many matrices are
    stacked in each of its weights, and each is orthogonalised by itself. The products run in bfloat16 on CUDA, as in
    torch, and in float32 elsewhere, where bfloat16 is often emulated. A weight that FSDP2 spreads over processes is
    gathered for this: every process computes the whole update and keeps its part.

    Args:
        params: groups of weights; `blocks` of a group is how many matrices are stacked in each.
        scaling: "adamw" or "spectral", as `OptimizerConfig.muon_scaling`.
        **settings: torch's.
    """

    def __init__(self, params: Any, scaling: str = "adamw", **settings: Any):
        super().__init__(params, **settings)
        self.scaling = _SCALINGS[scaling]

    @torch.no_grad()
    def step(self) -> None:
        """Update every weight that has a gradient."""
        for group in self.param_groups:
            batches: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight.grad)
                average = state["momentum_buffer"].lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(average, group["momentum"]) if group["nesterov"] else average
                update = whole(update).view(group["blocks"], -1, weight.shape[1])
                batches[update.shape[1:]].append((weight, update))
            for shape, batch in batches.items():
                self._update(batch, group, self.scaling(*shape))

    def _update(self, batch: list[tuple[nn.Parameter, Tensor]], group: dict[str, Any], scale: float) -> None:
        """Apply the orthogonalised updates times `scale`."""
        stacked = torch.cat([update for _, update in batch])
        dtype = torch.bfloat16 if stacked.is_cuda else torch.float32
        directions = orthogonalize(stacked.to(dtype)).to(stacked.dtype).split(group["blocks"])
        for (weight, _), direction in zip(batch, directions, strict=True):
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(part_like(direction.reshape(weight.shape), weight), alpha=-group["lr"] * scale)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon on the matrices of the blocks and AdamW on everything else, stepped together."""

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW):
        self.muon, self.adamw = muon, adamw
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        # The very same groups, so that the schedule, which writes into ours, reaches both optimizers.
        self.param_groups = [*muon.param_groups, *adamw.param_groups]

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        self.muon.step()
        self.adamw.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients."""
        for part in (self.muon, self.adamw):
            part.zero_grad(set_to_none)


def inner_optimizers(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """Return the optimizers that hold the state: the two of MuonWithAdamW, or the one given."""
    return [optimizer.muon, optimizer.adamw] if isinstance(optimizer, MuonWithAdamW) else [optimizer]


def split_parameters(model: PreTrainedModel) -> dict[str, list[tuple[nn.Parameter, int]]]:
    """Sort the parameters by role, each with the number of matrices stacked in it.

    Returns:
        "embedding", "head" (empty when tied), of the blocks "matrices" and "factors" of low-rank layers, and "vectors"
        (norms, biases, gates).
    """
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    blocks = {
        id(module.factor.weight): module.count
        for module in model.modules()
        if hasattr(module, "factor") and module.factor is not None
    }
    factors = _factors(model)
    roles: dict[str, list[tuple[nn.Parameter, int]]] = {
        role: [] for role in ("embedding", "head", "matrices", "factors", "vectors")
    }
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if parameter is embedding:
            role = "embedding"
        elif parameter is head:
            role = "head"
        elif parameter.ndim != 2:
            role = "vectors"
        else:
            role = "factors" if id(parameter) in factors else "matrices"
        roles[role].append((parameter, blocks.get(id(parameter), 1)))
    return roles


def _factors(model: nn.Module) -> set[int]:
    """Return the ids of all parameters of low-rank layers: of the first factor, and of whatever reads its output."""
    found: set[int] = set()
    for module in model.modules():
        for name, readers in _READERS.items():
            source = getattr(module, name, None)
            if source is not None and getattr(source, "factor", None) is not None:
                parts = [source, *(getattr(module, reader) for reader in readers)]
                found |= {id(parameter) for part in parts for parameter in part.parameters()}
    return found


def create_optimizer(model: PreTrainedModel, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return the run's optimizer; weight decay falls on the matrices of the blocks and the LM head only."""
    roles = split_parameters(model)
    plain = {role: [parameter for parameter, _ in members] for role, members in roles.items()}
    rate, decay = config.learning_rate, config.weight_decay
    # A tied embedding is the head too, which the steps of an embedding would destroy.
    embedding_scale = config.embedding_learning_rate_scale if plain["head"] else 1.0
    groups: list[dict[str, Any]] = [
        {"params": plain["embedding"], "lr": rate * embedding_scale, "weight_decay": 0.0},
        {"params": plain["head"], "lr": rate, "weight_decay": decay},
        {"params": plain["vectors"], "lr": rate, "weight_decay": 0.0},
    ]
    if config.optimizer == "adamw":
        groups.append({"params": plain["matrices"] + plain["factors"], "lr": rate, "weight_decay": decay})
    core: set[int] = set()
    scale_of_core = config.core_learning_rate_scale or 1.0
    if scale_of_core != 1.0:
        from fanformer.training.depth import core_parameters

        core = core_parameters(model)
    groups = _slower(groups, core, scale_of_core)
    adamw = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), fused=True)
    if config.optimizer == "adamw":
        return adamw
    muon_rate = rate * config.muon_learning_rate_scale
    scales = {"matrices": 1.0, "factors": config.muon_factor_scale}
    members = {id(parameter): (scales[role], count) for role in scales for parameter, count in roles[role]}
    stacks: dict[tuple[float, int], list[nn.Parameter]] = defaultdict(list)
    for parameter in model.parameters():
        if id(parameter) in members:
            stacks[members[id(parameter)]].append(parameter)
    muon_groups: list[dict[str, Any]] = [
        {"params": stack, "blocks": count, "lr": muon_rate * scale}
        for (scale, count), stack in sorted(stacks.items(), key=lambda item: item[0])
    ]
    muon = BlockMuon(
        _slower(muon_groups, core, scale_of_core),
        config.muon_scaling,
        lr=muon_rate,
        weight_decay=decay,
        momentum=config.muon_momentum,
    )
    return MuonWithAdamW(muon, adamw)


def _slower(groups: list[dict[str, Any]], core: set[int], scale: float) -> list[dict[str, Any]]:
    """Return the groups with parameters; those of a recurrent depth's core have some with `scale` times the rate."""
    found = []
    for group in groups:
        for is_core, factor in ((False, 1.0), (True, scale)):
            members = [parameter for parameter in group["params"] if (id(parameter) in core) is is_core]
            if members:
                found.append({**group, "params": members, "lr": group["lr"] * factor})
    return found
