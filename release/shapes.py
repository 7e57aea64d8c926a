"""Shapes that the model in the box may have: the default's block, its proportions those of preset nano."""

from typing import Any

HEAD_DIM = 32
_RANKS = {"qkv_rank": 0.6875, "o_rank": 0.5, "gate_up_rank": 0.5, "down_rank": 0.5}
"""Ranks over the width; multiples of 32, so that their rows fill the blocks of quantized formats."""
_RANK_STEP = 32


def model_fields(layers: int, width: int) -> dict[str, Any]:
    """Return the fields of FANformerConfig that make a shape; vocabulary and positions come with the data.

    Args:
        layers: how many blocks.
        width: hidden_size, a multiple of 64: heads are 32 wide, and two share keys and values.

    Raises:
        ValueError: if there is no such shape.
    """
    if layers < 1 or width < 2 * HEAD_DIM or width % (2 * HEAD_DIM):
        raise ValueError(f"a shape needs layers from 1 and a width that is a multiple of 64, got {layers} x {width}.")
    heads = width // HEAD_DIM
    ranks = {name: max(1, round(share * width / _RANK_STEP)) * _RANK_STEP for name, share in _RANKS.items()}
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": HEAD_DIM,
        **ranks,
    }


def architecture_spec(layers: int, width: int) -> str:
    """Return the shape as `fanformer compare` names architectures; arguments as in `model_fields`."""
    return "fanformer:" + ",".join(f"{name}={value}" for name, value in model_fields(layers, width).items())
