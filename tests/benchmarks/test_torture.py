"""The torture run in small: a few kills, some in the middle of a save, and nothing lost."""

import random

import pytest


@pytest.mark.ci
@pytest.mark.timeout(300)
def test_a_training_killed_again_and_again_ends_as_one_that_was_not(repository, monkeypatch, tmp_path):
    import subprocess
    import sys

    command = [
        sys.executable,
        str(repository / "benchmarks/proofs/torture.py"),
        "--kills",
        "12",
        "--steps",
        "60",
    ]
    command += ["--seed", str(random.SystemRandom().randrange(10**6))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    figures = dict(line.strip("| ").split(" | ") for line in done.stdout.splitlines())
    assert int(figures["kills"]) == 12
    assert (figures["steps lost"], figures["checkpoints damaged"]) == ("0", "0")
    assert (figures["records equal"], figures["weights equal"], figures["optimizer equal"]) == ("True",) * 3
