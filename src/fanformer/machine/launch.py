"""What a launcher says of the processes it started: `torchrun` and `accelerate launch` speak through the environment.

Nothing else in the package reads these variables, and this module imports neither torch nor transformers.
"""

import os
from collections.abc import Mapping
from typing import Literal

from fanformer.errors import ConfigError

Spread = Literal["none", "ddp", "fsdp2"]
_REFUSED_SETTINGS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "FSDP_OFFLOAD_PARAMS": "offloading parameters to the CPU",
}


def launched_processes(environment: Mapping[str, str] = os.environ) -> int:
    """Return how many processes the launcher started, 1 without one."""
    return int(environment.get("WORLD_SIZE", "1"))


def launched_rank(environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of this process among them, 0 without a launcher."""
    return int(environment.get("RANK", "0"))


def is_restarted(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether the launcher starts these processes again after a failure of one of them."""
    return int(environment.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def launcher(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return what tells the launcher that restarts these processes from any other, None without one."""
    if "TORCHELASTIC_RESTART_COUNT" not in environment:
        return None
    import psutil

    parent = psutil.Process(os.getppid())
    return f"{parent.pid} since {parent.create_time():.2f}"


def choose_spread(asked: str, environment: Mapping[str, str] = os.environ) -> Spread:
    """Return how the model is to be spread over the launched processes.

    Args:
        asked: "auto", "ddp" or "fsdp2"; auto does what the launcher says, ddp where it says nothing.
        environment: of the process.

    Raises:
        ConfigError: if the launcher was told something that this package does not do.
    """
    for name, what in _REFUSED_SETTINGS.items():
        if environment.get(name, "false").lower() in ("true", "1"):
            raise ConfigError(f"the launcher asks for {what}, which is not supported: unset it; expected DDP or FSDP2.")
    if launched_processes(environment) == 1:
        return "none"
    if asked != "auto":
        return "ddp" if asked == "ddp" else "fsdp2"
    if environment.get("ACCELERATE_USE_FSDP", "false").lower() not in ("true", "1"):
        return "ddp"
    version = environment.get("FSDP_VERSION", "1")
    if version != "2":
        raise ConfigError(f"the launcher asks for FSDP version {version}: use `accelerate launch --fsdp_version 2`.")
    return "fsdp2"
