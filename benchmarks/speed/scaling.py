"""How the cost of a forward pass grows with context, batch and layers: exponents, and what attention's share is.

    python benchmarks/speed/scaling.py [--contexts 256 512 1024 2048 4096 8192] [--rounds 3] [--write]

The default model on random tokens, float32, inference, sizes in turns. The exponent is the slope of log time over
log size, by least squares; for contexts it is given for the whole model and for all but attention, whose time is that
of the same attention alone. Operations say what to expect: attention grows with the square, everything else linearly.
"""

from functools import partial

import torch
import torch.nn.functional as F
from speed import OURS, arguments_of, build, exponent, finish, in_turns, random_ids
from torch import Tensor
from transformers import PreTrainedModel

from fanformer.comparison.ledger import Figure, range_of


@torch.inference_mode()
def forward(model: PreTrainedModel, ids: Tensor) -> None:
    """Compute the hidden states of every token."""
    model.model(input_ids=ids, use_cache=False)


@torch.inference_mode()
def attention_alone(model: PreTrainedModel, length: int) -> None:
    """Do the attention of all layers on random queries, keys and values."""
    config = model.config
    query = torch.randn(1, config.num_attention_heads, length, config.head_dim)
    key, value = (torch.randn(1, config.num_key_value_heads, length, config.head_dim) for _ in range(2))
    for _ in range(config.num_hidden_layers):
        F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def main() -> None:
    """Measure and print."""
    arguments = arguments_of(
        __doc__ or "",
        contexts=(256, 512, 1024, 2048, 4096, 8192),
        batches=(1, 4, 16, 64),
        layers=(6, 12, 24, 48),
        rounds=3,
    )
    result: dict[str, Figure] = {}
    model = build(OURS, max_position_embeddings=max(arguments.contexts)).eval()
    whole = {str(n): partial(forward, model, random_ids(1, n)) for n in arguments.contexts}
    alone = {f"attention {n}": partial(attention_alone, model, n) for n in arguments.contexts}
    seconds = in_turns({**whole, **alone}, arguments.rounds)
    rounds = range(arguments.rounds)

    def slopes(sizes: list[int], times: list[list[float]]) -> Figure:
        return range_of([exponent(sizes, [values[turn] for values in times]) for turn in rounds], "exponent")

    times = [seconds[str(n)] for n in arguments.contexts]
    attention = [seconds[f"attention {n}"] for n in arguments.contexts]
    rest = [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(times, attention, strict=True)]
    result["exponent_of_context"] = slopes(arguments.contexts, times)
    result["exponent_of_context_attention_alone"] = slopes(arguments.contexts, attention)
    result["exponent_of_context_without_attention"] = slopes(arguments.contexts, rest)
    for n, values in zip(arguments.contexts, times, strict=True):
        result[f"seconds_at_context_{n}"] = range_of(values, "s")
    seconds = in_turns(
        {str(n): partial(forward, model, random_ids(n, 64)) for n in arguments.batches}, arguments.rounds
    )
    result["exponent_of_batch"] = slopes(arguments.batches, [seconds[str(n)] for n in arguments.batches])
    del model
    deep = {str(n): build(OURS, num_hidden_layers=n).eval() for n in arguments.layers}
    seconds = in_turns({n: partial(forward, one, random_ids(1, 256)) for n, one in deep.items()}, arguments.rounds)
    result["exponent_of_layers"] = slopes(arguments.layers, [seconds[str(n)] for n in arguments.layers])
    finish("speed-scaling", "how the cost of a forward pass grows", arguments, result)


if __name__ == "__main__":
    main()
