"""What a run ran on: the machine, the versions of what shapes its numbers, and its command; torch-free."""

import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from fanformer import __version__

_BF16_FLAGS = ("amx_bf16", "avx512_bf16", "bf16")  # of x86 and of Arm


def hardware() -> dict[str, Any]:
    """Return what this machine is: processor, cores, memory in bytes, bfloat16 units, GPUs, operating system.

    GPUs are looked for only where torch is imported already; a run that used one has done so.
    """
    torch = sys.modules.get("torch")
    gpus = range(torch.cuda.device_count()) if torch is not None and torch.cuda.is_available() else ()
    model, flags = _processor()
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "bfloat16_units": [flag for flag in _BF16_FLAGS if flag in flags],
        "gpus": [torch.cuda.get_device_name(number) for number in gpus] if torch is not None else [],
        "os": " ".join(word for word in (platform.system(), platform.machine(), *platform.libc_ver()) if word),
    }


def versions() -> dict[str, str]:
    """Return the versions of everything that shapes a run's numbers."""
    names = ("torch", "transformers", "tokenizers", "accelerate", "numpy")
    # our own by import: the package may lie in a folder on the path, not installed
    own = {"python": platform.python_version(), "fanformer": __version__}
    return {**own, **{name: version(name) for name in names}}


def command_line(arguments: Sequence[str]) -> str:
    """Return a command as one line for a shell that names no folder of this machine.

    Args:
        arguments: the command's words; the first may be the path of a Python interpreter or of an installed command.

    Returns:
        The words, quoted where they need it. Absolute paths become relative to the working folder where they lie in it
        or beside it; of others the last part stays, after `PATH/`.
    """
    first, *rest = arguments
    name = Path(first).name
    words = ["python" if re.fullmatch(r"python[\d.]*", name) else name if Path(first).is_absolute() else first]
    for word in rest:
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        words.append(option + equals + _without_machine(value))
    return shlex.join(words)


def _processor() -> tuple[str, set[str]]:
    """Return the processor's name and its flags, as Linux lists them; elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name") or platform.processor() or platform.machine()
    return name, set((fields.get("flags") or fields.get("Features") or "").split())


def _without_machine(word: str) -> str:
    if not word.startswith(os.sep):
        return word
    path, here = Path(word), Path.cwd()
    if path.is_relative_to(here):
        return str(path.relative_to(here))
    if path != here.parent and here.parent != Path(here.anchor) and path.is_relative_to(here.parent):
        return os.path.join("..", path.relative_to(here.parent))
    return os.path.join("PATH", path.name)
