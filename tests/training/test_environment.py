import json
import os
import platform
import re
import shutil
import subprocess
import sys

import pytest
import torch

from fanformer.errors import ConfigError
from fanformer.training.configuration import resolve
from fanformer.training.environment import decide, keep_freed_memory

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine")


@needs_compiler
def test_only_long_runs_are_compiled_and_the_reason_is_kept():
    config = resolve("nano", overrides={"device": "cpu"})
    short, long = decide(config, flops=1e9, seconds=None), decide(config, flops=1e16, seconds=None)
    assert not short.compile
    assert long.compile
    assert "compiling pays from" in long.reasons["compile"]
    assert decide(config, flops=None, seconds=300.0).compile
    assert not decide(config, flops=None, seconds=60.0).compile


@needs_compiler
def test_what_is_asked_for_is_kept():
    config = resolve("nano", overrides={"device": "cpu", "compile": "on", "precision": "bfloat16", "threads": 1})
    before = torch.get_num_threads()
    try:
        environment = decide(config, flops=1.0, seconds=None)
        assert (environment.compile, environment.precision, environment.threads) == (True, "bfloat16", 1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_compilation_without_a_compiler_is_refused_not_skipped(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="`compile` is on, but no C\\+\\+ compiler"):
        decide(resolve("nano", overrides={"device": "cpu", "compile": "on"}), flops=1.0, seconds=None)
    automatic = decide(resolve("nano", overrides={"device": "cpu"}), flops=1e18, seconds=None)
    assert not automatic.compile
    assert "no C++ compiler" in automatic.reasons["compile"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_glibc_accepts_the_allocation_setting():
    assert keep_freed_memory()


_STEPS_MARKED = """
import json, sys
from fanformer.training.configuration import RunConfig
from fanformer.training.run import Silence, train

class Marks(Silence):
    def step(self, step, *rest):
        print("STEP", flush=True)

train(RunConfig(**json.loads(sys.argv[1])), Marks())
"""


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this torch is built without MKL")
def test_a_first_process_and_a_resumed_one_let_mkl_share_products_out_alike(run_config):
    """MKL chooses its threads for each product until torch is told a number: where a core runs two threads it takes
    fewer than torch reports, and sums in another order.
    """
    variables = {**os.environ, "MKL_VERBOSE": "1"}
    variables.pop("MKL_DYNAMIC", None)

    def choices(config):
        words = [sys.executable, "-c", _STEPS_MARKED, json.dumps(config.to_dict())]
        done = subprocess.run(words, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return set(re.findall(r"Dyn:\d|NThr:\d+", done.stdout.partition("STEP")[2]))

    first = choices(run_config(max_steps=3))
    assert "Dyn:0" in first
    assert choices(run_config(max_steps=6, resume=True)) == first
