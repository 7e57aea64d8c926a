"""What a model costs to hold and to run: parameters by part, operations per token, memory."""

import re
from collections import Counter
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedConfig, PreTrainedModel

import fanformer.model  # noqa: F401  registers the Auto classes

OPERATIONS = (
    "2 x weights of all matrix products + 4 L H K T for attention (every query against T keys); training is 3 x that"
)
"""What every figure of floating-point operations per token counts, a multiply-add as 2; T is the sequence length.

The head is a matrix product, the embedding's lookup is none. Causal attention counts whole, as in the field's tables of
model FLOPs utilisation, so that they compare: of its T keys a query at position t attends to t + 1, (T + 1) / 2 on
average, and a kernel that skips the others does about half of it.

Source: PaLM, arXiv:2204.02311, appendix B: 12 L H K T a token for attention, forward and backward.
"""
_BLOCK = re.compile(r"\.layers\.(\d+)\.")
_NAMES = {
    **{name: name for name in ("qkv_input", "gate_up_input", "fan_layer")},
    **{f"{name}_proj": name for name in ("q", "k", "v", "o", "gate", "up", "down")},
    "attention_residual": "gates",
    "mlp_residual": "gates",
    "bridge": "bridge",
    "embed_tokens": "embedding",
    "lm_head": "head",
}
_BESIDE_TEXT = {
    **{name: name for name in ("vision_tower", "audio_tower", "projectors")},
    **dict.fromkeys(("lora_A", "lora_B"), "adapters"),
}
"""What no token of a text goes through."""


@dataclass(frozen=True)
class Footprint:
    """Counts of one model; parameters are numbers, memory is in bytes, operations are those of OPERATIONS."""

    total: int
    trainable: int
    parts: dict[str, int]
    """Parameters of each part (see `part_of`) over all layers, in the order of the model."""
    layer_parts: dict[str, int]
    """Parameters of each part in the last block; the first one may have a norm more."""
    matrix_weights: int
    """Weights that a token of a text is multiplied with: all matrices, the embedding only where it is the head too;
    those of a recurrent depth's core once for every step, of which the mean of training is counted."""
    sequence_length: int
    """T of the figures below: the model's longest sequence, 2048 where nothing limits it."""
    attention_operations: int
    """4 L H K T: a token's query against T keys, and the weighted sum of T values; L counts every block that runs; 0
    without attention."""
    cache_bytes_per_token: dict[str, int]
    """Keys and values, 2 L G K numbers, by dtype; L counts every block that runs; 0 without attention."""

    @property
    def without_embeddings(self) -> int:
        """Parameters besides embedding and head."""
        return self.total - self.parts.get("embedding", 0) - self.parts.get("head", 0)

    @property
    def per_layer(self) -> int:
        """Parameters of the last block."""
        return sum(self.layer_parts.values())

    def forward_operations_at(self, length: int) -> int:
        """Return the operations of a forward pass per token in rows of `length` tokens."""
        return 2 * self.matrix_weights + self.attention_operations * length // self.sequence_length

    @property
    def forward_operations(self) -> int:
        """Operations of a forward pass per token, at sequence length T."""
        return self.forward_operations_at(self.sequence_length)

    @property
    def training_operations(self) -> int:
        """Operations of a training step per token: the backward pass costs twice the forward pass."""
        return 3 * self.forward_operations

    @property
    def weight_bytes(self) -> dict[str, int]:
        """Memory of the weights by dtype."""
        return {"float32": 4 * self.total, "bfloat16": 2 * self.total}

    @property
    def training_bytes(self) -> int:
        """Memory of weights, gradients and AdamW's two averages in float32, without activations."""
        return 16 * self.trainable


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the causal language model of `config`, with the towers that it has, without memory for its weights."""
    has_towers = config.model_type == "fanformer_multimodal"
    with torch.device("meta"):
        return (AutoModelForMultimodalLM if has_towers else AutoModelForCausalLM).from_config(config)


def part_of(name: str) -> str:
    """Return the part that the parameter called `name` belongs to; "other" is what only other architectures have."""
    words = name.split(".")
    for names in (_BESIDE_TEXT, _NAMES):
        for word in words:
            if word in names:
                return names[word]
    if "norm" in name:
        return "norms" if _BLOCK.search(f".{name}") else "final_norm"
    return "other"


def footprint(config: PreTrainedConfig, num_steps: int | None = None) -> Footprint:
    """Count the model of `config`, which is built on the meta device only.

    Args:
        config: of any causal language model, with towers or without.
        num_steps: how often a recurrent depth runs its core; None is the mean of its training.
    """
    model = meta_model(config)
    config = config.get_text_config()
    recurrence, executed = getattr(config, "recurrence", None), list(range(config.num_hidden_layers))
    steps = 1
    if recurrence is not None:
        steps = num_steps or recurrence.mean_steps
        executed = recurrence.executed(steps)
    runs = Counter(executed)
    parts: Counter[str] = Counter()
    last_block: Counter[str] = Counter()
    last = config.num_hidden_layers - 1
    matrices = 0
    for name, parameter in model.named_parameters():
        count = parameter.numel()
        parts[part_of(name)] += count
        if part_of(name) in _BESIDE_TEXT.values():
            continue
        block = _BLOCK.search(f".{name}")
        if block is not None and int(block[1]) == last:
            last_block[part_of(name)] += count
        is_lookup = parameter is model.get_input_embeddings().weight
        if parameter.dim() > 1 and (not is_lookup or parameter is model.get_output_embeddings().weight):
            outside = steps - 1 if part_of(name) == "bridge" else 1
            matrices += count * (outside if block is None else runs[int(block[1])])
    heads = getattr(config, "num_attention_heads", 0)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1)
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads
    cached = 2 * len(executed) * key_value_heads * head_dim
    length = getattr(config, "max_position_embeddings", 2048)
    return Footprint(
        total=model.num_parameters(),
        trainable=model.num_parameters(only_trainable=True),
        parts=dict(+parts),
        layer_parts=dict(+last_block),
        matrix_weights=matrices,
        sequence_length=length,
        attention_operations=4 * len(executed) * heads * head_dim * length,
        cache_bytes_per_token={"float32": 4 * cached, "bfloat16": 2 * cached},
    )
