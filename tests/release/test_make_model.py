"""The whole chain in little: killed it goes on, what is done is not done again, and what ships is a whole model."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

import fanformer
from fanformer.comparison.queue import read_status
from tests.release.small_data import write_data

pytestmark = [pytest.mark.ci, pytest.mark.timeout(900)]

RUN = {"batch_size": 2, "save_steps": 4, "compile": "off", "precision": "float32"}
MEASURED = {"eval_tokens": 2048, "final_eval_tokens": 2048}
ROWS = {"words": 60, "instructions": 40, "hard_instructions": 6, "lists": 4, "passage_questions": 10, "absent": 0.1}
ROWS |= {"readings": 1, "unanswerable": 4, "continuations": 4, "texts": 0.1}
RECIPE = {
    "text": {"shards": 1, "repeats": 1},
    "tokens": {"vocab_size": 320},
    "base": {
        "layers": 1,
        "width": 64,
        "run": {"tokens": 64 * 1024, "learning_rate": 0.01, "sequence_length": 512, **RUN, **MEASURED},
    },
    "rows_mid": ROWS,
    "mid": {"run": {"max_steps": 4, **RUN, **MEASURED}},
    "rows": ROWS,
    "tuned": {"run": {"max_steps": 4, **RUN, **MEASURED}},
    "box": {"shares": {"base": 0.125, "mid": 0.25}, "sampling": {"temperature": 0.9}, "most_bytes": 2_000_000},
    "beside": {
        "share": 0.1,
        "seeds": 2,
        "learning_rates": [0.01],
        "jobs": 2,
        "record_dir": None,
        "run": {"threads": 1},
    },
}
SHIPPED = {"README.md", "config.json", "model.safetensors", "generation_config.json", "tokenizer.json"}
SHIPPED |= {"tokenizer_config.json", "chat_template.jinja"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with small data, in the form of the real ones, and a recipe."""
    folder = tmp_path_factory.mktemp("making")
    write_data(folder / "data")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return folder


def command(place, *words):
    program = [sys.executable, "release/make_model.py", "--data", place / "data", "--work", place / "work"]
    return [*program, "--recipe", place / "recipe.yaml", "--output-dir", place / "box", *words]


@pytest.fixture(scope="module")
def made(place, repository):
    """What the command said that went on behind a kill."""
    with subprocess.Popen(command(place, "--only", "base"), cwd=repository, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 400
        while not list((place / "work/base").glob("checkpoint-[1-9]*")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    return subprocess.run(command(place), cwd=repository, capture_output=True, text=True, timeout=800)


def test_it_goes_on_where_it_was_killed(made, place):
    assert made.returncode == 0, made.stderr
    assert "== text" not in made.stdout
    assert "== base, 3 of 11: going on at step " in made.stdout
    run = yaml.safe_load((place / "work/base/run.yaml").read_text())
    assert len(run["resumed"]) == 1
    assert run["resumed"][0]["at_step"] >= 4
    content, running = read_status(place / "work")
    assert not running
    assert {entry["state"] for entry in content["entries"].values()} == {"done"}


def test_the_folder_that_ships_is_a_model_with_a_card(made, place):
    assert {path.name for path in (place / "box").iterdir()} == SHIPPED
    config = json.loads((place / "box/config.json").read_text())
    assert (config["dtype"], "auto_map" in config, config["vocab_size"]) == ("float32", False, 320)
    with safe_open(place / "box/model.safetensors", "pt") as weights:
        assert {str(weights.get_tensor(name).dtype) for name in weights.keys()} == {"torch.bfloat16"}  # noqa: SIM118
    shipped, tuned, mid, base = (
        load_file(place / part / "model.safetensors") for part in ("box", "work/tuned", "work/mid", "work/base")
    )
    for name, value in shipped.items():
        expected = 0.625 * tuned[name] + 0.25 * mid[name] + 0.125 * base[name]
        torch.testing.assert_close(value.float(), expected, rtol=0.01, atol=1e-4)
    model = fanformer.load(place / "box", device="cpu")
    assert model.settings().temperature == 0.9
    assert (model.has_chat_template, str(model.model.dtype)) == (True, "torch.float32")
    assert model.generate("One day", max_length=5, min_length=5, seed=0)
    card = (place / "box/README.md").read_text()
    for title in ("## Data", "## Training", "## What it writes", "## Limits", "| hours |", "FairytaleQA", "CC BY-SA"):
        assert title in card
    assert card.count("Asked:") == 7
    assert "12.5% base, 25% mid-training, the rest tuning" in card


def test_the_twin_and_the_llama_are_there(made, place):
    twin = json.loads((place / "work/stages/blind.json").read_text())["result"]
    beside = json.loads((place / "work/stages/beside.json").read_text())["result"]
    assert twin["steps"] == 4
    assert beside["value"] == pytest.approx(0, abs=2)
    record = json.loads((place / "work/beside/box-beside-llama/comparison.json").read_text())
    ours, llama = (found for found in record["trainings"] if found["seed"] == 0)
    assert llama["architecture"].startswith("llama@")
    counts = [training["result"]["figures"]["parameters"] for training in (ours, llama)]
    assert counts[1] == pytest.approx(counts[0], rel=0.01)


def again(place, repository, monkeypatch, capsys, *words):
    """Run the command in this process and return its status and what it printed."""
    from make_model import main

    monkeypatch.chdir(repository)
    monkeypatch.setattr(sys, "argv", list(map(str, command(place, *words)[1:])))
    capsys.readouterr()
    return main(), capsys.readouterr().out


def test_what_is_done_is_not_done_again(made, place, repository, monkeypatch, capsys):
    before = {path: path.stat().st_mtime_ns for path in place.glob("work/stages/*")}
    status, told = again(place, repository, monkeypatch, capsys)
    assert (status, "==" in told, len(told.splitlines())) == (0, False, 11)
    assert {path: path.stat().st_mtime_ns for path in place.glob("work/stages/*")} == before
    assert again(place, repository, monkeypatch, capsys, "--status") == (0, told)


def test_a_stage_is_done_with_what_it_takes_alone():
    from make_model import BEHIND, STAGES, chosen

    assert chosen("beside") == ["text", "tokens", "beside"]
    assert chosen("box") == ["text", "tokens", "base", "rows-mid", "mid", "rows", "tuned", "box"]
    assert [name for name in STAGES if name not in BEHIND] == ["text"]
    for stage, taken in BEHIND.items():
        assert all(STAGES.index(name) < STAGES.index(stage) for name in taken.split())


def test_time_that_is_over_has_a_status_of_its_own(place, repository, monkeypatch, capsys):
    status, told = again(place, repository, monkeypatch, capsys, "--minutes", "0", "--work", place / "other")
    assert (status, told.splitlines()[-1]) == (75, "the time is over: the same command goes on")
