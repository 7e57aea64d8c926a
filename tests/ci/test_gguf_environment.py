"""GGUF files and the engine in an environment that has the extra `gguf` and other readers, which the core lacks."""

import json

import pytest

from fanformer.loading import model_in_the_box

pytestmark = pytest.mark.ci

PINS = ("ggml-python==0.0.45", "gguf==0.19.0", "hypothesis==6.170.17", "sortedcontainers==2.4.0")
FILES = (
    "tests/gguf/test_runtime.py",
    "tests/gguf/test_engine.py",
    "tests/gguf/test_generation.py",
    "tests/gguf/test_file.py",
    "tests/gguf/test_export.py",
    "tests/gguf/test_fuzzing.py",
    "tests/server/test_slots.py",
    "tests/server/test_scheduler.py",
    "tests/server/test_completions.py",
)
SERVED_FILE = "tests/server/test_slots.py::test_a_file_is_served_without_torch"
FUZZED_ENGINE = "tests/gguf/test_fuzzing.py::test_mutated_gguf_files_never_end_the_engines_process"


@pytest.fixture(scope="module")
def python(python_with):
    """An interpreter that has PINS beside what this one has; ggml is compiled for it, in minutes."""
    return python_with(*PINS)


@pytest.mark.timeout(3600)
def test_everything_that_needs_the_extra_passes_and_nothing_is_skipped(fanformer, repository):
    for chosen in (["-m", "not ci", *FILES], [FUZZED_ENGINE, SERVED_FILE]):
        words = ["-q", "-p", "no:cacheprovider", "-rs", *chosen]
        assert "SKIPPED" not in fanformer(*words, program=("-m", "pytest"), folder=repository, timeout=1700)


@pytest.mark.timeout(900)
def test_the_model_in_the_box_is_quantized_and_writes(fanformer, english):
    """Write it in every type, let each write, and measure the loss of bits."""
    _, text = english
    box, story = model_in_the_box(), "Once upon a time, a little girl"
    before = json.loads(fanformer("eval", box, "--text", text, "--device", "cpu", "--json", "-"))
    for kind, most in (("f16", 1e-3), ("q8_0", 2e-3), ("q6_k", 5e-3), ("q5_k", 1e-2), ("q4_k", 2e-2), ("q4_0", 4e-2)):
        fanformer("quantize", box, "--format", "gguf", "--type", kind, "--output-dir", "small")
        path = f"small/model-{kind}.gguf"
        assert fanformer("generate", path, story, "--max-length", 5, "--threads", 1).startswith(story)
        after = json.loads(fanformer("eval", path, "--text", text, "--device", "cpu", "--json", "-"))
        assert after["bits_per_byte"] == pytest.approx(before["bits_per_byte"], rel=most), kind
