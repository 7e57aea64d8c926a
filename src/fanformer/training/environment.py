"""What a run decides for itself about the machine: device, precision, threads, memory allocation, compilation.

Decisions are made once, written into run.yaml with their reasons, and kept on resume. A process that decides and one
that keeps what was decided are set up by the same `Environment.apply`: a library that was told its number of threads
sums in another order than one that chose the same number by itself.
"""

import ctypes
import os
import statistics
import sys
import time
from dataclasses import dataclass

import torch

from fanformer.errors import ConfigError
from fanformer.machine.compiling import why_not_compile
from fanformer.machine.devices import resolve_device
from fanformer.machine.versions import hardware
from fanformer.training.fields import MachineConfig

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
# Share of the measured matrix-product rate that a training step reaches, and the seconds from which compiling pays:
# it costs about 35 s on two cores and makes a step 1.35 times faster.
_STEP_EFFICIENCY = 0.3
_COMPILE_PAYS_FROM_SECONDS = 170.0


@dataclass(frozen=True)
class Environment:
    """The decisions of one run; `reasons` says why each was made."""

    device: str
    precision: str
    compile: bool
    threads: int
    keep_freed_memory: bool
    reasons: dict[str, str]

    def apply(self) -> None:
        """Set this process up as decided; every process of a run does, whether it decided or was told."""
        torch.set_num_threads(self.threads)  # also ends MKL's own choice of threads, and with it that order of sums
        if self.keep_freed_memory:
            keep_freed_memory()


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed blocks instead of giving them back to the kernel at every step.

    A training step frees and asks for the same large blocks again; page faults on fresh ones cost time
    (benchmarks/speed/malloc.py measures how much).

    Returns:
        Whether the setting was accepted; False where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not hasattr(libc, "gnu_get_libc_version"):
        return False
    return bool(libc.mallopt(_M_MMAP_MAX, 0)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def what_sums_depend_on() -> dict[str, str]:
    """Return what else decides in which order this machine sums, and so its last bits: processor, kernels, variables.

    The number of threads is part of Environment.
    """
    names = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS")
    variables = {name: os.environ[name] for name in names if name in os.environ}
    devices = hardware()
    return {
        "processor": str(devices["cpu"]),
        **{f"gpu {number}": name for number, name in enumerate(devices["gpus"])},
        "kernels": torch.backends.cpu.get_cpu_capability(),
        **variables,
    }


def use_deterministic_operations() -> None:
    """Let CUDA take the operations whose sums have a fixed order; must come before its first product.

    An operation that has no such form goes on as it is: `fanformer train --prove-resume` shows whether bits are equal.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # of use for finding mistakes only


def product_rate(device: str, dtype: torch.dtype, size: int = 768) -> float:
    """Return the floating-point operations per second of a (size, size) matrix product, the median of several."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(9):
        start = time.perf_counter()
        (left @ right).sum().item()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times[2:])


def decide(
    config: MachineConfig, flops: float | None, seconds: float | None, uncompiled: str | None = None
) -> Environment:
    """Decide device, precision, threads, allocation and compilation; `apply` is the caller's.

    Args:
        config: what the run asks for; what is not "auto" or None is kept.
        flops: floating-point operations that the planned steps take, where the run's length is in steps.
        seconds: the planned time, where the run's length is a time.
        uncompiled: why the model cannot be compiled, None where it can.

    Raises:
        ConfigError: if the device is absent, or compilation is asked for where it cannot be.
    """
    reasons = {}
    device = resolve_device(config.device).type
    reasons["device"] = "as asked" if config.device != "auto" else "the first present of cuda, mps, cpu"
    threads = config.threads or torch.get_num_threads()
    reasons["threads"] = "as asked" if config.threads is not None else f"torch's default on {os.cpu_count()} CPUs"
    torch.set_num_threads(threads)  # for the measurements that follow
    kept = device == "cpu" and keep_freed_memory()
    reasons["keep_freed_memory"] = "mallopt of glibc" if kept else "not on the CPU, or no glibc"

    rate = product_rate(device, torch.float32)
    precision = config.precision
    reasons["precision"] = "as asked"
    if precision == "auto":
        half_rate = product_rate(device, torch.bfloat16)
        precision = "bfloat16" if half_rate > 1.3 * rate else "float32"
        reasons["precision"] = f"bfloat16 products run at {half_rate / rate:.2f} times the rate of float32"
    if precision == "bfloat16":
        rate = max(rate, product_rate(device, torch.bfloat16))

    compiling, reasons["compile"] = _decide_compile(config, device, flops, seconds, rate, uncompiled)
    return Environment(device, precision, compiling, threads, kept, reasons)


def _decide_compile(
    config: MachineConfig, device: str, flops: float | None, seconds: float | None, rate: float, uncompiled: str | None
) -> tuple[bool, str]:
    why = uncompiled or why_not_compile(device)
    if config.compile == "off":
        return False, "as asked"
    if config.compile == "on":
        if why is not None:
            raise ConfigError(f"`compile` is on, but {why}: use --compile auto.")
        return True, "as asked"
    if why is not None:
        return False, why
    expected = seconds if flops is None else flops / (_STEP_EFFICIENCY * rate)
    assert expected is not None, "a run has a length in steps or in time"
    pays = expected >= _COMPILE_PAYS_FROM_SECONDS
    return pays, f"about {expected:.0f} s of training planned, compiling pays from {_COMPILE_PAYS_FROM_SECONDS:.0f} s"
