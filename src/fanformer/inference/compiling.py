"""Compiling the decoding step: whether it is possible here, and what `generate` of transformers needs for it."""

import os
import shutil
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
