"""The accelerator benchmark: its dry run walks the whole path on the CPU, and no part takes another one down."""

import math
import os
import subprocess
import sys
import time

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fanformer.comparison.ledger import read_ledger
from fanformer.model import FANformerConfig, FANformerForCausalLM

ABOUT = {"date": "2026-11-25T00:00:00+00:00", "device": "a card", "dry_run": True, "asked": ["checks"]}


@pytest.fixture
def accelerator(repository, monkeypatch):
    for folder in ("speed", "accelerator"):
        monkeypatch.syspath_prepend(str(repository / "benchmarks" / folder))
    import accelerator

    return accelerator


def command(repository, *options, **environment):
    return subprocess.run(
        [sys.executable, repository / "benchmarks" / "accelerator" / "accelerator.py", *options],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )


def numbers(figures):
    """Return every number at any depth."""
    if isinstance(figures, dict):
        return [number for value in figures.values() for number in numbers(value)]
    if isinstance(figures, list):
        return [number for value in figures for number in numbers(value)]
    return [figures] if isinstance(figures, int | float) else []


@pytest.mark.slow
def test_dry_run_fills_every_part_with_finite_figures_and_no_error(accelerator, repository, tmp_path):
    finished = command(repository, "--dry-run", "--output", str(tmp_path))
    assert finished.returncode == 0, finished.stderr
    (entry,) = (entry for entry in read_ledger(tmp_path) if entry.name.startswith("accelerator-"))
    assert entry.name.endswith("-dry-run")
    results = entry.details
    parts = results["parts"]
    assert list(parts) == list(accelerator.PARTS)
    assert accelerator.problems(parts) == []
    assert all(math.isfinite(number) for number in numbers(results))
    assert results["reference"]["iterations_per_second"] == 5.9

    outcomes = [check["ok"] for check in parts["checks"].values() if isinstance(check, dict)]
    assert len(outcomes) >= 15
    assert all(outcomes)
    for part in ("training_regional", "training_whole"):
        assert parts[part]["ratio_of_tokens_per_second"]["median"] > 0
        for name in ("fanformer", "llama"):
            figures = parts[part][name]
            assert figures["timed_steps"] == 2
            assert figures["utilisation"] > 0
            assert figures["roofline_seconds"]["total"] > 0
            assert figures["last_loss"] == pytest.approx(math.log(256), abs=0.5)  # random tokens stay unpredictable
            tokens = figures["iterations_per_second"] * 2 * 32
            assert figures["tokens_per_second"] == pytest.approx(tokens)
            profile = figures["kernels"]
            assert profile["calls"] > 100
            listed = sum(seconds for seconds, _, _ in profile["longest"])
            assert 0 < listed <= sum(profile["seconds_by_kind"].values()) * 1.001
            assert len(profile["longest"]) == 40
    assert parts["packing"]["sdpa"]["tokens_per_second"] > 0
    for part in ("inference_eager", "inference_compiled"):
        for batch in ("batch_1", "batch_2"):
            assert parts[part][batch]["fanformer"]["first_token_seconds"] > 0
            assert parts[part][batch]["ratio_of_tokens_per_second"]["median"] > 0

    wanted = {
        "train_iterations_per_second",
        "model_flops_utilisation",
        "share_of_roofline",
        "train_tokens_per_second_ratio",
    }
    assert wanted | {"inference_tokens_per_second_ratio", "parts_done", "checks_held"} <= set(entry.result)
    faster = max(parts[name]["fanformer"]["iterations_per_second"] for name in ("training_regional", "training_whole"))
    assert entry.result["train_iterations_per_second"].value == pytest.approx(faster)
    assert parts["queue"]["entries"]["dry-run"] | {"text": ""} == {"state": "done", "done": 2, "planned": 2, "text": ""}
    assert sorted(found.kind for found in read_ledger(tmp_path)) == ["benchmark", "comparison", "training", "training"]

    table = "\n".join(accelerator.table(results))
    assert table in finished.stdout
    assert f"hold {len(outcomes)}, of {len(outcomes)}" in table


@pytest.mark.ci
def test_without_a_device_one_line_says_what_to_do(repository, tmp_path):
    finished = command(repository, "--output", str(tmp_path / "results"), CUDA_VISIBLE_DEVICES="")
    assert finished.returncode == 2
    expected = "no CUDA device was found: run this on a machine with one, or add --dry-run"
    assert finished.stderr.splitlines() == [expected]
    assert not (tmp_path / "results").exists()


def test_part_that_fails_leaves_its_reason_and_the_others(accelerator, tmp_path):
    path = tmp_path / "results"
    accelerator.write_results(path, {**ABOUT, "parts": {}})

    def half(context):
        context.save({"done": 1})
        raise RuntimeError("out of luck\nand of lines")

    functions = {
        "half": half,
        "infinite": lambda context: {"value": math.inf},
        "whole": lambda context: {"value": 2, "saw": list(context.earlier)},
    }
    accelerator.run_parts(functions, list(functions), path, "cpu", True, time.time() + 60, tmp_path)
    parts = accelerator.read_results(path)["parts"]
    assert parts["half"] | {"seconds": 0} == {"done": 1, "error": "RuntimeError: out of luck", "seconds": 0}
    assert parts["infinite"]["error"].startswith("ValueError: Out of range float values")
    assert parts["whole"] | {"seconds": 0} == {"value": 2, "saw": ["half", "infinite"], "seconds": 0}
    assert accelerator.problems(parts) == [
        "half: RuntimeError: out of luck",
        f"infinite: {parts['infinite']['error']}",
    ]


def test_hung_worker_is_stopped_and_keeps_what_was_saved(accelerator, tmp_path, monkeypatch):
    path, pid = tmp_path / "results", tmp_path / "pid"
    accelerator.write_results(path, {**ABOUT, "parts": {"checks": {"done": 1, "error": accelerator.UNFINISHED}}})
    hung = tmp_path / "hung.py"
    hung.write_text(
        f"import os, pathlib, time\npathlib.Path({str(pid)!r}).write_text(str(os.getpid()))\ntime.sleep(99)"
    )
    monkeypatch.setattr(accelerator, "__file__", str(hung))
    accelerator.run_worker(["checks", "machine"], path, time.time() + 1, dry_run=False, queue=tmp_path)
    parts = accelerator.read_results(path)["parts"]
    assert parts["checks"] | {"seconds": 0} == {"done": 1, "error": "stopped after 1 s", "seconds": 0}
    assert parts["machine"]["error"] == "stopped after 1 s"
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_part_without_time_is_skipped_with_the_reason(accelerator, tmp_path):
    path = tmp_path / "results"
    accelerator.write_results(path, {**ABOUT, "parts": {}})
    accelerator.run(["checks"], path, time.time() + 3, dry_run=False, queue=tmp_path)
    assert accelerator.read_results(path)["parts"]["checks"]["skipped"] == "takes about 90 s, 3 s left"


def test_failed_checks_and_tests_are_problems(accelerator):
    parts = {
        "checks": {"a": {"ok": True, "distance": 0.0}, "b": {"ok": False, "distance": 0.5}},
        "tests": {"ok": False, "failures": ["FAILED tests/x.py::test_y"]},
    }
    assert accelerator.problems(parts) == ["checks.b: 0.5", "tests: ['FAILED tests/x.py::test_y']"]


def test_closing_line_of_pytest_is_read(accelerator):
    output = "....F\nFAILED tests/a.py::test_b - 1 passed in 2s of 3\n1 failed, 4 passed, 2 skipped in 1.23s\n"
    assert accelerator.pytest_counts(output) == {"failed": 1, "passed": 4, "skipped": 2}
    assert accelerator.pytest_counts("Traceback\n") == {}


def test_operations_are_counted_as_the_formula_says(accelerator):
    from measures import FULL

    from fanformer.model.footprint import footprint

    with torch.device("meta"):
        ours = FANformerForCausalLM(FANformerConfig(**FULL.ours))
        theirs = LlamaForCausalLM(LlamaConfig(**FULL.theirs))
    assert ours.num_parameters() == 92_230_144
    assert theirs.num_parameters() == 134_515_008  # SmolLM2-135M
    # Weights of products in a block: the W_a and W_b of Q, K and V, of O, of gate and up, and of down. What gives
    # cosines gives sines too.
    attention = 512 * 384 + 384 * (1536 - 224 + 2 * (768 - 112)) + 1536 * 256 + 256 * 512
    ffn = 512 * 256 + 256 * 2 * 2048 + 2048 * 224 + 224 * 512
    matrices = 12 * (attention + ffn) + 512 * 49152
    assert footprint(ours.config).forward_operations_at(1024) == 2 * matrices + 12 * 4 * 12 * 128 * 1024
    llama = 30 * (576 * 576 * 2 + 2 * 576 * 192 + 3 * 576 * 1536) + 576 * 49152  # the tied embedding is the head
    assert footprint(theirs.config).forward_operations_at(1024) == 2 * llama + 30 * 4 * 9 * 64 * 1024
