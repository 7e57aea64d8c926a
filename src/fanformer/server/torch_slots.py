"""Slots on torch: one block of memory a layer for the keys and values of all slots, written where each text has got to.

Of 8 texts of 128 tokens, 4 layers of the default on one core, a step took 0.032 CPU seconds so, 0.046 with a cache for
each text that is stacked for every step, and 0.101 with a forward pass for each text (2026-11-29).
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from fanformer.errors import ConfigError
from fanformer.generation.depth import cache_layers
from fanformer.generation.fast_decoding import fast_decoding
from fanformer.generation.sampling import Floats, Noise
from fanformer.model.recurrence_fanformer import CACHE
from fanformer.server.slots import Shown, Slots, Steps

_CHUNK = 128


class _Step:
    """Which slots a step is for, and where its tokens go: what all layers of the cache read."""

    def __init__(self, count: int, positions: int) -> None:
        self.count, self.positions = count, positions
        self.first, self.after = 0, count
        self.places = torch.zeros(count, 1, dtype=torch.int64)  # (B, T)
        self.used = 1


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, (count, G, positions + 1, K) each; the last place takes what nobody reads."""

    def __init__(self, step: _Step) -> None:
        super().__init__()
        self._step = step
        self.num_bytes = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the memory, for states (B, G, T, K)."""
        cells = self._step.positions + 1
        self.keys = key_states.new_zeros(self._step.count, key_states.shape[1], cells, key_states.shape[3])
        self.values = value_states.new_zeros(self._step.count, value_states.shape[1], cells, value_states.shape[3])
        self.num_bytes = self.keys.nbytes + self.values.nbytes
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write states (B, G, T, K) of the step's slots; return theirs so far, (B, G, S, K)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        step = self._step
        found = []
        for kept, new in ((self.keys, key_states), (self.values, value_states)):
            assert kept is not None
            window = kept[step.first : step.after]
            rows = torch.arange(len(window), device=window.device)[:, None]
            window[rows, :, step.places] = new.transpose(1, 2)
            found.append(window[:, :, : step.used])
        return found[0], found[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys a mask covers, and where they begin."""
        return self._step.used, 0

    def get_seq_length(self) -> int:
        """Return the number of places in use."""
        return self._step.used

    def get_max_length(self) -> int:
        """Return the most tokens of a slot."""
        return self._step.positions


class TorchSlots(Slots):
    """Slots of a model of `transformers` whose layers all attend to the whole text."""

    def __init__(self, model: PreTrainedModel, known: int, count: int, positions: int) -> None:
        """Take the model and the memory of all slots.

        Args:
            model: in evaluation mode, where it is and in its dtype.
            known: how many ids its tokenizer has.
            count: slots.
            positions: tokens that each has room for.

        Raises:
            ConfigError: if a layer keeps less than the whole text, so that a slot could not be cut.
        """
        config = model.config.get_text_config()
        kinds = {type(layer) for layer in DynamicCache(config=config).layers}
        if kinds - {DynamicLayer}:
            names = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise ConfigError(f"a served model must attend to its whole text in every layer, got {names}.")
        self.count, self.positions, self.chunk_tokens = count, positions, _CHUNK
        self._model, self._known = model, known
        self._step = _Step(count, positions)
        recurrence = getattr(config, "recurrence", None)
        if recurrence is not None:
            self.steps = Steps(model.get_decoder().depth.largest, recurrence.largest_steps)
        self._depths = [1 if self.steps is None else self.steps.most] * count
        self._layers = [_SlotLayer(self._step) for _ in range(cache_layers(model, max(self._depths)))]
        self._lengths = [0] * count
        self._additive = config._attn_implementation == "eager"
        self._open = ExitStack()
        self._open.enter_context(fast_decoding(model))
        self.forward({slot: [0] for slot in range(count)})  # takes the memory now, not when requests wait
        for slot in range(count):
            self.cut(slot, 0)
        if self.steps is not None:
            self._depths = [self.steps.usual] * count

    def depth(self, slot: int) -> int | None:
        """Return how many steps a slot's text takes; None where the model has no recurrent depth."""
        return None if self.steps is None else self._depths[slot]

    def think(self, slot: int, num_steps: int) -> None:
        """Do what `Slots.think` says."""
        assert self._lengths[slot] == 0 or self._depths[slot] == num_steps, "what a slot holds has another depth"
        self._depths[slot] = num_steps

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights."""
        return sum(parameter.nbytes for parameter in self._model.parameters())

    @property
    def cache_bytes(self) -> int:
        """Memory of the keys and values of all slots."""
        return sum(layer.num_bytes for layer in self._layers)

    @torch.inference_mode()
    def forward(self, tokens: Mapping[int, Sequence[int]], every: bool = False) -> dict[int, Floats]:
        """Do what `Slots.forward` says."""
        step, lengths = self._step, self._lengths
        width = len(next(iter(tokens.values())))
        assert {len(row) for row in tokens.values()} == {width}, "equally many tokens for every slot"
        first, after = min(tokens), max(tokens) + 1
        ids = torch.zeros(after - first, width, dtype=torch.int64)
        positions = torch.zeros(after - first, width, dtype=torch.int64)
        places = torch.full((after - first, width), self.positions)
        for slot, row in tokens.items():
            ids[slot - first] = torch.tensor(row)
            positions[slot - first] = torch.arange(lengths[slot], lengths[slot] + width)
            places[slot - first] = positions[slot - first]
        used = max(lengths[slot] for slot in tokens) + width
        assert used <= self.positions, "more tokens than a slot has room for"
        device = self._model.device
        step.first, step.after, step.used, step.places = first, after, used, places.to(device)
        seen = (torch.arange(used) <= positions[..., None])[:, None].to(device)  # (B, 1, T, S)
        deepest, depth = max(self._depths[slot] for slot in tokens), {}
        if self.steps is not None:
            rows = [self._depths[slot] if slot in tokens else 1 for slot in range(first, after)]
            alike = all(self._depths[slot] == deepest for slot in tokens)
            depth = {"num_steps": deepest if alike else torch.tensor(rows, device=device)}
        output = self._model(
            **self._inputs(ids.to(device), tokens),
            attention_mask=self._masked(seen),
            position_ids=positions.to(device),
            use_cache=True,
            logits_to_keep=0 if every else 1,
            **{CACHE: Cache(layers=self._layers[: cache_layers(self._model, deepest)])},
            **depth,
        )
        for slot in tokens:
            lengths[slot] += width
        logits = output.logits.float().cpu().numpy()
        return {slot: logits[slot - first] for slot in tokens}

    def _inputs(self, ids: Tensor, tokens: Mapping[int, Sequence[int]]) -> dict[str, Tensor]:
        """Return what the model is given of ids (B, T), those of the step's slots in their order, 0 for idle ones."""
        return {"input_ids": ids}

    def _masked(self, seen: Tensor) -> Tensor:
        """Return the mask (B, 1, T, S) in the form that the model's attention takes."""
        if not self._additive:
            return seen
        dtype = self._model.dtype
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)

    def length(self, slot: int) -> int:
        """Return how many tokens a slot has."""
        return self._lengths[slot]

    def cut(self, slot: int, length: int) -> None:
        """Keep only the first `length` tokens of a slot."""
        assert 0 <= length <= self._lengths[slot]
        self._lengths[slot] = length

    @torch.inference_mode()
    def wipe(self, slot: int) -> None:
        """Do what `Slots.wipe` says."""
        self._lengths[slot] = 0
        for layer in self._layers:
            for kept in (layer.keys, layer.values):
                assert kept is not None
                kept[slot].zero_()

    def noise(self, seed: int) -> Noise:
        """Return the random stream of a seed, as `GumbelNoise` has it."""
        generator = torch.Generator().manual_seed(seed)
        vocab_size, known = self._model.config.vocab_size, self._known
        return lambda: torch.empty(vocab_size).exponential_(generator=generator)[:known].numpy()

    def close(self) -> None:
        """Leave the model as it was."""
        self._open.close()


class MediaSlots(TorchSlots):
    """Slots of a FANformer with towers: texts about pictures and recordings beside plain ones, in the same steps."""

    def __init__(self, model: PreTrainedModel, known: int, count: int, positions: int) -> None:
        """Take the model and the memory of all slots, as `TorchSlots` does."""
        self._shown: list[tuple[Shown, Tensor] | None] = [None] * count
        super().__init__(model, known, count, positions)

    def show(self, slot: int, shown: Shown | None) -> None:
        """Do what `Slots.show` says."""
        self._shown[slot] = None if shown is None else (shown, torch.tensor(shown.places))

    def _inputs(self, ids: Tensor, tokens: Mapping[int, Sequence[int]]) -> dict[str, Tensor]:
        """Return embeddings (B, T, D), what is shown at its places, and which adapters work on each row (B,)."""
        embeddings = self._model.get_input_embeddings()(ids)
        modality = torch.zeros(len(ids), dtype=torch.int64)
        for slot, row in tokens.items():
            found = self._shown[slot]
            if found is None:
                continue
            shown, places = found
            at, start = slot - self._step.first, self._lengths[slot]
            modality[at] = shown.modality
            inside = ((places >= start) & (places < start + len(row))).nonzero()[:, 0]
            if len(inside):
                embeddings[at, places[inside] - start] = shown.embeddings[inside].to(embeddings.dtype)
        return {"inputs_embeds": embeddings, "modality_ids": modality.to(ids.device)}
