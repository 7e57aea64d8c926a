"""Training on pictures and recordings: who learns in which stage, exact resume, held-out answers, refusals."""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fanformer.errors import CheckpointError, ConfigError, DataError
from fanformer.loading import load
from fanformer.training.checkpoint import OPTIMIZER_FILE
from fanformer.training.configuration import resolve, resolve_multimodal
from fanformer.training.folder import read_records, read_run_file
from fanformer.training.multimodal_corpus import _split
from fanformer.training.proof import _can_run_two
from fanformer.training.run import train
from tests.multimodal_files import COLOURS, TINY, TONES, save_with_towers, write_picture, write_rows, write_tone
from tests.saved_models import saved_model, tiny_tokenizer  # noqa: F401
from tests.training.conftest import Notebook
from tests.training.test_run import figures


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows"), 8, 8, 4)


@pytest.fixture
def learn(rows, saved_model, tmp_path):  # noqa: F811
    """Train a tiny model with towers; returns (result, notebook)."""

    def start(name="run", data=rows, **fields):
        notebook = Notebook()
        given = {"init_from": str(saved_model), "data": str(data), "output_dir": str(tmp_path / name)}
        config = resolve_multimodal(lambda: 128, {**TINY, **given, "max_steps": 2, **fields})
        return train(config, notebook), notebook

    return start


def weights(folder):
    return load_file(folder / "model.safetensors")


def changed(before, after):
    return {name for name, tensor in after.items() if name not in before or not torch.equal(before[name], tensor)}


def test_each_stage_trains_its_parts_and_never_the_language_model(learn, saved_model, rows):  # noqa: F811
    aligned, notebook = learn("align")
    base = {name.replace("model.", "model.language_model.", 1): value for name, value in weights(saved_model).items()}
    after = weights(aligned.folder)
    assert {".".join(name.split(".")[:2]) for name in changed(base, after)} == {
        "model.vision_tower",
        "model.audio_tower",
        "model.projectors",
    }
    assert read_run_file(aligned.folder)["data"]["stage"] == "align"
    assert any("16 conversations with" in note or "conversations with" in note for note in notebook.notes)

    tuned, _ = learn("tune", init_from=str(aligned.folder), max_steps=3)
    parts = {name for name in changed(after, weights(tuned.folder)) if ".lora_A." not in name}
    assert (
        {name for name in parts if ".lora_B." not in name}
        == {name for name in parts if ".projectors." in name}
        != set()
    )
    assert any(".lora_B.vision." in name for name in parts)
    assert any(".lora_B.audio." in name for name in parts)
    assert read_run_file(tuned.folder)["data"]["stage"] == "tune"
    text, expected = load(tuned.folder, "cpu"), load(saved_model, "cpu")
    ids = torch.arange(1, 30)[None]
    assert torch.equal(text.model(ids).logits, expected.model(ids).logits)


@pytest.mark.parametrize("stage", ["align", pytest.param("tune", marks=pytest.mark.ci)])
def test_a_resumed_run_equals_an_uninterrupted_one_without_its_base(request, learn, tmp_path, stage):
    base = shutil.copytree(request.getfixturevalue("saved_model"), tmp_path / "base")
    if stage == "tune":
        base = learn("aligned", init_from=str(base), max_steps=1)[0].folder
    fields = {"max_steps": 4, "save_steps": 2, "eval_steps": 2, "keep_last": 9, "init_from": str(base)}
    straight, _ = learn("straight", **fields)
    broken, _ = learn("broken", **fields)
    shutil.rmtree(broken.folder / "checkpoint-4")
    shutil.rmtree(base)
    resumed, notebook = learn("broken", **fields, resume=True)
    assert any(note.endswith("checkpoint-2") for note in notebook.notes)
    assert figures(resumed.folder) == figures(straight.folder)
    assert not changed(weights(straight.folder), weights(resumed.folder))
    states = [load_file(run.folder / "checkpoint-4" / OPTIMIZER_FILE) for run in (straight, resumed)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.ci
def test_damaged_checkpoints_cost_no_more_than_their_steps(learn):
    fields = {"max_steps": 2, "save_steps": 1, "keep_last": 9}
    straight, _ = learn("straight", **fields)
    broken, _ = learn("broken", **fields)
    for damaged, file, begins in (
        (["checkpoint-2"], "tokenizer.json", "resuming from .*checkpoint-1"),
        (["checkpoint-1", "checkpoint-2"], "model.safetensors", "no complete checkpoint in .*: starting at step 0"),
    ):
        for name in damaged:
            (broken.folder / name / file).write_bytes(b"damaged")
        again, notebook = learn("broken", **fields, resume=True)
        assert [note for note in notebook.notes if re.match(begins, note)]
        assert figures(again.folder) == figures(straight.folder)
        assert not changed(weights(straight.folder), weights(again.folder))


def test_rows_are_held_out_wherever_their_folder_lies(rows, tmp_path):
    def held_out(place):
        data = shutil.copytree(rows.parent, tmp_path / place) / rows.name
        config = resolve_multimodal(lambda: 128, {**TINY, "init_from": "base", "data": str(data)})
        return [one.place.rpartition(":")[2] for one in _split(config)[1]]

    found = [held_out(place) for place in ("one", "two", "three/deep")]
    assert found[0] == found[1] == found[2] != []


def test_a_proof_tries_no_second_process(rows):
    told = []
    config = resolve_multimodal(lambda: 128, {**TINY, "init_from": "base", "data": str(rows)})
    assert not _can_run_two(config, told.append)
    assert told == ["two processes were not tried: pictures and recordings are learnt from by a single process"]


def test_a_picture_is_learnt_or_held_out_whatever_is_asked_about_it(rows, tmp_path):
    data = shutil.copytree(rows.parent, tmp_path / "twice") / rows.name
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    for row in lines[:8]:
        again = json.loads(json.dumps(row))
        again["messages"][0]["content"][-1]["text"] = "and its name?"
        lines.append(again)
    data.write_text("".join(json.dumps(row) + "\n" for row in lines))
    fields = {**TINY, "init_from": "base", "data": str(data), "held_out_fraction": 0.5}
    learnt, held_out = _split(resolve_multimodal(lambda: 128, fields))
    assert len(learnt) + len(held_out) == len(lines)
    learnt, held_out = ({media for one in part for media in one.media} for part in (learnt, held_out))
    assert held_out  # and what two rows show beside something else binds them together
    assert learnt.isdisjoint(held_out)


def test_steps_that_show_nothing_to_what_learns_change_nothing(learn, rows, tmp_path):
    data = shutil.copytree(rows.parent, tmp_path / "mixed") / rows.name
    said = [{"role": "user", "content": "the cat?"}, {"role": "assistant", "content": "sat on the mat"}]
    with data.open("a") as file:
        for index in range(30):
            asked = {"role": "user", "content": f"{said[0]['content']} {index}"}
            file.write(json.dumps({"messages": [asked, said[1]]}) + "\n")
    result, _ = learn("text", data=data, batch_size=1, max_steps=12, eval_steps=1000)
    norms = [record["grad_norm"] for record in read_records(result.folder) if "grad_norm" in record]
    assert 0.0 in norms
    assert max(norms) > 0


RECIPE = {"max_steps": 60, "learning_rate": 1e-2, "weight_decay": 0.0, "stage": "tune"}


def first_letters(file):
    """Let the answers of a file of rows be the first letters of what they were, and return it."""
    text = file.read_text()
    for name in (*COLOURS, *TONES):
        text = text.replace(f'"content": "{name}"', f'"content": "{name[0]}"')
    file.write_text(text)
    return file


@pytest.fixture(scope="module")
def seeing(saved_model, tmp_path_factory):  # noqa: F811
    """A run that learnt colours, and what it was measured on: pictures, and recordings of which it learnt nothing."""
    place = tmp_path_factory.mktemp("seeing")
    data, measured = first_letters(write_rows(place / "p", 24, 0)), first_letters(write_rows(place / "m", 8, 2))
    base = save_with_towers(saved_model, place / "base")
    given = {"init_from": str(base), "data": str(data), "eval_data": str(measured), "output_dir": str(place / "run")}
    return train(resolve_multimodal(lambda: 128, {**TINY, **RECIPE, **given}), Notebook()), given


def test_pictures_are_learnt_and_a_blind_twin_cannot_tell_them(learn, seeing):
    run, given = seeing
    blind = learn("blind", **{**RECIPE, **given, "output_dir": f"{run.folder}-blind", "blind": True})[0].held_out
    assert run.held_out.exact >= 0.7  # eight pictures, and two recordings of which nothing was learnt
    assert blind.exact <= 0.4
    assert blind.loss > run.held_out.loss


def test_held_out_answers_are_right_where_greedy_decoding_writes_them(seeing):
    from fanformer.generation.media_model import load_media_model

    run, measured = seeing[0], Path(seeing[1]["eval_data"])
    model = load_media_model(run.folder, "cpu")
    lines, right = measured.read_text().splitlines(), 0
    for line in lines:
        asked, answer = json.loads(line)["messages"]
        shown, question = asked["content"]
        media = {"images" if shown["type"] == "image" else "audio": [measured.parent / shown["path"]]}
        right += model.generate(question["text"], **media, max_length=12, temperature=0.0) == answer["content"]
    assert right == round(run.held_out.exact * len(lines)) > 0


def test_a_second_modality_joins_a_model_that_keeps_its_first(learn, tmp_path):
    seeing = learn("seeing", data=write_rows(tmp_path / "p", 8, 0))[0].folder
    both = learn("both", data=write_rows(tmp_path / "s", 0, 8), init_from=str(seeing))[0].folder
    before, after = weights(seeing), weights(both)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not [name for name in before if "audio" in name]
    assert {name.split(".")[1] for name in changed(before, after)} == {"audio_tower", "projectors"}


def test_wrong_runs_are_refused_in_one_line_and_leave_nothing(learn, rows, saved_model, tmp_path):  # noqa: F811
    def refused(kind, message, **fields):
        with pytest.raises(kind, match=message) as caught:
            learn("wrong", **fields)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "wrong").exists()

    refused(ConfigError, "`stage` tune needs a model with a tower for what is shown", stage="tune")
    refused(ConfigError, "`lora_rank` has no effect beside `--multimodal`, got 4", lora_rank=4)
    refused(ConfigError, "`compile` must be off beside `--multimodal`, got on", compile="on")
    refused(ConfigError, "`image_size` must be a multiple of twice `patch_size`, got 17", image_size=17)
    refused(ConfigError, "`audio_token_ms` must be 20, 40, 80 or 160, got 30", audio_token_ms=30)
    refused(ConfigError, "`vision_tower` .*none cannot be read", vision_tower=str(tmp_path / "none"))
    towers = save_with_towers(saved_model, tmp_path / "towers")
    has_some = "`{}` has no effect where `init_from` has a tower for {}, got other: leave it out"
    refused(ConfigError, has_some.format("vision_tower", "pictures"), init_from=str(towers), vision_tower="other")
    refused(ConfigError, has_some.format("audio_tower", "recordings"), init_from=str(towers), audio_tower="other")
    refused(ConfigError, "`adapter_rank` must be 2, that of the adapters in", init_from=str(towers), adapter_rank=4)
    heard = write_rows(tmp_path / "heard", 0, 4)
    refused(ConfigError, "`vision_tower` has no effect where no pictures are shown", data=heard, vision_tower="other")
    spoilt = shutil.copytree(rows.parent, tmp_path / "spoilt")
    (spoilt / "p1.png").write_bytes((spoilt / "p1.png").read_bytes()[:80])
    refused(DataError, r"rows.jsonl:\d+: .*p1.png is damaged or truncated", data=spoilt / "rows.jsonl")
    text = tmp_path / "text.jsonl"
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text.write_text(json.dumps({"messages": said}) + "\n")
    refused(
        DataError,
        "must have two different things to show|shows no picture and no recording",
        data=text,
        eval_data=str(text),
    )
    with pytest.raises(ConfigError, match="`init_from` is needed beside `--multimodal`"):
        resolve_multimodal(lambda: 128, {"data": str(rows)})
    with pytest.raises(ConfigError, match="`blind` has no effect without `--multimodal`, got True"):
        train(resolve("nano", overrides={"output_dir": str(tmp_path / "wrong"), "blind": True, "max_steps": 1}))


def test_other_pictures_are_refused_on_resume(learn, rows, tmp_path):
    data = shutil.copytree(rows.parent, tmp_path / "own") / "rows.jsonl"
    learn(data=data, save_steps=1)
    write_picture(data.parent / "p0.png", "white", seed=5)
    with pytest.raises(CheckpointError, match="the data changed since the run began"):
        learn(data=data, max_steps=3, resume=True)
    for name, value in (("stage", "align"), ("blind", True), ("image_size", 32), ("vision_tower", "other")):
        with pytest.raises(CheckpointError, match=f"`{name}` of a run cannot change on resume: it was .*, got {value}"):
            learn(data=data, max_steps=3, resume=True, **{name: value})


def test_a_model_with_towers_is_refused_where_they_would_be_lost(learn, tmp_path):
    from fanformer.gguf.export import Settings, export_gguf
    from fanformer.quantization.quantized_folder import check_model
    from fanformer.training.configuration import resolve_tuning

    folder = learn(max_steps=1)[0].folder
    lost = "has towers for pictures and sound, which {} would leave behind: name the language model"
    with pytest.raises(ConfigError, match=lost.format("a GGUF file")):
        export_gguf(folder, tmp_path / "a.gguf", Settings("f16"))
    with pytest.raises(ConfigError, match=lost.format("quantizing")):
        check_model(folder, "none")
    file = tmp_path / "rows.jsonl"
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    file.write_text(
        "".join(json.dumps({"messages": [{**said[0], "content": str(n)}, said[1]]}) + "\n" for n in range(9))
    )
    tuning = resolve_tuning(str(folder), lambda: 128, {"data": str(file), "output_dir": str(tmp_path / "t")})
    with pytest.raises(ConfigError, match=lost.format("training on text")):
        train(tuning)
    assert not (tmp_path / "t").exists()


def test_a_pretrained_tower_rests_while_it_is_aligned(learn, tmp_path):
    from transformers import SiglipVisionConfig, SiglipVisionModel, WhisperConfig, WhisperModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=12, patch_size=4)).save_pretrained(tmp_path / "siglip")
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    whisper = WhisperConfig(d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, max_source_positions=100, **layers)
    WhisperModel(whisper).save_pretrained(tmp_path / "whisper")
    towers = {"vision_tower": str(tmp_path / "siglip"), "audio_tower": str(tmp_path / "whisper")}
    run = learn(**towers, audio_token_ms=80)[0]
    after, siglip = weights(run.folder), weights(tmp_path / "siglip")
    kept = {name: value for name, value in after.items() if name.startswith("model.vision_tower.")}
    assert kept
    assert all(torch.equal(siglip[name.removeprefix("model.vision_tower.")], value) for name, value in kept.items())
    heard = weights(tmp_path / "whisper")["encoder.conv1.weight"]
    assert torch.equal(after["model.audio_tower.conv1.weight"], heard)
    config = json.loads((run.folder / "config.json").read_text())
    assert config["image_downsample"] == 3  # patches a side, which 2 does not divide
    long = write_rows(tmp_path / "long", 2, 2)
    write_tone(long.parent / "t1.wav", "low", 2.5)
    with pytest.raises(DataError, match=r"rows.jsonl:\d+: .*t1.wav must last at most 2 s, got 2.5: cut it"):
        learn("refused", data=long, **towers, audio_token_ms=80)
    part = {name: value for name, value in weights(tmp_path / "siglip").items() if "post_layernorm" not in name}
    save_file(part, tmp_path / "siglip" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"the weights of .*siglip lack `.*post_layernorm.bias`: take another"):
        learn("refused", **towers, audio_token_ms=80)
    (tmp_path / "siglip" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"the weights of .*siglip cannot be read: "):
        learn("refused", **towers, audio_token_ms=80)
    assert not (tmp_path / "refused").exists()


def test_a_full_vocabulary_and_one_with_chatml_are_trained_on(learn, tiny_model, tiny_tokenizer, tmp_path):  # noqa: F811
    from fanformer.data.conversations.chat_tokens import add_chat_tokens
    from fanformer.generation.media_model import load_media_model

    full, chat = tmp_path / "full", tmp_path / "chat"
    tiny_model(vocab_size=300, eos_token_id=0, bos_token_id=0).save_pretrained(full)
    tiny_tokenizer.save_pretrained(full)
    model = tiny_model(vocab_size=320, eos_token_id=0, bos_token_id=0)
    speaking = add_chat_tokens(model, copy.deepcopy(tiny_tokenizer))
    model.save_pretrained(chat)
    speaking.tokenizer.save_pretrained(chat)
    for base in (full, chat):
        folder = learn(base.name + "-run", init_from=str(base), max_steps=1)[0].folder
        found = load_media_model(folder, "cpu")
        assert (found.wording.chatml is not None) == (base == chat)
        picture = write_picture(tmp_path / "p.png", "red")
        assert isinstance(found.generate("which?", images=[picture], max_length=3, temperature=0.0), str)
        ids = torch.arange(1, 30)[None]
        assert torch.equal(load(folder, "cpu").model(ids).logits, load(base, "cpu").model(ids).logits)
