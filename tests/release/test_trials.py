"""The trials in little: speeds, a queue of them, and a choice; the same command ends with it again at once."""

import json
import subprocess
import sys

import pytest
import yaml

from fanformer.comparison.queue import read_status
from tests.release.small_data import write_data

CANDIDATE = {"vocab_size": 320, "layers": 1, "width": 64}
PLAN = {
    "hours": 1,
    "cores": 2,
    "training_share": 0.9,
    "processor_minutes": [1, 2],
    "text": {"shards": 1, "repeats": 1, "share": 100},
    "candidates": [CANDIDATE],
    "learning_rate": 0.01,
    "other_rates": [0.005],
    "rates_of": CANDIDATE,
    "run": {"sequence_length": 64, "batch_size": 2, "precision": "float32", "threads": 1},
    "record_dir": "not-written",
}


@pytest.mark.ci
@pytest.mark.timeout(900)
def test_trials_end_with_a_choice(repository, tmp_path):
    write_data(tmp_path / "data")
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(PLAN))
    words = ["--plan", tmp_path / "plan.yaml", "--data", tmp_path / "data", "--work", tmp_path / "work"]
    program = [sys.executable, "release/trials.py", *words, "--scale", "0.01"]
    done = subprocess.run(program, cwd=repository, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    *_, table, _, _, rates, choice = done.stdout.splitlines()
    assert table.startswith("v320-1x64  ")
    assert rates.startswith("rates after the longer trial: 0.0")
    assert choice.startswith("choice: vocab_size 320, layers 1, width 64, tokens ")
    found = json.loads((tmp_path / "work/choice.json").read_text())
    speed = json.loads((tmp_path / "work/stages/speed-v320-1x64.json").read_text())["result"]
    assert found["tokens"] == f"{round(speed['tokens_per_processor_second'] * 3600 * 2 * 0.9 / 1e6)}M"
    status, running = read_status(tmp_path / "work/queue")
    assert {name: entry["state"] for name, entry in status["entries"].items()} == {"v320-1x64": "done", "rates": "done"}
    assert not running
    assert not (repository / "not-written").exists()

    again = subprocess.run(program, cwd=repository, capture_output=True, text=True, timeout=200)
    assert again.stdout.endswith("".join(f"{line}\n" for line in done.stdout.splitlines()[-6:]))
