"""Slots on ggml: the engine's streams, of which a step computes those that have something to do."""

from collections.abc import Mapping, Sequence

from fanformer.generation.sampling import Floats, Noise, noise_of
from fanformer.gguf.engine import CHUNK, Engine
from fanformer.server.slots import Slots


class GgmlSlots(Slots):
    """Slots of a GGUF file; torch is never imported."""

    def __init__(self, engine: Engine, known: int, count: int, positions: int) -> None:
        """Take the engine and the memory of all slots.

        Args:
            engine: nobody else's from now on.
            known: how many ids its tokenizer has.
            count: slots.
            positions: tokens that each has room for.

        Raises:
            ConfigError: if the model has fewer positions.
            EngineError: if there is not enough memory.
        """
        self.count, self.positions, self.chunk_tokens = count, positions, CHUNK
        self._engine, self._known = engine, known
        engine.begin(count, positions)

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights."""
        return self._engine.weight_bytes

    @property
    def cache_bytes(self) -> int:
        """Memory of the keys and values of all slots."""
        return self._engine.cache_bytes

    def forward(self, tokens: Mapping[int, Sequence[int]], every: bool = False) -> dict[int, Floats]:
        """Do what `Slots.forward` says."""
        logits = self._engine.forward([tokens.get(slot, ()) for slot in range(self.count)], every)
        return {slot: logits[slot] for slot in tokens}

    def length(self, slot: int) -> int:
        """Return how many tokens a slot has."""
        return self._engine.length(slot)

    def cut(self, slot: int, length: int) -> None:
        """Keep only the first `length` tokens of a slot."""
        self._engine.forget(slot, length)

    def wipe(self, slot: int) -> None:
        """Do what `Slots.wipe` says."""
        self._engine.wipe(slot)

    def noise(self, seed: int) -> Noise:
        """Do what `Slots.noise` says."""
        return noise_of(seed, self._known)
