"""A resumed run is the same run: every bit of it, or a refusal that says what is not."""

import json
import os
import shutil
import time

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from fanformer.errors import CheckpointError, ConfigError
from fanformer.model.configuration_fanformer import RANKS
from fanformer.training.checkpoint import OPTIMIZER_FILE, checkpoints, read_state
from fanformer.training.folder import ROUNDS_FILE, RUN_FILE, read_records
from tests.training.test_run import figures, same_weights


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(run, run_config, optimizer):
    # 7 steps of 4 rows over fewer rows than that: the resume falls into a later epoch, with dropout on
    fields = {
        "max_steps": 7,
        "save_steps": 3,
        "eval_steps": 7,
        "log_steps": 1,
        "keep_last": 9,
        "optimizer": optimizer,
        "sequence_length": 32,
        "batch_size": 4,
    }
    straight, _ = run("straight", **fields)
    broken, _ = run("broken", **fields)
    expected = figures(straight.folder)
    for last in (3, 6):
        forget_after(broken.folder, last)
        resumed, notebook = run("broken", **{**fields, "resume": True})
        assert any(f"checkpoint-{last}" in note for note in notebook.notes)
        assert figures(resumed.folder) == expected
        assert same_weights(resumed.folder, straight.folder)
        assert same_optimizer(resumed.folder, straight.folder, 7)


def forget_after(folder, step):
    """Leave a run as a kill leaves it, some steps after a checkpoint."""
    for path in checkpoints(folder):
        if int(path.name.removeprefix("checkpoint-")) > step:
            shutil.rmtree(path)
    for name in ("model.safetensors", "config.json", "loss.png"):
        (folder / name).unlink()


def same_optimizer(one, other, step):
    first, second = (load_file(folder / f"checkpoint-{step}" / OPTIMIZER_FILE) for folder in (one, other))
    return first.keys() == second.keys() and all((first[name] == second[name]).all() for name in first)


def test_a_resume_between_two_log_lines_gives_the_same_means(run):
    fields = {"max_steps": 12, "log_steps": 5, "save_steps": 7, "eval_steps": 12, "keep_last": 9}
    straight, _ = run("straight", **fields)
    broken, _ = run("broken", **fields)
    forget_after(broken.folder, 7)
    resumed, _ = run("broken", **fields, resume=True)
    assert figures(resumed.folder) == figures(straight.folder)


def test_micro_batches_resume_bit_for_bit_too(run):
    fields = {"max_steps": 6, "save_steps": 3, "log_steps": 1, "micro_batch_size": 2, "keep_last": 9}
    straight, _ = run("straight", **fields)
    broken, _ = run("broken", **fields)
    forget_after(broken.folder, 3)
    run("broken", **fields, resume=True)
    assert figures(broken.folder) == figures(straight.folder)


def test_a_damaged_newest_checkpoint_costs_no_more_than_the_steps_after_the_one_before(run):
    fields = {"max_steps": 9, "save_steps": 3, "log_steps": 1, "keep_last": 9}
    straight, _ = run("straight", **fields)
    broken, _ = run("broken", **fields)
    shutil.rmtree(broken.folder / "checkpoint-9")
    weights = broken.folder / "checkpoint-6" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 16
    weights.unlink()
    weights.write_bytes(content)
    resumed, notebook = run("broken", **fields, resume=True)
    assert any("checkpoint-6 is damaged: the checksum of its model.safetensors" in note for note in notebook.notes)
    assert any(note.endswith("checkpoint-3") for note in notebook.notes)
    assert figures(resumed.folder) == figures(straight.folder)
    assert same_weights(resumed.folder, straight.folder)


def test_every_checkpoint_is_a_model_folder_whose_card_has_the_figures_of_its_step(run):
    from fanformer.loading import load

    result, _ = run(max_steps=6, save_steps=3, eval_steps=3, log_steps=1)
    for step in (3, 6):
        folder = result.folder / f"checkpoint-{step}"
        assert load(folder, device="cpu").model.num_parameters() > 0
        card = (folder / "README.md").read_text()
        assert f"| steps | {step} (a checkpoint of a run under way) |" in card
        assert f"| tokens trained on | {step * 128:,} |" in card
    records = {record["step"]: record for record in read_records(result.folder)}
    assert f"{records[5]['loss']:.4f} nats per token" in (result.folder / "checkpoint-6" / "README.md").read_text()


def test_decisions_about_the_machine_are_made_once_and_kept(run, monkeypatch):
    from fanformer.training import run as run_module

    first, _ = run(max_steps=4, save_steps=2, keep_last=9)
    forget_after(first.folder, 2)

    def forbidden(*_):
        raise AssertionError("a resumed run must not decide again")

    monkeypatch.setattr(run_module, "decide", forbidden)
    before = yaml.safe_load((first.folder / "run.yaml").read_text())["environment"]
    run(max_steps=4, save_steps=2, keep_last=9, resume=True)
    assert yaml.safe_load((first.folder / "run.yaml").read_text())["environment"] == before


def test_a_run_from_before_each_kind_of_layer_had_a_rank_goes_on(run):
    block = {"fan_placement": "ffn", "fan_multiple": 1, "qkv_rank": 24, "o_rank": None, "gate_up_rank": 24}
    fields = {f"model.{name}": value for name, value in {**block, "down_rank": None}.items()}
    whole, _ = run("whole", max_steps=4, save_steps=2, **fields)
    first, _ = run("first", max_steps=4, save_steps=2, keep_last=9, **fields)
    forget_after(first.folder, 2)
    content = yaml.safe_load((first.folder / "run.yaml").read_text())
    for name in (*RANKS, "fan_multiple", "writer_activation"):
        del content["model"][name]
    content["model"] |= {"cola_rank_ratio": 0.75, "cola_rank": None, "cola_layers": "readers"}
    (first.folder / "run.yaml").write_text(yaml.safe_dump(content))
    run("first", max_steps=4, save_steps=2, keep_last=9, resume=True, **fields)
    losses = [[record["loss"] for record in read_records(folder)] for folder in (whole.folder, first.folder)]
    assert losses[0] == losses[1]
    assert yaml.safe_load((first.folder / "run.yaml").read_text())["model"]["qkv_rank"] == 24


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 8}, "`batch_size` of a run cannot change on resume: it was 4, got 8: go on with 4, or begin"),
        ({"sequence_length": 16}, "`sequence_length` of a run cannot change on resume: it was 32, got 16"),
        ({"seed": 1}, "`seed` of a run cannot change on resume: it was 0, got 1"),
        ({"optimizer": "adamw"}, "`optimizer` of a run cannot change on resume: it was muon, got adamw"),
        ({"model.fan_ratio": 0.2}, "`fan_ratio` was 0.15, is 0.2: resume"),
        ({"model.num_hidden_layers": 3}, "`num_hidden_layers` was 2, is 3: resume"),
        ({"held_out_fraction": 0.2}, "(`held_out_fraction` was 0.05, is 0.2): resume with the data it began with"),
        ({"vocab_size": 300}, "(`vocab_size` was None, is 300): resume with the data it began with"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_batch_model_or_split_is_refused_and_nothing_is_lost(run, finished, change, message):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(CheckpointError) as caught:
        run(max_steps=4, resume=True, **change)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    after = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file() and path.name != ".lock"}
    assert before == after


@pytest.fixture
def other_text(tmp_path):
    path = tmp_path / "other.txt"
    path.write_text("the old dog sees a river under the tree and runs.\n" * 500, encoding="utf-8")
    return str(path)


def test_other_data_are_refused_with_both_fingerprints_unless_allowed_and_then_recorded(run, other_text):
    first, _ = run(max_steps=2)
    with pytest.raises(CheckpointError) as caught:
        run(max_steps=4, resume=True, data=other_text)
    assert "the data changed since the run began, fingerprint " in str(caught.value)
    assert f", is {other_text}): resume with the data it began with, or accept these with --allow-changed-data" in str(
        caught.value
    )
    result, notebook = run(max_steps=4, resume=True, data=other_text, allow_changed_data=True)
    assert result.step == 4
    content = yaml.safe_load((first.folder / "run.yaml").read_text())
    assert content["configuration"]["data"] == other_text
    [entry] = content["resumed"]
    assert entry["at_step"] == 2
    assert {"data", "data.fingerprint", "max_steps"} <= entry["changes"].keys()
    assert any(note.startswith("changed since the run began: ") for note in notebook.notes)
    again, _ = run(max_steps=6, resume=True, data=other_text)  # from now on these are the run's data
    assert again.step == 6


def test_prepared_data_that_were_written_anew_in_their_place_are_refused(run, corpus, other_text, tmp_path):
    from fanformer.data.preparation.prepare import prepare
    from fanformer.data.sources.documents import open_source

    place = tmp_path / "prepared"
    first = prepare(open_source(str(corpus)), place, tokenizer=None, vocab_size=300)
    run(max_steps=2, data=str(place))
    shutil.rmtree(place)
    second = prepare(open_source(other_text), place, tokenizer=None, vocab_size=300)
    with pytest.raises(CheckpointError) as caught:
        run(max_steps=4, resume=True, data=str(place))
    assert f"fingerprint {first.fingerprint[:16]} then, {second.fingerprint[:16]} now" in str(caught.value)
    assert "was written anew" in str(caught.value)
    with pytest.raises(ConfigError, match="is not the one that the weights were trained with"):
        run(max_steps=4, resume=True, data=str(place), allow_changed_data=True)


def test_a_longer_run_and_another_rate_are_allowed_and_recorded(run):
    first, _ = run(max_steps=2)
    result, _ = run(max_steps=4, learning_rate=0.001, resume=True)
    assert result.step == 4
    content = yaml.safe_load((first.folder / "run.yaml").read_text())
    changes = content["resumed"][0]["changes"]
    assert changes["learning_rate"] == "0.01 -> 0.001"
    assert changes["max_steps"] == "2 -> 4"
    assert content["configuration"]["max_steps"] == 4


def test_a_run_that_is_past_a_shorter_length_ends_at_once(run):
    run(max_steps=4)
    result, notebook = run(max_steps=2, resume=True)
    assert (result.step, notebook.steps) == (4, [])


def test_resume_where_nothing_is_yet_begins_and_says_so(run):
    result, notebook = run(max_steps=2, resume=True)
    assert result.step == 2
    assert any("starting at step 0" in note for note in notebook.notes)


def test_the_system_clock_may_jump_between_and_during_the_parts_of_a_run(run, monkeypatch):
    fields = {"max_steps": 6, "save_steps": 3, "log_steps": 1, "keep_last": 9}
    straight, _ = run("straight", **fields)
    broken, _ = run("broken", **fields)
    forget_after(broken.folder, 3)
    for path in broken.folder.rglob("*"):
        os.utime(path, (1e9, 1e9))
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 1e8)
    resumed, _ = run("broken", **fields, resume=True)
    assert figures(resumed.folder) == figures(straight.folder)
    assert all(record["elapsed_seconds"] >= 0 for record in read_records(resumed.folder))


def test_resuming_costs_the_same_at_any_position(run_config):
    from fanformer.data.packing import rows_of_run

    reached = []
    for place in (0, 10**6, 10**12):
        started = time.perf_counter()
        rows_of_run(0, np.arange(place, place + 512), 10**5)
        reached.append(time.perf_counter() - started)
    assert max(reached) < 1.0  # a stream read from its beginning would take days


def test_a_checkpoint_tells_the_rows_and_seconds_so_far(run):
    result, _ = run(max_steps=4)
    loop = read_state(result.folder / "checkpoint-4")["loop"]
    assert (loop["step"], loop["place"]) == (4, 16)
    assert loop["elapsed_seconds"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device that it must lack")
def test_a_run_from_a_machine_with_another_device_says_how_to_go_on(run):
    first, _ = run(max_steps=2, device="auto")
    content = yaml.safe_load((first.folder / "run.yaml").read_text())
    content["environment"]["device"] = "cuda"
    (first.folder / "run.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(CheckpointError, match=r"was begun on `cuda`, which is not there: go on .* with --device cpu"):
        run(max_steps=4, device="auto", resume=True)
    result, _ = run(max_steps=4, device="cpu", resume=True)
    assert result.step == 4


@pytest.mark.parametrize(
    ("line", "shown"),
    [("garbage", "got 'garbage'"), ("[1, 2]", "got '[1, 2]'"), ('{"loss": 1}', "with `step`"), ("[" * 10**5, "'[[[")],
    ids=["no JSON", "no object", "no step", "deep"],
)
def test_a_garbage_line_of_the_records_is_named(run, finished, line, shown):
    path = finished / "metrics.jsonl"
    good = path.read_text()
    path.write_text(good.replace("\n", f"\n{line}\n", 1))
    with pytest.raises(CheckpointError) as caught:
        run(max_steps=4, resume=True)
    assert "metrics.jsonl:2 must be a JSON object with `step`" in str(caught.value)
    assert shown in str(caught.value)
    path.write_text(good)
    assert run(max_steps=4, resume=True)[0].step == 4


@pytest.mark.parametrize("damage", ["configuration: {}", "configuration: 3", "environment: 3", "model:", "7", "a: ["])
def test_a_damaged_run_file_is_named(run, finished, damage):
    path = finished / "run.yaml"
    name, _, value = damage.partition(": ")
    content = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**content, name.rstrip(":"): yaml.safe_load(value or "null")})
                    if name in ("configuration", "environment", "model:") else damage)  # fmt: skip
    with pytest.raises(
        CheckpointError, match=r"run\.yaml (must have a mapping|\(ParserError\))|cannot read .*run\.yaml"
    ):
        run(max_steps=4, resume=True)


def test_the_saved_tokenizer_knows_how_long_a_text_may_be(run):
    result, _ = run(max_steps=1)
    tokenizer = json.loads((result.folder / "tokenizer_config.json").read_text())
    assert (
        tokenizer["model_max_length"]
        == json.loads((result.folder / "config.json").read_text())["max_position_embeddings"]
    )


def test_a_sample_prompt_that_fills_the_positions_is_refused_before_training(run):
    with pytest.raises(ConfigError, match="`sample_prompt` must leave room in the model's 32 positions, got "):
        run(max_steps=2, sample_prompt="the cat sees the dog " * 20)


def test_rows_longer_than_the_positions_of_the_weights_are_refused(run):
    first, _ = run("first", max_steps=2)
    with pytest.raises(ConfigError, match=r"`sequence_length` must be at most 32, the positions of .*, got 64"):
        run("second", max_steps=2, init_from=str(first.folder), sequence_length=64)


def test_what_the_bits_depend_on_is_recorded_and_its_change_told(run, monkeypatch):
    first, _ = run(max_steps=2)
    content = yaml.safe_load((first.folder / "run.yaml").read_text())
    assert content["machine"]["processor"]
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    _, notebook = run(max_steps=4, resume=True)
    changes = yaml.safe_load((first.folder / "run.yaml").read_text())["resumed"][0]["changes"]
    assert "COMPATIBLE" in changes["machine"]
    assert any(note.startswith("changed since the run began: ") and "machine" in note for note in notebook.notes)


def test_a_community_run_is_not_gone_on_with_by_oneself(run, finished):
    """Its host compares the recipe in run.yaml with its own, which a training would have replaced."""
    (finished / ROUNDS_FILE).write_text("{}")
    before = (finished / RUN_FILE).read_bytes()
    with pytest.raises(CheckpointError, match="holds a community run: go on with the same `fanformer community host`"):
        run(resume=True, max_steps=3)
    assert (finished / RUN_FILE).read_bytes() == before
