"""The demos of pictures and sound, and the longer measurement, run from end to end in a few steps."""

import json
import subprocess
import sys

import pytest

from tests.saved_models import saved_model, tiny_tokenizer  # noqa: F401

pytestmark = pytest.mark.ci


def program(repository, *words):
    command = [sys.executable, *(str(word) for word in words)]
    return subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=900)


@pytest.mark.parametrize(("name", "counts"), [("image", (1438, 359)), ("audio", (2700, 300))])
def test_a_demo_trains_both_twins_and_says_that_two_steps_are_too_few(request, repository, tmp_path, name, counts):
    base = request.getfixturevalue("saved_model")
    pytest.importorskip("sklearn" if name == "image" else "soundfile")
    words = ("--base", base, "--output-dir", tmp_path / "demo", "--max-steps", 2)
    done = program(repository, f"examples/demo_{name}.py", *words)
    assert done.returncode == 1, done.stderr[-2000:]
    assert f"{counts[0]} examples to learn from, {counts[1]} held out" in done.stdout
    assert "the blind twin's: " in done.stdout
    again = program(repository, f"examples/demo_{name}.py", *words)
    assert again.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]  # nothing was trained anew


def test_the_measurement_makes_all_its_data_and_records_every_bar(repository, saved_model, shared, tmp_path):  # noqa: F811
    out = tmp_path / "work"
    done = program(
        repository, "benchmarks/quality/multimodal.py", "--dry-run", "--base", saved_model, "--data", shared / "data",
        "--work", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((out / "result.json").read_text())
    names = {
        "naming",
        "reading",
        "emoji",
        "spoken",
        "spoken-40ms",
        "unheard-speaker",
        "connected",
        "both",
        "two-pictures",
    }
    assert set(record["tasks"]) == names
    for task in record["tasks"].values():
        assert {"right", "blind", "held_out", "bar"} <= set(task)
    assert record["text_changed"] == 0.0
