"""The parameters of a FANformer: what a GGUF file calls them, and their shapes, both read off the model itself.

Names are llama.cpp's where it has one (`blk.0.attn_q.weight`); ours are `_fan` for the rows that become cosines and
sines, `_a` for the first factor of CoLA linears with `_a_norm` for its norm, and `_residual_gate`.
"""

from dataclasses import dataclass

from fanformer.gguf.file import GGUFFile
from fanformer.model import FANformerConfig
from fanformer.model.footprint import meta_model

# What takes the place of what in the name of a parameter, one after the other
_WORDS = (
    ("model.layers.", "blk."),
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
    ("model.bridge.norm_weight", "bridge_norm.weight"),
    ("model.bridge.scale", "bridge_scale.weight"),
    ("model.bridge.linear", "bridge"),
    ("post_attention_layernorm", "ffn_norm"),
    ("input_layernorm", "attn_norm"),
    ("attention_residual.gate", "attn_residual_gate.weight"),
    ("mlp_residual.gate", "ffn_residual_gate.weight"),
    ("self_attn.", "attn_"),
    ("mlp.", "ffn_"),
    ("fan_layer.projection", "fan"),
    ("o_proj", "output"),
    ("_proj", ""),
    (".input.", "_input."),
    ("_input.factor", "_a"),
    ("_input.norm", "_a_norm"),
    (".output.", "."),
    (".periodic", "_fan"),
    (".linear", ""),
)


@dataclass(frozen=True)
class Parameter:
    """One parameter of a model."""

    parameter: str
    """Its name in the state dict."""
    name: str
    """Its name in a file."""
    shape: tuple[int, ...]
    """(outputs, inputs) of a matrix."""


def parameters(config: FANformerConfig) -> list[Parameter]:
    """Return every parameter of a model in its order; those without a number are left out, a tied head is none."""
    found = []
    for parameter, value in meta_model(config).named_parameters():
        name = parameter
        for theirs, ours in _WORDS:
            name = name.replace(theirs, ours)
        if value.numel():
            found.append(Parameter(parameter, name, tuple(value.shape)))
    return found


def check_parameters(config: FANformerConfig, file: GGUFFile) -> list[Parameter]:
    """Return the parameters of a model after checking that a file's tensors are those, no more and no fewer.

    Raises:
        CheckpointError: if they are not.
    """
    found = parameters(config)
    shapes = {item.name: item.shape for item in found}
    held = {name: info.shape for name, info in file.tensors.items()}
    for name, _ in sorted(shapes.items() ^ held.items()):
        raise file.fail(
            f"its tensors do not fit its metadata: `{name}` is {held.get(name)}, expected {shapes.get(name)}."
        )
    return found
