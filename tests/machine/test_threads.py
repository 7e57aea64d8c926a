"""How many threads the engine takes: asked for, fixed by the environment, or the cores that others leave free."""

import os
import subprocess
import sys

import pytest

from fanformer.errors import ConfigError
from fanformer.machine.threads import allowed_cores, choose_threads, free_cores, spin_briefly


@pytest.fixture
def eight_cores(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path / "cpu.max"


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        ("max 100000", 8),
        ("200000 100000", 2),
        ("350000 100000", 3),
        ("50000 100000", 1),
        ("9000000 100000", 8),
        ("?", 8),
    ],
)
def test_control_groups_share_limits_the_cores(eight_cores, text, cores):
    eight_cores.write_text(text + "\n")
    assert allowed_cores(eight_cores) == cores


def test_without_a_control_group_the_affinity_counts(eight_cores):
    assert allowed_cores(eight_cores) == 8


@pytest.mark.parametrize(("load", "free"), [(0.0, 8), (0.4, 8), (2.6, 5), (8.0, 1), (40.0, 1)])
def test_busy_cores_are_left_to_others(eight_cores, monkeypatch, load, free):
    monkeypatch.setattr("fanformer.machine.threads.allowed_cores", lambda: 8)
    assert free_cores(load) == free
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    assert choose_threads(None) == free


@pytest.mark.parametrize(("useful", "threads"), [(0, 1), (1, 1), (3, 3), (50, 5)])
def test_little_work_takes_few_threads(monkeypatch, useful, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("fanformer.machine.threads.allowed_cores", lambda: 8)
    monkeypatch.setattr(os, "getloadavg", lambda: (3.0, 0.0, 0.0))
    assert choose_threads(None, useful) == threads
    assert choose_threads(6, useful) == 6
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert choose_threads(None, useful) == 7


def test_environment_fixes_the_number(monkeypatch):
    monkeypatch.setattr("fanformer.machine.threads.allowed_cores", lambda: 4)
    for text, threads in (("1", 1), ("3", 3), ("64", 4)):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert choose_threads(None) == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    with pytest.raises(ConfigError, match=r"`OMP_NUM_THREADS` must be a number from 1 on, got 'many': unset it"):
        choose_threads(None)


def test_number_that_is_asked_for_must_be_there(monkeypatch):
    monkeypatch.setattr("fanformer.machine.threads.allowed_cores", lambda: 4)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert choose_threads(3) == 3
    for wanted in (0, 5):
        with pytest.raises(ConfigError, match=rf"`threads` must be from 1 to the 4 cores that are there, got {wanted}"):
            choose_threads(wanted)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": "4000"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_threads_wait_briefly_unless_the_environment_says_how(given, expected):
    environment = dict(given)
    spin_briefly(environment)
    assert environment == expected


def test_a_training_is_told_before_torch_is_imported():
    code = (
        "import os, sys; from fanformer.cli import train; assert 'torch' not in sys.modules;"
        "train.spin_briefly(os.environ); import ctypes, torch; libc = ctypes.CDLL(None);"
        "libc.getenv.restype = ctypes.c_char_p; print(libc.getenv(b'GOMP_SPINCOUNT'))"
    )
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "b'4000'"
