"""Whatever writes text: a model folder on torch or a GGUF file on ggml, by the same functions; itself torch-free."""

from typing import TYPE_CHECKING, Any

from fanformer.errors import ConfigError
from fanformer.inference.gguf_file import is_gguf

if TYPE_CHECKING:
    from fanformer.inference.ggml_generation import LoadedEngine
    from fanformer.inference.loading import LoadedModel


def load_text_model(
    path: str, device: str = "auto", dtype: str = "auto", threads: int | None = None
) -> "LoadedModel | LoadedEngine":
    """Load what `path` names: a folder on torch, a .gguf file on ggml, for which torch is never imported.

    Args:
        path: a model folder or a GGUF file.
        device: of a folder; a file runs on the CPU.
        dtype: of a folder; a file has its own types.
        threads: of a file; None chooses the free cores.

    Raises:
        CheckpointError: if it is missing, damaged, or of another kind.
        ConfigError: if an argument has no effect on what `path` names, or is wrong.
        DependencyError: if a file is named and the extra `gguf` is not installed.
    """
    if not is_gguf(path):
        if threads is not None:
            raise ConfigError(f"`--threads` is for .gguf files, got {threads} for {path}: set OMP_NUM_THREADS instead.")
        from fanformer.inference.loading import load

        return load(path, device, dtype)
    if device not in ("auto", "cpu"):
        raise ConfigError(f"`device` must be auto or cpu for a .gguf file, got {device!r}: ggml runs on the CPU here.")
    if dtype != "auto":
        raise ConfigError(
            f"`dtype` must be auto for a .gguf file, got {dtype!r}: its types were chosen when it was written."
        )
    from fanformer.inference.ggml_generation import load_engine

    return load_engine(path, threads)


def generation_of(model: Any) -> Any:
    """Return the module whose `iterate`, `generate` and `continue_ids` write text with `model`."""
    from fanformer.inference.ggml_engine import Engine

    if isinstance(model, Engine):
        from fanformer.inference import ggml_generation

        return ggml_generation
    from fanformer.inference import generation

    return generation
