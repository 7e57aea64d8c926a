"""Fixtures of this folder."""

import io
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest

from tests.saved_models import asking, loaded, model_copy, saved_model, tiny_tokenizer  # noqa: F401
from tests.warm_processes import WarmParent

WARM = (
    "fanformer.cli.chat",
    "fanformer.cli.generate",
    "fanformer.cli.terminal",
    "fanformer.cli.train",
    "fanformer.data.preparation.prepare",
    "fanformer.generation.torch_model",
    "fanformer.generation.loading",
    "fanformer.training.run",
    "matplotlib.pyplot",
    "transformers.models.auto.modeling_auto",
)


@dataclass(frozen=True)
class Outcome:
    """How a command ended and what it wrote."""

    code: int
    out: str
    err: str

    def refusal(self):
        """The one line that bad input gives; fails for anything else."""
        assert self.code == 2, self
        assert self.err.startswith("error: "), self
        assert self.err.count("\n") == 1, self
        return self.err.strip()


@pytest.fixture
def command(capfd, monkeypatch):
    """Run the `fanformer` command in this process, with all that its libraries write; `text` is its standard input."""
    from transformers.utils import logging

    from fanformer.cli.main import main

    # The command says so by environment variables, too late for a library that another test has imported already.
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words, text=""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        capfd.readouterr()
        code = main([str(word) for word in words])
        return Outcome(code, *capfd.readouterr())

    yield run
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


@pytest.fixture
def process(repository):
    """Run a command in a process of its own; `text` is its standard input."""

    def run(*words, text="", program=("-m", "fanformer.cli.main"), timeout=120, **arguments):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **arguments.pop("environment", {})}
        done = subprocess.run(
            [sys.executable, *program, *map(str, words)],
            input=text,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment,
            **arguments,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def warm():
    """Start the command in processes that have imported what it needs."""
    with WarmParent(*WARM, env={"OMP_NUM_THREADS": "1"}) as parent:
        yield parent
