"""Fields that several tests give the tiny configuration."""

from fanformer.model.configuration_fanformer import RANKS

FULL_RANK = dict.fromkeys(RANKS)
"""No layer has factors."""
TUNED = {
    "fan_placement": "ffn",
    "fan_multiple": 1,
    "qkv_rank": 48,
    "o_rank": None,
    "gate_up_rank": 48,
    "down_rank": None,
}
"""The block of preset `92m-tuned`: Fourier features between the factors of gate and up, plain matrices at the ends."""
PAPERS_COLA = {"cola_input": "separate", "cola_norm": False, "writer_activation": "silu"}
"""CoLA as published: a first factor for each layer, no norm between the factors, SiLU in all of them."""


def every_rank(rank: int | None) -> dict[str, int | None]:
    """Return the fields that give all layers the same rank."""
    return dict.fromkeys(RANKS, rank)
