"""GGUF files and the engine in an environment that has the extra `gguf` and other readers, which the core lacks."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.ci

PINS = ("ggml-python==0.0.45", "gguf==0.19.0", "hypothesis==6.170.17", "sortedcontainers==2.4.0")
FILES = (
    "tests/inference/test_ggml_runtime.py",
    "tests/inference/test_ggml_engine.py",
    "tests/inference/test_ggml_generation.py",
    "tests/inference/test_gguf_file.py",
    "tests/quantization/test_gguf_export.py",
    "tests/inference/test_fuzzing.py",
)
FUZZED_ENGINE = "tests/inference/test_fuzzing.py::test_mutated_gguf_files_never_end_the_engines_process"


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """An interpreter that has PINS beside what this one has; ggml is compiled for it, in minutes."""
    folder = tmp_path_factory.mktemp("gguf") / "env"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    [site] = (folder / "lib").glob("python*/site-packages")
    # a plain path in a .pth file is searched, but .pth files inside it are not
    borrowed = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "borrowed.pth").write_text(borrowed + "\n")
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", *PINS]
    subprocess.run(install, check=True, timeout=1500)
    return python


@pytest.mark.timeout(3600)
def test_everything_that_needs_the_extra_passes_and_nothing_is_skipped(python, repository):
    environment = {**os.environ, "PYTHONPATH": str(repository / "src"), "OMP_NUM_THREADS": "1"}
    for chosen in (["-m", "not ci", *FILES], [FUZZED_ENGINE]):
        words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", *chosen]
        done = subprocess.run(
            [str(python), *words], cwd=repository, env=environment, capture_output=True, text=True, timeout=1700
        )
        assert done.returncode == 0, done.stdout[-5000:]
        assert "SKIPPED" not in done.stdout, done.stdout[-5000:]


@pytest.mark.timeout(900)
def test_the_nano_model_is_quantized_and_writes(python, repository, tmp_path):
    """Train the nano preset for a few steps, write it in every type, run each, and measure the loss of bits."""
    import json

    environment = {**os.environ, "PYTHONPATH": str(repository / "src"), "OMP_NUM_THREADS": "1"}

    def fanformer(*words):
        command = [str(python), "-m", "fanformer.cli.main", *map(str, words)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    Path(tmp_path / "mine.txt").write_text("a line of text, number one and two and three.\n" * 500)
    train = ("--preset", "nano", "--data", "mine.txt", "--max-steps", 10, "--sequence-length", 64)
    fanformer("train", *train, "--output-dir", "out")
    before = json.loads(fanformer("eval", "out", "--text", "mine.txt", "--device", "cpu", "--json", "-"))
    for kind, most in (("f16", 1e-3), ("q8_0", 1e-2), ("q6_k", 2e-2), ("q5_k", 5e-2), ("q4_k", 0.1), ("q4_0", 0.1)):
        fanformer("quantize", "out", "--format", "gguf", "--type", kind, "--output-dir", "small")
        path = f"small/model-{kind}.gguf"
        assert fanformer("generate", path, "a line", "--max-length", 5, "--threads", 1).startswith("a line")
        after = json.loads(fanformer("eval", path, "--text", "mine.txt", "--device", "cpu", "--json", "-"))
        # after ten steps the model is rough: these bounds find a broken type, not a poor one
        assert after["bits_per_byte"] == pytest.approx(before["bits_per_byte"], rel=most), kind
