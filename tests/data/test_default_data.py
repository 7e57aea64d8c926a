"""The data and the tokenizer of the preset 92m, by their own names, from a hub of this layout."""

import filecmp
import io
import json
import os
import random
import subprocess
import sys
import threading
import time

import pytest

from tests.local_hub import LocalHub

pytestmark = pytest.mark.ci  # four processes that import torch

CARD = """---
license: odc-by
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*/*
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
---
# FineWeb-Edu
"""
FILES, ROWS = 3, 400
WORDS = ["water", "light", "energy", "school", "number", "history", "plant", "system", "teacher", "river", "people"]


def parquet(file):
    """Return a file with the columns of the real set, of invented sentences."""
    import pyarrow
    from pyarrow import parquet

    chooser = random.Random(file)
    texts = [" ".join(chooser.choices(WORDS, k=80)) + f" {file}-{row}." for row in range(ROWS)]
    names = ["id", "dump", "url", "file_path", "language"]
    columns = {name: [f"{name} {file} {row}" for row in range(ROWS)] for name in names}
    columns |= {
        "language_score": [0.9] * ROWS,
        "token_count": [80] * ROWS,
        "score": [3.0] * ROWS,
        "int_score": [3] * ROWS,
    }
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": texts, **columns}), buffer, row_group_size=100)
    return buffer.getvalue()


@pytest.fixture
def hub(tmp_path):
    """A hub with the two repositories that the preset names."""
    from fanformer.data.tokenizer import train_tokenizer
    from fanformer.training.configuration import load_preset

    run = load_preset("92m").run
    assert (run["data"], run["tokenizer"]) == ("hf:HuggingFaceFW/fineweb-edu:sample-10BT", "HuggingFaceTB/SmolLM2-135M")
    files = {f"sample/10BT/{file:03}_00000.parquet": parquet(file) for file in range(FILES)}
    files |= {"README.md": CARD.encode(), "data/CC-MAIN-2024-10/train-00000.parquet": parquet(9)}
    train_tokenizer([" ".join(WORDS)] * 10, 320).save_pretrained(tmp_path / "tokenizer")
    with LocalHub() as server:
        server.add("datasets", "HuggingFaceFW/fineweb-edu", files)
        server.add("models", "HuggingFaceTB/SmolLM2-135M", tmp_path / "tokenizer")
        yield server


@pytest.fixture
def start(hub, tmp_path):
    """Start `fanformer data prepare` with the preset's data and tokenizer, in a home without a cache."""

    def prepare(name):
        command = [
            sys.executable,
            "-m",
            "fanformer.cli.main",
            "data",
            "prepare",
            "hf:HuggingFaceFW/fineweb-edu:sample-10BT",
        ]
        command += ["--tokenizer", "HuggingFaceTB/SmolLM2-135M", "--output-dir", str(tmp_path / name)]
        environment = os.environ | hub.environment(tmp_path / f"{name}-home")
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return prepare


def finish(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def described(folder):
    return json.loads((folder / "data.json").read_text())


def test_default_data_is_prepared_alike_undisturbed_with_faults_and_after_a_kill(hub, start, tmp_path):
    code, out, err = finish(start("undisturbed"))
    assert code == 0, err
    # where the machine is busy, lines of progress come too
    assert not [line for line in err.splitlines() if not line.startswith("encoding: ")], err
    assert "train: 1,1" in out
    data = described(tmp_path / "undisturbed")
    assert data["tokenizer"] == "HuggingFaceTB/SmolLM2-135M"
    assert data["source"]["licence"] == "odc-by"
    assert data["source"]["parts"] == [f"sample/10BT/{file:03}_00000.parquet" for file in range(FILES)]
    assert sum(split["documents"] for split in data["splits"].values()) == FILES * ROWS
    assert not hub.asked("data/CC-MAIN-2024-10/"), "another configuration was fetched"

    hub.requests.clear()
    hub.fail("GET /storage/", after=1, drop_at_byte=2000)
    hub.fail("GET /datasets/HuggingFaceFW/fineweb-edu/resolve", after=6, times=2, status=503)
    hub.fail("GET /storage/", after=3, seconds=0.5)
    process = start("disturbed")
    wait_for(lambda: len(hub.asked("GET /storage/")) >= 3, process)
    hub.stop()
    threading.Timer(2, hub.start).start()
    code, _, err = finish(process)
    assert code == 0, err
    assert not any(fault.times for fault in hub.faults), hub.faults
    assert described(tmp_path / "disturbed")["fingerprint"] == data["fingerprint"]
    assert described(tmp_path / "disturbed")["source"] == data["source"]
    for name in ("train-00000.bin", "heldout-00000.bin"):
        assert filecmp.cmp(tmp_path / "undisturbed" / name, tmp_path / "disturbed" / name, shallow=False)

    hub.requests.clear()
    hub.fail("GET /storage/", after=1, times=99, seconds=0.3)
    process = start("killed")
    wait_for(lambda: len(hub.asked("GET /storage/")) >= 2, process)
    process.kill()
    process.communicate()
    assert not (tmp_path / "killed").exists()
    hub.faults.clear()
    code, _, err = finish(start("killed"))
    assert code == 0, err
    assert described(tmp_path / "killed")["fingerprint"] == data["fingerprint"]


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, finish(process)
        time.sleep(0.01)
