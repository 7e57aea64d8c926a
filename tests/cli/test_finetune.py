"""`fanformer finetune`: one command from a folder and a file to a model that chats by its template."""

import copy
import json

import pytest
import yaml


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    words = ["cat", "mat", "small", "model", "def", "add"]
    path.write_text("".join(json.dumps({"prompt": f"{word}?", "completion": word}) + "\n" for word in words))
    return path


TINY = ("--max-steps", 2, "--batch-size", 2, "--device", "cpu", "--precision", "float32", "--compile", "off")


def test_a_folder_is_tuned_chats_by_its_template_and_goes_on(command, saved_model, rows, tmp_path):
    out = tmp_path / "tuned"
    done = command("finetune", saved_model, "--data", rows, "--output-dir", out, *TINY)
    assert done.code == 0, done.err
    assert f"model: {out}" in done.out
    assert "held-out loss" in done.out
    talk = command("chat", out, "--device", "cpu", "--max-length", 4, "--seed", 1, text="cat?\n")
    assert talk.code == 0
    assert "base model" not in talk.err
    assert "already holds a run" in command("finetune", saved_model, "--data", rows, "--output-dir", out).refusal()
    more = command("finetune", saved_model, "--data", rows, "--output-dir", out, "--resume", "--max-steps", 3)
    assert more.code == 0, more.err
    assert "resuming from" in more.err


def test_show_rows_marks_what_is_learnt_and_trains_nothing(command, saved_model, rows, tmp_path):
    out = tmp_path / "tuned"
    shown = command("finetune", saved_model, "--data", rows, "--output-dir", out, "--show-rows", 3)
    assert shown.code == 0, shown.err
    assert "[[cat<|im_end|>]]" in shown.out
    assert not out.exists()


def test_preferences_are_learnt_in_place_of_answers(command, saved_model, rows, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    said = [{"prompt": f"{word}?", "chosen": word, "rejected": f"no {word}"} for word in ("cat", "mat", "def", "add")]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in said))
    out = tmp_path / "tuned"
    words = ("finetune", saved_model, "--preferences", pairs, "--output-dir", out)
    shown = command(*words, "--show-rows", 2)
    assert "pair 1, chosen: 2 of 23 tokens are weighed" in shown.out
    assert shown.out.index("[[def<|im_end|>]]") < shown.out.index("[[no def<|im_end|>]]")
    done = command(*words, *TINY, "--dpo-beta", 0.5)
    assert done.code == 0, done.err
    assert "nats per pair, margin" in done.out
    assert "ahead" in done.err
    more = command(*words, "--resume", "--max-steps", 3)
    assert more.code == 0, more.err
    refused = command(*words, "--data", rows).refusal()
    assert "`data` or `preferences` is needed to tune a model, got both" in refused
    assert "got neither" in command("finetune", saved_model).refusal()
    refused = command("finetune", saved_model, "--data", rows, "--dpo-beta", 0.5).refusal()
    assert "`dpo_beta` has no effect where the objective is answers, got 0.5" in refused


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_preferences_prove_that_a_killed_run_loses_nothing(process, saved_model, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    said = [{"prompt": f"{word}?", "chosen": word, "rejected": f"no {word}"} for word in ("cat", "mat", "def", "add")]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in said))
    words = ("--preferences", str(pairs), "--output-dir", str(tmp_path / "proof"), "--batch-size", "1")
    here = ("--max-steps", "6", "--device", "cpu", "--precision", "float32", "--compile", "off")
    proof = process("finetune", str(saved_model), *words, *here, "--prove-resume", timeout=800)
    assert proof.code == 0, proof.err
    findings = json.loads((tmp_path / "proof" / "proof.json").read_text())
    assert [finding["kills"] for finding in findings] == [1, 2]
    assert all(all(finding["equal"].values()) for finding in findings)
    records = (tmp_path / "proof" / "straight" / "metrics.jsonl").read_text().splitlines()
    assert all("margin" in json.loads(record) for record in records)


def test_what_cannot_be_tuned_is_refused_in_one_line(command, saved_model, rows, tmp_path):
    assert "nowhere" in command("finetune", tmp_path / "nowhere", "--data", rows).refusal()
    refused = command("finetune", saved_model, "--data", rows, "--set", "objective=text").refusal()
    assert "`objective` of a tuning must be another than text" in refused
    refused = command("finetune", saved_model, "--data", rows, "--lora-rank", 4).refusal()
    assert "`lora_rank` has no effect without `--lora`, got 4" in refused


@pytest.mark.ci
def test_a_run_of_adapters_keeps_its_rank_and_one_without_gets_none(command, saved_model, rows, tmp_path):
    pytest.importorskip("peft", reason="needs the extra `lora`")
    for name, adapters in (("low", ("--lora", "--lora-rank", 4)), ("whole", ())):
        out = tmp_path / name
        words = ("finetune", saved_model, "--data", rows, "--output-dir", out)
        assert command(*words, *TINY, *adapters).code == 0
        again = command(*words, "--resume", "--lora", "--max-steps", 3)
        assert (again.code == 0) == bool(adapters)
        if not adapters:
            assert "`--lora` does not apply to the run in" in again.err
    assert yaml.safe_load((tmp_path / "low" / "run.yaml").read_text())["configuration"]["lora_rank"] == 4


def test_an_adapter_on_its_base_writes_what_the_merged_folder_does(command, saved_model, rows, tmp_path):
    pytest.importorskip("peft", reason="needs the extra `lora`")
    out = tmp_path / "tuned"
    tuned = command("finetune", saved_model, "--data", rows, "--output-dir", out, *TINY, "--lora", "--lora-rank", 4)
    assert tuned.code == 0, tuned.err
    drawn = ("--device", "cpu", "--temperature", 0, "--max-length", 8, "--min-length", 8)
    adapter = ("--adapter", out / "adapter")
    merged, apart = (command("chat", *words, *drawn, text="cat?\n") for words in ((out,), (saved_model, *adapter)))
    assert (apart.code, apart.out) == (0, merged.out)
    assert "base model" not in apart.err
    written = [command("generate", *words, "the cat", *drawn).out for words in ((out,), (saved_model, *adapter))]
    assert written[0] == written[1]
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 20)
    losses = []
    for words in ((out,), (saved_model, *adapter)):
        measured = command("eval", *words, "--text", text, "--device", "cpu", "--json", "-")
        losses.append(json.loads(measured.out)["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # the same sums, added by other code
    assert "no adapter_config.json in" in command("generate", saved_model, "--adapter", tmp_path).refusal()
    assert "`--adapter` is for model folders" in command("generate", "x.gguf", "--adapter", tmp_path).refusal()


@pytest.fixture
def adapter(command, saved_model, rows, tmp_path):
    """Folder of a tuning by adapters; the adapter is apart in it."""
    pytest.importorskip("peft", reason="needs the extra `lora`")
    out = tmp_path / "tuned"
    tuned = command("finetune", saved_model, "--data", rows, "--output-dir", out, *TINY, "--lora", "--lora-rank", 4)
    assert tuned.code == 0, tuned.err
    return out / "adapter"


def test_an_adapter_of_another_model_is_refused_in_one_line(command, adapter, tiny_model, tiny_tokenizer, tmp_path):
    ranks = {"qkv_rank": 48, "o_rank": 32, "gate_up_rank": 32, "down_rank": 48}
    others = {
        "narrow": {"vocab_size": 320, "intermediate_size": 64, **ranks},
        "deep": {"vocab_size": 320, "num_hidden_layers": 3, **ranks},
        "shallow": {"vocab_size": 320, "num_hidden_layers": 1, **ranks},
    }
    for name, fields in others.items():
        tiny_model(eos_token_id=0, bos_token_id=0, **fields).save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
        refused = command("generate", tmp_path / name, "the cat", "--adapter", adapter, "--device", "cpu").refusal()
        assert f"error: the adapter in {adapter} does not fit the model (" in refused, name
        assert refused.endswith("name the base that it was trained on."), name
    (adapter / "adapter_model.safetensors").write_bytes(b"nothing")
    refused = command("chat", tmp_path / "deep", "--adapter", adapter, "--device", "cpu").refusal()
    assert "does not fit the model (" in refused


@pytest.mark.ci
def test_an_adapter_whose_base_has_no_room_for_its_tokens_grows_it_as_training_did(
    command, tiny_model, tiny_tokenizer, rows, tmp_path
):
    pytest.importorskip("peft", reason="needs the extra `lora`")
    base, other, out = tmp_path / "full", tmp_path / "other", tmp_path / "tuned"
    tiny_model(vocab_size=300, eos_token_id=0, bos_token_id=0).save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    tuned = command("finetune", base, "--data", rows, "--output-dir", out, *TINY, "--lora", "--lora-rank", 4)
    assert "the vocabulary grows from 300 to 320" in tuned.err
    adapter, drawn = ("--adapter", out / "adapter"), ("--device", "cpu", "--temperature", 0, "--max-length", 8)
    merged, apart = (command("chat", *words, *drawn, text="cat?\n") for words in ((out,), (base, *adapter)))
    assert (apart.code, apart.out) == (0, merged.out), apart.err
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 20)
    losses = []
    for words in ((out,), (base, *adapter)):
        losses.append(json.loads(command("eval", *words, "--text", text, "--device", "cpu", "--json", "-").out)["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # the same sums, added by other code
    more = copy.deepcopy(tiny_tokenizer)
    more.add_tokens(["another"])
    tiny_model(vocab_size=301, eos_token_id=0, bos_token_id=0).save_pretrained(other)
    more.save_pretrained(other)
    refused = command("generate", other, "the cat", *adapter, "--device", "cpu").refusal()
    assert "does not fit the model (its tokenizer has 302 tokens, other ones than the model's 303): name" in refused


def test_an_adapter_is_quantized_with_its_base_as_the_merged_folder_is(command, saved_model, adapter, tmp_path):
    from fanformer.loading import load

    words = ("--format", "gguf", "--type", "f32", "--output-dir")
    for name, more in (("merged", (adapter.parent,)), ("apart", (saved_model, "--adapter", adapter))):
        outcome = command("quantize", *more, *words, tmp_path / f"{name}.gguf")
        assert outcome.code == 0, outcome.err
    assert f"the adapter {adapter} is merged into the weights" in outcome.out
    merged, apart = (load(tmp_path / f"{name}.gguf", device="cpu") for name in ("merged", "apart"))
    assert apart.tokenizer.get_vocab() == merged.tokenizer.get_vocab()
    assert apart.tokenizer.chat_template == merged.tokenizer.chat_template
    assert apart.model.config.eos_token_id == merged.model.config.eos_token_id
    expected = merged.model.state_dict()
    moved = 0
    for name, tensor in apart.model.state_dict().items():
        # the same product, added in another order
        assert tensor == pytest.approx(expected[name], abs=1e-6), name
    for name, tensor in load(saved_model, device="cpu").model.state_dict().items():
        moved += not bool((tensor == expected[name]).all())
    assert moved > 2
    refused = command("quantize", saved_model, *words, tmp_path / "no.gguf", "--adapter", tmp_path).refusal()
    assert "no adapter_config.json in" in refused
    scan = ("--scan", "--calibration", "stdlib", "--calibration-tokens", 1024, "--output-dir", tmp_path / "scan")
    assert command("quantize", saved_model, "--adapter", adapter, *scan).code == 0
