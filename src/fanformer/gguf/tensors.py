"""The tensors of a FANformer: their names in GGUF and in a state dict, and their shapes; needs neither torch nor numpy.

Names are llama.cpp's where it has one (`blk.0.attn_q.weight`); ours are `_fan` for the rows that become cosines and
sines, `_a` for the first factor of CoLA linears with `_a_norm` for its norm, and `_residual_gate`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from fanformer.errors import CheckpointError
from fanformer.gguf.architecture import Architecture, Factors
from fanformer.gguf.file import GGUFFile, TensorInfo


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a model."""

    name: str
    """In GGUF."""
    parameter: str
    """In the state dict of `FANformerForCausalLM`."""
    shape: tuple[int, ...]
    """(outputs, inputs) of a matrix."""
    role: Literal["embedding", "head", "matrix", "vector"]


def tensor_specs(model: Architecture) -> list[TensorSpec]:
    """Return every tensor of a model, in the order of the forward pass; those without a number are left out."""
    specs = [TensorSpec("token_embd.weight", "model.embed_tokens.weight", (model.vocab_size, model.hidden_size),
                        "embedding")]  # fmt: skip
    for layer in range(model.num_hidden_layers):
        specs += _layer(model, layer)
    specs.append(_vector("output_norm.weight", "model.norm.weight", model.hidden_size))
    if not model.tie_word_embeddings:
        specs.append(TensorSpec("output.weight", "lm_head.weight", (model.vocab_size, model.hidden_size), "head"))
    return [spec for spec in specs if min(spec.shape) > 0]


def check_tensors(model: Architecture, file: GGUFFile) -> dict[str, TensorInfo]:
    """Return the file's tensors by name after checking that they are those of `model`, no more and no fewer.

    Raises:
        CheckpointError: if one is missing, unknown or of another shape, or if a norm, gate or bias is not float32.
    """
    # a block count that lies would otherwise make us list millions of tensors
    if model.num_hidden_layers > len(file.tensors):
        raise file.fail(f"claims {model.num_hidden_layers} blocks, but has {len(file.tensors)} tensors.")
    specs = {spec.name: spec for spec in tensor_specs(model)}
    for verb, names in (("lacks", specs.keys() - file.tensors.keys()), ("has", file.tensors.keys() - specs.keys())):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise file.fail(f"its tensors do not fit its metadata: it {verb} `{min(names)}`{more}.")
    for name, spec in specs.items():
        info = file.tensors[name]
        if info.shape != spec.shape:
            raise file.fail(f"its tensors do not fit its metadata: `{name}` is {info.shape}, expected {spec.shape}.")
        if spec.role == "vector" and info.kind.name != "f32":
            raise file.fail(
                f"stores `{name}` as {info.kind.name}, expected f32: norms, gates and biases are never cut."
            )
    return {name: file.tensors[name] for name in specs}


def open_model(path: str) -> tuple[GGUFFile, Architecture]:
    """Read and check a file's header, metadata and list of tensors.

    Raises:
        CheckpointError: if anything is not what it must be.
    """
    try:
        file = GGUFFile(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    model = Architecture.from_file(file)
    check_tensors(model, file)
    return file, model


def _vector(name: str, parameter: str, width: int) -> TensorSpec:
    return TensorSpec(name, parameter, (width,), "vector")


def _linear(name: str, parameter: str, outputs: int, inputs: int, bias: bool) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{name}.weight", f"{parameter}.weight", (outputs, inputs), "matrix")
    if bias:
        yield _vector(f"{name}.bias", f"{parameter}.bias", outputs)


def _first_factor(factors: Factors, name: str, parameter: str, inputs: int) -> Iterator[TensorSpec]:
    channels = factors.rank - factors.periodic
    yield from _linear(f"{name}_a", f"{parameter}.factor", factors.count * channels, inputs, False)
    if factors.norm:
        yield _vector(f"{name}_a_norm.weight", f"{parameter}.norm.weight", channels)


def _writer(model: Architecture, block: str, part: str, parameter: str, inputs: int) -> Iterator[TensorSpec]:
    factors, name = model.factors(part), f"{block}.{part}"
    if factors is None:
        yield from _linear(name, parameter, model.hidden_size, inputs, model.projection_bias)
        return
    yield from _first_factor(factors, name, f"{parameter}.input", inputs)
    yield from _linear(name, f"{parameter}.output", model.hidden_size, factors.rank, model.projection_bias)


def _layer(model: Architecture, layer: int) -> Iterator[TensorSpec]:
    block, module, width = f"blk.{layer}", f"model.layers.{layer}", model.hidden_size
    if model.has_attention_norm(layer):
        yield _vector(f"{block}.attn_norm.weight", f"{module}.input_layernorm.weight", width)
    yield from _attention(model, block, f"{module}.self_attn")
    if model.gated_residual:
        yield _vector(f"{block}.attn_residual_gate.weight", f"{module}.attention_residual.gate", width)
    yield _vector(f"{block}.ffn_norm.weight", f"{module}.post_attention_layernorm.weight", width)
    factors = model.factors("ffn_gate_up")
    if factors is not None:
        yield from _first_factor(factors, f"{block}.ffn_gate_up", f"{module}.mlp.gate_up_input", width)
    for part in ("gate", "up"):
        yield from _linear(
            f"{block}.ffn_{part}", f"{module}.mlp.{part}_proj", model.intermediate_size, model.gate_up_rank or width,
            model.projection_bias,
        )  # fmt: skip
    yield from _writer(model, block, "ffn_down", f"{module}.mlp.down_proj", model.intermediate_size)
    if model.gated_residual:
        yield _vector(f"{block}.ffn_residual_gate.weight", f"{module}.mlp_residual.gate", width)


def _attention(model: Architecture, block: str, module: str) -> Iterator[TensorSpec]:
    width = model.hidden_size
    if model.fan_placement == "layer":
        rows = width - model.periodic_width(width)
        yield from _linear(f"{block}.attn_fan", f"{module}.fan_layer.projection", rows, width, True)
    factors = model.factors("attn_qkv")
    if factors is not None:
        yield from _first_factor(factors, f"{block}.attn_qkv", f"{module}.qkv_input", width)
    for part, heads in (
        ("q", model.num_attention_heads),
        ("k", model.num_key_value_heads),
        ("v", model.num_key_value_heads),
    ):
        outputs, inputs = heads * model.head_dim, model.qkv_rank or width
        name, parameter = f"{block}.attn_{part}", f"{module}.{part}_proj"
        if model.fan_placement == "projection":
            periodic = model.periodic_width(outputs)
            yield from _linear(f"{name}_fan", f"{parameter}.periodic", periodic, inputs, False)
            yield from _linear(name, f"{parameter}.linear", outputs - 2 * periodic, inputs, model.projection_bias)
        else:
            yield from _linear(name, parameter, outputs, inputs, model.projection_bias)
    for part in "" if model.qkv_norm == "none" else "qkv":
        yield _vector(f"{block}.attn_{part}_norm.weight", f"{module}.{part}_norm.weight", model.head_dim)
    outputs = model.num_attention_heads * model.head_dim
    yield from _writer(model, block, "attn_output", f"{module}.o_proj", outputs)
