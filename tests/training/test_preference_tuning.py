"""Tuning on preferences: DPO's loss over a step's pairs, against what the base gave, which a resumed run knows too."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fanformer.data.conversations.chat_tokens import add_chat_tokens
from fanformer.data.conversations.examples import Example, Message
from fanformer.data.conversations.rows import ConversationRows, tokenize_examples
from fanformer.errors import CheckpointError, ConfigError, DataError
from fanformer.evaluation.preferences import dpo_loss, dpo_margins, measure_pairs
from fanformer.loading import load, load_model
from fanformer.training.checkpoint import OPTIMIZER_FILE, checkpoints
from fanformer.training.configuration import resolve_tuning
from fanformer.training.folder import read_records
from fanformer.training.pair_loss import PairLoss, ReferencedRows
from fanformer.training.references import REFERENCE_FILE
from fanformer.training.run import train
from tests.saved_models import saved_model, tiny_tokenizer  # noqa: F401
from tests.training.conftest import Notebook
from tests.training.test_run import figures, same_weights

WORDS = ["cat", "mat", "small", "model", "def", "add", "things", "speaks", "sat", "return"]
LENGTH = 128


def pairs():
    """Questions of which the second word is the better answer and the first the worse one."""
    return [
        {"prompt": f"{first} {second}?", "chosen": second, "rejected": first}
        for first in WORDS
        for second in WORDS
        if first != second
    ]


@pytest.fixture
def prefer(saved_model, tmp_path):  # noqa: F811
    """Teach the tiny model preferences; returns (result, notebook)."""

    def start(name="tuned", rows=None, base=saved_model, **fields):
        data = tmp_path / "pairs.jsonl"
        if rows is not None or not data.exists():
            data.write_text("".join(json.dumps(row) + "\n" for row in rows or pairs()))
        given = {
            "objective": "preferences",
            "data": str(data),
            "output_dir": str(tmp_path / name),
            "batch_size": 2,
            "max_steps": 4,
            "eval_steps": 1000,
            "device": "cpu",
            "precision": "float32",
            "compile": "off",
            "log_steps": 1,
            **fields,
        }
        notebook = Notebook()
        return train(resolve_tuning(str(base), lambda: 128, given), notebook), notebook

    return start


@pytest.fixture
def taught(tiny_model, tiny_tokenizer):  # noqa: F811
    """A model with dropout, another as its reference, and rows of pairs that both read."""
    model, other = tiny_model(vocab_size=320, dropout=0.5), tiny_model(seed=1, vocab_size=320)
    tokens = add_chat_tokens(model, tiny_tokenizer)
    add_chat_tokens(other, tiny_tokenizer)
    examples = [
        Example((Message("user", row["prompt"]), Message("assistant", row["chosen"])), 1, (
            Message("assistant", row["rejected"]),
        ))
        for row in pairs()[:9]
    ]  # fmt: skip
    documents = tokenize_examples(tokens.chatml, examples, LENGTH, pytest.fail, preference=True).documents
    rows = ConversationRows(documents, LENGTH, 0)
    assert len(rows) > 2
    assert rows.most_examples > 1
    return model, other, rows


@pytest.mark.parametrize("rows_per_pass", [1, 2, 9])
def test_the_loss_of_a_step_is_dpos_over_all_its_pairs_however_it_is_split(taught, rows_per_pass):
    model, other, rows = taught
    everything = list(range(len(rows)))
    policy, reference = (measure_pairs(each, rows, everything, 2) for each in (model, other))
    referenced, loss = ReferencedRows(rows), PairLoss(0.3)
    referenced.reference = reference
    loss.install(model.train(), None)  # which takes its dropout away
    parts = [everything[begin : begin + rows_per_pass] for begin in range(0, len(everything), rows_per_pass)]
    batches = [referenced.batch(part) for part in parts]
    count = sum(map(loss.count, batches))
    assert count == rows.num_examples == 9
    outputs = [
        model(**batch, shift_labels=batch["labels"], num_items_in_batch=count, use_cache=False) for batch in batches
    ]
    margins = dpo_margins(policy, reference, 0.3)
    found, expected = sum(output.loss.item() for output in outputs), float(dpo_loss(policy, reference, 0.3))
    assert found == pytest.approx(expected, rel=1e-5)  # float32, other batches of the same rows
    margin, accuracy = sum(output.figures for output in outputs).tolist()
    assert margin == pytest.approx(float(margins.mean()), rel=1e-5)
    assert accuracy == pytest.approx(float((margins > 0).float().mean()))
    assert 0 < accuracy < 1


def test_a_run_says_how_far_it_prefers_the_better_answers_and_leaves_the_base_nothing_to_do(prefer, saved_model):  # noqa: F811
    rows = [row | {"rejected": f"no {row['chosen']}"} for row in pairs()]
    result, notebook = prefer(rows=rows, max_steps=30, batch_size=4, learning_rate=3e-3, eval_steps=10)
    records = read_records(result.folder)
    assert records[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)  # which is its reference still
    assert records[0]["margin"] == pytest.approx(0, abs=1e-4)
    measured = [record for record in records if "val_margin" in record]
    assert len(measured) > 1
    assert measured[-1]["val_margin"] > max(0.5, measured[0]["val_margin"])
    assert measured[-1]["val_loss"] < measured[0]["val_loss"] < math.log(2)
    assert result.held_out.margin == measured[-1]["val_margin"]
    assert result.held_out.accuracy > 0.9
    data = yaml.safe_load((result.folder / "run.yaml").read_text())["data"]
    assert data["examples"] + data["held_out_examples"] == len(pairs())
    assert result.held_out.pairs == data["held_out_examples"]
    card = (result.folder / "README.md").read_text()
    assert "which of two answers is better" in card
    assert "nats per pair" in card
    assert "| beta | 0.1 |" in card
    assert any(note.startswith("reference: measuring") for note in notebook.notes)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit_without_its_base(prefer, saved_model, tmp_path):  # noqa: F811
    fields = {"max_steps": 6, "save_steps": 3, "eval_steps": 3, "keep_last": 9, "micro_batch_size": 1, "log_steps": 2}
    base = shutil.copytree(saved_model, tmp_path / "base")
    straight, _ = prefer("straight", base=base, **fields)
    broken, _ = prefer("broken", base=base, **fields)
    shutil.rmtree(broken.folder / "checkpoint-6")
    shutil.rmtree(base)
    resumed, notebook = prefer("broken", base=base, **fields, resume=True)
    assert any(note.endswith("checkpoint-3") for note in notebook.notes)
    assert not any(note.startswith("reference") for note in notebook.notes)
    assert figures(resumed.folder) == figures(straight.folder)
    assert "margin" in figures(straight.folder)[0]
    assert same_weights(resumed.folder, straight.folder)
    states = [load_file(run.folder / "checkpoint-6" / OPTIMIZER_FILE) for run in (straight, resumed)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.ci
def test_adapters_learn_preferences_against_the_base_and_resume(prefer, saved_model):  # noqa: F811
    pytest.importorskip("peft", reason="needs the extra `lora`")
    fields = {"max_steps": 4, "save_steps": 2, "eval_steps": 2, "keep_last": 9, "lora_rank": 4, "learning_rate": 1e-2}
    full, _ = prefer("full")
    straight, _ = prefer("straight", **fields)
    assert same_reference(straight.folder, full.folder)
    assert read_records(straight.folder)[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    broken, _ = prefer("broken", **fields)
    shutil.rmtree(broken.folder / "checkpoint-4")
    resumed, _ = prefer("broken", **fields, resume=True)
    assert figures(resumed.folder) == figures(straight.folder)
    assert same_weights(resumed.folder, straight.folder)
    merged, base = load(straight.folder, device="cpu").model, load_model(saved_model, device="cpu")
    before, after = base.state_dict(), merged.state_dict()
    assert any(not torch.equal(before[name][:290], after[name][:290]) for name in before)


def same_reference(one, other):
    first, second = load_file(one / REFERENCE_FILE), load_file(other / REFERENCE_FILE)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_whose_reference_is_gone_or_broken_does_not_go_on(prefer):
    result, _ = prefer(max_steps=2)
    (result.folder / REFERENCE_FILE).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"reference\.safetensors cannot be read \(SafetensorError\)"):
        prefer(max_steps=3, resume=True)
    (result.folder / REFERENCE_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"reference\.safetensors is missing: expected .*--overwrite\.$"):
        prefer(max_steps=3, resume=True)


def test_other_pairs_are_refused_on_resume_or_measured_anew(prefer):
    result, _ = prefer(max_steps=2)
    before = load_file(result.folder / REFERENCE_FILE)
    rows = [*pairs()[:-1], {"prompt": "so?", "chosen": "small things", "rejected": "cat"}]
    with pytest.raises(CheckpointError, match="the data changed since the run began"):
        prefer(rows=rows, max_steps=3, resume=True)
    again, notebook = prefer(rows=rows, max_steps=3, resume=True, allow_changed_data=True)
    assert again.step == 3
    assert any(note.startswith("reference: measuring") for note in notebook.notes)
    after = load_file(result.folder / REFERENCE_FILE)
    assert any(before[name].shape != after[name].shape or not torch.equal(before[name], after[name]) for name in after)


def test_rows_without_a_pair_and_pairs_longer_than_a_row_cost_a_line_each(prefer):
    without = [{"prompt": "cat?", "completion": "mat"}, {"prompt": "cat?", "chosen": "mat", "rejected": "mat"}]
    long = {"prompt": "cat", "chosen": "mat " * 60, "rejected": "sat " * 60}  # either end alone would fit
    told = [
        {"role": role, "content": f"{word} " * 20}
        for word in ("cat", "mat")
        for role in ("user", "assistant")
    ]  # fmt: skip
    forgotten = {"prompt": [*told, {"role": "user", "content": "so?"}], "chosen": "mat", "rejected": "sat"}
    result, notebook = prefer(rows=[*without, *pairs(), long, forgotten], max_steps=1)
    left_out = [note for note in notebook.notes if note.endswith("left out")]
    assert ["`chosen` and `rejected`" in note for note in left_out] == [True, True, False]
    assert "pairs.jsonl:93: its last question with both answers has more tokens than a row" in left_out[-1]
    data = yaml.safe_load((result.folder / "run.yaml").read_text())["data"]
    assert (data["wrong"], data["too_long"], data["shortened"]) == (2, 1, 1)


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        (
            {"rows": [{"prompt": "cat?", "completion": "mat"}]},
            DataError,
            "holds no row to learn from, got 1 wrong ones",
        ),
        ({"dpo_beta": 0.0}, ConfigError, "`dpo_beta` must be above 0, got 0.0"),
        (
            {"objective": "answers", "dpo_beta": 0.1},
            ConfigError,
            "`dpo_beta` has no effect where the objective is a",
        ),
        ({"tokenizer": "somewhere"}, ConfigError, "`tokenizer` does not apply to conversations"),
    ],
    ids=["no pair", "beta", "beta of answers", "tokenizer"],
)
def test_bad_input_leaves_nothing_behind(prefer, tmp_path, fields, kind, message):
    with pytest.raises(kind, match=message):
        prefer(**fields)
    assert not (tmp_path / "tuned").exists()


def test_checkpoints_of_preferences_are_folders_that_chat(prefer):
    result, _ = prefer(save_steps=2)
    for place in (result.folder, *checkpoints(result.folder)):
        assert load(place, device="cpu").tokenizer.eos_token == "<|im_end|>"


def test_a_share_of_the_held_out_pairs_is_measured_where_that_is_asked_for(prefer):
    whole, _ = prefer("whole", max_steps=1)
    some, _ = prefer("some", max_steps=1, final_eval_tokens=1, held_out_fraction=0.3)
    assert some.held_out.tokens == 128
    assert 0 < some.held_out.pairs < 27
    assert dataclasses.replace(whole.held_out, pairs=0) != whole.held_out
