"""The bars of the model in the box: what is counted as a repetition, an end and a sentence, and what is missing."""

import json

import pytest


@pytest.fixture
def on(tmp_path):
    from check import Checking

    return Checking(tmp_path / "box", tmp_path / "data", tmp_path)


def done(on, stage, result):
    (on.work / "stages").mkdir(exist_ok=True)
    (on.work / "stages" / f"{stage}.json").write_text(json.dumps({"settings": {}, "result": result}))


def test_eight_words_twice_are_a_repetition():
    from check import repeats

    eight = "one two three four five six seven eight"
    assert repeats(f"{eight} and {eight.upper()}")
    assert not repeats(f"{eight} and one two three four five six seven nine")


def test_whole_sentences_are_taken():
    from check import whole_sentences

    assert whole_sentences('A cat sat. "Oh!" it said. And then') == 'A cat sat. "Oh!" it said.'
    assert whole_sentences("no end") == ""


def test_the_llama_is_beaten_where_the_difference_is_below_0(on):
    from check import beside_llama

    assert beside_llama(on).holds is None
    done(on, "beside", None)
    assert beside_llama(on).holds is None
    for value, holds in ((-0.004, True), (0.0, False), (0.002, False)):
        done(on, "beside", {"value": value, "low": value - 0.01, "high": value + 0.01})
        assert beside_llama(on).holds is holds
    assert beside_llama(on).measured == "+0.0020 [-0.0080, +0.0120]"


def test_ends_are_those_of_all_answers(on):
    from check import ends

    assert ends(on).holds is None
    on.ended.extend([True] * 98 + [False] * 2)
    assert (ends(on).holds, ends(on).measured) == (True, "98.0% of 100 within 60 tokens")
    on.ended.append(False)
    assert ends(on).holds is False


def test_answers_are_cut_at_their_end(saved_model):
    from check import written

    import fanformer
    from fanformer.errors import ConfigError
    from fanformer.generation.settings import GenerationSettings

    model = fanformer.load(saved_model, device="cpu")
    model.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    asked = ["the cat", "a small model speaks", "def add"]
    settings = GenerationSettings(max_length=12, temperature=1.0, top_p=1.0, top_k=0)
    found = written(model, asked, settings)
    assert found == written(model, asked, settings)
    for text, ids in found:
        assert len(ids) <= 12
        assert not set(ids) & set(model.end_ids)
        assert text == model.tokenizer.decode(ids, skip_special_tokens=True).strip()
    model.end_ids = [found[0][1][3]]  # what the first one drew fourth
    assert written(model, asked, settings)[0][1] == found[0][1][: found[0][1].index(model.end_ids[0])]
    with pytest.raises(ConfigError, match="the model has 128 positions"):
        written(model, ["the cat " * 100], settings)


def test_a_card_has_one_section_of_measurements():
    from card import with_measured

    card = "# A model\n\nWhat it is.\n"
    once = with_measured(card, "| a |")
    assert once == "# A model\n\nWhat it is.\n\n## Measured\n\n| a |\n"
    assert with_measured(once, "| b |") == once.replace("| a |", "| b |")


def test_every_figure_has_a_unit():
    from check import unit_of

    assert unit_of("first_answer_seconds_torch") == "seconds"
    assert unit_of("bits_per_byte") == unit_of("difference_to_llama") == "bits per byte"
    assert unit_of("f1") == unit_of("followed_repeat") == "share"


def test_a_missing_model_is_told(capfd, monkeypatch, tmp_path):
    import sys

    from check import main

    from fanformer.errors import ConfigError

    monkeypatch.setattr(sys, "argv", ["check.py", "--model", str(tmp_path / "box")])
    with pytest.raises(ConfigError, match=r"no model in .*box: make it with `make release-model`"):
        main()
