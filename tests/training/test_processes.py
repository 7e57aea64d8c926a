"""Several processes train the model that one would: the same rows in every step, the same losses to 1e-6."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fanformer.errors import CheckpointError, ConfigError
from fanformer.machine.launch import choose_spread, is_restarted
from fanformer.training.checkpoint import OPTIMIZER_FILE, checkpoints
from fanformer.training.configuration import resolve
from fanformer.training.folder import read_records
from fanformer.training.run import train
from tests.training.conftest import TINY_MODEL, Notebook

STEPS, BATCH = 8, 8
DEEP = {
    "optimizer": "adamw",
    "one_step_fraction": 0.3,
    **{f"model.{name}": count for name, count in (("prelude_layers", 0), ("core_layers", 1), ("coda_layers", 1))},
}
"""A recurrent depth, whose bridge has no gradient in the first steps."""


@pytest.fixture(scope="module")
def together(corpus, tmp_path_factory, repository):
    """Make runs of one recipe: `one()` in this process, `several(count, ...)` in processes of their own."""
    folder = tmp_path_factory.mktemp("together")

    def config(name, **fields):
        tiny = {
            "data": str(corpus), "output_dir": str(folder / name), "sequence_length": 32, "batch_size": BATCH,
            "max_steps": STEPS, "save_steps": 4, "eval_steps": 4, "log_steps": 1, "eval_tokens": 512, "keep_last": 9,
            "device": "cpu", "precision": "float32", "threads": 1,
            **{f"model.{key}": value for key, value in {**TINY_MODEL, "dropout": 0.0}.items()},
        }  # fmt: skip
        return resolve("nano", overrides={**tiny, **fields})

    def one(name, **fields):
        train(config(name, **fields), Notebook())
        return folder / name

    def several(count, *runs):
        settings = folder / f"{runs[0][0]}.json"
        settings.write_text(json.dumps([config(name, **fields).to_dict() for name, fields in runs]))
        launcher = ["torch.distributed.run", "--nproc-per-node", str(count)]
        launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        command = [sys.executable, "-m", *launcher, "-m", "tests.training.several_runs", str(settings)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr[-3000:]

    def resumed_copy(source, name):
        """A copy of a run as a kill after its first checkpoint leaves it."""
        shutil.copytree(folder / source, folder / name)
        shutil.rmtree(folder / name / f"checkpoint-{STEPS}")
        return folder / name

    class Together:
        pass

    result = Together()
    result.folder, result.one, result.several, result.resumed_copy = folder, one, several, resumed_copy
    return result


@pytest.fixture(scope="module")
def runs(together):
    """All runs of this module: few launches, since starting the processes is what takes the time."""
    together.one("one")
    together.one("one-adamw", optimizer="adamw")
    together.one("one-deep", **DEEP)
    for name in ("ddp2-from-one", "fsdp2-from-one"):
        together.resumed_copy("one", name)
    together.several(
        2,
        ("ddp2", {}),
        ("ddp2-micro", {"micro_batch_size": 2}),
        ("ddp2-adamw", {"optimizer": "adamw"}),
        ("fsdp2", {"parallel": "fsdp2"}),
        ("fsdp2-micro", {"parallel": "fsdp2", "micro_batch_size": 2}),
        ("fsdp2-adamw", {"parallel": "fsdp2", "optimizer": "adamw"}),
        ("ddp2-deep", DEEP),
        ("fsdp2-deep", {"parallel": "fsdp2", **DEEP}),
        ("ddp2-from-one", {"resume": True}),
        ("fsdp2-from-one", {"resume": True, "parallel": "fsdp2"}),
    )
    together.resumed_copy("fsdp2", "one-from-fsdp2")
    together.one("one-from-fsdp2", resume=True)
    for name in ("ddp4-from-fsdp2", "fsdp4-from-fsdp2"):
        together.resumed_copy("fsdp2", name)
    together.several(
        4,
        ("ddp4", {}),
        ("fsdp4", {"parallel": "fsdp2"}),
        ("ddp4-from-fsdp2", {"resume": True}),
        ("fsdp4-from-fsdp2", {"resume": True, "parallel": "fsdp2"}),
    )
    return together.folder


PAIRS = [
    ("one", name)
    for name in ("ddp2", "ddp2-micro", "ddp4", "fsdp2", "fsdp2-micro", "fsdp4", "ddp2-from-one", "fsdp2-from-one")
] + [("one", "one-from-fsdp2"), ("one", "ddp4-from-fsdp2"), ("one", "fsdp4-from-fsdp2")]
PAIRS += [("one-adamw", "ddp2-adamw"), ("one-adamw", "fsdp2-adamw")]
PAIRS += [("one-deep", "ddp2-deep"), ("one-deep", "fsdp2-deep")]


@pytest.mark.slow
@pytest.mark.parametrize(("alone", "shared"), PAIRS, ids=[pair[1] for pair in PAIRS])
def test_every_step_has_the_rows_and_the_loss_of_one_process(runs, alone, shared):
    one, several = read_records(runs / alone), read_records(runs / shared)
    assert [record["step"] for record in several] == list(range(1, STEPS + 1))
    assert [record["rows"] for record in several] == [record["rows"] for record in one]
    for key in ("loss", "val_loss", "val_bits_per_byte"):
        expected = [record[key] for record in one if key in record]
        # the same sums in another order, float32: below 1e-6, as the product promises
        assert [record[key] for record in several if key in record] == pytest.approx(expected, rel=1e-6)
    expected = [record["grad_norm"] for record in one]
    assert [record["grad_norm"] for record in several] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shared", ["ddp4", "fsdp2", "fsdp4"])
def test_a_checkpoint_does_not_tell_how_many_processes_wrote_it(runs, shared):
    for name in ("model.safetensors", OPTIMIZER_FILE):
        one, several = (load_file(runs / run / f"checkpoint-{STEPS}" / name) for run in ("one", shared))
        assert {key: value.shape for key, value in one.items()} == {key: value.shape for key, value in several.items()}
        for key in one:
            torch.testing.assert_close(one[key], several[key], atol=2e-4, rtol=1e-3, msg=f"{name} {key}")
    assert [path.name for path in checkpoints(runs / shared)] == ["checkpoint-4", f"checkpoint-{STEPS}"]


def test_a_batch_that_the_processes_cannot_share_is_refused(run_config, monkeypatch):
    from fanformer.training.run import _check_batch

    with pytest.raises(ConfigError, match=r"must be a multiple of the processes times `micro_batch_size`, got 4 for 3"):
        _check_batch(run_config(batch_size=4), 3)


TWO = {"WORLD_SIZE": "2", "RANK": "0"}


@pytest.mark.parametrize(
    ("asked", "environment", "expected"),
    [
        ("auto", {}, "none"),
        ("fsdp2", {}, "none"),
        ("auto", TWO, "ddp"),
        ("fsdp2", TWO, "fsdp2"),
        ("auto", {**TWO, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "fsdp2"),
        ("ddp", {**TWO, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "ddp"),
    ],
)
def test_the_launcher_s_word_counts_unless_the_run_has_its_own(asked, environment, expected):
    assert choose_spread(asked, environment) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP version 1: use `accelerate launch --fsdp_version 2`"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "asks for DeepSpeed, which is not supported: unset it"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "asks for offloading parameters to the CPU, which is not supported"),
    ],
)
def test_what_the_launcher_asks_for_in_vain_is_refused(environment, message):
    with pytest.raises(ConfigError, match=message):
        choose_spread("auto", {**TWO, **environment})


def test_a_restarted_job_is_one_that_resumes():
    assert not is_restarted({})
    assert not is_restarted({"TORCHELASTIC_RESTART_COUNT": "0"})
    assert is_restarted({"TORCHELASTIC_RESTART_COUNT": "2"})


@pytest.mark.parametrize("options", [{}, {"overwrite": True}])
def test_a_restarted_job_goes_on_with_its_own_run_only(run_config, monkeypatch, options):
    folder = train(run_config(max_steps=1)).folder
    before = (folder / "run.yaml").read_text()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    if not options:
        with pytest.raises(CheckpointError, match="already holds a run: go on with --resume"):
            train(run_config(max_steps=2))
        assert (folder / "run.yaml").read_text() == before
    result = train(run_config(max_steps=2, overwrite=True))
    assert yaml.safe_load((folder / "run.yaml").read_text())["resumed"] == []
    assert train(run_config(max_steps=3, **options)).step == 3
    assert len(yaml.safe_load((folder / "run.yaml").read_text())["resumed"]) == 1
    assert result.step == 2
