"""A model folder as one GGUF file: metadata, tokenizer and tensors, with a report of what each tensor lost."""

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fanformer.data.held_out import DEFAULT_TOKENS
from fanformer.errors import ConfigError
from fanformer.files.durable import printable
from fanformer.files.staging import check_free, staged
from fanformer.generation.adapters import adapter_note, with_adapter
from fanformer.generation.loading import LoadedModel, load, load_config, refuse_towers
from fanformer.generation.torch_model import end_token_ids, sampling_of
from fanformer.gguf import architecture
from fanformer.gguf.blocks import TYPES, BlockType, Bytes, Floats, dequantize
from fanformer.gguf.file import ARCHITECTURE, ARRAY, SAMPLING, STRING
from fanformer.gguf.importance import importance
from fanformer.gguf.plan import Plan, PlannedTensor, make_plan
from fanformer.gguf.runtime import library, quantize
from fanformer.gguf.tokenizer import (
    END_IDS,
    MERGES,
    SPECIAL,
    TEMPLATE,
    TOKEN_TYPES,
    TOKENS,
    WHOLE,
    split_json,
    without_generation_tags,
)
from fanformer.gguf.writer import Value, write_gguf

_UINT32, _INT32, _FLOAT32, _BOOL = 4, 5, 6, 7
_QUANTIZATION_VERSION = 2
_ROWS_AT_ONCE = 4096
# the types that weigh errors by an importance
_WEIGHTED = ("q4_0", "iq4_nl", "q4_k", "q5_k", "q6_k")


@dataclass(frozen=True)
class TensorReport:
    """What became of one tensor."""

    name: str
    parameter: str
    shape: tuple[int, ...]
    type: str
    bits_per_weight: float
    bytes: int
    relative_error: float
    """Norm of the difference over norm of the original."""
    note: str
    """Why the type is not the one asked for."""


@dataclass(frozen=True)
class Report:
    """What a file holds, tensor by tensor."""

    file: str
    bytes: int
    asked_type: str
    weighted: bool
    """Whether errors were weighed by an importance."""
    bits_per_weight: float
    """Bits of all tensors over the model's number of parameters."""
    notes: tuple[str, ...]
    tensors: tuple[TensorReport, ...]


@dataclass(frozen=True)
class Settings:
    """What a GGUF file is to hold.

    Attributes:
        type: number format of the matrices.
        embedding_type: of the embedding; None as `make_plan` says.
        head_type: of the head; None as `make_plan` says.
        calibration: text that tells which channels count; None counts all alike.
        calibration_tokens: how much of it to run.
        overwrite: whether a file that is there may be replaced.
        adapter: folder of an adapter that PEFT saved, merged into the weights first.
    """

    type: str
    embedding_type: str | None = None
    head_type: str | None = None
    calibration: str | None = None
    calibration_tokens: int = DEFAULT_TOKENS
    overwrite: bool = False
    adapter: str | None = None


def export_gguf(
    folder: str | Path,
    output: str | Path,
    settings: Settings,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Write a FANformer as a GGUF file, and beside it the report as JSON.

    Args:
        folder: a model folder of the family `fanformer`.
        output: the file, where it ends in .gguf, else a folder, in which it becomes `model-TYPE.gguf`.
        settings: what it is to hold.
        on_progress: called with what is being done, how much of it is done, and how much there is.

    Raises:
        CheckpointError: if the folder cannot be loaded, or the adapter does not fit it.
        ConfigError: if the model or its tokenizer is of another kind, a setting is wrong or has no effect, or the file
            or its report is there already or cannot be written.
        DataError: if the calibration text is missing or too short.
        DependencyError: if a type needs the extra `gguf`, and it is not installed.
    """
    path = output_file(output, settings.type)
    check_free(path, report_file(path), overwrite=settings.overwrite)
    refuse_towers(folder, "a GGUF file")
    if getattr(load_config(folder), "quantization_config", None) is not None:
        raise ConfigError(f"{Path(folder).absolute()} is quantized already: give the folder that it was made from.")
    model, tokenizer = load(folder, device="cpu", dtype="auto" if settings.adapter is None else "float32")
    if model.config.model_type != ARCHITECTURE:
        raise ConfigError(
            f"{Path(folder).absolute()} is a {model.config.model_type}, expected a {ARCHITECTURE}: llama.cpp's own "
            "convert_hf_to_gguf.py writes other models."
        )
    if settings.adapter is not None:
        model, tokenizer = with_adapter(LoadedModel(model, tokenizer), settings.adapter)
    plan = make_plan(model.config, settings.type, settings.embedding_type, settings.head_type)
    if any(item.kind.block_elements > 1 for item in plan.tensors):
        library()  # a missing extra shows before the work begins
    tell = on_progress or (lambda what, done, total: None)
    weights: dict[str, Floats] = {}
    if settings.calibration is not None:
        if not any(item.kind.name in _WEIGHTED for item in plan.tensors):
            raise ConfigError(f"`--calibration` has no effect on the type {settings.type}: leave it out.")
        text, tokens = settings.calibration, settings.calibration_tokens
        weights = importance(model, tokenizer, text, tokens, functools.partial(tell, "calibration"))
    metadata = _metadata(Path(folder), model, tokenizer, plan, settings.type)
    reports: list[TensorReport] = []

    def content() -> Iterator[Bytes]:
        parameters = model.state_dict()
        for index, item in enumerate(plan.tensors):
            raw, report = _encode(item, parameters[item.spec.parameter], weights.get(item.spec.parameter))
            reports.append(report)
            tell("tensors", index + 1, len(plan.tensors))
            yield raw

    path.parent.mkdir(parents=True, exist_ok=True)
    with staged(path, report_file(path)) as (file, beside):
        write_gguf(file, metadata, [(item.spec.name, item.spec.shape, item.kind) for item in plan.tensors], content())
        report = Report(
            file=path.name,
            bytes=file.stat().st_size,
            asked_type=settings.type,
            weighted=bool(weights),
            bits_per_weight=8 * sum(item.bytes for item in reports) / model.num_parameters(),
            notes=(*plan.notes, *([adapter_note(settings.adapter)] if settings.adapter is not None else [])),
            tensors=tuple(reports),
        )
        beside.write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    return report


def output_file(output: str | Path, kind: str) -> Path:
    """Return the file that `--output-dir` means: itself where it ends in .gguf, else `model-TYPE.gguf` in it."""
    path = Path(output)
    return path if path.suffix == ".gguf" else path / f"model-{kind}.gguf"


def report_file(path: Path) -> Path:
    """Return where the report of a GGUF file is."""
    return path.with_suffix(".json")


def _encode(item: PlannedTensor, parameter: torch.Tensor, weights: Floats | None) -> tuple[Bytes, TensorReport]:
    """Return the bytes of a tensor, and what it lost."""
    values = parameter.detach().float().cpu().numpy()
    filled = np.zeros(item.spec.shape, dtype=np.float32)
    filled[tuple(slice(length) for length in values.shape)] = values
    if weights is not None:
        floor = max(float(weights.mean()) * 1e-6, float(np.finfo(np.float32).tiny))
        columns = np.full(item.spec.shape[-1], floor, dtype=np.float32)
        columns[: len(weights)] = np.maximum(weights, floor)
        weights = columns
    matrix = filled.reshape(-1, item.spec.shape[-1])
    pieces, lost, total = [], 0.0, 0.0
    for start in range(0, len(matrix), _ROWS_AT_ONCE):
        rows = matrix[start : start + _ROWS_AT_ONCE]
        raw = encode_rows(rows, item.kind, weights if item.kind.name in _WEIGHTED else None)
        difference = dequantize(raw, item.kind, rows.shape).astype(np.float64) - rows
        lost, total = lost + float((difference**2).sum()), total + float((rows.astype(np.float64) ** 2).sum())
        pieces.append(raw)
    whole = np.concatenate(pieces)
    if not np.isfinite(lost):
        raise ConfigError(f"`{item.spec.parameter}` has values beyond 65504, which {item.kind.name} lacks: use bf16.")
    report = TensorReport(
        name=item.spec.name,
        parameter=item.spec.parameter,
        shape=item.spec.shape,
        type=item.kind.name,
        bits_per_weight=8 * whole.nbytes / filled.size,
        bytes=whole.nbytes,
        relative_error=(lost / total) ** 0.5 if total else 0.0,
        note=item.note,
    )
    return whole, report


def encode_rows(values: Floats, kind: BlockType, weights: Floats | None = None) -> Bytes:
    """Return the bytes of a matrix (rows, row length) in a type; bfloat16 is rounded to the nearest, ties to even."""
    if kind.name == "f32":
        return np.ascontiguousarray(values, "<f4").view(np.uint8).ravel()
    if kind.name == "f16":
        with np.errstate(over="ignore"):
            return values.astype("<f2").view(np.uint8).ravel()
    if kind.name == "bf16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").view(np.uint8).ravel()
    return quantize(values, kind, weights)


def _metadata(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, plan: Plan, kind: str
) -> dict[str, Value]:
    """Return the file's metadata: llama.cpp's keys where it has one, ours below `fanformer.`."""
    millions = model.num_parameters() / 1e6
    return {
        "general.architecture": (STRING, ARCHITECTURE),
        "general.type": (STRING, "model"),
        "general.name": (STRING, printable(folder.absolute().name)),
        "general.size_label": (STRING, f"{millions:.0f}M" if millions >= 10 else f"{millions:.1f}M"),
        "general.file_type": (_UINT32, TYPES[kind].file_type),
        "general.quantization_version": (_UINT32, _QUANTIZATION_VERSION),
        **{
            SAMPLING[name]: (_INT32 if name == "top_k" else _FLOAT32, value)
            for name, value in sampling_of(model).items()
        },
        **architecture.metadata(plan.config),
        **_tokenizer_metadata(model, tokenizer),
    }


def _tokenizer_metadata(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, Value]:
    content = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    tokens, types, merges = split_json(content, model.config.vocab_size)
    ids = tokenizer("a").input_ids
    found: dict[str, Value] = {
        "tokenizer.ggml.model": (STRING, "gpt2"),
        "tokenizer.ggml.pre": (STRING, pre_tokenizer_name(content["pre_tokenizer"])),
        TOKENS: (ARRAY, (STRING, tokens)),
        TOKEN_TYPES: (ARRAY, (_INT32, types)),
        MERGES: (ARRAY, (STRING, merges)),
        "tokenizer.ggml.add_bos_token": (_BOOL, ids[:1] == [tokenizer.bos_token_id]),
        "tokenizer.ggml.add_eos_token": (_BOOL, ids[-1:] == [tokenizer.eos_token_id]),
        "tokenizer.ggml.add_space_prefix": (_BOOL, False),
        WHOLE: (STRING, json.dumps(content, ensure_ascii=False, separators=(",", ":"))),
    }
    for name, key in SPECIAL.items():
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            found[f"tokenizer.ggml.{key}"] = _UINT32, number
    ends = end_token_ids(model, tokenizer)
    if ends:
        found[END_IDS] = ARRAY, (_UINT32, ends)
    if tokenizer.chat_template:
        if not isinstance(tokenizer.chat_template, str):
            raise ConfigError("the tokenizer has several chat templates, expected one: a GGUF file holds no more.")
        found[TEMPLATE] = STRING, without_generation_tags(tokenizer.chat_template)
    return found


def pre_tokenizer_name(parts: dict[str, Any]) -> str:
    """Return llama.cpp's name for how text is cut into pieces, or ours where it has none.

    Args:
        parts: `pre_tokenizer` of tokenizer.json.
    """
    steps = parts.get("pretokenizers", [parts])
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1].get("use_regex", True):
        return "smollm"
    return ARCHITECTURE
