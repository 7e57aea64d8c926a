"""Models of every kind for the tests of GGUF files, and such files made of them without the extra `gguf`."""

from pathlib import Path

from fanformer.gguf.export import Settings, export_gguf
from tests.tiny_models import FULL_RANK, PAPERS_COLA, TUNED, every_rank

VARIANTS = {
    "default": {},
    "tied": {"tie_word_embeddings": True},
    "tuned": TUNED,
    "p-rounded-down": {"fan_multiple": 1},
    "p-of-four": {"fan_multiple": 4, "fan_ratio": 0.3},
    "separate-inputs": {"cola_input": "separate", **every_rank(32)},
    "separate-tuned": {**TUNED, "cola_input": "separate", "gate_up_rank": 32},
    "one-rank": {**every_rank(24), "cola_activation": "gelu", "writer_activation": "gelu"},
    "attention-low-rank": {
        **every_rank(24),
        "gate_up_rank": None,
        "down_rank": None,
        "cola_norm": False,
        "fan_placement": "none",
    },
    "ffn-low-rank": {
        "qkv_rank": None,
        "o_rank": None,
        "cola_input": "separate",
        "cola_activation": "linear",
        "writer_activation": "linear",
        "fan_placement": "ffn",
    },
    "writers-silu": {"writer_activation": "silu", "down_rank": 39},
    "ffn-fan": {"fan_placement": "ffn", "cola_norm": False},
    "papers-cola": {**PAPERS_COLA, "fan_placement": "none"},
    "o-full-rank": {"o_rank": None},
    "full-rank": {**FULL_RANK, "fan_placement": "none"},
    "ffn-fan-separate": {"fan_placement": "ffn", "cola_input": "separate", **every_rank(16)},
    "fan-projection-full-rank": FULL_RANK,
    "fan-layer": {"fan_placement": "layer", "fan_ratio": 0.25},
    "fan-layer-full-rank": {"fan_placement": "layer", **FULL_RANK, "projection_bias": False},
    "fan-none": {"fan_placement": "none"},
    "no-cosines": {"fan_ratio": 0.01},  # p has no width
    "cosines-only": {"fan_ratio": 0.5},  # g has none
    "no-cosines-tuned": {**TUNED, "fan_ratio": 0.01},
    "cosines-only-ffn": {**every_rank(48), "fan_ratio": 0.5, "fan_multiple": 1, "fan_placement": "ffn"},
    "cosines-only-separate": {"fan_ratio": 0.5, "cola_input": "separate", "qkv_rank": 16},
    "hybrid": {"norm_placement": "hybrid", "gated_residual": False},
    "pre": {"norm_placement": "pre", "qkv_norm": "none", "hidden_act": "gelu"},
    "linear-act": {"hidden_act": "linear", "projection_bias": False},
    "linear-rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}},
    "llama": {
        **FULL_RANK,
        "fan_placement": "none",
        "projection_bias": False,
        "norm_placement": "pre",
        "qkv_norm": "none",
        "gated_residual": False,
    },
    "recurrent": {"num_hidden_layers": 3, "prelude_layers": 1, "core_layers": 1, "coda_layers": 1},
    "recurrent-add": {"prelude_layers": 0, "core_layers": 2, "coda_layers": 0, "injection": "add"},
    "recurrent-concat": {
        "num_hidden_layers": 3,
        "prelude_layers": 1,
        "core_layers": 2,
        "coda_layers": 0,
        "injection": "concat",
        "mean_recurrence": 3,
        "max_recurrence": 5,
        "norm_placement": "pre",
    },
    "odd-widths": {"hidden_size": 60, "intermediate_size": 50, "num_attention_heads": 3, "num_key_value_heads": 1},
}
"""Fields of a tiny configuration that, together, use every switch and every value of it."""

STATIC_ROPES = {
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
}
"""What files hold and torch runs, but the engine does not."""


def save(folder: Path, model, tokenizer) -> Path:
    """Save model and tokenizer as one folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def export(folder: Path, kind: str = "f32", output: Path | None = None, **settings) -> Path:
    """Write a model folder as a GGUF file, by default beside it, and return its path."""
    path = output or folder / f"model-{kind}.gguf"
    export_gguf(folder, path, Settings(kind, overwrite=True, **settings))
    return path
