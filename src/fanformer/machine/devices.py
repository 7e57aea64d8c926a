"""Which device and which dtype a model runs on; what is asked for and absent is an error, never replaced."""

import torch

from fanformer.errors import ConfigError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """Return the device called `name`; `auto` is the first present of cuda, mps and cpu.

    Args:
        name: auto, cpu, cuda, cuda:N or mps.

    Raises:
        ConfigError: if the device does not exist here, or is none that is known.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or not (index.isdigit() or name == kind):
        raise ConfigError(f"`device` must be auto, cpu, cuda, cuda:N or mps, got {name!r}.")
    present = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[kind]
    if int(index or 0) >= present:
        found = f"{present} of its kind" if present else "none of its kind"
        raise ConfigError(
            f"`device` {name!r} is not there: PyTorch {torch.__version__} finds {found}; use cpu or auto."
        )
    return torch.device(name)


def resolve_dtype(name: str) -> torch.dtype | None:
    """Return the dtype called `name`, or None for `auto`: the dtype that the weights were saved in.

    Raises:
        ConfigError: if the name is not auto, float32, bfloat16 or float16.
    """
    if name != "auto" and name not in _DTYPES:
        raise ConfigError(f"`dtype` must be auto, {', '.join(_DTYPES)}, got {name!r}.")
    return _DTYPES.get(name)
