"""Trackers themselves, in an environment that has them: what a training sent is read back by each one's own reader."""

import json

import pytest

from tests.training.conftest import TINY_MODEL, corpus  # noqa: F401

pytestmark = pytest.mark.ci

PINS = (
    "trackio==0.43.0", "brotli==1.2.1", "gradio_client==2.7.2", "httpcore==1.0.9", "httpx==0.28.1", "orjson==3.13.0",
    "python-multipart==0.0.34", "websockets==17.4",
    "tensorboard==2.21.0", "grpcio==1.85.3", "Markdown==3.11.3", "protobuf==7.36.2", "Werkzeug==3.1.9",
    "wandb==0.31.0", "platformdirs==4.14.8",
)  # fmt: skip
READ_TENSORBOARD = """
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
found = EventAccumulator(sys.argv[1])
found.Reload()
print(json.dumps([[one.step, one.value] for one in found.Scalars("loss")]))
"""
READ_TRACKIO = """
import json
from trackio.sqlite_storage import SQLiteStorage
[run] = SQLiteStorage.get_runs("fanformer")
print(json.dumps([[one["step"], one["loss"]] for one in SQLiteStorage.get_logs("fanformer", run)]))
"""


@pytest.fixture(scope="module")
def python(python_with):
    """An interpreter with all three."""
    return python_with(*PINS)


@pytest.fixture
def trained(fanformer, corpus, tmp_path, monkeypatch):  # noqa: F811
    """Train with a tracker, and once more resumed; return the folder and its losses."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    model = [word for name, value in TINY_MODEL.items() for word in ("--set", f"model.{name}={value}")]
    sizes = ["--sequence-length", 32, "--batch-size", 4, "--set", "log_steps=1", "--save-steps", 3, "--compile", "off"]

    def train(tracker):
        words = ["train", "--data", corpus, "--output-dir", "run", "--log-to", tracker, *sizes, *model]
        out = fanformer(*words, "--max-steps", 3)
        assert out.startswith("held-out loss"), out  # what trackers print stays off standard output
        fanformer("train", "--resume", "--output-dir", "run", "--max-steps", 6, "--log-to", tracker)
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        return tmp_path / "run", [[one["step"], one["loss"]] for one in map(json.loads, lines)]

    return train


def test_tensorboard_reads_what_was_logged(trained, fanformer):
    folder, losses = trained("tensorboard")
    found = json.loads(fanformer(folder / "tensorboard", program=("-c", READ_TENSORBOARD)))
    assert found == [[step, pytest.approx(loss, rel=1e-6)] for step, loss in losses]


def test_trackio_reads_what_was_logged(trained, fanformer):
    _, losses = trained("trackio")
    assert json.loads(fanformer(program=("-c", READ_TRACKIO)).splitlines()[-1]) == losses


def test_wandb_keeps_what_was_logged_without_a_network(trained):
    folder, losses = trained("wandb")
    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2  # the run and its resumption
    assert all(b"val_bits_per_byte" in file.read_bytes() for file in files)
    assert len(losses) == 6
