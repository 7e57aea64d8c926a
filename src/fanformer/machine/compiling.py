"""Compiling: whether it is possible here, where compiled code is kept, and what `generate` of transformers needs."""

import hashlib
import os
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import CompileConfig, PreTrainedModel, StaticCache

from fanformer.errors import ConfigError

_CACHE_STEP = 256
"""Caches are as long as a multiple of this, so that texts of other lengths need no new compilation."""


def why_not_compile(device: str) -> str | None:
    """Return why torch cannot compile for a kind of device here, or None where it can."""
    if device == "mps":
        return "not supported on mps"
    if device == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        return "no C++ compiler (g++) found"
    return None


def compile_options(device: str, threads: int) -> dict[str, Any] | None:
    """Return torch.compile's `options` for a kind of device and a number of CPU threads."""
    # The number of threads is fixed in the compiled code, but only part of its cache's key where it is given.
    return {"cpp.threads": threads} if device == "cpu" else None


def keep_compiled_code(threads: int) -> Path | None:
    """Let torch keep compiled code in the user's own cache folder, so that the next process need not compile again.

    The folder is one for each processor, number of threads and versions: code is made for all of them. By itself torch
    uses a folder of the machine's temporary files, which is gone after a restart. TORCHINDUCTOR_CACHE_DIR, where it is
    set, stays what it is.

    Args:
        threads: of the CPU, which are fixed in the code.

    Returns:
        The folder, None where none can be made, so that torch uses its own.
    """
    given = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or _torchs_own())
    if given.parent != _torchs_own().parent or not given.name.startswith(_torchs_own().name):
        return given
    root = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    made_for = [_processor(), threads, torch.__version__, platform.python_version()]
    folder = root / "fanformer" / "compiled" / hashlib.sha256(repr(made_for).encode()).hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)  # it holds code that will be run
    except OSError:
        return None
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    return folder


def _torchs_own() -> Path:
    """Return the beginning of the folder that torch names in TORCHINDUCTOR_CACHE_DIR by itself."""
    return Path(tempfile.gettempdir()) / "torchinductor_"


def _processor() -> str:
    """Return what the processor is and can, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.split(":")[0].strip() in wanted}))


def compiled_decoding(device: str) -> dict[str, Any]:
    """Return fields of a GenerationConfig with which every step on a `fixed_cache` but the first runs compiled.

    On CUDA the step is captured as a graph.

    Args:
        device: kind of the model's device.

    Raises:
        ConfigError: if torch cannot compile here.
    """
    reason = why_not_compile(device)
    if reason is not None:
        raise ConfigError(f"`compile` is on, but {reason}: leave it off.")
    keep_compiled_code(torch.get_num_threads())
    options = compile_options(device, torch.get_num_threads())
    # torch takes options or a mode; transformers' own mode captures graphs, which only CUDA has
    compiling = CompileConfig(dynamic=False, **({} if options is None else {"mode": None, "options": options}))
    compiling._compile_all_devices = True  # on the CPU too
    return {"compile_config": compiling}


def fixed_cache(model: PreTrainedModel, positions: int) -> StaticCache:
    """Return a cache of fixed size for one call of `generate`, with room for so many tokens a row.

    That which `generate` makes by itself is never shorter than any before it, and every step reads all of it: one long
    text would slow down every later one.
    """
    capacity = -(-positions // _CACHE_STEP) * _CACHE_STEP
    return StaticCache(config=model.config, max_cache_len=capacity)
