"""Real questions as rows: every file is readable as instruction data, and the baselines are what they were."""

import itertools
import json
import subprocess
import sys

import pytest

from fanformer.data.conversations.instructions import Instruction
from fanformer.data.conversations.reading import read_examples


@pytest.fixture(scope="module")
def written(shared, repository, tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    script = repository / "benchmarks" / "quality" / "answer_data.py"
    words = ["--instructions", "300", "--abstracts", "200", "--leave-out", "assipattle-and-the-mester-stoorworm"]
    done = subprocess.run(
        [sys.executable, script, "--data", shared / "data", "--output-dir", folder, *words],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_every_file_is_instruction_data_without_a_wrong_row(written):
    folder, report = written
    for name, count in report["rows"].items():
        found = read_examples(str(folder / f"{name}.jsonl"), pytest.fail, preference="pairs" in name)
        assert (len(found.examples), found.wrong) == (count, 0), name
    rows = report["rows"]
    assert rows["fairytale-train"] == 8548
    assert rows["fairytale-valid"] == rows["fairytale-blind-valid"] < 1025
    assert (rows["arc-train"], rows["openbookqa-train"], rows["arxiv-train"]) == (3370, 4957, 200)
    assert (rows["instructions-train"], rows["instructions-valid"]) == (300, 60)
    assert rows["arc-pairs-train"] > 3 * 3300


def test_rows_say_what_they_are_measured_by(written):
    folder, _ = written

    def first(name, count):
        with (folder / f"{name}.jsonl").open() as lines:
            return [json.loads(line) for line in itertools.islice(lines, count)]

    for full, blind in zip(first("fairytale-valid", 20), first("fairytale-blind-valid", 20), strict=True):
        assert full["messages"][0]["content"].endswith("\n\n" + blind["messages"][0]["content"])
        assert full["messages"][1]["content"] in full["references"] == blind["references"]
        assert full["story"] != "assipattle-and-the-mester-stoorworm"
    for row in first("arc-train", 20):
        letter = row["messages"][1]["content"]
        assert f"={letter}\n" in row["messages"][0]["content"]
    for row in first("instructions-valid", 60):
        item = Instruction(row["kind"], row["values"], row["messages"][0]["content"])
        assert item.is_followed_by(row["messages"][1]["content"])


def test_baselines_are_those_of_the_dated_measurement(written):
    _, report = written
    explicit = report["baselines"]["explicit"]
    # 2026-11-29, all 750 explicit questions of the validation part; exact sums of exact fractions
    assert explicit["constant"]["f1"] == 0.0
    assert explicit["first sentence"]["f1"] == pytest.approx(0.1319, abs=1e-4)
    assert explicit["best overlap"]["f1"] == pytest.approx(0.2409, abs=1e-4)
    assert explicit["best overlap"]["exact_match"] < 0.01
