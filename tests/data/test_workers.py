"""Processes that encode: what ends them, and what they say then."""

import json
import os
import signal
import time

import pytest

from fanformer.data.preparation import workers
from fanformer.errors import ConfigError
from tests.warm_processes import WarmParent

psutil = pytest.importorskip("psutil")


@pytest.mark.parametrize(("system", "allowed", "usual"), [("linux", 2, 2), ("linux", 96, 96), ("win32", 96, 61)])
def test_as_many_processes_as_cores_that_may_be_used(monkeypatch, system, allowed, usual):
    monkeypatch.setattr(workers.sys, "platform", system)
    monkeypatch.setattr(workers, "allowed_cores", lambda: allowed)
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    assert workers.usual_workers() == usual
    workers.check_workers(usual)


def test_more_processes_than_windows_can_wait_for_are_refused(monkeypatch):
    monkeypatch.setattr(workers.sys, "platform", "win32")
    with pytest.raises(ConfigError, match=r"`workers` must be at most 61 on Windows, got 62"):
        workers.check_workers(62)


@pytest.mark.ci
def test_ctrl_c_while_workers_start_is_quiet(tmp_path):
    text = json.dumps({"text": "many words and no end of them, " * 20}) + "\n"
    work = tmp_path / "work"
    work.mkdir()
    (work / "a.jsonl").write_text(text * 60)
    command = ["data", "prepare", "a.jsonl", "--vocab-size", 300, "--workers", 2, "--output-dir", "out"]
    with WarmParent(
        "fanformer.cli.data", "fanformer.data.preparation.prepare", "tests.data.small_batches", "regex"
    ) as warm:
        for pause in (0.0, 0.04, 0.1):
            process = warm.start(command, work)
            own = psutil.Process(process.pid)
            deadline = time.monotonic() + 30
            while not any("spawn_main" in " ".join(child.cmdline()) for child in own.children()):
                assert time.monotonic() < deadline
            time.sleep(pause)
            process.kill(signal.SIGINT)
            code, said = process.wait(), process.stderr.read_text()
            assert (code, [line for line in said.splitlines() if not line.startswith("encoding: ")]) == (130, [])
