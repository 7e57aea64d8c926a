"""The processes of one run: who is who, how the model is spread over them, and what they tell each other.

`launch.py` reads what the launcher says of them. The model file knows nothing of it.
"""

import contextlib
import hashlib
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from fanformer.errors import ConfigError, ProcessLostError
from fanformer.machine.launch import choose_spread, launched_processes, launched_rank
from fanformer.training.other_models import blocks

_PREPARATION_LIMIT = timedelta(days=2)
"""How long processes wait while the first one prepares data; a process that dies ends the wait at once."""
_POLL_SECONDS = 0.02


class Processes:
    """The processes that train one model together; with a single one everything here is free.

    Attributes:
        rank: number of this process, 0 for the one that writes files.
        count: number of processes.
        spread: how the model is spread over them.
    """

    def __init__(self, asked: str, device_type: str) -> None:
        """Join the other processes.

        Args:
            asked: the run's `parallel`.
            device_type: "cpu" or "cuda".

        Raises:
            ConfigError: if the launcher or the device asks for what cannot be done.
        """
        self.spread = choose_spread(asked)
        self.rank, self.count = 0, 1
        self._device_type = device_type
        if self.spread == "none":
            return
        if device_type not in ("cpu", "cuda"):
            raise ConfigError(f"several processes train on cpu or cuda, got {device_type}: start a single one.")
        self.rank, self.count = launched_rank(), launched_processes()
        if device_type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        store, rank, count = next(iter(dist.rendezvous("env://", self.rank, self.count)))
        store = dist.PrefixStore(_agree(store, rank, count), store)
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo", store=store, rank=rank, world_size=count)
        # Plain numbers travel by gloo whatever the device; the long limit is for the preparation of data.
        self._control = dist.new_group(backend="gloo", timeout=_PREPARATION_LIMIT)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def wait(self) -> None:
        """Return once every process has come here."""
        if self.count > 1:
            with _others_may_end():
                dist.barrier(group=self._control)

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Let the main process do a block before the others do it, as where it writes what they read."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()

    def exchange(self, values: Sequence[float]) -> list[list[float]]:
        """Return what every process gave, in the order of their ranks.

        Args:
            values: as many numbers in every process, exact as float64.
        """
        if self.count == 1:
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.float64)
        everyone = [torch.empty_like(mine) for _ in range(self.count)]
        with _others_may_end():
            dist.all_gather(everyone, mine, group=self._control)
        return [part.tolist() for part in everyone]

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums over all processes, the same in each."""
        return [sum(column) for column in zip(*self.exchange(values), strict=True)]

    def wrap(self, model: Any) -> nn.Module:
        """Return what to call in place of `model`, whose gradients are averaged over the processes.

        Args:
            model: a causal language model; FSDP2 shards it in place, block by block where it has `blocks`.
        """
        if self.spread == "none":
            return model
        if self.spread == "ddp":
            devices = [torch.cuda.current_device()] if self._device_type == "cuda" else None
            return nn.parallel.DistributedDataParallel(
                model,
                device_ids=devices,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                # one step of a recurrent depth leaves its bridge out
                find_unused_parameters=getattr(model.config, "recurrence", None) is not None,
            )
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self._device_type, (self.count,))
        for layer in blocks(model):
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    @contextlib.contextmanager
    def accumulating(self, wrapped: Any, last: bool) -> Iterator[None]:
        """Send gradients over the network only in a step's last pass.

        Args:
            wrapped: what `wrap` returned.
            last: whether this is that pass.
        """
        if self.spread == "ddp" and not last:
            with wrapped.no_sync():
                yield
            return
        if self.spread == "fsdp2":
            wrapped.set_requires_gradient_sync(last)
        yield

    def leave(self) -> None:
        """End the group; the process can train alone afterwards."""
        if self.count > 1 and dist.is_initialized():
            dist.destroy_process_group()


@contextlib.contextmanager
def _others_may_end() -> Iterator[None]:
    """Say in our words that a process which this one waited for has ended; gloo raises plain RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessLostError("another process of this job ended: what it said tells why.") from error


def _agree(store: dist.Store, rank: int, count: int) -> str:
    """Return a name that exactly the processes of this start of the job have agreed on.

    The launcher keeps its store when it starts the processes again, and with it the addresses that dead ones left
    there, which gloo would try to reach for ever. So every process announces itself under a name of its own, the first
    one says whom it sees, and once all have found themselves among them, they meet under the names of all.
    """
    me = uuid.uuid4().hex
    store.set(f"here/{rank}", me)
    while True:
        if rank == 0:
            store.set("seen", ",".join(store.get(f"here/{other}").decode() for other in range(count)))
        seen = store.get("seen").decode()
        token = hashlib.sha256(seen.encode()).hexdigest()[:16]
        if seen.split(",")[rank] == me:
            store.set(f"agreed/{token}/{rank}", "")
            if store.check([f"agreed/{token}/{other}" for other in range(count)]):
                return token
        time.sleep(_POLL_SECONDS)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor of any shape with all its parts, of which FSDP2 leaves one in every process; all have to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this process's part of a whole tensor of any shape, spread as `like` is; itself where that is not."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
