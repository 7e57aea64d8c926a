"""Tokenizer and weights belong together, whatever the data."""

import json
import shutil

import pytest

from fanformer.data.preparation.prepare import prepare
from fanformer.data.sources.documents import open_source
from fanformer.errors import CheckpointError, ConfigError


@pytest.fixture
def other(tmp_path):
    path = tmp_path / "other.txt"
    path.write_text("a quick red fox jumps over 17 lazy hounds, and it rains.\n" * 400, encoding="utf-8")
    return str(path)


def vocabulary(folder):
    return json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]


def test_weights_to_start_from_bring_their_tokenizer(run, other):
    first, _ = run("first", max_steps=2)
    second, _ = run("second", max_steps=2, init_from=str(first.folder), data=other)
    assert vocabulary(second.folder) == vocabulary(first.folder)


def test_another_tokenizer_is_taken_where_it_is_asked_for(run, other):
    first, _ = run("first", max_steps=2, vocab_size=320)
    second, _ = run("second", max_steps=2, data=other, vocab_size=300)
    third, _ = run("third", max_steps=1, init_from=str(first.folder), tokenizer=str(second.folder), data=other)
    assert vocabulary(third.folder) == vocabulary(second.folder)
    with pytest.raises(ConfigError, match="`vocab_size` does not apply beside `init_from`, got 300"):
        run("fourth", max_steps=1, init_from=str(first.folder), data=other, vocab_size=300)


def test_prepared_data_of_another_tokenizer_are_refused_unless_asked_for(run, other, corpus, tmp_path):
    first, _ = run("first", max_steps=2)
    place = tmp_path / "prepared"
    prepare(open_source(other), place, tokenizer=None, vocab_size=300)
    with pytest.raises(ConfigError, match="is not the one that the weights were trained with: prepare the text with"):
        run("second", max_steps=1, init_from=str(first.folder), data=str(place))
    run("second", max_steps=1, init_from=str(first.folder), data=str(place), tokenizer=str(place))
    same = first.folder / "data"
    run("third", max_steps=1, init_from=str(first.folder), data=str(same))


def test_a_model_without_tokenizer_needs_one_that_is_named(run, other):
    first, _ = run("first", max_steps=1)
    (first.folder / "tokenizer.json").rename(first.folder.parent / "tokenizer.json")
    with pytest.raises(CheckpointError, match="no tokenizer in"):
        run("second", max_steps=1, init_from=str(first.folder), data=other)


def test_a_resumed_run_keeps_its_tokenizer_on_other_data(run, other):
    first, _ = run(max_steps=2)
    before = vocabulary(first.folder)
    run(max_steps=4, resume=True, data=other, allow_changed_data=True)
    assert vocabulary(first.folder) == before
    with pytest.raises(CheckpointError, match="`vocab_size` of a run cannot change on resume"):
        run(max_steps=6, resume=True, data=other, allow_changed_data=True, vocab_size=300)


def test_a_resumed_run_refuses_prepared_data_of_another_tokenizer(run, other, tmp_path):
    run(max_steps=2)
    place = tmp_path / "prepared"
    prepare(open_source(other), place, tokenizer=None, vocab_size=300)
    fields = {"max_steps": 4, "resume": True, "data": str(place), "allow_changed_data": True}
    with pytest.raises(ConfigError, match="is not the one that the weights were trained with"):
        run(**fields)
    result, _ = run(**fields, tokenizer=str(place))
    assert result.step == 4


def test_data_prepared_elsewhere_may_move(run, corpus, tmp_path):
    prepare(open_source(str(corpus)), tmp_path / "here", tokenizer=None, vocab_size=300)
    run(max_steps=2, data=str(tmp_path / "here"))
    shutil.move(tmp_path / "here", tmp_path / "there")
    result, _ = run(max_steps=4, resume=True, data=str(tmp_path / "there"))
    assert result.step == 4


def test_held_out_text_is_read_in_the_tokens_of_the_weights(run, other, corpus):
    first, _ = run("first", max_steps=2)
    run("second", max_steps=2, data=other, eval_data=str(corpus))
    fields = {"resume": True, "max_steps": 4, "data": other, "eval_data": str(corpus)}
    run("second", **fields, tokenizer=str(first.folder), allow_changed_data=True)
    again, _ = run("second", **{**fields, "max_steps": 5}, tokenizer=str(first.folder))
    measured = json.loads(again.folder.joinpath("metrics.jsonl").read_text().splitlines()[-1])
    assert measured["val_loss"] == again.held_out.loss
    assert again.held_out.bytes == corpus.stat().st_size


def test_a_run_from_a_saved_model_goes_on_where_that_model_is_gone(run, other):
    first, _ = run("first", max_steps=2)
    run("second", max_steps=2, init_from=str(first.folder), data=other)
    shutil.rmtree(first.folder)
    result, _ = run("second", max_steps=4, init_from=str(first.folder), data=other, resume=True)
    assert result.step == 4


@pytest.mark.parametrize("damage", ["damaged", "deleted"])
def test_a_run_that_lost_its_checkpoints_begins_from_its_model_again(run, other, damage):
    first, _ = run("first", max_steps=30, learning_rate=0.01)
    fields = {"init_from": str(first.folder), "data": other, "max_steps": 1, "learning_rate": 1e-9}
    second, _ = run("second", **fields)
    [checkpoint] = second.folder.glob("checkpoint-*")
    (checkpoint / ("model.safetensors" if damage == "damaged" else "manifest.json")).unlink()
    again, notebook = run("second", **fields, resume=True)
    assert any("starting at step 0" in note for note in notebook.notes)
    assert again.held_out.loss == pytest.approx(second.held_out.loss, abs=1e-5)
