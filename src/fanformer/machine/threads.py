"""How many threads are of use, the cores that nobody else is busy on, and how long they wait for each other."""

import math
import os
from collections.abc import MutableMapping
from pathlib import Path

from fanformer.errors import ConfigError

_SPINS = "4000"
"""Looks that a waiting thread of OpenMP takes before it sleeps; GNU's own default is some milliseconds' worth."""
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def allowed_cores(quota_file: Path = _QUOTA) -> int:
    """Return the cores that this process may use, at least 1: its affinity, within its control group's share.

    Args:
        quota_file: where Linux says "QUOTA PERIOD" or "max PERIOD".
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = quota_file.read_text(encoding="ascii").split()
        cores = min(cores, max(1, math.floor(int(quota) / int(period))))
    except (OSError, ValueError):
        pass  # no control group, or one without a limit
    return cores


def free_cores(load: float | None = None) -> int:
    """Return how many of the allowed cores others leave free, at least 1.

    ggml's threads wait for each other by spinning: one on a busy core holds up all of them.

    Args:
        load: processes that run on average; default: the system's figure for the last minute.
    """
    if load is None:
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return max(1, allowed_cores() - round(load))


def choose_threads(wanted: int | None, useful: int | None = None) -> int:
    """Return the number of threads to use: `wanted`, else `OMP_NUM_THREADS`, else the free cores.

    Args:
        wanted: what the user asked for.
        useful: how many the work is large enough for: no more of the free cores are taken.

    Raises:
        ConfigError: if it is asked for and below 1 or above the allowed cores, or if OMP_NUM_THREADS is no number.
    """
    if wanted is not None:
        if not 1 <= wanted <= allowed_cores():
            raise ConfigError(f"`threads` must be from 1 to the {allowed_cores()} cores that are there, got {wanted}.")
        return wanted
    fixed = os.environ.get("OMP_NUM_THREADS")
    if fixed is None:
        return free_cores() if useful is None else max(1, min(free_cores(), useful))
    if not fixed.isdigit() or int(fixed) < 1:
        raise ConfigError(f"`OMP_NUM_THREADS` must be a number from 1 on, got {fixed!r}: unset it.")
    return min(int(fixed), allowed_cores())


def spin_briefly(environment: MutableMapping[str, str]) -> None:
    """Let torch's threads wait awake for microseconds only, and then sleep, unless the environment says how they wait.

    Beside another process that computes, a thread that waits awake keeps the one that it waits for off its core: two
    trainings on two cores, two threads each, ran at a hundredth of their speed. For GNU's OpenMP, and of effect only
    before torch is imported.

    Args:
        environment: of this process or of one to be started; changed.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", _SPINS)
