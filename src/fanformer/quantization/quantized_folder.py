"""What every quantized model folder shares: settings, refusals, calibration text, the report and the model card."""

import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fanformer.data.held_out import DEFAULT_TOKENS, held_out_stream
from fanformer.data.packing import PackedRows
from fanformer.data.preparation.journal import require_utf8_name
from fanformer.errors import ConfigError, DependencyError
from fanformer.evaluation.loss import default_sequence_length, every_nth
from fanformer.files.durable import replace_json, replace_text
from fanformer.files.staging import check_folder, staged_folder
from fanformer.generation.adapters import adapter_note
from fanformer.generation.loading import refuse_towers, weight_files
from fanformer.gguf.file import ARCHITECTURE
from fanformer.loading import load_config
from fanformer.quantization.linear_layers import SMALLEST_GROUP, check_bits_and_group, fitting_group, matrices_by_part

REPORT_FILE = "quantization.json"
KEPT_HIGH = ("embedding", "head")
"""Parts whose matrices stay as they are."""
_CARD = "README.md"


@dataclass(frozen=True)
class Settings:
    """How a folder is to be quantized.

    Attributes:
        method: which of the formats' methods.
        bits: of a weight, 4 or 8.
        group_size: weights to a scale; halved for layers whose rows it does not fill.
        calibration: text to run; None takes what the training held out.
        calibration_tokens: how much of it.
        overwrite: whether a quantized folder that is there may be replaced.
        adapter: folder of an adapter that PEFT saved, merged into the weights first.
    """

    method: str
    bits: int = 4
    group_size: int = 64
    calibration: str | None = None
    calibration_tokens: int = DEFAULT_TOKENS
    overwrite: bool = False
    adapter: str | None = None


@dataclass(frozen=True)
class LayerReport:
    """What became of one matrix."""

    name: str
    part: str
    shape: tuple[int, int]
    method: str
    """gptq, awq+gptq, round-to-nearest (where GPTQ's matrix could not be inverted) or none."""
    bits: int | None
    """None where it is as it was."""
    group_size: int | None
    weight_error: float
    """Norm of the difference over norm of the weights (for AWQ, of the scaled ones)."""
    output_error: float
    """The same of the layer's outputs on the calibration text."""
    note: str


@dataclass(frozen=True)
class Report:
    """What a folder holds, matrix by matrix."""

    method: str
    bits: int
    group_size: int
    calibration: str
    calibration_tokens: int
    bytes: int
    """Of the folder's weights."""
    bytes_before: int
    notes: tuple[str, ...]
    """What holds for the model as a whole."""
    layers: tuple[LayerReport, ...]


def check(source: Path, target: Path, settings: Settings, library: str) -> None:
    """Refuse, before any work, what cannot be quantized or written.

    Raises:
        CheckpointError: if `source` is no model folder.
        ConfigError: if its model is of another kind or quantized already, a setting is wrong, or `target` is taken or
            cannot be written.
    """
    check_bits_and_group(settings.bits, settings.group_size)
    _check_target(source.resolve(), target.resolve(), settings.overwrite)
    check_model(source, f"{library}'s own examples quantize other models")
    if getattr(load_config(source), "recurrence", None) is not None:
        raise ConfigError(
            f"{source.absolute()} runs blocks several times, and {library} sees their inputs once: take `--format "
            "gguf`, whose statistics are sums over all steps."
        )


def check_library(module: str, need: str, extra: str, why: str) -> None:
    """Raise DependencyError where `module` is not installed: who needs it, the extra that has it, and why apart."""
    if importlib.util.find_spec(module) is None:
        raise DependencyError(
            f"{need}, which is not installed: pip install 'fanformer[{extra}]' into an environment of its own "
            f"(it {why})"
        )


def check_model(source: Path, others: str) -> None:
    """Refuse a folder whose model is of another kind, for which `others` is the remedy, or quantized already."""
    refuse_towers(source, "quantizing")
    config = load_config(source)
    if config.model_type != ARCHITECTURE:
        raise ConfigError(f"{source.absolute()} is a {config.model_type}, expected a {ARCHITECTURE}: {others}.")
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"{source.absolute()} is quantized already: give the folder that it was made from.")


def _check_target(source: Path, target: Path, overwrite: bool) -> None:
    require_utf8_name(target, ConfigError)
    check_folder(target)
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if target == source:
        raise ConfigError(f"`--output-dir` is the model's own folder {target}: give another.")
    if not (target / REPORT_FILE).is_file():
        raise ConfigError(f"{target} is there and holds no quantized model: give another `--output-dir`.")
    if not overwrite:
        raise ConfigError(f"{target} is there already: give another `--output-dir`, or `--overwrite`.")


def calibration_batches(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, settings: Settings
) -> tuple[list[dict[str, Tensor]], int]:
    """Return packed rows as batches of one, evenly spread over the text, and how many tokens they are.

    A batch has `input_ids` and `position_ids`, (1, T) each.
    """
    stream = held_out_stream(folder, tokenizer, settings.calibration, settings.calibration_tokens)
    length = min(default_sequence_length(model), len(stream.tokens) - 1)
    rows = PackedRows(stream, length)
    chosen = every_nth(len(rows), settings.calibration_tokens // length)
    batches = [
        {name: values[None] for name, values in rows[index].items() if name in ("input_ids", "position_ids")}
        for index in chosen
    ]
    return batches, len(chosen) * length


def planned_groups(
    model: PreTrainedModel, wanted: int, source: Path, smallest: int = SMALLEST_GROUP, outputs: int = 1
) -> dict[str, int | None]:
    """Return the group size of every matrix of the blocks, None where no size from `smallest` on fills its rows.

    None as well where the number of rows is no multiple of `outputs`.

    Raises:
        ConfigError: if that is so for all of them.
    """
    groups = {
        name: None if module.weight.shape[0] % outputs else fitting_group(module.weight.shape[1], wanted, smallest)
        for part, modules in matrices_by_part(model).items()
        if part not in KEPT_HIGH
        for name, module in modules.items()
    }
    if not any(groups.values()):
        raise ConfigError(
            f"no layer of {source.absolute()} has rows that groups of {wanted} or less fill: nothing can be quantized."
        )
    return groups


def relative_errors(before: Tensor, after: Tensor, squares: Tensor) -> tuple[float, float]:
    """Return what a matrix lost, and what its outputs did: norms of the differences over norms of the originals.

    Args:
        before: W, (out_features, in_features).
        after: what stands for W now.
        squares: X^T X of the calibration inputs X, (in_features, in_features).
    """
    lost = after - before
    weight_error = _root(lost.square().sum(), before.square().sum())
    return weight_error, _root(((lost @ squares) * lost).sum(), ((before @ squares) * before).sum())


def _root(lost: Tensor, total: Tensor) -> float:
    return float((lost / total).clamp_min(0).sqrt()) if total > 0 else 0.0


def layer_reports(
    model: PreTrainedModel,
    groups: Mapping[str, int | None],
    settings: Settings,
    describe: Callable[[str, nn.Module], tuple[str, tuple[float, float], list[str]]],
) -> tuple[LayerReport, ...]:
    """Return what became of every matrix of `model`.

    Args:
        model: that was quantized.
        groups: as `planned_groups` returned them.
        settings: how.
        describe: returns the method, the errors and what the format notes of a matrix, by name and module.
    """
    found = []
    for part, modules in matrices_by_part(model).items():
        for name, module in modules.items():
            (rows, length), size = module.weight.shape, groups.get(name)
            method, errors, notes = describe(name, module)
            if size is None:
                told = not notes and part not in KEPT_HIGH
                notes.insert(0, f"kept as it is{f': no group that there is fills rows of {length}' if told else ''}")
            elif size != settings.group_size:
                notes.insert(0, f"groups of {settings.group_size} do not fill rows of {length}")
            how, bits = ("none", None) if size is None else (method, settings.bits)
            found.append(LayerReport(name, part, (rows, length), how, bits, size, *errors, "; ".join(notes)))
    return tuple(found)


def write_folder(
    source: Path,
    target: Path,
    settings: Settings,
    tokenizer: PreTrainedTokenizerFast,
    tokens: int,
    notes: tuple[str, ...],
    write_model: Callable[[Path], tuple[LayerReport, ...]],
    reading: str,
) -> Report:
    """Write a folder aside, and then in one step to its place.

    Args:
        source: the folder that was quantized.
        target: where to write; of a link the folder that it means.
        settings: how it was quantized.
        tokenizer: its tokenizer.
        tokens: how many tokens calibrated it.
        notes: what holds for the model as a whole.
        write_model: writes weights, configuration and code into a folder and returns what became of every matrix.
        reading: for the model card, the format and what it is read with.
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with staged_folder(target) as aside:
        layers = write_model(aside)
        tokenizer.save_pretrained(aside)
        report = Report(
            method=settings.method,
            bits=settings.bits,
            group_size=settings.group_size,
            calibration=settings.calibration or "what the run held out",
            calibration_tokens=tokens,
            bytes=_weight_bytes(aside),
            bytes_before=_weight_bytes(source),
            notes=(*notes, *([adapter_note(settings.adapter)] if settings.adapter is not None else [])),
            layers=layers,
        )
        replace_json(aside / REPORT_FILE, asdict(report))
        replace_text(aside / _CARD, _card(source, report, reading))
    return report


def update_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a folder's configuration."""
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    change(saved)
    replace_json(folder / "config.json", saved)


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in weight_files(folder))


def _card(source: Path, report: Report, reading: str) -> str:
    """Return the model card: the original's, and what was done to it."""
    original = source / _CARD
    card = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [fanformer, causal-lm]\n---\n\n"
    card += f"# {source.absolute().name}\n"
    if original.is_file():
        card = original.read_text(encoding="utf-8", errors="replace")
    return f"""{card.rstrip()}

## Quantized

These weights are quantized with `fanformer quantize --format {report.method} --bits {report.bits} --group-size
{report.group_size}`; what stands above was measured before. Embedding, head, norms, gates and biases are not cut.
{report.bytes:,} bytes, before {report.bytes_before:,}; `{REPORT_FILE}` says what every layer lost. {reading}
{"".join(f"{note[:1].upper()}{note[1:]}.{chr(10)}" for note in report.notes)}"""
