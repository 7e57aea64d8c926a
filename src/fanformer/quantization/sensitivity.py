"""Which parts of a model lose what: bits per byte on held-out text with one part at a time rounded to few bits."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from fanformer.data.held_out import held_out_stream
from fanformer.data.prepared import TokenStream
from fanformer.evaluation.loss import default_sequence_length, held_out_loss
from fanformer.files.durable import replace_json
from fanformer.files.staging import check_free
from fanformer.loading import load
from fanformer.quantization.linear_layers import (
    check_bits_and_group,
    fill_intermediate,
    fitting_group,
    matrices_by_part,
    round_to_nearest,
)
from fanformer.quantization.quantized_folder import Settings, check_model

SCAN_FILE = "sensitivity.json"
_ROWS_AT_ONCE = 8


@dataclass(frozen=True)
class PartLoss:
    """What rounding one part alone costs."""

    part: str
    parameters: int
    """Weights of its matrices."""
    bits_per_byte: float
    change: float
    """Relative change of bits per byte; below 0 where rounding happens to help."""
    relative_error: float
    """Of its weights: norm of the difference over norm of the original."""
    group_sizes: tuple[int, ...]
    """Weights to a scale; smaller than asked for where rows do not fill groups."""
    left: tuple[str, ...]
    """Matrices whose rows no group fills: they were not rounded."""


@dataclass(frozen=True)
class Scan:
    """Bits per byte of a model, and with one part at a time rounded."""

    bits: int
    group_size: int
    bits_per_byte: float
    tokens: int
    parts: tuple[PartLoss, ...]


def scan_folder(
    folder: str | Path,
    output: str | Path,
    settings: Settings,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Scan:
    """Measure each part of the model in `folder`, and write the figures as JSON to a folder.

    Args:
        folder: a model folder of the family `fanformer`.
        output: folder for SCAN_FILE.
        settings: bits, groups and the text to measure on; their method is of no account.
        on_progress: called with what is measured, how many parts are done, and how many there are.

    Raises:
        CheckpointError: if the folder cannot be loaded.
        ConfigError: if the model is of another kind, a setting is wrong, or the file is there already or cannot be
            written.
        DataError: if the text is missing or too short.
    """
    check_bits_and_group(settings.bits, settings.group_size)
    check_free(Path(output) / SCAN_FILE, overwrite=settings.overwrite)
    check_model(Path(folder), "a scan has no parts for others")
    model, tokenizer = load(folder, device="cpu", dtype="float32", adapter=settings.adapter)
    tokens = settings.calibration_tokens
    stream = held_out_stream(Path(folder), tokenizer, settings.calibration, tokens)
    scan = scan_model(model, stream, settings.bits, settings.group_size, tokens, on_progress)
    Path(output).mkdir(parents=True, exist_ok=True)
    replace_json(Path(output) / SCAN_FILE, asdict(scan))
    return scan


def scan_model(
    model: PreTrainedModel,
    stream: TokenStream,
    bits: int,
    group_size: int,
    tokens: int,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Scan:
    """Measure each part of `model`, whose weights are put back (but see `fill_intermediate`)."""
    tell = on_progress or (lambda name, done, total: None)
    length = min(default_sequence_length(model), len(stream.tokens) - 1)

    def measure() -> float:
        return held_out_loss(model, stream, length, _ROWS_AT_ONCE, max_tokens=max(tokens, length)).bits_per_byte

    fill_intermediate(model, group_size)
    parts = matrices_by_part(model)
    tell("as it is", 0, len(parts) + 1)
    before = measure()
    found = []
    for number, (part, modules) in enumerate(parts.items(), start=1):
        tell(part, number, len(parts) + 1)
        originals = {name: module.weight.detach().clone() for name, module in modules.items()}
        groups = {name: fitting_group(module.weight.shape[-1], group_size) for name, module in modules.items()}
        try:
            error = _round_all(modules, groups, bits)
            after = measure()
        finally:
            with torch.no_grad():
                for name, module in modules.items():
                    module.weight.copy_(originals[name])
        found.append(
            PartLoss(
                part=part,
                parameters=sum(weight.numel() for weight in originals.values()),
                bits_per_byte=after,
                change=after / before - 1,
                relative_error=error,
                group_sizes=tuple(sorted({size for size in groups.values() if size is not None})),
                left=tuple(name for name, size in groups.items() if size is None),
            )
        )
    tell("done", len(parts) + 1, len(parts) + 1)
    return Scan(bits, group_size, before, min(tokens, len(stream.tokens)), tuple(found))


@torch.no_grad()
def _round_all(modules: dict[str, nn.Module], groups: dict[str, int | None], bits: int) -> float:
    """Round the weights in place, and return their relative error together."""
    lost = total = 0.0
    for name, module in modules.items():
        size, weight = groups[name], module.weight
        total += float(weight.double().square().sum())
        if size is not None:
            rounded = round_to_nearest(weight, bits, size)
            lost += float((rounded.double() - weight.double()).square().sum())
            weight.copy_(rounded)
    return (lost / total) ** 0.5 if total else 0.0
