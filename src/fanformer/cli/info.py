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


@click.command(cls=Verb, example="fanformer info nano")
@click.argument("model", metavar="[PRESET|DIR]", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def info(model: str | None, as_json: bool) -> None:
    """Explain PRESET or the model saved in DIR: its parts, parameters, operations per token and memory.

    Without an argument it is the model that came with this package: also what it was trained on, its licence, and where
    it lies. Nothing is computed: the model is built without memory for its weights. A trained tokenizer may be smaller
    than a preset's vocabulary; DIR shows the model as it is.
    """
    about = None
    if model is None:
        from fanformer.loading import model_in_the_box

        model = str(model_in_the_box())
        about = beginning_of_card(model_in_the_box())
    config = _configuration(model)
    from fanformer.model.footprint import OPERATIONS, footprint

    measured = footprint(config)
    if as_json:
        record = to_record(model, config, measured) | ({} if about is None else {"about": about})
        click.echo(json.dumps(record, indent=2))
        return
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=110)  # a pipe has no width of its own
    if about is not None:
        console.print(f"{about}\n", markup=False)
    console.print(f"[bold]{model}[/bold]: {config.model_type}, {measured.total:,} parameters\n")
    console.print(parts_table(config, measured))
    console.print(costs_table(config, measured))
    console.print(f"Operations: {OPERATIONS}.")


def beginning_of_card(folder: Path) -> str:
    """Return what a folder's model card says before its first section, without what it says to machines."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    if text.startswith("---\n"):
        text = text.partition("\n---\n")[2]
    return text.partition("\n## ")[0].strip()


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
    from fanformer.model.footprint import OPERATIONS

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
            "formula": OPERATIONS,
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

    words = {}
    if config.model_type in ("fanformer", "fanformer_multimodal"):
        text = config.get_text_config()
        words = {**fanformer_words(text), **towers_words(config), "total": f"{text.num_hidden_layers} layers"}
    table = Table("part", box=box.SIMPLE)
    for header in ("a layer", "all layers", "share"):
        table.add_column(header, justify="right")
    if words:
        table.add_column("what it is")
    in_layer = {**measured.layer_parts, "total": measured.per_layer}
    for part, count in {**measured.parts, "total": measured.total}.items():
        layer = f"{in_layer[part]:,}" if part in in_layer else ""
        row = [part.replace("_", " "), layer, f"{count:,}", f"{count / measured.total:.1%}"]
        table.add_row(*row, *([words[part]] if words else []))
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
    from fanformer.model.footprint import meta_model

    decoder = meta_model(config).model
    first, last, width = decoder.layers[0], decoder.layers[-1], config.hidden_size
    attention, mlp, heads = last.self_attn, last.mlp, config.num_attention_heads
    groups = attention.num_key_value_groups
    sharing = "" if groups == 1 else f", each for {groups} query heads (GQA)"
    placed = "the inputs of attention and FFN"
    if last.residual_after_norm:
        placed = "the input of the FFN, which is its residual too"
        starred = hasattr(first.input_layernorm, "weight")
        placed += ", and that of the first attention (HybridNorm*)" if starred else " (HybridNorm)"
    per_head = "each head's q, k and v, " if hasattr(attention.q_norm, "weight") else ""
    words = {
        "embedding": f"{config.vocab_size} tokens, a vector of {width} each"
        + ("; also the output layer" if config.tie_word_embeddings else ""),
        "qkv_input": _first_factor(attention.qkv_input, "Q, K and V"),
        "q": f"{_reader(attention.q_proj)}; {heads} heads of {config.head_dim}",
        "k": f"{_reader(attention.k_proj)}; {heads // groups} heads{sharing}",
        "v": f"{_reader(attention.v_proj)}; as the keys",
        "o": f"{_writer(attention.o_proj)}; back from the heads",
        "gate_up_input": _first_factor(mlp.gate_up_input, "gate and up"),
        "gate": f"{_reader(mlp.gate_proj)}; SwiGLU's gate, {_form(mlp.act_fn)}",
        "up": f"{_reader(mlp.up_proj)}; what the gate multiplies",
        "down": f"{_writer(mlp.down_proj)}; back to the width",
        "norms": f"RMSNorm on {per_head}{placed}",
        "gates": f"sigmoid(g) on each residual branch, two learnable vectors of {width} a layer that start "
        f"at g = {last.mlp_residual.initial}",
        "final_norm": f"RMSNorm over {width} before the output layer",
        "head": f"{width} -> {config.vocab_size}: a score for each token, full rank",
    }
    if decoder.bridge is not None:
        parts, steps = decoder.bridge.recurrence, decoder.depth.largest
        words["bridge"] = (
            f"brings the first {len(parts.prelude)} blocks' output to each further step of the next {len(parts.core)}; "
            f"{steps} steps are counted, 1 to {parts.largest_steps} can be taken"
        )
    if attention.fan_layer is not None:
        periodic = attention.fan_layer.periodic_width
        rest = width - 2 * periodic
        words["fan_layer"] = f"{width} -> {width} before Q, K and V: {periodic} cos, {periodic} sin, {rest} linear"
    return words


def towers_words(config: Any) -> dict[str, str]:
    """Return what each part of a model that sees or hears is, beside its language model; nothing for others."""
    words = {}
    if getattr(config, "vision_config", None) is not None:
        side = config.vision_config.image_size
        words["vision_tower"] = f"{side} x {side} pixels in, {config.image_seq_length} tokens of a picture out"
    if getattr(config, "audio_config", None) is not None:
        rate = 100 / config.frames_per_audio_token
        words["audio_tower"] = f"sound in, {rate:g} tokens a second out"
    if words:
        words["projectors"] = "from a tower's width to the language model's"
        words["adapters"] = f"LoRA of rank {config.adapter_rank} for the rows that show something"
    return words


def _form(activation: Any) -> str:
    """Return what an activation does, such as silu."""
    name = type(activation).__name__.removesuffix("Activation")
    return {"Identity": "linear", "ResidualSiLU": "x + silu(x)"}.get(name, name.lower())


def _fan(periodic: int, rest: int, form: str) -> str:
    return f"P = {periodic} numbers p give {periodic} cos(p) and {periodic} sin(p), the other {rest} {form}"


def _between(module: Any) -> str:
    """Return what stands between the factors that a CoLAInput begins with."""
    norm, form = "RMSNorm and " if hasattr(module.norm, "weight") else "", _form(module.activation)
    if not module.periodic:
        return f"{norm}{form}"
    return f"{norm}FAN: {_fan(module.periodic, module.out_features - 2 * module.periodic, form)}"


def _first_factor(module: Any, readers: str) -> str:
    if module.factor is None:
        return ""
    rank, inputs = module.out_features, module.factor.in_features
    count = "the first CoLA factor" if module.count == 1 else f"the {module.count} first CoLA factors"
    return f"{inputs} -> {rank}: {count} of {readers}, rank {rank}, with {_between(module)}"


def _writer(module: Any) -> str:
    if not hasattr(module, "input"):
        return f"{module.in_features} -> {module.out_features}"
    rank, inputs = module.input.out_features, module.input.factor.in_features
    return f"{inputs} -> {rank} -> {module.output.out_features}: CoLA, rank {rank}, with {_between(module.input)}"


def _reader(module: Any) -> str:
    if not hasattr(module, "periodic"):
        return f"{module.in_features} -> {module.out_features}"
    periodic, rest = module.periodic.out_features, module.linear.out_features
    return f"{module.linear.in_features} -> {2 * periodic + rest}: FAN, {_fan(periodic, rest, 'are linear')}"


def _number(value: float) -> str:
    return _in_units(value, {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}, f"{value:.4g}")


def _bytes(value: float) -> str:
    return _in_units(value, {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}, f"{value:.0f} bytes")


def _in_units(value: float, sizes: dict[str, float], otherwise: str) -> str:
    """Return a number in the first unit that it reaches."""
    return next((f"{value / size:.4g} {unit}" for unit, size in sizes.items() if value >= size), otherwise)
