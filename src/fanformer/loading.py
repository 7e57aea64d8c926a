"""What a path names: a model folder, on torch, or a GGUF file, on ggml or on torch. Imports only what it needs."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fanformer.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

    from fanformer.generation.loading import LoadedModel
    from fanformer.generation.text_model import TextModel

BOX = Path(__file__).with_name("box")
"""Where the model in the box lies, the small one that ships with this package."""


def model_in_the_box() -> Path:
    """Return the folder of the model that ships with this package.

    Raises:
        CheckpointError: if this installation has none.
    """
    if not (BOX / "config.json").is_file():
        raise CheckpointError(
            f"no model came with this installation, expected one in {BOX}: name a model folder or .gguf file, or "
            "install fanformer from a clone in which `make release-model` has run."
        )
    return BOX


def is_gguf(path: str | Path) -> bool:
    """Return whether `path` means a GGUF file rather than a folder: it ends in .gguf and is no folder."""
    return Path(path).suffix == ".gguf" and not Path(path).is_dir()


def load_text_model(
    path: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    compiled: bool = False,
    adapter: str | Path | None = None,
    *,
    num_steps: int | None = None,
    exit_threshold: float | None = None,
    draft_tokens: int | None = None,
    towers: bool = False,
) -> "TextModel":
    """Load what writes text: a folder on torch, a .gguf file on ggml, for which torch is never imported.

    Args:
        path: a model folder or a GGUF file; None is the model in the box.
        device: of a folder: auto, cpu, cuda, cuda:N or mps; a file runs on the CPU.
        dtype: of a folder: auto (as saved), float32, bfloat16 or float16; a file has its own types.
        threads: of a file; None chooses the free cores.
        compiled: of a folder: whether the step from token to token is compiled, which pays for long texts.
        adapter: of a folder: folder of an adapter that PEFT saved, merged into the weights.
        num_steps: how often a recurrent depth runs its core; None is the mean of its training.
        exit_threshold: of a folder: relative change of its state from which on a token takes no further step.
        draft_tokens: of a folder: as many tokens as one step drafts before all steps verify them, for greedy text.
        towers: of a folder that has them: load what sees and hears too, a `MediaModel`; else its language model alone.

    Raises:
        CheckpointError: if it is missing, damaged, or of another kind.
        ConfigError: if an argument has no effect on what `path` names, or is wrong.
        DependencyError: if a file is named and the extra `gguf` is not installed.
    """
    path = model_in_the_box() if path is None else path
    if not is_gguf(path):
        if threads is not None:
            raise ConfigError(f"`--threads` is for .gguf files, got {threads} for {path}: set OMP_NUM_THREADS instead.")
        if towers:
            others: dict[str, Any] = {"adapter": adapter, "compile": compiled or None, "num-steps": num_steps}
            others |= {"exit-threshold": exit_threshold, "draft-tokens": draft_tokens}
            for option, given in others.items():
                if given is not None:
                    raise ConfigError(
                        f"`--{option}` does not go with pictures and recordings, got it for {path}: drop it."
                    )
            from fanformer.generation.media_model import load_media_model

            return load_media_model(path, device, dtype)
        from fanformer.generation.torch_model import TorchModel

        loaded = load(path, device, dtype, adapter)
        if num_steps is not None or exit_threshold is not None:
            from fanformer.generation.depth import set_depth

            set_depth(loaded.model, num_steps, exit_threshold)
        return TorchModel(*loaded, compiled, draft_tokens=draft_tokens)
    _refuse_adapter(path, adapter)
    if towers:
        raise ConfigError(f"pictures and recordings are for model folders, got {path}: name a folder with towers.")
    if compiled:
        raise ConfigError(f"`--compile` is for model folders, got {path}: leave it out, ggml needs no compiling.")
    if device not in ("auto", "cpu"):
        raise ConfigError(f"`device` must be auto or cpu for a .gguf file, got {device!r}: ggml runs on the CPU here.")
    if dtype != "auto":
        raise ConfigError(
            f"`dtype` must be auto for a .gguf file, got {dtype!r}: its types were chosen when it was written."
        )
    for name, value in (("exit_threshold", exit_threshold), ("draft_tokens", draft_tokens)):
        if value is not None:
            raise ConfigError(f"`{name}` is for model folders, got {value} for {path}: ggml takes --num-steps only.")
    from fanformer.gguf.ggml_model import GgmlModel

    return GgmlModel(path, threads, num_steps)


def _refuse_adapter(path: str | Path, adapter: str | Path | None) -> None:
    if adapter is not None:
        raise ConfigError(f"`--adapter` is for model folders, got {adapter} for {path}: merge it before exporting.")


def load(
    path: str | Path, device: str = "auto", dtype: str = "auto", adapter: str | Path | None = None
) -> "LoadedModel":
    """Load model and tokenizer for torch; of a GGUF file the numbers become float32.

    Arguments and errors are those of `generation.loading.load`, which reads the folders; `adapter` is the folder of an
    adapter that PEFT saved, merged into the weights, with a tokenizer of its own or not.
    """
    from fanformer.generation.loading import LoadedModel
    from fanformer.generation.loading import load as load_folder

    if not is_gguf(path):
        if adapter is None:
            return load_folder(path, device, dtype)
        from fanformer.generation.adapters import with_adapter
        from fanformer.generation.loading import resolve_dtype

        adapted = with_adapter(load_folder(path, device, "float32"), adapter)  # rounded once, when it is whole
        adapted.model.to(resolve_dtype(dtype) or load_config(path).dtype)
        return adapted
    _refuse_adapter(path, adapter)
    model = load_model(path, device, dtype)
    return LoadedModel(model, load_tokenizer(path, model.config.vocab_size))


def load_model(path: str | Path, device: str = "auto", dtype: str = "auto") -> "PreTrainedModel":
    """Load the model for torch, in evaluation mode; arguments and errors as in `load`."""
    if not is_gguf(path):
        from fanformer.generation.loading import load_model as load_folder

        return load_folder(path, device, dtype)
    from fanformer.gguf.loading import read_model
    from fanformer.machine.devices import resolve_device, resolve_dtype

    placed, kind = resolve_device(device), resolve_dtype(dtype)
    return read_model(path, kind).to(placed)


def load_config(path: str | Path) -> "PreTrainedConfig":
    """Return the configuration of the model.

    Raises:
        CheckpointError: if it is missing, or not that of a causal language model.
    """
    if is_gguf(path):
        from fanformer.gguf.loading import read_config

        return read_config(path)
    from fanformer.generation.loading import load_config as read_from_folder

    return read_from_folder(path)


def has_towers(path: str | Path) -> bool:
    """Return whether the model sees or hears; raises as `load_config`."""
    return not is_gguf(path) and load_config(path).model_type == "fanformer_multimodal"


def longest_text(path: str | Path) -> int | None:
    """Return how many positions the model has, None where nothing limits them; raises as `load_config`."""
    return getattr(load_config(path), "max_position_embeddings", None)


def load_tokenizer(path: str | Path, vocab_size: int) -> "PreTrainedTokenizerFast":
    """Return the tokenizer of the model, as `transformers` has it.

    Args:
        path: a model folder or a GGUF file.
        vocab_size: V, how many token ids the model knows.

    Raises:
        CheckpointError: if it is missing, broken, has more tokens than `vocab_size`, or brings code of its own.
    """
    if is_gguf(path):
        from fanformer.gguf.loading import read_tokenizer

        return read_tokenizer(path)
    from fanformer.generation.loading import load_tokenizer as read_from_folder

    return read_from_folder(path, vocab_size)
