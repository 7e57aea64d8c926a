"""A tiny corpus, a tiny recipe, and a reporter that remembers."""

import random
import shutil

import pytest

TINY_MODEL = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 32,
    "dropout": 0.1,
    "qkv_rank": 22,
    "o_rank": 16,
    "gate_up_rank": 14,
    "down_rank": 20,
}


class Notebook:
    """A listener that keeps what it hears."""

    def __init__(self):
        self.notes, self.samples, self.steps = [], [], []

    def __call__(self, event):
        if event.kind == "note":
            self.notes.append(event.text)
        elif event.kind == "sample":
            self.samples.append(event.text)
        elif event.kind == "step":
            self.step(event.figures["step"])

    def step(self, step):
        """Keep the number of a step; what a test does at a step takes its place."""
        self.steps.append(step)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A text file of 200 invented sentences."""
    chooser = random.Random(0)
    words = ["the", "cat", "dog", "river", "runs", "sees", "under", "over", "blue", "old", "tree", "and"]
    lines = [" ".join(chooser.choices(words, k=12)) + "." for _ in range(600)]
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def tiny_run(corpus, folder, **fields):
    """Return the configuration of a run of a few seconds; keyword arguments replace its fields."""
    from fanformer.training.configuration import resolve

    tiny = {
        "data": str(corpus),
        "output_dir": str(folder),
        "sequence_length": 32,
        "batch_size": 4,
        "max_steps": 6,
        "eval_steps": 1000,  # at the end only: an evaluation costs more than a step here
        "eval_tokens": 256,
        "sample_prompt": "zq" * 14,  # fills most of the 32 positions: few tokens are drawn after an evaluation
        "device": "cpu",
        "precision": "float32",
        **{f"model.{key}": value for key, value in TINY_MODEL.items()},
    }
    return resolve("nano", overrides={**tiny, **fields})


@pytest.fixture
def run_config(corpus, tmp_path):
    """Make the configuration of a run of a few seconds in a folder of this name."""

    def make(name="run", **fields):
        return tiny_run(corpus, tmp_path / name, **fields)

    return make


@pytest.fixture
def run(run_config):
    """Train a tiny model; returns (result, notebook)."""
    from fanformer.training.run import train

    def start(name="run", **fields):
        notebook = Notebook()
        return train(run_config(name, **fields), notebook), notebook

    return start


@pytest.fixture(scope="session")
def finished_once(corpus, tmp_path_factory):
    """The folder of a run of two steps, to be left as it is."""
    from fanformer.training.run import train

    return train(tiny_run(corpus, tmp_path_factory.mktemp("finished") / "run", max_steps=2), Notebook()).folder


@pytest.fixture
def finished(finished_once, tmp_path):
    """The folder of a run of two steps, where `run` would make it."""
    return shutil.copytree(finished_once, tmp_path / "run")
