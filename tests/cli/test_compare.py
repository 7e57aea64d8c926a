"""`fanformer compare`: a report and numbers after a kill in the middle, and bad input in one line."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import yaml

from fanformer.comparison.ledger import read_ledger

SMALL = [
    "--tokens=1280", "--evaluations=2", "--eval-tokens=256",
    *[f"--set={field}" for field in (
        "vocab_size=320", "sequence_length=32", "batch_size=4", "compile=off", "precision=float32",
    )],
]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    chooser = random.Random(0)
    words = ["the", "cat", "dog", "river", "runs", "sees", "under", "over", "blue", "old", "tree", "and"]
    path = tmp_path_factory.mktemp("text") / "mine.txt"
    path.write_text("\n".join(" ".join(chooser.choices(words, k=12)) + "." for _ in range(600)))
    return path


@pytest.mark.ci
def test_two_architectures_end_in_a_report_and_numbers(command, text, tmp_path):
    words = ["compare", "fanformer@60k", "llama@60k", "--learning-rates=0.01", f"--data={text}", *SMALL]
    done = command(*words, f"--output-dir={tmp_path / 'out'}", f"--record-dir={tmp_path / 'ledger'}")
    assert done.code == 0, done
    record = json.loads((tmp_path / "out" / "comparison.json").read_text())
    page = (tmp_path / "out" / "comparison.html").read_text()
    for arm in record["arms"]:
        assert f"{arm['figures']['bits_per_byte']['value']:.4f}" in done.out
        assert f"{arm['figures']['bits_per_byte']['value']:.4f}" in page
    assert "fanformer@60k less llama@60k: " in done.out
    assert "2/2" in done.err
    entries = read_ledger(tmp_path / "ledger")
    assert sorted(entry.kind for entry in entries) == ["comparison", "training", "training"]
    assert all(entry.command.startswith("fanformer compare fanformer@60k llama@60k") for entry in entries)
    status = command("compare", "--status", f"--output-dir={tmp_path / 'out'}")
    assert "out: done  2 of 2 trainings" in status.out


@pytest.mark.slow
def test_a_sweep_killed_in_the_middle_ends_in_the_same_report_and_numbers(process, text, tmp_path):
    words = ["compare", "fanformer@60k", "llama@60k", "--learning-rates=0.003,0.01", "--seeds=2", *SMALL]
    words += [f"--data={text}", f"--output-dir={tmp_path / 'out'}"]
    program = [sys.executable, "-m", "fanformer.cli.main", *words]
    killed = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    results = lambda: sorted((tmp_path / "out").rglob("result.json"))  # noqa: E731
    deadline = time.monotonic() + 120
    while len(results()) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    before = {path: path.read_bytes() for path in results()}
    assert 3 <= len(before) < 6
    done = process(*words)
    assert done.code == 0, done
    assert {path: path.read_bytes() for path in before} == before
    record = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [len(record["arms"][arm]["swept"]) for arm in range(2)] == [2, 2]
    assert record["pairs"][0]["figures"]["bits_per_byte_difference"]["interval"] == "95% t-interval over 2 seeds"
    assert "95% t-interval over 2 seeds" in (tmp_path / "out" / "comparison.html").read_text()


@pytest.mark.slow
def test_a_background_queue_is_watched_and_stopped_and_goes_on(process, text, tmp_path):
    entry = {"name": "one", "architectures": "llama@60k", "data": str(text), "learning_rates": 0.01, "tokens": "1M"}
    run = {"vocab_size": 320, "sequence_length": 32, "batch_size": 4, "compile": False, "precision": "float32"}
    entry |= {"evaluations": 2, "eval_tokens": 256, "run": run}
    file = tmp_path / "queue.yaml"
    file.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "out"), "entries": [entry]}))
    begun = process("compare", "--queue", file, "--background")
    assert begun.code == 0, begun
    number = int(begun.out.split("process ")[1].split(";")[0])
    try:
        deadline = time.monotonic() + 60
        while not list((tmp_path / "out").rglob("metrics.jsonl")) and time.monotonic() < deadline:
            time.sleep(0.1)
        watched = process("compare", "--queue", file, "--status")
        assert f"process {number} runs" in watched.out
        assert "one: running  0 of 1 trainings" in watched.out
        assert "is in use by process" in process("compare", "--queue", file).refusal()
    finally:
        os.kill(number, signal.SIGTERM)
    while "has ended" not in (watched := process("compare", "--queue", file, "--status")).out:
        assert time.monotonic() < deadline + 60, watched
        time.sleep(0.2)
    assert "one: stopped  0 of 1 trainings" in watched.out
    assert len(list((tmp_path / "out").rglob("checkpoint-*"))) == 1  # it saved before it ended


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to compare: name architectures"),
        (["lama@60k"], "no architecture 'lama': did you mean `llama`?"),
        (["llama@60k", "--tokens=x"], "a count must look like 500000, 500k, 3M or 2B, got 'x'."),
        (["llama@60k", "--learning-rates=a"], "`learning_rates` of a comparison cannot be ['a']"),
        (["llama@60k", "--seeds=a"], "`--seeds` must be how many, such as 3, or which, such as 0,1,2, got 'a'."),
        (["llama@60k", "--set=batch=3"], "did you mean `batch_size`?"),
        (["llama@60k", "--rule=modular"], "did you mean `modular-addition`?"),
        (["llama@60k", "--queue=q.yaml"], "a queue says everything in its file, got llama@60k"),
        (["--queue=nowhere.yaml"], "no such file or folder: "),
        (["--status", "--output-dir=nowhere"], "no queue has run in "),
        (["llama@60k", "--data=nowhere.txt", *SMALL], "nowhere.txt: expected `stdlib`, a file or glob"),
    ],
)
def test_bad_input_is_one_line(command, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    done = command("compare", *words)
    assert done.code == 2
    assert message in done.err.splitlines()[-1], done
