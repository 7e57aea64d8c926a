"""Processes that encode: what ends them, and what they say then."""

import json
import signal
import time

import pytest

from tests.warm_processes import WarmParent

psutil = pytest.importorskip("psutil")


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
