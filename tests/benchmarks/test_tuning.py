"""The benchmark of tuning: nothing of the test's stories in the base's text, right scores, and all of it in little."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from fanformer.comparison.ledger import read_ledger
from fanformer.data.conversations.chat_tokens import add_chat_tokens
from fanformer.data.conversations.examples import Example, Message
from fanformer.data.conversations.rows import tokenize_examples


@pytest.fixture
def quality(repository, monkeypatch):
    """The benchmark's modules."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks" / "quality"))
    import tuning
    import tuning_data

    return SimpleNamespace(run=tuning, data=tuning_data)


PASSAGE = "once upon a time there lived a very old king who had three sons and one golden bird in a cage"
STORY = {"story": "the-golden-bird", "text": PASSAGE, "question": "Who had three sons?", "answers": ["a king"]}


def test_documents_with_a_story_of_the_test_are_left_out_by_title_and_by_words(quality, tmp_path):
    stories = quality.data.Stories([STORY])
    run = PASSAGE.split()[3:16]
    copied, shorter = (" ".join(["So:", *run[:count], "and more."]) for count in (13, 12))
    assert stories.in_text(copied.upper()) == {"the-golden-bird"}
    assert stories.in_text(shorter) == set()
    assert stories.in_text("THE GOLDEN BIRD\n\nby somebody") == {"the-golden-bird"}
    assert stories.in_text("the golden birds") == set()
    source = [{"id": number, "text": text} for number, text in enumerate([shorter, copied, "the golden bird", "x" * 9])]
    found = quality.data.write_text([*source, *source], stories, len(shorter) + 9, tmp_path / "text.jsonl")
    assert found == {"documents": 2, "bytes": len(shorter) + 9, "left_out": {"the-golden-bird": ["1", "2"]}}
    kept = [json.loads(line)["text"] for line in (tmp_path / "text.jsonl").read_text().splitlines()]
    assert kept == [shorter, "x" * 9]


def row(question, answer, **more):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "references": [answer], **more}


def test_scores_are_means_over_questions_and_rules_have_theirs(quality):
    asked = "A king sat. The bird sang in a cage.\n\nWho sang in a cage?"
    rows = [row(asked, "the bird", explicit=True), row("A cat.\n\nWho?", "a dog", explicit=False)]
    found = quality.data.score("fairytale", rows, ["The bird!", "a cat"])
    assert found == {"f1": 0.5, "exact_match": 0.5, "explicit_f1": 1.0, "explicit_exact_match": 1.0}
    rules = quality.data.baselines("fairytale", [row("x\n\ny", "a dog")], rows)
    assert rules["constant"]["exact_match"] == 0.5
    assert rules["first sentence"]["f1"] == 0.0
    assert rules["best overlap"]["explicit_f1"] == pytest.approx(2 / 5)  # one word right of four, and of one
    asked = [row("Repeat oak.", "oak", kind="repeat", values={"word": "oak"}) | {"references": None}]
    with pytest.raises(KeyError):
        quality.data.score("instructions", asked, ["oak"])  # no such kind: a check is never passed by silence


def test_without_the_mask_questions_are_learnt_too_and_only_meanwhile(quality, tiny_model, tiny_tokenizer):
    chatml = add_chat_tokens(tiny_model(vocab_size=320), tiny_tokenizer).chatml
    example = Example((Message("user", "the cat?"), Message("assistant", "sat.")), 1)

    def learnt():
        [[document]] = tokenize_examples(chatml, [example], 64, pytest.fail).documents
        return int(document.trained.sum()), len(document.trained)

    before = learnt()
    with quality.run.learning_questions_too():
        assert learnt() == (before[1], before[1])
    assert learnt() == before
    assert before[0] < before[1]


def test_figures_are_means_over_seeds_and_aims_are_told(quality):
    import tuning_tables

    sets = {name: {} for name in quality.data.SETS} | {"arc": {"exact_match": 0.5}}
    seeds = [{**sets, "ended": ended, "unasked": 0, "bits_per_byte": 2.0} for ended in (1.0, 0.98)]
    preferring = {"bits_per_byte": 2.2, "margin": 0.4, "accuracy": 1.0, "loss": 0.3}
    results = {"full": seeds, "llama": seeds, "preferences": [preferring]}
    before = {"base": 2.0, "llama": 1.9}
    found = tuning_tables.figures(results, before, {})
    assert found["full_ended"].value == pytest.approx(0.99)
    assert found["full_ended"].low < 0.98 < found["full_ended"].high
    assert found["llama_bits_per_byte_ratio"].value == pytest.approx(2.0 / 1.9)
    assert found["preferences_margin"].value == 0.4
    told = tuning_tables.aims(results, before)
    assert told == "full: 99.0% of answers end (aim at least 98%, met); bits per byte +0.00% (aim at most +2%, met)"
    assert "(aim at most +2%, missed)" in tuning_tables.aims(results, before | {"base": 1.9})
    fewer = {"full": [seed | {"unasked": 7} for seed in seeds]}
    assert "(aim at least 98%, met), 7 questions left no room for one; bits" in tuning_tables.aims(fewer, before)
    blind = [seed | {"arc": {"exact_match": value}} for seed, value in zip(seeds, (0.25, 0.5), strict=True)]
    less = tuning_tables.figures(results | {"blind": blind}, before, {})["full_less_blind_arc_exact_match"]
    assert (less.value, less.low < 0 < less.high) == (0.125, True)
    explicit = [seed | {"fairytale": {"explicit_f1": value}} for seed, value in zip(seeds, (0.2, 0.3), strict=True)]
    beyond = tuning_tables.figures({"full": explicit}, before, {"fairytale": {"best overlap": {"explicit_f1": 0.24}}})
    assert beyond["full_less_best_overlap_explicit_f1"].value == pytest.approx(0.01)
    assert "full less blind" in tuning_tables.tables(
        results | {"blind": blind}, before, {name: {} for name in quality.data.SETS}
    )
    table = tuning_tables.tables(results, before, {name: {} for name in quality.data.SETS})
    assert "margin 0.400, accuracy 1.000, loss 0.300, bits per byte +10.00%" in table


def test_a_question_that_leaves_no_room_is_no_answer_that_did_not_end(quality, tiny_model, tiny_tokenizer):
    import tuning_measures

    from fanformer.generation.torch_model import TorchModel

    model = tiny_model(vocab_size=320, max_position_embeddings=96)
    tokens = add_chat_tokens(model, tiny_tokenizer)
    rows = [row("the cat?", "sat"), row("the cat sat on the mat. " * 20, "sat")]
    found = tuning_measures.answers(TorchModel(model.eval(), tokens.tokenizer), rows)
    assert [ended is None for _, ended in found] == [False, True]
    assert found[1][0] == ""


def test_a_work_folder_of_other_settings_is_refused(quality, tmp_path, monkeypatch):
    def asked(*words):
        monkeypatch.setattr(sys, "argv", ["tuning.py", "--work", str(tmp_path), *words])
        return quality.run.parse()

    monkeypatch.setattr(quality.run, "write_all", lambda *arguments: None)
    quality.run.prepare(asked())
    quality.run.prepare(asked("--seeds", "5"))  # more of the same
    with pytest.raises(SystemExit, match=r"was begun with epochs 2\.0, got 3\.0: give another --work"):
        quality.run.prepare(asked("--epochs", "3"))
    with pytest.raises(SystemExit):
        asked("--base", "runs/mine")  # beside which Llama would be another size, on other tokens
    assert asked("--base", "runs/mine", "--parts", "full").parts == "full"
    stages = quality.run.stages(asked("--parts", "preferences,llama", "--seeds", "1"))
    cells = [[cell.name for cell in stage] for stage in stages]
    assert cells == [["base-0"], ["llama-base-0"], ["full-0", "llama-0"], ["preferences-0"]]


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_of_it_in_little_and_nothing_twice(shared, repository, tmp_path):
    script = repository / "benchmarks" / "quality" / "tuning.py"
    words = [sys.executable, script, "--dry-run", "--data", shared / "data", "--work", tmp_path / "work"]

    def run():
        done = subprocess.run(words, capture_output=True, text=True, timeout=800, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    first = run()
    results = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "work/results").iterdir()}
    names = ("base", "llama-base", "full", "lora", "unmasked", "blind", "llama", "preferences")
    assert results.keys() == {f"{name}-0.json" for name in names}
    for name in ("constant", "first sentence", "best overlap", "full", "llama", "preferences, held-out pairs"):
        assert name in first
    assert "stories of the test: assipattle-and-the-mester-stoorworm, " in first
    again = run()
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "work/results").iterdir()} == results
    assert again.splitlines()[-10:] == first.splitlines()[-10:]
    [entry] = read_ledger(tmp_path / "work/ledger")
    assert entry.result["full_ended"].unit == "share of answers"
    assert {"preferences_margin", "blind_fairytale_f1", "llama_bits_per_byte_ratio"} <= entry.result.keys()
