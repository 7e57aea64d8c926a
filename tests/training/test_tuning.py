"""A tuning is a run like any other: exact resume, refusals, figures, and a folder that speaks the template."""

import json
import re
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from fanformer.data.conversations.chatml import END, START
from fanformer.data.packing import IGNORED_LABEL
from fanformer.errors import CheckpointError, ConfigError, DataError
from fanformer.loading import load
from fanformer.training.checkpoint import OPTIMIZER_FILE, checkpoints
from fanformer.training.chunked_loss import chunked_cross_entropy
from fanformer.training.configuration import resolve_tuning
from fanformer.training.folder import read_records
from fanformer.training.run import train
from tests.saved_models import model_copy, recurrent_model, saved_model, tiny_tokenizer  # noqa: F401
from tests.training.conftest import Notebook
from tests.training.test_run import figures, same_weights

WORDS = ["cat", "mat", "small", "model", "def", "add", "things", "speaks", "sat", "return"]


def conversations():
    """Questions whose answer is their second word, in four of the forms."""
    rows = []
    for first in WORDS:
        for second in WORDS[:4]:
            asked = f"{first} {second}?"
            rows.append(
                [
                    {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": second}]},
                    {"prompt": asked, "completion": second},
                    {"conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": second}]},
                    {"instruction": asked, "output": second},
                ][len(rows) % 4]
            )
    return rows


@pytest.fixture
def tune(saved_model, tmp_path):  # noqa: F811
    """Tune the tiny model; returns (result, notebook)."""

    def start(name="tuned", rows=None, base=saved_model, **fields):
        data = tmp_path / "rows.jsonl"
        if rows is not None or not data.exists():
            lines = [row if isinstance(row, str) else json.dumps(row) for row in rows or conversations()]
            data.write_text("\n".join(lines) + "\n")
        given = {
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


def test_a_tuning_leaves_a_folder_that_speaks_the_template_and_says_what_it_is(tune, saved_model):  # noqa: F811
    result, notebook = tune(save_steps=2)
    folder = result.folder
    for place in (folder, *checkpoints(folder)):
        loaded = load(place, device="cpu")
        assert loaded.tokenizer.eos_token == END
        assert loaded.model.config.eos_token_id == loaded.tokenizer.eos_token_id
        ends = [loaded.tokenizer.eos_token_id, loaded.tokenizer.pad_token_id]
        assert loaded.model.generation_config.eos_token_id == ends
        assert loaded.model.generation_config.pad_token_id != loaded.tokenizer.eos_token_id
        assert "generation" in (place / "chat_template.jinja").read_text()
        assert "a base language model" not in (place / "README.md").read_text().lower()
    card = (folder / "README.md").read_text()
    assert "taught to answer" in card
    assert f"# {saved_model.name}, tuned" in card
    data = yaml.safe_load((folder / "run.yaml").read_text())["data"]
    assert data["examples"] + data["held_out_examples"] == 40
    assert data["wrong"] == data["too_long"] == data["unanswered"] == 0
    assert read_records(folder)[-1]["val_loss"] == pytest.approx(result.held_out.loss)
    assert result.held_out.documents == data["held_out_examples"]
    assert any("tokens of answers" in note for note in notebook.notes)
    assert all("? -> " in sample for sample in notebook.samples)


def test_plain_texts_among_the_rows_are_learnt_and_counted(tune, saved_model):  # noqa: F811
    text = "the cat sat on the mat. " * 12
    mixed, notebook = tune(rows=[*conversations(), {"text": text}, {"text": "a small model"}], max_steps=2)
    data = yaml.safe_load((mixed.folder / "run.yaml").read_text())["data"]
    assert (data["texts"], data["wrong"], data["too_long"]) == (2, 0, 0)
    assert any("pieces of plain texts, of which 2 were given" in note for note in notebook.notes)
    with pytest.raises(DataError, match="must hold a conversation, got plain texts"):
        tune("alone", rows=[{"text": text}, {"text": "a small model"}])


def test_a_tuned_model_answers_and_ends(tune):
    result, _ = tune(max_steps=60, batch_size=4, learning_rate=1e-2)
    records = read_records(result.folder)
    assert records[-1]["loss"] < 0.5 * records[0]["loss"]
    from fanformer.generation.settings import GenerationSettings
    from fanformer.generation.torch_model import TorchModel

    writer = TorchModel(*load(result.folder, device="cpu"))
    ids = writer.encode_messages([{"role": "user", "content": "cat model?"}])
    answer = writer.complete_ids(ids, "", GenerationSettings(max_length=20, temperature=0.0))
    assert answer.finish_reason == "end"
    assert START not in answer.text


def test_a_full_vocabulary_grows_by_rows_for_the_two_tokens(tune, tiny_model, tiny_tokenizer, tmp_path):  # noqa: F811
    base = tmp_path / "full"
    tiny_model(vocab_size=300, eos_token_id=0, bos_token_id=0).save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    result, notebook = tune(base=base, max_steps=2, save_steps=1)
    assert "the vocabulary grows from 300 to 320" in notebook.notes
    assert load(result.folder, device="cpu").model.config.vocab_size == 320
    shutil.rmtree(result.folder / "checkpoint-2")
    shutil.rmtree(base)  # what it began with is not needed again
    again, _ = tune(base=base, max_steps=2, save_steps=1, resume=True)
    assert again.step == 2


def test_a_resumed_tuning_equals_an_uninterrupted_one_bit_for_bit(tune):
    fields = {"max_steps": 6, "save_steps": 3, "eval_steps": 3, "keep_last": 9, "micro_batch_size": 1}
    straight, _ = tune("straight", **fields)
    broken, _ = tune("broken", **fields)
    shutil.rmtree(broken.folder / "checkpoint-6")
    (broken.folder / "model.safetensors").unlink()
    resumed, notebook = tune("broken", **fields, resume=True)
    assert any(note.endswith("checkpoint-3") for note in notebook.notes)
    assert figures(resumed.folder) == figures(straight.folder)
    assert same_weights(resumed.folder, straight.folder)
    states = [load_file(run.folder / "checkpoint-6" / OPTIMIZER_FILE) for run in (straight, resumed)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_other_rows_or_another_objective_are_refused_on_resume(tune, saved_model):  # noqa: F811
    tune(max_steps=2)
    rows = conversations()
    rows[3]["output"] = "other"
    with pytest.raises(CheckpointError, match=r"the data changed since the run began, .*the rows of .*rows\.jsonl"):
        tune(rows=rows, max_steps=3, resume=True)
    with pytest.raises(CheckpointError, match="`objective` of a run cannot change on resume: it was answers, got text"):
        tune(max_steps=3, resume=True, objective="text")
    with pytest.raises(CheckpointError, match="`init_from` of a run cannot change on resume"):
        tune(base=f"{saved_model}-other", max_steps=3, resume=True)
    result, notebook = tune(base=f"{saved_model}/", max_steps=3, resume=True, allow_changed_data=True)
    assert result.step == 3
    assert any("data.fingerprint" in note for note in notebook.notes)


def test_rows_with_other_labels_have_another_digest(tune):
    def digests(name, first_answer_too):
        rows = []
        for word in WORDS:
            said = [{"role": role, "content": f"{word}!"} for role in ("user", "assistant")]
            asked, answer = [*said, {"role": "user", "content": "so?"}], {"role": "assistant", "content": "mat"}
            whole = {"messages": [*asked, answer]}
            rows.append(whole if first_answer_too else {"prompt": asked, "completion": [answer]})
        result, _ = tune(name, rows=rows, max_steps=1, batch_size=8)
        return [record["rows"] for record in read_records(result.folder)]

    assert digests("one", False) == digests("again", False) != digests("two", True)  # the tokens are the same


def test_wrong_rows_cost_a_line_each_and_are_counted(tune):
    wrong = ["{", {"messages": []}, {"messages": [{"role": "assistant", "content": "mat"}]}, {"prompt": "cat"}]
    long = {"prompt": "cat", "completion": "mat " * 200}
    result, notebook = tune(rows=[*wrong, *conversations(), long], max_steps=1)
    left_out = [note for note in notebook.notes if note.endswith("left out")]
    assert [f"rows.jsonl:{number}" in note for number, note in zip((1, 2, 3, 4, 45), left_out, strict=True)] == [
        True
    ] * 5
    data = yaml.safe_load((result.folder / "run.yaml").read_text())["data"]
    assert (data["wrong"], data["too_long"]) == (4, 1)


@pytest.mark.parametrize(
    ("rows", "fields", "kind", "message"),
    [
        (["{"], {}, DataError, "holds no row to learn from, got 1 wrong ones"),
        ([{"prompt": "cat", "completion": "mat"}] * 3, {}, DataError, "must have two different questions"),
        (None, {"tokenizer": "somewhere"}, ConfigError, "`tokenizer` does not apply to conversations, got 'somewhere'"),
        (None, {"init_from": None}, ConfigError, "`init_from` is needed to learn answers, got none"),
        (None, {"sequence_length": 256}, ConfigError, "`sequence_length` must be at most 128"),
        (None, {"data": "nowhere.jsonl"}, DataError, "no file"),
    ],
    ids=["no right row", "one question", "tokenizer", "no base", "long rows", "no file"],
)
def test_bad_input_leaves_nothing_behind(tune, tmp_path, rows, fields, kind, message):
    with pytest.raises(kind, match=message):
        tune(rows=rows, **fields)
    assert not (tmp_path / "tuned").exists()


def test_a_quantized_base_is_refused(tune, model_copy):  # noqa: F811
    config = model_copy / "config.json"
    content = json.loads(config.read_text()) | {"quantization_config": {"quant_method": "compressed-tensors"}}
    config.write_text(json.dumps(content))
    with pytest.raises(
        ConfigError, match="is quantized, and what learns must not be: name the folder that it was made"
    ):
        tune(base=model_copy)


@pytest.mark.ci
@pytest.mark.parametrize("recurrent", [False, True])
def test_the_trainer_of_transformers_trains_our_folder_unchanged(request, repository, tmp_path, monkeypatch, recurrent):
    """The block of the page itself."""
    from transformers import AutoModelForCausalLM

    given = request.getfixturevalue("recurrent_model" if recurrent else "saved_model")
    shutil.copytree(given, tmp_path / "folder")
    page = (repository / "docs" / "tuning.md").read_text(encoding="utf-8")
    [block] = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "TrainingArguments" in block]
    monkeypatch.chdir(tmp_path)
    names = {"texts": ["the cat sat on the mat. a small model speaks."] * 16}
    exec(block, names)
    trainer = names["trainer"]
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert losses[-1] < losses[0] - 0.1
    again = AutoModelForCausalLM.from_pretrained("trained", trust_remote_code=True)
    with torch.no_grad():
        rows = torch.tensor([names["tokenizer"](names["texts"][0]).input_ids])
        assert torch.equal(again.eval()(rows).logits, trainer.model.eval()(rows).logits)


def test_a_micro_batch_without_labels_adds_nothing_and_no_nan(tiny_model):
    model = tiny_model(vocab_size=320).train()
    ids = torch.arange(16).view(2, 8)
    labels = torch.full((2, 8), IGNORED_LABEL)
    plain = model(input_ids=ids, labels=labels, shift_labels=labels, num_items_in_batch=1).loss
    hidden = model.model(input_ids=ids).last_hidden_state.flatten(0, 1)
    chunked = chunked_cross_entropy(hidden, model.lm_head.weight, labels.flatten(), 1)
    (plain + chunked).backward()
    assert plain == chunked == 0
    assert all(not parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


def test_adapters_merge_into_the_folder_and_load_by_peft(tune, saved_model):  # noqa: F811
    peft = pytest.importorskip("peft", reason="needs the extra `lora`")
    result, notebook = tune(max_steps=4, lora_rank=4, learning_rate=1e-2)
    assert any("adapters of rank 4" in note for note in notebook.notes)
    base, tuned = load(saved_model, device="cpu").model, load(result.folder, device="cpu")
    ids = torch.tensor([tuned.tokenizer("the cat <|im_end|> sat<|im_start|>").input_ids])
    known = len(tuned.tokenizer) - 2
    before, after = base.state_dict(), tuned.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name][:known], after[name][:known])}
    assert moved
    assert all(name.endswith("weight") and before[name].ndim == 2 for name in moved)
    assert not moved & {"lm_head.weight", "model.embed_tokens.weight"}
    start, end = (tuned.tokenizer.convert_tokens_to_ids(token) for token in (START, END))
    head = after["lm_head.weight"]
    assert not torch.equal(head[end], head[0])  # END begins as the end of documents does, and learns
    with torch.no_grad():
        expected = tuned.model(ids).logits
        adapted = peft.PeftModel.from_pretrained(base, result.folder / "adapter").eval()
        # the same matrices, once summed before the product and once after
        torch.testing.assert_close(adapted(ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert (ids == start).any()


@pytest.mark.parametrize(
    "dtype", ["float32", *(pytest.param(name, marks=pytest.mark.ci) for name in ("bfloat16", "float16"))]
)
def test_an_adapter_takes_no_other_weights_than_those_of_its_base(tune, saved_model, tiny_model, dtype):  # noqa: F811
    pytest.importorskip("peft", reason="needs the extra `lora`")
    result, _ = tune(max_steps=2, lora_rank=4, learning_rate=1e-3)
    adapter = result.folder / "adapter"
    load(saved_model, device="cpu", dtype=dtype, adapter=adapter)
    with pytest.raises(CheckpointError, match="was trained beside other weights than the model's: name the folder"):
        load(result.folder, device="cpu", dtype=dtype, adapter=adapter)  # which has it already


@pytest.mark.ci
def test_a_run_of_adapters_does_not_go_on_beside_another_base(tune, model_copy):  # noqa: F811
    pytest.importorskip("peft", reason="needs the extra `lora`")
    fields = {"base": model_copy, "max_steps": 2, "lora_rank": 4}
    tune(**fields)
    weights = load_file(model_copy / "model.safetensors")
    save_file(
        {name: value * 1.001 for name, value in weights.items()}, model_copy / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(CheckpointError, match="was trained beside other weights than the model's"):
        tune(**{**fields, "max_steps": 3}, resume=True)


@pytest.mark.ci
def test_adapters_resume_bit_for_bit(tune):
    pytest.importorskip("peft", reason="needs the extra `lora`")
    fields = {"max_steps": 4, "save_steps": 2, "eval_steps": 2, "keep_last": 9, "lora_rank": 4}
    straight, _ = tune("straight", **fields)
    broken, _ = tune("broken", **fields)
    shutil.rmtree(broken.folder / "checkpoint-4")
    resumed, notebook = tune("broken", **fields, resume=True)
    assert any(note.endswith("checkpoint-2") for note in notebook.notes)
    assert figures(resumed.folder) == figures(straight.folder)
    assert same_weights(resumed.folder, straight.folder)
    with pytest.raises(CheckpointError, match="`lora_rank` of a run cannot change on resume: it was 4, got 8"):
        tune("broken", **{**fields, "lora_rank": 8}, resume=True)


def test_adapters_without_a_base_are_refused(run_config):
    with pytest.raises(ConfigError, match="`lora_rank` needs `init_from`, what adapters belong to, got 4 alone"):
        train(run_config(lora_rank=4), Notebook())
