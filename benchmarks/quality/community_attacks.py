"""What a false member sends in place of its update: nine ways, each as good as its author could make it.

All begin with an honest share of the round, since that is what a check cannot tell from others'; they speak the real
format, and lie in every field that nobody can look up.
"""

import math
import struct
from dataclasses import replace

import torch
from torch import Tensor

from fanformer.community.plan import Task
from fanformer.community.updates import Limits, Shapes, Update, decode_update, encode_update

ATTACKS = ("nan", "scaled", "flipped", "random", "replayed", "oversized", "shapes", "stale", "bias")
STALE_ROUNDS = 3
BIAS = 0.25
"""Norm of the constant bias over that of the update."""
_ANY = Limits(max_tokens=1 << 50)


def data_begin(payload: bytes) -> int:
    """Return where the tensors of a payload begin."""
    return 8 + int(struct.unpack_from("<Q", payload)[0])


class Attacker:
    """A member that joins, trains, and then sends something else."""

    def __init__(self, kind: str, bits: int, seed: int) -> None:
        """Set up.

        Args:
            kind: one of ATTACKS.
            bits: of the updates.
            seed: of its random numbers.
        """
        assert kind in ATTACKS, f"an attack is one of {ATTACKS}, got {kind}"
        self._change = getattr(self, f"_{kind}")
        self._bits, self._seed = bits, seed
        self._generator = torch.Generator().manual_seed(seed)
        self._honest: list[bytes] = []

    def send(self, task: Task, payload: bytes, like: Shapes) -> bytes:
        """Return what it sends.

        Args:
            task: its share.
            payload: the honest update.
            like: shapes of its tensors.
        """
        self._honest.append(payload)
        sent: bytes = self._change(task, payload, like)
        return sent

    def _with(self, update: Update, tensors: dict[str, Tensor]) -> bytes:
        return encode_update(replace(update, tensors=tensors), self._bits)

    def _nan(self, task: Task, payload: bytes, like: Shapes) -> bytes:
        spoilt = bytearray(payload)
        struct.pack_into("<f", spoilt, data_begin(payload), math.nan)  # scales come first
        return bytes(spoilt)

    def _scaled(self, task: Task, payload: bytes, like: Shapes) -> bytes:
        update = decode_update(payload, like, _ANY)
        return self._with(update, {name: 100 * tensor for name, tensor in update.tensors.items()})

    def _flipped(self, task: Task, payload: bytes, like: Shapes) -> bytes:
        update = decode_update(payload, like, _ANY)
        return self._with(update, {name: -tensor for name, tensor in update.tensors.items()})

    def _random(self, task: Task, payload: bytes, like: Shapes) -> bytes:
        update = decode_update(payload, like, _ANY)
        tensors = {
            name: torch.randn(tensor.shape, generator=self._generator) * tensor.square().mean().sqrt()
            for name, tensor in update.tensors.items()
        }
        return self._with(update, tensors)

    def _replayed(self, task: Task, payload: bytes, like: Shapes) -> bytes:
        return self._relabelled(self._honest[0], task, like)

    def _oversized(self, task: Task, payload: bytes, like: Shapes) -> bytes:
        return payload + bytes(4 * len(payload))

    def _shapes(self, task: Task, payload: bytes, like: Shapes) -> bytes:
        update = decode_update(payload, like, _ANY)
        return self._with(update, {name: tensor[:-1] for name, tensor in update.tensors.items()})

    def _stale(self, task: Task, payload: bytes, like: Shapes) -> bytes:
        old = self._honest[-1 - min(STALE_ROUNDS, len(self._honest) - 1)]
        return self._relabelled(old, task, like) if len(self._honest) > STALE_ROUNDS else old

    def _bias(self, task: Task, payload: bytes, like: Shapes) -> bytes:
        update = decode_update(payload, like, _ANY)
        always = torch.Generator().manual_seed(self._seed)
        tensors = {name: torch.randn(tensor.shape, generator=always) for name, tensor in update.tensors.items()}
        size = BIAS * _norm(dict(update.tensors)) / _norm(tensors)
        return self._with(update, {name: update.tensors[name] + size * tensor for name, tensor in tensors.items()})

    def _relabelled(self, payload: bytes, task: Task, like: Shapes) -> bytes:
        """Return a payload with the very same numbers as an update of this round."""
        update = replace(decode_update(payload, like, _ANY), round=task.round, base=task.base)
        fresh = encode_update(update, self._bits)
        return fresh[: data_begin(fresh)] + payload[data_begin(payload) :]


def _norm(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))
