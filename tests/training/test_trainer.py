"""The training loop: numbers that stay numbers, saves that come first, and stops that lose nothing."""

import json
import math
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fanformer.errors import CheckpointError, DivergenceError
from fanformer.evaluation.loss import HeldOutLoss
from fanformer.training.checkpoint import checkpoints, read_state
from fanformer.training.configuration import resolve
from fanformer.training.environment import Environment
from fanformer.training.folder import read_records
from fanformer.training.parallel import Processes
from fanformer.training.run import build_fanformer, train
from fanformer.training.schedule import is_finished, run_length
from fanformer.training.trainer import Trainer
from tests.tiny_models import TUNED
from tests.training.conftest import TINY_MODEL, Notebook

GOLDEN = Path(__file__).with_name("golden_losses.json")


def spoiled(bad_passes, factor):
    """Make a builder whose model's logits are multiplied by `factor` in some of its training passes."""

    def build(fields):
        model = build_fanformer(fields)
        passes = 0

        def spoil(module, inputs, output):
            nonlocal passes
            if not module.training:
                return output
            passes += 1
            return output * factor if passes in bad_passes else output

        model.lm_head.register_forward_hook(spoil)
        return model

    return build


class Rows(list):
    """Rows in a list, each a dictionary of (T,) tensors."""

    digested = ("input_ids",)

    def batch(self, indices):
        return {name: torch.stack([self[index][name] for index in indices]) for name in self[0]}


def trainer_on(rows, tmp_path, **fields):
    """A trainer of a tiny model on the given rows, without a run around it, and what it tells."""
    tmp_path.mkdir(exist_ok=True)
    config = resolve(
        "nano",
        overrides={
            "output_dir": str(tmp_path),
            "batch_size": len(rows),
            "sequence_length": 8,
            "log_steps": 1,
            **fields,
        },
    )
    torch.manual_seed(0)
    model = build_fanformer({**TINY_MODEL, "dropout": 0.0})
    environment = Environment("cpu", "float32", False, 1, False, {})
    told, measured = [], HeldOutLoss(loss=1.0, perplexity=2.7, bits_per_byte=1.4, tokens=1, bytes=1, documents=1)
    trainer = Trainer(
        model, rows, config=config, length=run_length(config, len(rows)), environment=environment,
        processes=Processes("auto", "cpu"), held_out_tokens=1, started=time.monotonic(), listener=told.append,
        evaluate=lambda *asked: measured, save_model=lambda weights, step: lambda folder: None,
    )  # fmt: skip
    return trainer, told


def losses_of(told):
    return [event.figures["loss"] for event in told if event.kind == "record" and "loss" in event.figures]


def rows_with(*masked):
    """Four rows of eight tokens, those of the given numbers without a single label."""
    generator = torch.Generator().manual_seed(3)
    rows = Rows()
    for number in range(4):
        ids = torch.randint(0, 300, (9,), generator=generator)
        labels = torch.full((8,), -100) if number in masked else ids[1:].clone()
        rows.append({"input_ids": ids[:-1].clone(), "labels": labels, "position_ids": torch.arange(8)})
    return rows


def test_the_loss_is_the_mean_over_all_labels_of_the_step_whatever_row_they_are_in(tmp_path):
    rows = rows_with(1)
    rows[2]["labels"][3:] = -100
    reference, _ = trainer_on(rows, tmp_path / "reference")
    logits = [reference.model(input_ids=row["input_ids"][None], use_cache=False).logits[0] for row in rows]
    labels = torch.cat([row["labels"] for row in rows])
    expected = torch.nn.functional.cross_entropy(torch.cat(logits), labels, ignore_index=-100)
    losses = []
    for micro_batch_size in (4, 2, 1):
        size = {"max_steps": 1, "micro_batch_size": micro_batch_size}
        trainer, told = trainer_on(rows, tmp_path / str(micro_batch_size), **size)
        trainer.run(None)
        losses += losses_of(told)
    assert losses == pytest.approx([expected.item()] * 3, rel=1e-6)


def test_rows_without_a_label_give_a_loss_of_zero_not_nan(tmp_path):
    trainer, told = trainer_on(rows_with(0, 1, 2, 3), tmp_path, max_steps=2)
    trainer.run(None)
    assert losses_of(told) == [0.0, 0.0]
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())


@pytest.mark.parametrize("factor", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_without_a_finite_gradient_leaves_the_weights_as_they_are_and_is_counted(run_config, factor, optimizer):
    notebook = Notebook()
    config = run_config(max_steps=5, save_steps=1, keep_last=9, log_steps=1, optimizer=optimizer)
    train(config, notebook, spoiled({3}, factor))
    folder = config.folder
    weights = {step: load_file(folder / f"checkpoint-{step}" / "model.safetensors") for step in range(1, 6)}
    same = [
        all(torch.equal(weights[step][name], weights[step + 1][name]) for name in weights[step]) for step in range(1, 5)
    ]
    assert same == [False, True, False, False]
    [note] = [note for note in notebook.notes if "left out" in note]
    assert note.startswith("step 3 left out: loss nan, gradient norm nan, not finite in `model.")
    records = {record["step"]: record for record in read_records(folder)}
    assert "loss" not in records[3]
    assert records[5]["skipped_steps"] == 1
    assert all(math.isfinite(records[step]["loss"]) for step in (1, 2, 4, 5))


def test_too_many_such_steps_in_a_row_end_the_run_at_its_last_checkpoint_with_a_diagnosis(run_config):
    config = run_config(max_steps=9, save_steps=2, max_skipped_steps=3, optimizer="adamw")
    with pytest.raises(DivergenceError) as caught:
        train(config, Notebook(), spoiled({5, 6, 7, 8, 9}, math.nan))
    said = str(caught.value)
    assert said.startswith("step 7 left out: loss nan, gradient norm nan, not finite in `")
    assert "the 3th in a row, at learning rate" in said or "3 in a row" in said
    assert re.search(r"the last finite loss was \d\.\d", said)
    assert "--resume and a lower --learning-rate" in said
    assert "\n" not in said
    finite = load_file(checkpoints(config.folder)[-1] / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in finite.values())


def test_a_spike_sends_the_run_back_and_leaves_its_rows_out(run_config):
    fields = {"max_steps": 26, "save_steps": 10, "log_steps": 1, "spike_rollback": 8.0}
    notebook = Notebook()
    config = run_config(**fields)
    train(config, notebook, spoiled({23}, 400.0))
    [note] = [note for note in notebook.notes if "back to" in note]
    assert note.startswith("the loss of step 23 is ")
    assert note.endswith("back to checkpoint-20, the 12 rows since then are left out")
    records = read_records(config.folder)
    assert [record["step"] for record in records] == list(range(1, 27))
    assert all(record["tokens_per_second"] > 0 for record in records)
    loop = read_state(config.folder / "checkpoint-26")["loop"]
    assert (loop["place"], loop["rollbacks"]) == (4 * (26 + 3), 1)


def test_spikes_again_and_again_end_the_run(run_config):
    config = run_config(max_steps=40, save_steps=10, spike_rollback=8.0, max_rollbacks=1)
    with pytest.raises(DivergenceError, match="the run went back 1 times already: use a lower --learning-rate"):
        train(config, Notebook(), spoiled({23, 26}, 400.0))


def test_the_checkpoint_with_the_best_held_out_loss_is_kept(run_config):
    rising = {"learning_rate": 3.0, "warmup_fraction": 1.0, "decay_fraction": 0.0, "optimizer": "adamw"}
    config = run_config(max_steps=8, save_steps=1, eval_steps=2, keep_last=1, max_grad_norm=0.0, **rising)
    train(config, Notebook())
    measured = {record["step"]: record["val_loss"] for record in read_records(config.folder) if "val_loss" in record}
    best = min(measured, key=measured.get)
    assert best != 8, "this test needs a run whose end is not its best"
    assert [path.name for path in checkpoints(config.folder)] == [f"checkpoint-{best}", "checkpoint-8"]


def test_the_best_is_the_best_of_those_that_have_a_checkpoint(run_config):
    rising = {"learning_rate": 3.0, "warmup_fraction": 1.0, "decay_fraction": 0.0, "optimizer": "adamw"}
    fields = {"save_steps": 4, "eval_steps": 1, "keep_last": 1, "max_grad_norm": 0.0, **rising}
    train(run_config(max_steps=8, **fields), Notebook())
    config = run_config(max_steps=12, resume=True, **fields)
    train(config, Notebook())
    measured = {record["step"]: record["val_loss"] for record in read_records(config.folder) if "val_loss" in record}
    best = min((step for step in measured if step % 4 == 0), key=measured.get)
    assert min(measured, key=measured.get) < best < 12, "this test needs a run that is best before its first checkpoint"
    assert [path.name for path in checkpoints(config.folder)] == [f"checkpoint-{best}", "checkpoint-12"]


def test_an_evaluation_that_is_no_number_is_never_the_best(tmp_path):
    trainer, _ = trainer_on(rows_with(), tmp_path, max_steps=4, save_steps=1, eval_steps=1, keep_last=1)
    losses = iter([math.nan, 3.0, 2.0, math.nan])
    trainer.evaluate = lambda *asked: HeldOutLoss(next(losses), 2.7, 1.4, tokens=1, bytes=1, documents=1)
    trainer.run(None)
    assert math.isnan(read_records(tmp_path)[0]["val_loss"])
    assert trainer.best == trainer._best_so_far() == (2.0, 3)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-4"]


def test_an_evaluation_that_a_kill_left_out_is_made_up_for_on_resume(run, run_config):
    fields = {"max_steps": 6, "save_steps": 3, "eval_steps": 3, "log_steps": 1, "keep_last": 9}
    straight, _ = run("straight", **fields)
    killed, _ = run("killed", **fields)
    folder = killed.folder  # as a kill between checkpoint-3 and its evaluation leaves it
    shutil.rmtree(folder / "checkpoint-6")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:2]))
    run("killed", **fields, resume=True)
    keys = ("step", "loss", "grad_norm", "val_loss", "rows")
    one, two = (
        [[record.get(key) for key in keys] for record in read_records(result)] for result in (straight.folder, folder)
    )
    assert one == two


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_saves_the_step_under_way_and_the_run_goes_on_from_it_bit_for_bit(run, run_config, number):
    fields = {"max_steps": 30, "save_steps": 30, "eval_steps": 30, "log_steps": 7}
    straight, _ = run("straight", **fields)

    class Impatient(Notebook):
        def step(self, step):
            if step == 12:
                os.kill(os.getpid(), number)

    config = run_config("stopped", **fields)
    before = signal.getsignal(number)
    result = train(config, Impatient())
    assert signal.getsignal(number) is before
    assert (result.stopped_by, result.reached_end, result.held_out) == (number.name, False, None)
    assert result.step in (12, 13)  # the signal is seen when the step after it ends, at the latest
    assert [path.name for path in checkpoints(config.folder)] == [f"checkpoint-{result.step}"]
    assert (config.folder / "model.safetensors").is_file()  # the folder can be used as it is
    assert not is_finished(config.folder)
    resumed, _ = run("stopped", **fields, resume=True)
    keys = ("step", "loss", "grad_norm", "rows", "val_loss")
    one, two = ([[r.get(k) for k in keys] for r in read_records(f)] for f in (straight.folder, resumed.folder))
    assert one == two
    first, second = (load_file(f / "model.safetensors") for f in (straight.folder, resumed.folder))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("resumed", [False, True], ids=["first process", "resumed"])
def test_a_signal_in_an_evaluation_saves_the_step_before_it(run, run_config, monkeypatch, resumed):
    from fanformer.training.run import Run

    fields = {"max_steps": 200, "save_steps": 1000, "eval_steps": 6, "log_steps": 1}
    if resumed:
        run(**{**fields, "max_steps": 2})
    real = Run.evaluate

    def stopped(self, everything, between_batches, most_tokens):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(self, everything, between_batches, most_tokens)

    monkeypatch.setattr(Run, "evaluate", stopped)
    result, _ = run(**fields, resume=resumed)
    assert (result.stopped_by, result.step) == ("SIGTERM", 6)
    assert "checkpoint-6" in [path.name for path in checkpoints(result.folder)]
    monkeypatch.setattr(Run, "evaluate", real)
    again, notebook = run(**{**fields, "max_steps": 8}, resume=True)
    assert (again.step, notebook.steps) == (8, [7, 8])


def test_a_finished_run_says_so_and_trains_no_further_unless_it_is_made_longer(run):
    fields = {"max_steps": None, "max_time": 2.0, "log_steps": 1}
    first, _ = run(**fields)
    assert first.reached_end
    weights = (first.folder / "model.safetensors").read_bytes()
    assert is_finished(first.folder)
    again, notebook = run(**fields, resume=True)
    assert (again.step, again.reached_end, notebook.steps) == (first.step, True, [])
    assert any(note.startswith(f"this run is finished, after {first.step} steps: a longer") for note in notebook.notes)
    assert (first.folder / "model.safetensors").read_bytes() == weights
    longer, notebook = run(**{**fields, "max_time": 4.0}, resume=True)
    assert longer.step > first.step
    assert longer.reached_end
    by_steps, _ = run("by steps", max_steps=2)
    assert by_steps.reached_end
    assert is_finished(by_steps.folder)
    _, notebook = run("by steps", max_steps=2, resume=True)
    assert any(note.startswith("this run is finished, after 2 steps") for note in notebook.notes)


def test_a_job_s_time_limit_beside_steps_counts_each_part_of_the_run_anew(run):
    fields = {"max_steps": 100_000, "max_time": 1.0, "compile": "off"}
    first, _ = run(**fields)
    assert not first.reached_end
    second, _ = run(**fields, resume=True)
    assert second.step > first.step


def test_training_goes_on_while_a_checkpoint_is_written(run_config, monkeypatch):
    """A disk that takes a while for each file must not make a step wait, and the last checkpoint is waited for."""
    from fanformer.training import checkpoint

    slow_threads = set()
    real = checkpoint.sync

    def slow(path):
        slow_threads.add(threading.current_thread())
        time.sleep(0.05)
        real(path)

    monkeypatch.setattr(checkpoint, "sync", slow)
    stamps = []

    class Timed(Notebook):
        def step(self, step):
            stamps.append((step, len(checkpoints(config.folder))))
            assert threading.main_thread() not in slow_threads

    config = run_config(max_steps=12, save_steps=6, eval_steps=12, keep_last=9)
    train(config, Timed())
    assert dict(stamps)[7] == 0, "step 7 came before checkpoint-6 was on the disk"
    assert [path.name for path in checkpoints(config.folder)] == ["checkpoint-6", "checkpoint-12"]


def test_a_checkpoint_that_cannot_be_written_does_not_end_training_but_the_last_one_does(run_config, monkeypatch):
    real = shutil.disk_usage
    full_until = 8

    class Disk(Notebook):
        def step(self, step):
            self.now = step

    notebook = Disk()
    notebook.now = 0

    def usage(path):
        free = 10 if notebook.now <= full_until else real(path).free
        return type(real(path))(real(path).total, real(path).used, free)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    config = run_config(max_steps=12, save_steps=4, keep_last=9)
    train(config, notebook)
    said = [note for note in notebook.notes if "the disk has no room for" in note]
    assert len(said) == 2
    assert all("Training goes on" in note for note in said)
    assert [path.name for path in checkpoints(config.folder)] == ["checkpoint-12"]
    full_until = 99
    with pytest.raises(
        CheckpointError, match=r"the disk has no room for .*checkpoint-12: [\d,]+ bytes needed, 10 free"
    ):
        train(run_config("full", max_steps=12, save_steps=4), notebook)


# The block of the curves "adamw" and "muon": that of 92m-tuned, in the tiny width.
TUNED_BLOCK = {**TUNED, "qkv_rank": 24, "gate_up_rank": 24}


@pytest.mark.parametrize(
    ("curve", "block"),
    [("adamw", TUNED_BLOCK), ("muon", TUNED_BLOCK), ("muon-definition", {})],
    ids=["adamw", "muon", "definition"],
)
def test_fifty_steps_follow_the_golden_curve(run, curve, block):
    """Regenerate after a wanted change: FANFORMER_WRITE_GOLDEN=1 python -m pytest -k golden_curve tests/training."""
    fields = {"max_steps": 50, "eval_steps": 50, "save_steps": 50, "log_steps": 1, "learning_rate": 0.004}
    fields["muon_factor_scale"] = 1.0  # older than the field
    model = {f"model.{name}": value for name, value in {"dropout": 0.0, **block}.items()}
    result, _ = run(**fields, optimizer=curve.partition("-")[0], threads=1, **model)
    losses = [record["loss"] for record in read_records(result.folder)]
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("FANFORMER_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(golden | {curve: [round(loss, 6) for loss in losses]}, indent=0) + "\n")
    # the same arithmetic in another order, as on another processor, moves these losses by less than 1e-4
    assert losses == pytest.approx(json.loads(GOLDEN.read_text())[curve], rel=2e-3)
