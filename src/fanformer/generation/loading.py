"""A saved model and its tokenizer from a folder, checked first: what would load as garbage is an error with a name."""

import importlib.util
import io
import json
import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import fanformer.model  # noqa: F401  registers the Auto classes, so that a saved folder's own code is not asked for
from fanformer.data.multimodal import known_ids
from fanformer.errors import CheckpointError, ConfigError, DependencyError
from fanformer.machine.devices import resolve_device, resolve_dtype

_INDEX = "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_TRAINING_STATE = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*)\.\w+")


class LoadedModel(NamedTuple):
    """A model in evaluation mode, and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast


def load(folder: str | Path, device: str = "auto", dtype: str = "auto") -> LoadedModel:
    """Load the causal language model and the tokenizer that `folder` holds; no code of the folder is run.

    Args:
        folder: what `save_pretrained` of a causal language model and of its tokenizer left, of any architecture that
            `transformers` has, or a FANformer.
        device: auto, cpu, cuda, cuda:N or mps.
        dtype: auto (as saved), float32, bfloat16 or float16.

    Raises:
        CheckpointError: if anything is missing, damaged, of another kind, or does not fit together.
        ConfigError: if the device is not there or the dtype not known.
        DependencyError: if it is quantized and the package that reads it is not installed.
    """
    model = load_model(folder, device, dtype)
    return LoadedModel(model, load_tokenizer(folder, known_ids(load_config(folder))))


def load_model(folder: str | Path, device: str = "auto", dtype: str = "auto") -> PreTrainedModel:
    """Load the causal language model that `folder` holds, in evaluation mode; arguments and errors as in `load`."""
    placed, kind = resolve_device(device), resolve_dtype(dtype)
    config = load_config(folder)
    path = Path(folder)
    method = _check_quantization(path, config)
    _check_fit(path, config, check_weights(path))
    packed = method == "gptq"
    if packed and kind == torch.float32:
        raise ConfigError(f"`dtype` must be float16 or bfloat16 for {path.absolute()}, which is in the GPTQ layout.")
    with quiet_gptqmodel() if packed else nullcontext():
        # its kernels are chosen for where it is loaded
        model = read_weights(AutoModelForCausalLM, path, config, kind, device_map={"": placed} if packed else None)
    return model.to(placed).eval()


def read_weights(
    auto_class: Any, path: Path, config: PreTrainedConfig, dtype: torch.dtype | None, **options: Any
) -> PreTrainedModel:
    """Return the model that a folder holds; its code is not run, and all weights must be there and fit.

    Args:
        auto_class: of `transformers`, whose `from_pretrained` reads it.
        path: the folder.
        config: of the model.
        dtype: of the weights; None is as they were saved.
        **options: more for `from_pretrained`.

    Raises:
        CheckpointError: if a weight is missing, too many, of another size, or no number.
    """
    model, report = auto_class.from_pretrained(
        path,
        config=config,
        dtype=dtype or "auto",
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,  # so that they come back in the report, which raises
        output_loading_info=True,
        **options,
    )
    _check_report(path, model, report)
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise CheckpointError(
                f"{path.absolute()} is of no use: `{name}` holds values that are not finite (its training diverged)."
            )
    found: PreTrainedModel = model
    return found


@contextmanager
def quiet_gptqmodel() -> Iterator[None]:
    """Keep GPTQModel's log and bars out of what is printed, and let it run where there are few cores."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, os.cpu_count() or 2)))  # with one it refuses to load
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


def load_config(folder: str | Path) -> PreTrainedConfig:
    """Return the configuration of the causal language model that `folder` holds.

    Raises:
        CheckpointError: if there is no such folder, no config.json in it, or not that of a causal language model.
    """
    path = Path(folder)
    _check_folder(path)
    file = path / "config.json"
    content = _read_json(file)
    model_type = content.get("model_type")
    if model_type == "fanformer_multimodal":
        import fanformer.model.multimodal  # noqa: F401  registers it; text alone needs none of it
    if model_type not in transformers.CONFIG_MAPPING:
        raise CheckpointError(
            f"{file.absolute()} has model_type {model_type!r}, expected `fanformer` or one that transformers "
            f"{transformers.__version__} has; code inside a model folder is not run."
        )
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:  # what a damaged value leads to depends on the field: transformers checks few of them
        reason = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
        raise CheckpointError(f"{file.absolute()}: {' '.join(str(reason).split())[:500]}") from error
    causal = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    architectures = content.get("architectures") or []
    if model_type == "fanformer_multimodal" and architectures == ["FANformerForConditionalGeneration"]:
        return config  # whose language model can be loaded alone
    if causal is None or (architectures and causal.__name__ not in architectures):
        raise CheckpointError(
            f"{path.absolute()} holds {' and '.join(architectures) or model_type}, expected a causal language model"
            f"{f' ({causal.__name__})' if causal is not None else ''}."
        )
    return config


def refuse_towers(folder: str | Path, purpose: str) -> None:
    """Refuse a folder with towers where only its language model could go along.

    Args:
        folder: a model folder.
        purpose: what would leave the towers behind, in words.

    Raises:
        ConfigError: if it has some.
        CheckpointError: as `load_config`.
    """
    if load_config(folder).model_type == "fanformer_multimodal":
        raise ConfigError(
            f"{folder} has towers for pictures and sound, which {purpose} would leave behind: name the language model "
            "that it was made from (`init_from` in its run.yaml)."
        )


def load_tokenizer(folder: str | Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """Return the tokenizer that `folder` holds.

    Args:
        folder: a model folder.
        vocab_size: V, how many token ids the model knows.

    Raises:
        CheckpointError: if it is missing, broken, has more tokens than `vocab_size`, or brings code of its own.
    """
    path = Path(folder)
    if not (path / "tokenizer.json").is_file():
        raise CheckpointError(
            f"no tokenizer in {path.absolute()}: expected tokenizer.json; put the one that the model was trained with "
            "there (tokenizer.save_pretrained)."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception on a broken file
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"the tokenizer in {path.absolute()} cannot be read: {reason}") from error
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocab_size:
        raise CheckpointError(
            f"the tokenizer in {path.absolute()} has ids up to {largest}, but the model's vocab_size is {vocab_size}: "
            "it belongs to another model."
        )
    return tokenizer


class SavedTensor(NamedTuple):
    """What the header of a safetensors file says of a tensor."""

    dtype: str
    shape: tuple[int, ...]


def check_weights(folder: Path) -> dict[str, SavedTensor]:
    """Check that the safetensors files of `folder` are all there and whole; reads their headers only.

    Returns:
        Type and shape of every tensor by its name.

    Raises:
        CheckpointError: if there are none, if they are pickles instead, or if one is missing, truncated or corrupt.
    """
    files = weight_files(folder)
    if not files:
        pickles = sorted(
            file.name
            for file in folder.iterdir()
            if file.suffix in _PICKLES and not _TRAINING_STATE.fullmatch(file.name)
        )
        if pickles:
            raise CheckpointError(
                f"{folder.absolute()} holds its weights as a pickle ({pickles[0]}), which can run code and is never "
                "loaded: expected model.safetensors; save them again with save_pretrained."
            )
        raise CheckpointError(f"no weights in {folder.absolute()}: expected model.safetensors.")
    tensors: dict[str, SavedTensor] = {}
    for file in files:
        tensors |= _check_safetensors(file)
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files with a folder's weights, and no optimizer's or other of them; none where none are.

    Raises:
        CheckpointError: if the list of several files is damaged.
    """
    index = folder / _INDEX
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not index.is_file():
        return []
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{index.absolute()} is damaged: expected a `weight_map` of tensors to files.")
    return sorted({folder / str(name) for name in shards.values()})


def _check_folder(path: Path) -> None:
    if path.is_file():
        raise CheckpointError(f"{path.absolute()} is a file, expected a model folder (config.json, model.safetensors).")
    if not path.is_dir():
        remedy = "give the folder that `fanformer train --output-dir` wrote."
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not path.parent.is_dir():
            remedy = f"if `{path}` is a name on the hub, fetch it first with `hf download {path} --local-dir DIR`."
        raise CheckpointError(f"no model folder {path.absolute()}: {remedy}")
    if not (path / "config.json").is_file():
        checkpoints = [entry for entry in path.glob("checkpoint-*") if (entry / "config.json").is_file()]
        newest = max(checkpoints, key=lambda entry: int(re.sub(r"\D", "", entry.name) or 0), default=None)
        remedy = f"its training has not ended, try {newest}" if newest else "expected what save_pretrained leaves"
        raise CheckpointError(f"no config.json in {path.absolute()}: {remedy}.")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file.absolute()} is damaged: not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file.absolute()} is damaged: expected a JSON object, got {type(content).__name__}.")
    return content


def _check_safetensors(file: Path) -> dict[str, SavedTensor]:
    """Compare the size of `file` with its header (length as uint64, then JSON), and return its tensors."""
    if not file.is_file():
        raise CheckpointError(f"{file.absolute()} is missing, and the index names it: copy the folder again.")
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:
            raise CheckpointError(
                f"{file.absolute()} is truncated or no safetensors file: {size} bytes; copy it again."
            )
        try:
            tensors = json.loads(stream.read(length))
            tensors.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        except (ValueError, AttributeError, LookupError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{file.absolute()} is corrupt: its header cannot be read; copy it again.") from error
    if size != 8 + length + end:
        raise CheckpointError(
            f"{file.absolute()} is truncated or corrupt: {size} bytes, its header says {8 + length + end}; "
            "copy it again."
        )
    try:
        with safetensors.safe_open(file, framework="np"):  # reads the header only, and checks the rest of it
            return {name: SavedTensor(entry["dtype"], tuple(entry["shape"])) for name, entry in tensors.items()}
    except (safetensors.SafetensorError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{file.absolute()} is corrupt: {reason}; copy it again.") from error


_READERS = {
    "compressed-tensors": ("compressed_tensors", "compressed-tensors", "quantize"),
    "gptq": ("gptqmodel", "gptqmodel optimum", "gptq"),
}
"""For a way of quantizing the module and the packages that read it, and the extra that has them."""


def _check_quantization(path: Path, config: PreTrainedConfig) -> str | None:
    """Return how the weights are quantized, of _READERS; name the package that reads them where it is missing."""
    quantization = getattr(config, "quantization_config", None)
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method not in _READERS:
        return None
    module, packages, extra = _READERS[method]
    if importlib.util.find_spec(module) is None:
        raise DependencyError(
            f"{path.absolute()} is quantized, and reading it needs {packages.split()[0]}, which is not installed: "
            f"pip install {packages} (the extra fanformer[{extra}] has it)"
        )
    return str(method)


def _check_fit(path: Path, config: PreTrainedConfig, saved: dict[str, SavedTensor]) -> None:
    """Compare a FANformer's configuration with its weights before memory is taken for what it claims.

    Other architectures' and quantized weights are compared by transformers once they are loaded.
    """
    if config.model_type != "fanformer" or getattr(config, "quantization_config", None) is not None:
        return
    if config.num_hidden_layers > len(saved):
        raise CheckpointError(
            f"the weights in {path.absolute()} do not fit its config.json: `num_hidden_layers` is "
            f"{config.num_hidden_layers}, but they are {len(saved)} tensors."
        )
    with torch.device("meta"):
        expected = AutoModelForCausalLM.from_config(config).state_dict()
    for name, parameter in sorted(expected.items()):
        found = saved.get(name)
        if found is None:
            continue  # told with all others that are missing once the model is loaded
        if found.shape != parameter.shape:
            raise _mismatch(path, config.vocab_size, name, found.shape, tuple(parameter.shape))
        if found.dtype not in _FLOATS:
            raise CheckpointError(
                f"the weights in {path.absolute()} are of no use: `{name}` is stored as {found.dtype}, "
                f"expected one of {', '.join(_FLOATS)}."
            )


def _check_report(path: Path, model: PreTrainedModel, report: dict[str, Any]) -> None:
    for key, saved, expected in sorted(report["mismatched_keys"]):
        raise _mismatch(path, model.config.vocab_size, key, tuple(saved), tuple(expected))
    for verb, keys in (("lacks", report["missing_keys"]), ("has unknown", report["unexpected_keys"])):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise CheckpointError(
                f"the weights in {path.absolute()} do not fit its config.json: it {verb} `{min(keys)}`{more}."
            )
    if report["error_msgs"]:
        raise CheckpointError(f"the weights in {path.absolute()} cannot be loaded: {report['error_msgs'][0]}")


def _mismatch(
    path: Path, vocab_size: int, key: str, saved: tuple[int, ...], expected: tuple[int, ...]
) -> CheckpointError:
    """Return the error for a weight of another shape than the configuration says."""
    if expected[0] == vocab_size and saved[1:] == expected[1:]:
        return CheckpointError(
            f"the vocabulary of {path.absolute()} does not fit its weights: `vocab_size` is {vocab_size}, but `{key}` "
            f"has {saved[0]} rows."
        )
    return CheckpointError(
        f"the weights in {path.absolute()} do not fit its config.json: `{key}` is {saved}, expected {expected}."
    )
