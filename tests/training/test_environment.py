import json
import platform
import re
import shutil

import pytest
import torch

from fanformer.errors import ConfigError
from fanformer.training.configuration import resolve
from fanformer.training.environment import decide, keep_freed_memory
from fanformer.training.fields import RunConfig
from fanformer.training.run import train
from tests.warm_processes import WarmParent

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine")


@needs_compiler
def test_only_long_runs_are_compiled_and_the_reason_is_kept():
    config = resolve("nano", overrides={"device": "cpu"}).machine
    short, long = decide(config, flops=1e9, seconds=None), decide(config, flops=1e16, seconds=None)
    assert not short.compile
    assert long.compile
    assert "compiling pays from" in long.reasons["compile"]
    assert decide(config, flops=None, seconds=300.0).compile
    assert not decide(config, flops=None, seconds=60.0).compile


@needs_compiler
def test_what_is_asked_for_is_kept():
    config = resolve(
        "nano", overrides={"device": "cpu", "compile": "on", "precision": "bfloat16", "threads": 1}
    ).machine
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
        decide(resolve("nano", overrides={"device": "cpu", "compile": "on"}).machine, flops=1.0, seconds=None)
    automatic = decide(resolve("nano", overrides={"device": "cpu"}).machine, flops=1e18, seconds=None)
    assert not automatic.compile
    assert "no C++ compiler" in automatic.reasons["compile"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_glibc_accepts_the_allocation_setting():
    assert keep_freed_memory()


def mark(event):
    """Say when a step has ended, between the lines of MKL."""
    if event.kind == "step":
        print("STEP", flush=True)


def train_with_marks(configuration):
    """Train as a JSON object says."""
    train(RunConfig.from_fields(json.loads(configuration)), mark)


@pytest.mark.ci
@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this torch is built without MKL")
def test_a_first_process_and_a_resumed_one_let_mkl_share_products_out_alike(run_config, tmp_path, monkeypatch):
    """MKL chooses its threads for each product until torch is told a number: where a core runs two threads it takes
    fewer than torch reports, and sums in another order.
    """
    monkeypatch.delenv("MKL_DYNAMIC", raising=False)

    def choices(warm, config):
        words, call = [json.dumps(config.to_dict())], "tests.training.test_environment:train_with_marks"
        process = warm.start(words, tmp_path, call=call)
        assert process.wait() == 0, process.stderr.read_text()
        return set(re.findall(r"Dyn:\d|NThr:\d+", process.stdout.read_text().partition("STEP")[2]))

    with WarmParent("tests.training.test_environment", env={"MKL_VERBOSE": "1"}) as warm:
        first = choices(warm, run_config(max_steps=3))
        assert "Dyn:0" in first
        assert choices(warm, run_config(max_steps=6, resume=True)) == first
