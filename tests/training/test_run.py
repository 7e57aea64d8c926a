import json
import math
import os
import random
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fanformer.errors import CheckpointError, ConfigError, DataError
from fanformer.training.checkpoint import checkpoints
from fanformer.training.folder import read_records
from fanformer.training.run import build_fanformer, train
from tests.training.conftest import Notebook

NOT_COMPARED = ("tokens_per_second", "elapsed_seconds")


def figures(folder):
    return [{key: value for key, value in record.items() if key not in NOT_COMPARED} for record in read_records(folder)]


def same_weights(one, other):
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_leaves_a_complete_folder_with_its_own_figures(run):
    result, notebook = run(max_steps=6, save_steps=3, eval_steps=3, log_steps=1)
    folder = result.folder
    for name in (
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "README.md",
        "run.yaml",
        "metrics.jsonl",
        "loss.png",
        "modeling_fanformer.py",
        "configuration_fanformer.py",
    ):
        assert (folder / name).stat().st_size > 0, name
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-3", "checkpoint-6"]
    for checkpoint in checkpoints(folder):
        assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= {
            path.name for path in checkpoint.iterdir()
        }
        assert not list(checkpoint.glob("*.bin"))
    records = read_records(folder)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert all(
        {"loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second"} <= record.keys() for record in records
    )
    assert [record["step"] for record in records if "val_loss" in record] == [3, 6]
    assert records[-1]["tokens"] == 6 * 4 * 32
    assert records[-1]["val_loss"] == pytest.approx(result.held_out.loss, rel=1e-5)
    assert "val_loss_stderr" not in records[-1]  # one held-out document gives none
    card = (folder / "README.md").read_text()
    assert f"{result.held_out.bits_per_byte:.4f}" in card
    assert "6 (finished)" in card
    content = yaml.safe_load((folder / "run.yaml").read_text())
    assert content["data"]["fingerprint"]
    assert content["environment"]["reasons"]["compile"].startswith("about")
    assert content["versions"]["torch"] == torch.__version__
    assert len(notebook.samples) == 2
    assert notebook.steps == [1, 2, 3, 4, 5, 6]


def test_training_learns(run):
    result, _ = run(max_steps=60, eval_steps=60, save_steps=60, learning_rate=0.01, **{"model.dropout": 0.0})
    records = read_records(result.folder)
    assert records[-1]["loss"] < records[0]["loss"] - 1.5
    # uniform choice among 12 words and a full stop per 13: far below the untrained ln(320) = 5.8
    assert result.held_out.loss < 4.0


def test_an_evaluation_that_gives_no_number_writes_nothing_and_does_not_end_the_run(run_config):
    steps = []

    def build(fields):
        model = build_fanformer(fields)

        def spoil(module, inputs, logits):
            if module.training:
                steps.append(len(steps))
            return logits * math.nan if not module.training and len(steps) <= 3 else logits

        model.lm_head.register_forward_hook(spoil)
        return model

    notebook, config = Notebook(), run_config(max_steps=6, eval_steps=3)
    result = train(config, notebook, build)
    spoilt, sound = (record for record in read_records(config.folder) if "val_loss" in record)
    assert len(steps) == 6
    assert (spoilt["step"], math.isnan(spoilt["val_loss"]), spoilt["sample"]) == (3, True, "")
    assert sound["val_loss"] == result.held_out.loss
    assert sound["sample"].startswith("zq" * 14)
    assert notebook.samples == ["", sound["sample"]]
    assert result.reached_end


def test_the_folder_loads_and_writes_without_this_package(finished, tmp_path):
    program = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "fanformer":
            raise ImportError("absent for this test")
sys.meta_path.insert(0, Absent())
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(finished)!r}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({str(finished)!r}, trust_remote_code=True)
ids = tokenizer("the cat", return_tensors="pt").input_ids
print(model.generate(ids, max_new_tokens=5, do_sample=True).shape[1] > ids.shape[1])
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "True", done.stderr


def test_the_same_seed_gives_the_same_run_and_another_seed_another(run):
    first, _ = run("first", max_steps=3, seed=1)
    second, _ = run("second", max_steps=3, seed=1)
    third, _ = run("third", max_steps=3, seed=2)
    assert same_weights(first.folder, second.folder)
    assert not same_weights(first.folder, third.folder)


def test_gradient_accumulation_gives_the_whole_batch_gradient(run):
    whole, _ = run("whole", max_steps=2, **{"model.dropout": 0.0})
    parts, _ = run("parts", max_steps=2, micro_batch_size=2, **{"model.dropout": 0.0})
    first, second = load_file(whole.folder / "model.safetensors"), load_file(parts.folder / "model.safetensors")
    for name in first:  # the same sum in another order; AdamW's first steps have the size of the learning rate
        torch.testing.assert_close(first[name], second[name], atol=2e-4, rtol=0, msg=name)


def test_resume_without_a_complete_checkpoint_starts_at_step_0_and_says_so(run):
    result, _ = run(max_steps=2)
    for path in checkpoints(result.folder):
        (path / "manifest.json").unlink()
    again, notebook = run(max_steps=2, resume=True)
    assert any("no complete checkpoint" in note and "starting at step 0" in note for note in notebook.notes)
    assert [record["step"] for record in read_records(again.folder)][-1] == 2


def test_a_time_limit_alone_sets_the_length_and_lets_the_learning_rate_fall_before_it_ends(run):
    result, _ = run(max_steps=None, max_time=6.0, log_steps=1)
    records = read_records(result.folder)
    assert result.reached_end
    assert records[-1]["elapsed_seconds"] < 30  # 6 and one step, which may take long on a busy machine
    assert records[-1]["learning_rate"] < max(record["learning_rate"] for record in records)


def test_a_time_limit_beside_steps_stops_early_with_a_checkpoint(run):
    result, _ = run(max_steps=100_000, max_time=2.0, compile="off")
    assert not result.reached_end
    assert checkpoints(result.folder)
    assert "a checkpoint of a run under way" in (result.folder / "README.md").read_text()


def test_training_goes_on_from_a_saved_model(run):
    first, _ = run("first", max_steps=30, learning_rate=0.01)
    second, _ = run("second", max_steps=1, learning_rate=1e-6, init_from=str(first.folder), tokenizer=str(first.folder))
    assert second.held_out.loss == pytest.approx(first.held_out.loss, abs=1e-3)


def test_held_out_data_can_be_another_file(run, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("zebra quartz jigsaw vex.\n" * 40, encoding="utf-8")
    result, _ = run(max_steps=2, eval_data=str(other))
    assert result.held_out.bytes == other.stat().st_size
    assert result.gzip_bits_per_byte is None


def test_held_out_documents_give_the_loss_a_standard_error(run, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": "zebra " * number}) + "\n" for number in range(1, 9)))
    result, _ = run(max_steps=2, eval_data=str(other))
    assert result.held_out.documents == 8
    assert read_records(result.folder)[-1]["val_loss_stderr"] == result.held_out.loss_stderr > 0


def test_prepared_data_is_used_as_it_is(run, corpus, tmp_path):
    from fanformer.data.preparation.prepare import prepare
    from fanformer.data.sources.documents import open_source

    prepared = prepare(open_source(str(corpus)), tmp_path / "prepared", tokenizer=None, vocab_size=300)
    result, _ = run(max_steps=1, data=str(tmp_path / "prepared"))
    content = yaml.safe_load((result.folder / "run.yaml").read_text())
    assert content["data"]["fingerprint"] == prepared.fingerprint
    assert json.loads((result.folder / "config.json").read_text())["vocab_size"] == 320
    with pytest.raises(ConfigError, match="`vocab_size` does not apply beside `tokenizer`, got 300: leave one out"):
        run("other", max_steps=1, tokenizer=str(tmp_path / "prepared"), vocab_size=300)


def test_ids_that_pad_the_vocabulary_are_suppressed_in_the_saved_defaults(run):
    result, _ = run(max_steps=1, vocab_size=300)
    generation = json.loads((result.folder / "generation_config.json").read_text())
    assert generation["suppress_tokens"] == list(range(300, 320))


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"data": "/nowhere/text.txt"}, DataError, "/nowhere/text.txt"),
        ({"sequence_length": 100_000}, DataError, "one row needs 100001"),
        ({"model.fan_ratio": 0.7}, Exception, "`fan_ratio` must be in [0, 0.5], got 0.7"),
        ({"model.num_key_value_heads": 3}, Exception, "must be a multiple of `num_key_value_heads`"),
        ({"model.hidden_sise": 3}, Exception, "did you mean `hidden_size`"),
        ({"init_from": "/nowhere/model"}, CheckpointError, "/nowhere/model"),
        ({"device": "cuda"}, ConfigError, "cuda"),
    ],
    ids=["missing data", "short data", "fan_ratio", "heads", "unknown model field", "missing weights", "absent device"],
)
def test_bad_input_leaves_nothing_behind(run, run_config, fields, kind, message):
    if "device" in fields and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(kind) as caught:
        run("bad", **fields)
    assert message in str(caught.value) + str(caught.value.__cause__)
    assert not run_config("bad").folder.exists()


def test_a_folder_that_holds_a_run_is_kept_unless_told_otherwise(run):
    run(max_steps=1)
    with pytest.raises(CheckpointError, match="already holds a run: go on with --resume, replace it with --overwrite"):
        run(max_steps=1)
    second, _ = run(max_steps=2, overwrite=True)
    assert [record["step"] for record in read_records(second.folder)][-1] == 2


def test_a_folder_that_is_no_run_is_never_deleted(run, run_config):
    folder = run_config("mine").folder
    folder.mkdir(parents=True)
    (folder / "precious.txt").write_text("keep me")
    with pytest.raises(CheckpointError, match="is not empty and holds no run"):
        run("mine", overwrite=True)
    assert (folder / "precious.txt").read_text() == "keep me"
    with pytest.raises(CheckpointError, match="is not empty and holds no run"):
        run("mine", resume=True)


def test_a_tokenizer_larger_than_the_weights_is_refused(run, tmp_path):
    first, _ = run("first", max_steps=1)
    chooser = random.Random(0)
    letters = tmp_path / "letters.txt"
    words = ["".join(chooser.choices("abcdefghij", k=5)) for _ in range(50)]
    letters.write_text("\n".join(" ".join(chooser.choices(words, k=9)) for _ in range(300)), encoding="utf-8")
    own, _ = run("own", max_steps=1, data=str(letters), vocab_size=400)
    with pytest.raises(ConfigError, match=r"the tokenizer has 400 tokens, but the weights of .* only 320"):
        run("second", max_steps=1, data=str(letters), init_from=str(first.folder), tokenizer=str(own.folder))
