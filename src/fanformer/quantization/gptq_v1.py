"""GPTQ through GPTQModel: a model folder in the classic GPTQ layout (version 1), with a report of every layer.

The layout (qweight, qzeros, scales, g_idx) is what AutoGPTQ wrote and what servers and `transformers` read; GPTQModel's
kernels compute on the packed weights, on a CPU too.

Source: GPTQ, arXiv:2210.17323.
"""

import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from fanformer.errors import CheckpointError, ConfigError
from fanformer.generation.loading import quiet_gptqmodel
from fanformer.gguf.file import ARCHITECTURE
from fanformer.gguf.importance import watched_inputs
from fanformer.loading import load
from fanformer.quantization.linear_layers import fill_intermediate, matrices_by_part
from fanformer.quantization.quantized_folder import (
    KEPT_HIGH,
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

METHOD = "gptq-v1"
_SMALLEST_GROUP = 32
_OUTPUTS = 32
"""The kernels that read the layout on a CPU have no smaller groups, and outputs in so many."""
_FEWEST_TOKENS = 10
"""GPTQModel leaves shorter texts out."""
_READING = (
    "Made by GPTQModel, in the GPTQ layout of version 1; `transformers` reads it in float16 or bfloat16 where "
    "`gptqmodel` and `optimum` are installed."
)


def export_gptq_v1(
    folder: str | Path,
    output: str | Path,
    settings: Settings,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Quantize the linear layers of a FANformer's blocks by GPTQModel, and write a folder in the GPTQ layout.

    Embedding, head, norms and gates become bfloat16. Weights are symmetric, a scale for each group, and all groups are
    of one size: readers of the layout have one for the whole model.

    Args:
        folder: a model folder of the family `fanformer`, with its tokenizer.
        output: the folder to write; its REPORT_FILE is the report.
        settings: how.
        on_progress: called with what is being done, how much of it is done, and how much there is.

    Raises:
        CheckpointError: if the folder cannot be loaded, or has no tokenizer.
        ConfigError: if the model is of another kind or quantized already, a setting is wrong, or `output` is taken.
        DataError: if the calibration text is missing or too short.
        DependencyError: if the extra `gptq` is not installed.
    """
    source, target = Path(folder), Path(output)
    check(source, target, settings, "GPTQModel")
    if settings.group_size < _SMALLEST_GROUP:
        raise ConfigError(
            f"`--group-size` must be at least {_SMALLEST_GROUP} for gptq-v1, got {settings.group_size}: its kernels "
            "have no smaller groups."
        )
    check_library("gptqmodel", "`--format gptq-v1` needs GPTQModel", "gptq", "wants the newest torch")
    model, tokenizer = load(source, device="cpu", dtype="float32", adapter=settings.adapter)
    batches, tokens = calibration_batches(source, model, tokenizer, settings)
    group_size = common_group(model, settings.group_size)
    used = replace(settings, group_size=group_size)
    filled = fill_intermediate(model, group_size, smallest=group_size)
    groups = planned_groups(model, group_size, source, smallest=group_size, outputs=_OUTPUTS)
    squares = _input_squares(model, batches, [name for name, size in groups.items() if size is not None])
    tell = on_progress or (lambda what, done, total: None)

    def write_model(aside: Path) -> tuple[LayerReport, ...]:
        with tempfile.TemporaryDirectory(dir=target.parent) as whole, quiet_gptqmodel():
            model.save_pretrained(whole)
            tokenizer.save_pretrained(whole)
            _run(Path(whole), aside, texts_of(batches), groups, settings.bits, tell)
            for code in Path(whole).glob("*.py"):
                shutil.copy(code, aside)
        (aside / "quant_log.csv").unlink(missing_ok=True)  # says less than the report

        def describe(name: str, module: nn.Module) -> tuple[str, tuple[float, float], list[str]]:
            weight, size, errors, notes = module.weight.detach(), groups.get(name), (0.0, 0.0), []
            if size is not None:
                errors = relative_errors(weight, stored_weight(aside, name, settings.bits), squares[name])
            elif name in groups and weight.shape[0] % _OUTPUTS:
                notes = [f"{weight.shape[0]} outputs, and the kernels have {_OUTPUTS} at a time"]
            return "gptq", errors, notes

        return layer_reports(model, groups, used, describe)

    notes = ["what is kept as it is becomes bfloat16", *([filled] if filled else [])]
    if group_size != settings.group_size:
        notes.append(f"groups of {group_size}: more rows are whole groups of it than of {settings.group_size}")
    return write_folder(source, target, used, tokenizer, tokens, tuple(notes), write_model, _READING)


def common_group(model: PreTrainedModel, wanted: int) -> int:
    """Return the size of groups that fills the rows of most matrices: `wanted`, or halved, but at least 32.

    Rows of F can be filled up.
    """
    rows = [
        module.weight.shape[1]
        for part, modules in matrices_by_part(model).items()
        if part not in KEPT_HIGH
        for name, module in modules.items()
        if "down_proj" not in name or module.weight.shape[1] != model.config.intermediate_size
    ]
    sizes = [wanted]
    while sizes[-1] >= 2 * _SMALLEST_GROUP:
        sizes.append(sizes[-1] // 2)
    return max(sizes, key=lambda size: sum(row % size == 0 for row in rows))


def texts_of(batches: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    """Return the documents, or pieces of documents, that packed rows hold: ids (T) of each, T at least 10.

    GPTQModel knows no packed rows: in one, documents would attend to each other.
    """
    found = []
    for batch in batches:
        ids, positions = batch["input_ids"][0], batch["position_ids"][0]
        starts = [*torch.nonzero(positions == 0).flatten().tolist(), len(ids)]
        if starts[0] != 0:
            starts.insert(0, 0)
        found += [ids[a:b] for a, b in pairwise(starts) if b - a >= _FEWEST_TOKENS]
    return found


@torch.inference_mode()
def _input_squares(
    model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]], names: Sequence[str]
) -> dict[str, Tensor]:
    """Return X^T X (in_features, in_features) of each named layer's inputs X over the calibration text."""
    found: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        rows = x.flatten(0, -2)
        found[name] = found.get(name, 0) + rows.T @ rows

    with watched_inputs(model, names, add):
        for batch in batches:
            model(**batch, use_cache=False, logits_to_keep=1)
    return found


def _run(
    whole: Path,
    aside: Path,
    texts: Sequence[Tensor],
    groups: Mapping[str, int | None],
    bits: int,
    tell: Callable[[str, int, int], None],
) -> None:
    """Quantize the folder `whole` into the folder `aside`."""
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.looper import loop_processor
    from gptqmodel.models import auto
    from gptqmodel.models.base import BaseQModel

    class Definition(BaseQModel):
        """Where the library finds the layers of a FANformer."""

        pre_lm_head_norm_module = "model.norm"
        module_tree = _module_tree(list(groups))

    if ARCHITECTURE not in auto.SUPPORTED_MODELS:
        auto.SUPPORTED_MODELS.append(ARCHITECTURE)
    auto.MODEL_MAP[ARCHITECTURE] = Definition
    sizes = {size for size in groups.values() if size is not None}
    kept: dict[str, dict[str, Any]] = {f"-:^{re.escape(name)}$": {} for name, size in groups.items() if size is None}
    how = QuantizeConfig(bits=bits, group_size=sizes.pop(), desc_act=False, sym=True, dynamic=kept or None)
    loop_processor._PROJECT_LOG_DIR = whole / "logs"  # else a folder `logs` stays where the user happens to be
    quantizer = GPTQModel.load(str(whole), how)
    layers = len({name.split(".")[2] for name in groups})
    done: set[int] = set()

    def count(layer_idx: int, **_: Any) -> None:
        done.add(layer_idx)
        tell("blocks", len(done), layers)

    quantizer.layer_callback = count
    tell("blocks", 0, layers)
    examples = [{"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]} for ids in texts]
    quantizer.quantize(examples, batch_size=1, calibration_data_min_length=_FEWEST_TOKENS)
    quantizer.save(str(aside))
    # GPTQModel and vLLM know by `dynamic` what is kept, transformers by this
    cut = sorted({name.split(".", 3)[3] for name, size in groups.items() if size is not None})
    update_config(aside, lambda saved: saved["quantization_config"].update(modules_in_block_to_quantize=[cut]))


def _module_tree(names: Sequence[str]) -> list[Any]:
    """Return GPTQModel's description of a block: its matrices in the order in which they run, each a step of its own.

    So every matrix is rounded for what the rounded ones before it give.
    """
    branches: dict[str, dict[str, None]] = {}
    for name in names:  # of a block, in the order in which the model has its layers, which is that in which they run
        _, _, _, branch, path = name.split(".", 4)
        branches.setdefault(branch, {})[path] = None
    steps = {branch: tuple(f"{path}:{at}" for at, path in enumerate(paths)) for branch, paths in branches.items()}
    return ["model", "layers", "#", steps]


def stored_weight(folder: Path, name: str, bits: int) -> Tensor:
    """Return the matrix (out_features, in_features) that a layer of a GPTQ folder stands for, in float32.

    qweight (in * bits / 32, out) packs a column's integers, the first in the lowest bits; qzeros (groups, out * bits /
    32) packs a group's zero points, in this version less 1; g_idx (in) is each row's group.

    Raises:
        CheckpointError: if the folder has no such layer.
    """
    parts: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            stored = set(tensors.keys())
            for kind in ("qweight", "qzeros", "scales", "g_idx"):
                if f"{name}.{kind}" in stored:
                    parts[kind] = tensors.get_tensor(f"{name}.{kind}")
    if len(parts) != 4:
        raise CheckpointError(f"GPTQModel left `{name}` out of {folder.absolute()}: expected it quantized.")
    places = torch.arange(0, 32, bits)
    mask = 2**bits - 1
    integers = ((parts["qweight"][:, None] >> places[:, None]) & mask).flatten(0, 1)  # (in, out)
    zeros = ((parts["qzeros"][:, :, None] >> places) & mask).flatten(1)[:, : integers.shape[1]] + 1  # (groups, out)
    group = parts["g_idx"].long()
    return ((integers - (zeros & mask)[group]) * parts["scales"].float()[group]).T
