"""Environments with an extra that the core lacks, and running in them."""

import os
import subprocess
import sys
import venv

import pytest


@pytest.fixture(scope="module")
def python_with(tmp_path_factory):
    """Return a function that makes an interpreter which has pinned packages in front of what this one has."""

    def make(*pins):
        folder = tmp_path_factory.mktemp("environment") / "env"
        venv.create(folder, with_pip=True)
        python = folder / "bin" / "python"
        [site] = (folder / "lib").glob("python*/site-packages")
        # a plain path in a .pth file is searched, but .pth files inside it are not
        borrowed = next(path for path in sys.path if path.endswith("site-packages"))
        (site / "borrowed.pth").write_text(borrowed + "\n")
        install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", *pins]
        subprocess.run(install, check=True, timeout=1500)
        return python

    return make


@pytest.fixture
def fanformer(python, repository, tmp_path):
    """Return a function that runs `fanformer` with the module's `python`, and returns what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(repository / "src"), "OMP_NUM_THREADS": "1"}

    def run(*words, program=("-m", "fanformer.cli.main"), folder=tmp_path, timeout=600):
        command = [str(python), *program, *map(str, words)]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
        return done.stdout

    return run
