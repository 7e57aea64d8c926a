"""GPTQ and AWQ through llm-compressor: a model folder in the compressed-tensors format, with a report of every layer.

Sources: GPTQ, arXiv:2210.17323; AWQ, arXiv:2306.00978. A layer's output error is measured with the same sums of
squares that GPTQ works from: |X (W - W_q)^T| / |X W^T| over the calibration inputs X.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fanformer.errors import CheckpointError, ConfigError
from fanformer.generation.loading import weight_files
from fanformer.loading import load, load_config
from fanformer.quantization.linear_layers import fill_intermediate
from fanformer.quantization.quantized_folder import (
    LayerReport,
    Report,
    Settings,
    calibration_batches,
    check,
    check_library,
    layer_reports,
    planned_groups,
    relative_errors,
    update_config,
    write_folder,
)

METHODS = ("gptq", "awq")


def export_compressed(
    folder: str | Path,
    output: str | Path,
    settings: Settings,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Quantize the linear layers of a FANformer's blocks, and write a folder in the format compressed-tensors.

    Embedding, head, norms, gates and biases stay as they are. Weights are symmetric, a scale for each group.

    Args:
        folder: a model folder of the family `fanformer`, with its tokenizer.
        output: the folder to write; its REPORT_FILE is the report.
        settings: how.
        on_progress: called with what is being done, how much of it is done, and how much there is.

    Raises:
        CheckpointError: if the folder cannot be loaded, or has no tokenizer.
        ConfigError: if the model is of another kind or quantized already, a setting is wrong, or `output` is taken.
        DataError: if the calibration text is missing or too short.
        DependencyError: if the extra `quantize` is not installed.
    """
    source, target = Path(folder), Path(output)
    if settings.method not in METHODS:
        raise ConfigError(f"`method` must be one of {', '.join(METHODS)}, got {settings.method!r}.")
    check(source, target, settings, "llm-compressor")
    need = "`--format gptq` and `awq` need llm-compressor"
    check_library("llmcompressor", need, "quantize", "holds transformers at 5.17")
    model, tokenizer = load(source, device="cpu", dtype="float32", adapter=settings.adapter)
    batches, tokens = calibration_batches(source, model, tokenizer, settings)
    filled = fill_intermediate(model, settings.group_size)
    groups = planned_groups(model, settings.group_size, source)
    with _quiet_library():
        layers = _run(model, tokenizer, batches, groups, settings, on_progress or (lambda what, done, total: None))

        def write_model(aside: Path) -> tuple[LayerReport, ...]:
            model.save_pretrained(aside, save_compressed=True)
            restore_dtypes(aside, groups, source)
            # the library saves the configuration that it finds in the folder the model came from
            update_config(aside, lambda saved: saved.update({name: getattr(model.config, name) for name in _CHANGED}))
            (aside / "recipe.yaml").unlink(missing_ok=True)  # says less than the report
            return layers

        notes = (filled,) if filled else ()
        return write_folder(source, target, settings, tokenizer, tokens, notes, write_model, _READING)


def restore_dtypes(folder: Path, groups: Mapping[str, int | None], source: Path) -> None:
    """Write the weights of a folder again, what is not quantized in the dtype that it has in the files of `source`.

    That may be a narrower one than the model is computed with. What `source` has no tensor of gets its configuration's.
    The files are changed rather than the model, whose weights the library may have on another device.

    Args:
        folder: what the library saved of a model in float32.
        groups: as `planned_groups` returned them.
        source: the folder that was quantized.
    """
    dtypes: dict[str, torch.dtype] = {}
    for file in weight_files(source):
        dtypes |= {name: tensor.dtype for name, tensor in load_file(file).items()}
    other = load_config(source).dtype or torch.float32
    for file in weight_files(folder):
        tensors, changed = load_file(file), {}
        for name, tensor in tensors.items():
            module, _, kind = name.rpartition(".")
            cut = groups.get(module) is not None and kind.startswith("weight")  # integers, and their scales
            if tensor.is_floating_point() and not cut and tensor.dtype != (dtype := dtypes.get(name, other)):
                changed[name] = tensor.to(dtype)
        if not changed:
            continue
        aside = file.with_suffix(".new")  # what was loaded is still read from the file
        save_file(tensors | changed, aside, metadata={"format": "pt"})
        os.replace(aside, file)


_CHANGED = ("intermediate_size", "vocab_size", "eos_token_id", "pad_token_id", "auto_map")
"""Fields of the configuration that change: filling up, an adapter's tokenizer, and the code that the box has not."""
_READING = (
    "Made by llm-compressor, in the format compressed-tensors; reading it needs `pip install compressed-tensors`."
)


def foldable_scales(model: PreTrainedModel) -> list[tuple[str, list[str]]]:
    """Return where AWQ's scale of a layer's inputs can be folded into what makes them: (that module, its readers).

    - The norm in front of attention (the first block's, or every block's with "pre") into whatever reads it.
    - With "pre", the norm in front of the FFN too; otherwise the residual reads it as well.
    - Up's rows into down's columns, for what is between them is a product.

    Nothing else folds: an activation, or cosine and sine, stand between W_a and W_b; and V's norm undoes a scale of V's
    rows (without it, several query heads share them).
    """
    found = []
    for number, layer in enumerate(model.model.layers):
        attention, mlp, prefix = layer.self_attn, layer.mlp, f"model.layers.{number}"
        if not isinstance(layer.input_layernorm, nn.Identity):
            found.append((f"{prefix}.input_layernorm", _readers(attention, f"{prefix}.self_attn")))
        if not layer.residual_after_norm:
            found.append((f"{prefix}.post_attention_layernorm", _readers(mlp, f"{prefix}.mlp")))
        down = "down_proj" if isinstance(mlp.down_proj, nn.Linear) else "down_proj.input.factor"
        found.append((f"{prefix}.mlp.up_proj", [f"{prefix}.mlp.{down}"]))
    return found


def _readers(branch: nn.Module, prefix: str) -> list[str]:
    """Return the linear layers that read what goes into attention or the FFN."""
    if getattr(branch, "fan_layer", None) is not None:
        return [f"{prefix}.fan_layer.projection"]
    shared = "qkv_input" if hasattr(branch, "qkv_input") else "gate_up_input"
    if getattr(branch, shared).factor is not None:
        return [f"{prefix}.{shared}.factor"]
    starts = ("q_proj", "k_proj", "v_proj") if shared == "qkv_input" else ("gate_proj", "up_proj")
    return [
        f"{prefix}.{name}"
        for name, module in branch.named_modules()
        if name.startswith(starts) and isinstance(module, nn.Linear) and module.weight.numel()
    ]


def _run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    batches: list[dict[str, Tensor]],
    groups: dict[str, int | None],
    settings: Settings,
    tell: Callable[[str, int, int], None],
) -> tuple[LayerReport, ...]:
    """Quantize `model` in place, and return what became of every matrix."""
    from llmcompressor import oneshot
    from torch.utils.data import DataLoader

    total = sum(size is not None for size in groups.values())
    measured: dict[str, tuple[float, float]] = {}

    def note(name: str, weight_error: float, output_error: float) -> None:
        measured[name] = weight_error, output_error
        tell("layers", len(measured), total)

    gptq = _gptq_modifier(groups, settings.bits, note)
    recipe: list[Any] = [gptq]
    scaled: dict[str, str] = {}
    if settings.method == "awq":
        awq, scaled = _awq_modifier(model, groups)
        recipe.insert(0, awq)
    tell("layers", 0, total)
    oneshot(
        model=model,
        dataset=DataLoader(batches, batch_size=None),
        processor=tokenizer,
        recipe=recipe,
        num_calibration_samples=len(batches),
        pipeline="independent",
    )
    missing = [name for name, size in groups.items() if size is not None and name not in measured]
    if missing:
        raise CheckpointError(f"the calibration text never reached `{missing[0]}`: the layer was not quantized.")

    def describe(name: str, module: nn.Module) -> tuple[str, tuple[float, float], list[str]]:
        method, notes = "gptq", []
        if name in gptq._rtn_fallback_module_names:
            method, notes = "round-to-nearest", ["GPTQ's matrix could not be inverted"]
        if name in scaled:
            method, notes = f"awq+{method}", [*notes, f"scale folded into {scaled[name]}"]
        return method, measured.get(name, (0.0, 0.0)), notes

    return layer_reports(model, groups, settings, describe)


def _exactly(name: str) -> str:
    """Return a module's name in the library's notation for patterns."""
    return f"re:^{re.escape(name)}$"


def _gptq_modifier(groups: dict[str, int | None], bits: int, note: Callable[[str, float, float], None]) -> Any:
    """Return a GPTQ modifier that tells of every layer what it lost."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.quantization import GPTQModifier

    class MeasuringGPTQModifier(GPTQModifier):
        """Compares weights before and after, by the sums of squares that GPTQ itself uses."""

        def compress_module_list(self, module_list: list[nn.Module]) -> None:
            """Quantize layer after layer."""
            for module in module_list:
                before = module.weight.detach().double()
                squares = self._hessians[module].detach().double()
                super().compress_module_list([module])
                errors = relative_errors(before, module.weight.detach().double(), squares)
                note(self._module_names[module], *errors)

    schemes = {}
    for size in sorted({size for size in groups.values() if size is not None}):
        names = [name for name, own in groups.items() if own == size]
        weights = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="group", group_size=size)
        schemes[f"group_{size}"] = QuantizationScheme(targets=[_exactly(name) for name in names], weights=weights)
    return MeasuringGPTQModifier(config_groups=schemes)


def _awq_modifier(model: PreTrainedModel, groups: dict[str, int | None]) -> tuple[Any, dict[str, str]]:
    """Return an AWQ modifier for what folds, and for every layer whose inputs it scales what the scale folds into."""
    from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier

    mappings: list[Any] = []
    scaled: dict[str, str] = {}
    for source, readers in foldable_scales(model):
        if any(groups[name] is not None for name in readers):
            mappings.append(AWQMapping(_exactly(source), [_exactly(name) for name in readers]))
            scaled |= {name: source.removeprefix("model.layers.") for name in readers}
    return AWQModifier(mappings=mappings), scaled


@contextlib.contextmanager
def _quiet_library() -> Iterator[None]:
    """Keep llm-compressor's log off the terminal, and let AWQ run where there is no accelerator.

    Version 0.14 pins the memory that AWQ caches, which torch refuses on a machine without one; nothing needs it there.
    """
    from loguru import logger

    os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")  # read at its import, which logs already
    from llmcompressor.pipelines.cache import IntermediatesCache

    for package in ("llmcompressor", "compressed_tensors"):
        logger.disable(package)
    pin_memory = IntermediatesCache.pin_memory
    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda *arguments, **options: None
    try:
        yield
    finally:
        IntermediatesCache.pin_memory = pin_memory
        for package in ("llmcompressor", "compressed_tensors"):
            logger.enable(package)
