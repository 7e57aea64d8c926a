"""The bars of the model in the box: what is counted as a repetition, an end and a sentence, and what is missing."""

import json
import sys

import pytest

from fanformer.comparison.ledger import read_ledger
from fanformer.errors import ConfigError


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


def test_the_llama_is_beaten_where_the_whole_interval_is_below_0(on):
    from check import beside_llama

    assert beside_llama(on).holds is None
    done(on, "beside", None)
    assert beside_llama(on).holds is None
    for value, holds in ((-0.014, True), (-0.004, False), (0.002, False)):
        done(on, "beside", {"value": value, "low": value - 0.01, "high": value + 0.01})
        assert beside_llama(on).holds is holds
    assert beside_llama(on).measured == "+0.0020 [-0.0080, +0.0120]"


def test_a_difference_of_a_single_seed_is_not_judged(on):
    from check import beside_llama

    done(on, "beside", {"value": -0.004, "low": None, "high": None})
    bar = beside_llama(on)
    assert (bar.holds, bar.figures) == (None, {})
    assert bar.measured.startswith("-0.0040 by a single seed, whose noise is not known")


def test_the_right_words_in_another_order_are_no_exact_match(on, monkeypatch):
    import check

    rows = [{"explicit": True, "references": ["the dog saw a cat"]}] * 2
    monkeypatch.setattr(check, "fairytales", lambda *given, blind: rows)
    monkeypatch.setattr(check.Checking, "answers", lambda on, rows: ["A cat saw the dog.", "Dog saw cat!"])
    assert check.questions(on)[0].figures == {"f1": 1.0, "exact_match": 0.5}


def test_the_first_answer_is_asked_of_the_model_that_is_checked(tmp_path):
    from check import BOX, named

    assert named(BOX) == named(BOX.parent / "server/../box") == []
    assert named(tmp_path / "other") == [tmp_path / "other"]


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
    from check import main

    monkeypatch.setattr(sys, "argv", ["check.py", "--model", str(tmp_path / "box")])
    with pytest.raises(ConfigError, match=r"no model in .*box: make it with `make release-model`"):
        main()


@pytest.fixture
def checked(monkeypatch, tmp_path):
    """Run the check with bars of the test's own; returns its status and what it wrote."""
    import check

    box = tmp_path / "box"
    box.mkdir()
    (box / "config.json").write_text("{}")
    (box / "model.safetensors").write_text("weights")
    (box / "README.md").write_text("# A model\n")
    monkeypatch.setattr(check, "LEDGER", tmp_path / "ledger")
    asked = []

    def bar(name, answers, breaks=False):
        def measure(on):
            asked.append(name)
            if breaks:
                raise RuntimeError(f"{name} is\nbroken")
            on.ended.extend(answers)
            return check.Bar(f"the {name}", "some", "much", True, {f"share_{name}": 0.5})

        return measure

    def run(*words, broken=()):
        bars = {name: bar(name, [True, False], name in broken) for name in ("bits", "questions", "instructions")}
        monkeypatch.setattr(
            check, "BARS", {**bars, "ends": check.ends, "installed": bar("installed", [], "installed" in broken)}
        )
        monkeypatch.setattr(sys, "argv", ["check.py", "--model", str(box), "--work", str(tmp_path / "work"), *words])
        asked.clear()
        return check.main(), list(asked)

    run.box, run.ledger = box, tmp_path / "ledger"
    return run


def written_bars(run):
    (entry,) = read_ledger(run.ledger)
    bars = list(entry.details["bars"])
    rows = (run.box / "README.md").read_text().partition("|---|---|---|---|\n")[2].splitlines()
    cells = [row.strip("| ").split(" | ") for row in rows]
    reached = ["yes" if bar["holds"] else "**no**" for bar in entry.details["bars"].values()]
    assert [[row[0], row[-1]] for row in cells] == [list(row) for row in zip(bars, reached, strict=True)]
    return bars


def test_a_bar_that_fails_is_not_measured_and_costs_no_other(checked, capsys):
    status, _ = checked("--write", broken=["bits", "installed"])
    lines = capsys.readouterr().out.splitlines()
    assert status == 1
    assert lines[0] == "not measured   bits: failed: RuntimeError: bits is broken (demand: to be measured)"
    assert lines[3].startswith("DOES NOT HOLD  answers that end: 50.0% of 4 within ")
    assert written_bars(checked) == ["the questions", "the instructions", "answers that end"]


def test_the_check_is_done_in_parts_and_goes_on_after_any_end(checked, capsys):
    assert checked("--only", "questions", "--write") == (0, ["questions"])
    assert written_bars(checked) == ["the questions", "answers that end"]
    assert checked(broken=["installed"]) == (1, ["bits", "instructions", "installed"])
    assert "the questions: much (demand: some) [measured before]" in capsys.readouterr().out
    assert checked("--only", "installed", "--write") == (0, ["installed"])
    whole = ["the bits", "the questions", "the instructions", "answers that end", "the installed"]
    assert written_bars(checked) == whole
    assert checked("--only", "bits", "--write", broken=["bits"])[0] == 1  # what was measured before stays
    assert written_bars(checked) == whole
    (checked.box / "model.safetensors").write_text("others")
    assert checked() == (1, ["bits", "questions", "instructions", "installed"])


def test_nothing_is_written_where_nothing_was_measured(checked):
    with pytest.raises(ConfigError, match="`--write` needs a bar that was measured, got none"):
        checked("--only", "bits", "--write", broken=["bits"])
