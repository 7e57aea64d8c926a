"""The least time that a training step can take on a machine, operation by operation.

An operation takes at least the larger of its operations over the machine's peak and its bytes over the bandwidth; here
are those of a step in bfloat16 with float32 weights:

- **products**: every linear layer forward, for the gradient of its input and for that of its weight;
- **attention**: causal, half of all pairs, without the scores in memory; 2.5 times the operations backward;
- **between products**: one pass that reads what a product wrote and writes what the next one reads, however many norms,
  activations, Fourier features, rotations and gates are in it; the loss is the pass after the head. Backward it reads
  the gradient and what the product wrote, and writes a gradient;
- **weights**: AdamW reads weight, gradient and two moments and writes three of them; a copy in bfloat16 is made.

So a share of 1 would need every pass fused and every operation at the machine's full rate.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

HALF, WHOLE = 2, 4
"""Bytes of a number in bfloat16 and in float32."""


@dataclass(frozen=True)
class Product:
    """Rows (rows, inputs) times a weight (outputs, inputs)."""

    rows: int
    inputs: int
    outputs: int
    shared: bool
    """Whether an earlier product has read the same rows."""


def products_of(model: PreTrainedModel, batch: int, length: int) -> list[Product]:
    """Return the matrix products of a forward pass over (batch, length) tokens, in order; nothing is computed.

    Raises:
        ValueError: if a matrix of the model is in no product that was seen.
    """
    with FakeTensorMode():  # shapes and no numbers
        return _products(type(model)(model.config), batch, length)


def _products(model: PreTrainedModel, batch: int, length: int) -> list[Product]:
    found: list[Product] = []
    read: list[Tensor] = []  # kept, so that no identity is used twice
    seen: set[int] = set()

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x, weight = inputs[0], module.weight
        assert isinstance(weight, Tensor)
        shared = any(x is other for other in read)
        read.append(x)
        seen.add(id(weight))
        found.append(Product(x.shape[:-1].numel(), weight.shape[1], weight.shape[0], shared))

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(note)
    with torch.no_grad():
        model(input_ids=torch.zeros(batch, length, dtype=torch.long), use_cache=False)
    lookup = model.get_input_embeddings().weight
    missed = [n for n, p in model.named_parameters() if p.dim() == 2 and p is not lookup and id(p) not in seen]
    if missed:
        raise ValueError(f"expected every matrix in a linear layer that runs, but {', '.join(missed)} is in none")
    return found


def roofline_seconds(
    model: PreTrainedModel, batch: int, length: int, flops_per_second: float, bytes_per_second: float
) -> dict[str, float]:
    """Return the least seconds of a training step on (batch, length) tokens by kind of operation, and their `total`.

    Args:
        model: ours or Llama; only its shapes count.
        batch: rows.
        length: tokens a row.
        flops_per_second: the machine's rate of a large bfloat16 product.
        bytes_per_second: its bandwidth, read and written.
    """

    def least(operations: float, moved: float) -> float:
        return max(operations / flops_per_second, moved / bytes_per_second)

    seconds = dict.fromkeys(("products", "attention", "between products", "weights"), 0.0)
    for product in products_of(model, batch, length):
        m, k, n = product.rows, product.inputs, product.outputs
        operations, rows, weight, results = 2 * m * k * n, m * k, k * n, m * n
        forward = backward = least(operations, HALF * (rows + weight + results))
        seconds["products"] += forward + backward + least(operations, HALF * (rows + results) + WHOLE * weight)
        unread = 0 if product.shared else rows
        seconds["between products"] += least(0, HALF * (results + unread) + HALF * (2 * results + unread))
    config = model.config
    width, tokens = config.head_dim * config.num_attention_heads, batch * length
    read = config.head_dim * (config.num_attention_heads + 2 * config.num_key_value_heads)
    operations = 4 * width * tokens * length / 2
    attention = least(operations, HALF * tokens * (read + width)) + least(
        2.5 * operations, HALF * tokens * 2 * (read + width)
    )
    seconds["attention"] = config.num_hidden_layers * attention
    seconds["weights"] = least(0, sum(p.numel() for p in model.parameters()) * (7 * WHOLE + WHOLE + HALF))
    return seconds | {"total": sum(seconds.values())}
