"""Models of every kind for the tests of GGUF files, and such files made of them without the extra `gguf`."""

from pathlib import Path

from fanformer.quantization.gguf_export import Settings, export_gguf

VARIANTS = {
    "default": {},
    "tied": {"tie_word_embeddings": True},
    "separate-inputs": {"cola_input": "separate", "cola_rank_ratio": 0.5},
    "all-low-rank": {"cola_layers": "all", "cola_rank": 24, "cola_activation": "gelu"},
    "attention-low-rank": {
        "cola_layers": "attention",
        "cola_rank": 24,
        "cola_norm": False,
        "fan_placement": "attention",
    },
    "ffn-low-rank": {"cola_layers": "ffn", "cola_rank": 24, "cola_input": "separate", "cola_activation": "linear"},
    "full-rank": {"cola_rank_ratio": None, "fan_placement": "none"},
    "fan-both": {"fan_placement": "both", "cola_layers": "all", "cola_input": "separate", "cola_rank": 16},
    "fan-projection": {"fan_placement": "projection"},
    "fan-projection-separate": {"fan_placement": "projection", "cola_input": "separate", "cola_rank": 16},
    "fan-projection-full-rank": {"fan_placement": "projection", "cola_rank_ratio": None},
    "fan-layer": {"fan_placement": "layer", "fan_ratio": 0.25},
    "fan-layer-full-rank": {"fan_placement": "layer", "cola_rank_ratio": None, "projection_bias": False},
    "fan-none": {"fan_placement": "none"},
    "fan-none-separate": {"fan_placement": "none", "cola_input": "separate", "cola_rank": 16},
    "no-cosines": {"fan_ratio": 0.01},  # p has no width
    "cosines-only": {"fan_ratio": 0.5, "fan_placement": "both"},  # g has none
    "no-cosines-projection": {"fan_ratio": 0.01, "fan_placement": "projection"},
    "cosines-only-projection": {"fan_ratio": 0.5, "fan_placement": "projection"},
    "cosines-only-separate": {
        "fan_ratio": 0.5,
        "fan_placement": "projection",
        "cola_input": "separate",
        "cola_rank": 16,
    },
    "hybrid": {"norm_placement": "hybrid", "qkv_norm": "qk", "gated_residual": False},
    "pre": {"norm_placement": "pre", "qkv_norm": "none", "hidden_act": "gelu"},
    "linear-act": {"hidden_act": "linear", "projection_bias": False},
    "linear-rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}},
    "llama": {
        "fan_placement": "none",
        "cola_rank_ratio": None,
        "projection_bias": False,
        "norm_placement": "pre",
        "qkv_norm": "none",
        "gated_residual": False,
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
