"""The functions that `import fanformer` offers do what the commands do."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

import fanformer
from fanformer.errors import ConfigError, DataError
from fanformer.generation.settings import GenerationSettings
from tests.gguf_models import export
from tests.multimodal_files import TINY, write_rows
from tests.saved_models import complete_on_torch, loaded, saved_model, tiny_tokenizer  # noqa: F401
from tests.training.conftest import TINY_MODEL, Notebook, corpus  # noqa: F401

SAMPLING = {"max_length": 12, "seed": 3}


@pytest.fixture(scope="module", params=["folder", "gguf"])
def model(request, saved_model):  # noqa: F811
    if request.param == "folder":
        return fanformer.load(saved_model, device="cpu")
    pytest.importorskip("ggml", reason="needs the extra `gguf` (ggml-python)")
    return fanformer.load(export(saved_model), threads=1)


def test_a_prompt_gives_a_text_and_several_give_a_list(model):
    texts = model.generate(["the cat", "def"], **SAMPLING)
    assert [type(text) for text in texts] == [str, str]
    assert model.generate("the cat", **SAMPLING) == texts[0] != ""


def test_text_is_that_of_the_command(saved_model, loaded):  # noqa: F811
    expected = complete_on_torch(*loaded, ["the cat"], GenerationSettings(**SAMPLING))[0].text
    assert fanformer.load(saved_model).generate("the cat", **SAMPLING) == expected


def test_streamed_pieces_are_the_text(model):
    settings = {"max_length": 40, "min_length": 40, "seed": 1}
    pieces = list(model.stream("the cat", **settings))
    assert "".join(pieces) == model.generate("the cat", **settings)
    assert len(pieces) > 5


def test_a_closed_stream_stops_the_text(model):
    pieces = model.stream("the cat", max_length=100, min_length=100, seed=0)
    next(pieces)
    pieces.close()  # returns, so the writing thread has ended
    assert model.generate("the cat", **SAMPLING)


def test_a_stream_raises_what_went_wrong_where_it_is_read(model):
    with pytest.raises(ConfigError, match="128 positions"):
        list(model.stream("!?" * 200))
    with pytest.raises(ConfigError, match="no setting `temprature`: did you mean `temperature`"):
        model.stream("a", temprature=1)


def test_score_is_the_sum_of_log_probabilities(model, loaded):  # noqa: F811
    text = "sat on the mat"
    before, ids = model.encode("the cat "), model.encode(text)[1:]
    with torch.no_grad():
        logits = loaded.model(torch.tensor([[*before, *ids]])).logits[0].double().log_softmax(-1)
    expected = sum(logits[len(before) - 1 + place, token].item() for place, token in enumerate(ids))
    score = model.score(text, "the cat ")
    assert score.tokens == len(ids)
    assert score.log_likelihood == pytest.approx(expected, rel=1e-4)
    assert score.bits_per_byte == pytest.approx(-expected / math.log(2) / len(text), rel=1e-4)
    assert math.isnan(model.score("").bits_per_byte)
    with pytest.raises(ConfigError, match="the model has 128 positions: score it in parts"):
        model.score("!?" * 200)


def test_training_and_evaluating_are_the_commands(corpus, tmp_path):  # noqa: F811
    sizes = {"vocab_size": 320, "sequence_length": 32, "batch_size": 4, "eval_tokens": 256}
    fields = {**sizes, "precision": "float32", "compile": "off", "device": "cpu", "model": TINY_MODEL}
    heard = Notebook()
    result = fanformer.train(Path(corpus), output_dir=tmp_path / "run", tokens="1280", listener=heard, **fields)
    assert (result.step, heard.steps[-1]) == (10, 10)
    text = tmp_path / "text.txt"
    text.write_text("the old cat sees the river. " * 20)
    figures = fanformer.evaluate(result.folder, [text])
    assert figures["files"][str(text)]["bits_per_byte"] == figures["bits_per_byte"]
    again = fanformer.load(result.folder).score(text.read_text()[:20])
    assert again.bits_per_byte < 8
    assert json.loads(json.dumps(figures)) == figures

    longer = fanformer.train(output_dir=tmp_path / "run", resume=True, max_steps=12)  # its own data, not stdlib
    assert longer.step == 12
    assert dataclasses.is_dataclass(longer)


def test_wrong_requests_are_refused(saved_model, tmp_path):  # noqa: F811
    with pytest.raises(ConfigError, match="`texts` or `tasks` is needed"):
        fanformer.evaluate(saved_model)
    with pytest.raises(ConfigError, match="did you mean `max_steps`"):
        fanformer.train(max_step=3)
    with pytest.raises((DataError, OSError)):
        fanformer.evaluate(saved_model, [tmp_path / "nowhere.txt"])


def test_a_tuning_is_the_command_s(saved_model, tmp_path):  # noqa: F811
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{word}?", "completion": word}) + "\n" for word in ("cat", "mat")))
    fields = {"batch_size": 2, "device": "cpu", "precision": "float32", "compile": "off"}
    result = fanformer.finetune(saved_model, data, output_dir=tmp_path / "tuned", max_steps=1, **fields)
    assert (result.step, result.held_out.documents) == (1, 1)
    assert fanformer.load(result.folder, device="cpu").has_chat_template
    with pytest.raises(ConfigError, match="`epochs` must be"):
        fanformer.finetune(saved_model, data, epochs="two")
    pairs = tmp_path / "pairs.jsonl"
    rows = ({"prompt": f"{word}?", "chosen": word, "rejected": "no"} for word in ("cat", "mat"))
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    preferring = fanformer.finetune(saved_model, preferences=pairs, output_dir=tmp_path / "two", max_steps=1, **fields)
    assert (preferring.step, preferring.held_out.pairs) == (1, 1)
    with pytest.raises(ConfigError, match="`data` or `preferences` is needed to tune a model, got neither"):
        fanformer.finetune(saved_model)


def test_a_model_is_taught_to_see_and_asked_from_python(saved_model, tmp_path):  # noqa: F811
    rows = write_rows(tmp_path / "rows", 8, 0)
    fields = {**TINY, "init_from": saved_model, "output_dir": tmp_path / "run", "max_steps": 1}
    result = fanformer.train(multimodal=rows, **fields)
    model = fanformer.load(result.folder, device="cpu", towers=True)
    picture = rows.parent / "p0.png"
    assert isinstance(model.generate("which?", images=[picture], max_length=3, temperature=0.0), str)
    with pytest.raises(ConfigError, match=r"`data` does not go with `multimodal`, got 'a\.txt'"):
        fanformer.train("a.txt", multimodal=rows, **fields)
