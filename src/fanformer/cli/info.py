"""`fanformer info`: a preset or a saved model, explained part by part."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fanformer.cli.options import Verb
from fanformer.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedConfig

    from fanformer.model.footprint import Footprint

FORMULA = (
    "2 x weights of all matrix products + 4 L H K T for attention (every query against T keys); training is 3 x that"
)

_FORMS = {"residual": "x + silu(x)"}


@click.command(cls=Verb, example="fanformer info nano")
@click.argument("model", metavar="[PRESET|DIR]", default="92m")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def info(model: str, as_json: bool) -> None:
    """Explain PRESET or the model saved in DIR: its parts, parameters, operations per token and memory.

    Without an argument, preset 92m. Nothing is computed: the model is built without memory for its weights. A trained
    tokenizer may be smaller than a preset's vocabulary; DIR shows the model as it is.
    """
    config = _configuration(model)
    from fanformer.model.footprint import footprint

    measured = footprint(config)
    if as_json:
        click.echo(json.dumps(to_record(model, config, measured), indent=2))
        return
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=110)  # a pipe has no width of its own
    console.print(f"[bold]{model}[/bold]: {config.model_type}, {measured.total:,} parameters\n")
    console.print(parts_table(config, measured))
    console.print(costs_table(config, measured))
    console.print(f"Operations: {FORMULA}.")


def _configuration(model: str) -> "PreTrainedConfig":
    from fanformer.training.configuration import load_preset, preset_names

    if model in preset_names():
        from fanformer.model import FANformerConfig

        return FANformerConfig(**load_preset(model).model)
    if not Path(model).exists() and not set(model) & set("/\\"):
        raise ConfigError(f"no preset or folder {model!r}: {did_you_mean(model, preset_names())}")
    from fanformer.loading import load_config

    return load_config(model)


def to_record(name: str, config: "PreTrainedConfig", measured: "Footprint") -> dict[str, Any]:
    """Return what `--json` prints."""
    length = measured.sequence_length
    return {
        "name": name,
        "model_type": config.model_type,
        "parameters": {
            "total": measured.total,
            "trainable": measured.trainable,
            "without_embeddings": measured.without_embeddings,
            "per_layer": measured.per_layer,
            "layer_parts": measured.layer_parts,
            "parts": measured.parts,
        },
        "flops_per_token": {
            "forward": measured.forward_operations,
            "training": measured.training_operations,
            "sequence_length": length,
            "formula": FORMULA,
        },
        "memory_bytes": {
            "weights": measured.weight_bytes,
            "cache_per_token": measured.cache_bytes_per_token,
            "cache_at_full_length": {kind: length * size for kind, size in measured.cache_bytes_per_token.items()},
            "training_state": measured.training_bytes,
        },
        "config": config.to_diff_dict() | {"vocab_size": config.vocab_size},
    }


def parts_table(config: "PreTrainedConfig", measured: "Footprint") -> "Table":
    """Return a table of every part: its parameters, their share, and what it is in plain words."""
    from rich import box
    from rich.table import Table

    words = fanformer_words(config) if config.model_type == "fanformer" else {}
    table = Table(box=box.SIMPLE)
    table.add_column("part")
    table.add_column("a layer", justify="right")
    table.add_column("all layers", justify="right")
    table.add_column("share", justify="right")
    if words:
        table.add_column("what it is")
    for part, count in measured.parts.items():
        layer = f"{measured.layer_parts[part]:,}" if part in measured.layer_parts else ""
        row = [part.replace("_", " "), layer, f"{count:,}", f"{count / measured.total:.1%}"]
        table.add_row(*row, *([words[part]] if words else []))
    table.add_row(
        "total",
        f"{measured.per_layer:,}",
        f"{measured.total:,}",
        "100.0%",
        *([f"{config.num_hidden_layers} layers"] if words else []),
    )
    return table


def costs_table(config: "PreTrainedConfig", measured: "Footprint") -> "Table":
    """Return a table of operations per token and of memory."""
    from rich import box
    from rich.table import Table

    length = measured.sequence_length
    cache = measured.cache_bytes_per_token
    table = Table(box=box.SIMPLE, show_header=False)
    for row in (
        ("trainable parameters", f"{measured.trainable:,}"),
        (f"operations a token, forward (T = {length})", _number(measured.forward_operations)),
        ("operations a token, training", _number(measured.training_operations)),
        ("weights, float32 / bfloat16", " / ".join(map(_bytes, measured.weight_bytes.values()))),
        ("key-value cache a token, float32 / bfloat16", " / ".join(map(_bytes, cache.values()))),
        (f"key-value cache at {length} tokens", " / ".join(_bytes(length * size) for size in cache.values())),
        ("training state: weights, gradients, AdamW in float32", _bytes(measured.training_bytes)),
    ):
        table.add_row(*row)
    return table


def fanformer_words(config: Any) -> dict[str, str]:
    """Return what each part of a FANformer is, in plain words and with its numbers.

    Args:
        config: a FANformerConfig.
    """
    width, head_dim = config.hidden_size, config.head_dim

    def between(rank: int, branch: str, activation: str, has_norm: bool = False) -> str:
        norm = "RMSNorm and " if has_norm else ""
        form = _FORMS.get(activation, activation)
        if config.fan_placement != "ffn" or branch != "ffn":
            return f"{norm}{form}"
        periodic = config.periodic_width(rank)
        return (
            f"{norm}FAN: P = {periodic} numbers p give {periodic} cos(p) and {periodic} sin(p), "
            f"the other {rank - 2 * periodic} {form}"
        )

    def factors(rank: int | None, branch: str, readers: int, names: str) -> str:
        if rank is None:
            return ""
        count = "the first CoLA factor" if config.cola_input == "shared" else f"the {readers} first CoLA factors"
        form = between(rank, branch, config.cola_activation, config.cola_norm)
        return f"{width} -> {rank}: {count} of {names}, rank {rank}, with {form}"

    def writer(inputs: int, rank: int | None, branch: str) -> str:
        if rank is None:
            return f"{inputs} -> {width}"
        form = between(rank, branch, config.writer_activation)
        return f"{inputs} -> {rank} -> {width}: CoLA, rank {rank}, with {form}"

    def projection(heads: int) -> str:
        outputs = heads * head_dim
        plain = f"{config.qkv_rank or width} -> {outputs}"
        if config.fan_placement != "projection":
            return plain
        periodic = config.periodic_width(outputs)
        return (
            f"{plain}: FAN, P = {periodic} numbers p give {periodic} cos(p) and {periodic} sin(p), the other "
            f"{outputs - 2 * periodic} are linear"
        )

    gate_up = f"{config.gate_up_rank or width} -> {config.intermediate_size}"
    groups = config.num_attention_heads // config.num_key_value_heads
    sharing = "" if groups == 1 else f", each for {groups} query heads (GQA)"
    per_head = {"qkv": "each head's q, k and v, ", "none": ""}[config.qkv_norm]
    placed = {
        "pre": "the inputs of attention and FFN",
        "hybrid": "the input of the FFN, which is its residual too (HybridNorm)",
        "hybrid-star": "the input of the FFN, which is its residual too, and that of the first attention (HybridNorm*)",
    }[config.norm_placement]
    periodic = config.periodic_width(width)
    qkv_readers = 6 if config.fan_placement == "projection" else 3
    return {
        "embedding": f"{config.vocab_size} tokens, a vector of {width} each"
        + ("; also the output layer" if config.tie_word_embeddings else ""),
        "qkv_input": factors(config.qkv_rank, "attention", qkv_readers, "Q, K and V"),
        "q": f"{projection(config.num_attention_heads)}; {config.num_attention_heads} heads of {head_dim}",
        "k": f"{projection(config.num_key_value_heads)}; {config.num_key_value_heads} heads{sharing}",
        "v": f"{projection(config.num_key_value_heads)}; as the keys",
        "o": f"{writer(config.num_attention_heads * head_dim, config.o_rank, 'attention')}; back from the heads",
        "gate_up_input": factors(config.gate_up_rank, "ffn", 2, "gate and up"),
        "gate": f"{gate_up}; SwiGLU's gate, {config.hidden_act}",
        "up": f"{gate_up}; what the gate multiplies",
        "down": f"{writer(config.intermediate_size, config.down_rank, 'ffn')}; back to the width",
        "fan_layer": f"{width} -> {width} before Q, K and V: {periodic} cos, {periodic} sin, "
        f"{width - 2 * periodic} linear",
        "norms": f"RMSNorm on {per_head}{placed}",
        "gates": f"sigmoid(g) on each residual branch, two learnable vectors of {width} a layer that start "
        f"at g = {config.gate_initial}",
        "final_norm": f"RMSNorm over {width} before the output layer",
        "head": f"{width} -> {config.vocab_size}: a score for each token, full rank",
    }


def _number(value: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.4g}"


def _bytes(value: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.0f} bytes"
