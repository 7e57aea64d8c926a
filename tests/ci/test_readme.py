"""The README's blocks are executed, in order, in one folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ci

# `make demo` and `make test` are what CI itself runs around this test; `fanformer chat` answers in test_wheel.py.
RUN_ELSEWHERE = {"make chat", "make demo", "make test"}


def blocks(text):
    """Return (language, content) of every fenced block that is a program."""
    return [match for match in re.findall(r"```(\w+)\n(.*?)```", text, flags=re.S) if match[0] in ("bash", "python")]


@pytest.mark.timeout(1200)
def test_every_block_of_the_readme_runs(repository, tmp_path):
    found = blocks((repository / "README.md").read_text(encoding="utf-8"))
    assert len(found) >= 3
    scripts = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{scripts}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    (tmp_path / "HybridFun.py").write_text((repository / "HybridFun.py").read_text(encoding="utf-8"))
    for language, content in found:
        lines = [line for line in content.splitlines() if line.split("#")[0].strip() not in RUN_ELSEWHERE]
        program = ["bash", "-euo", "pipefail", "-c"] if language == "bash" else [sys.executable, "-c"]
        done = subprocess.run(
            [*program, "\n".join(lines)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, f"{content}\n{done.stdout}\n{done.stderr}"
