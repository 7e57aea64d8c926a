"""`fanformer data prepare`: a folder that training can use, and what it says about it."""

import json
import os

import pytest


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("the cat sat on the mat, and a small model spoke of small things.\n" * 200)
    return path


def test_prepared_folder_is_what_the_summary_says(command, book, tmp_path):
    from fanformer.data.preparation.prepare import open_prepared

    outcome = command("data", "prepare", book, "--output-dir", tmp_path / "out", "--vocab-size", "300")
    assert (outcome.code, outcome.err) == (0, "")
    prepared = open_prepared(tmp_path / "out")
    assert prepared.fingerprint[:16] in outcome.out
    assert f"{len(prepared.split('train').tokens):,} tokens" in outcome.out.splitlines()[0]
    assert len(prepared.tokenizer()) <= 300


def test_given_tokenizer_is_used(command, book, saved_model, tmp_path):
    from fanformer.data.preparation.prepare import open_prepared

    command("data", "prepare", book, "--output-dir", tmp_path / "out", "--tokenizer", saved_model)
    assert len(open_prepared(tmp_path / "out").tokenizer()) == 300


def test_processes_are_those_of_the_cores_that_may_be_used(command, book, tmp_path, monkeypatch):
    from fanformer.data.preparation import prepare, workers

    asked, prepared = [], prepare.prepare
    monkeypatch.setattr(workers, "allowed_cores", lambda: 3)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(
        prepare, "prepare", lambda *words, **more: asked.append(more["workers"]) or prepared(*words, **more)
    )
    assert command("data", "prepare", book, "--output-dir", tmp_path / "out", "--vocab-size", "300").code == 0
    assert asked == [3]


def test_bad_input_is_refused_and_nothing_written(command, book, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("x")
    for words, message in (
        ([tmp_path / "none.txt"], "no file"),
        ([book, "--vocab-size", "10"], "`vocab_size` must be at least 257, got 10"),
        ([book, "--held-out-fraction", "0.9"], "held_out_fraction"),
        ([book, "--max-bytes", "lots"], "a count must look like"),
        ([book, "--tokenizer", "./none"], "expected a folder with tokenizer.json"),
    ):
        assert message in command("data", "prepare", *words, "--output-dir", tmp_path / "out").refusal()
    assert str(tmp_path / "used") in command("data", "prepare", book, "--output-dir", tmp_path / "used").refusal()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["book.txt", "used"]
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["file"]


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(monkeypatch, capfd):
    from fanformer.cli import data

    monkeypatch.setattr(data, "SECONDS_BETWEEN_LINES", 0.0)
    with data.byte_progress("encoding") as progress:
        progress(1_500_000, 3_000_000)
        progress(2_000_000, None)
    assert capfd.readouterr() == ("", "encoding: 1.5 of 3.0 MB after 0 s\nencoding: 2.0 MB after 0 s\n")


def test_summary_counts_what_was_dropped_and_tells_rate_and_memory(command, tmp_path):
    texts = ["word " * (5 + 10 * (i % 2)) + str(i % 40) for i in range(100)]
    lines = [json.dumps({"text": text, "src": str(i % 3)}) for i, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    words = (
        "--filter",
        "min-words",
        "--filter",
        "clean-urls",
        "--dedup",
        "exact",
        "--source-field",
        "src",
        "--workers",
        1,
    )
    outcome = command(
        "data",
        "prepare",
        tmp_path / "a.jsonl",
        "--output-dir",
        tmp_path / "out",
        "--workers",
        1,
        "--vocab-size",
        300,
        *words,
    )
    assert (outcome.code, outcome.err) == (0, "")
    assert "dropped by min-words: 50 documents" in outcome.out
    assert "dropped by duplicate: 30 documents" in outcome.out
    assert " MB/s, " in outcome.out
    assert " tokens/s; at most " in outcome.out
    assert "tokenizer trained in " in outcome.out
    assert (
        "no filter `min-word`: did you mean `min-words`?"
        in command(
            "data", "prepare", tmp_path / "a.jsonl", "--output-dir", tmp_path / "b", "--filter", "min-word"
        ).refusal()
    )


def test_verify_reads_everything(command, book, tmp_path):
    command("data", "prepare", book, "--output-dir", tmp_path / "out", "--vocab-size", "300")
    outcome = command("data", "verify", tmp_path / "out")
    assert outcome.code == 0
    assert "complete and unchanged, fingerprint" in outcome.out
    shard = tmp_path / "out" / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[::-1])
    assert "train" in command("data", "verify", tmp_path / "out").refusal()


TINY = [
    *("model.hidden_size=32", "model.num_hidden_layers=1", "model.num_attention_heads=2"),
    *("model.num_key_value_heads=1", "model.head_dim=16", "model.intermediate_size=32", "model.vocab_size=300"),
]
SMALL = [word for setting in TINY for word in ("--set", setting)] + [
    *("--vocab-size", 300, "--sequence-length", 32, "--batch-size", 4, "--precision", "float32", "--compile", "off"),
]


def test_file_whose_name_is_not_utf8_trains_resumes_and_is_prepared_again(command, book, tmp_path):
    odd = book.rename(tmp_path / os.fsdecode(b"caf\xe9.txt"))
    out = tmp_path / "out"
    begun = command("train", "--data", odd, "--output-dir", out, *SMALL, "--max-steps", 3)
    assert begun.code == 0, begun.err
    gone_on = command("train", "--data", odd, "--output-dir", out, *SMALL, "--max-steps", 5, "--resume")
    assert gone_on.code == 0, gone_on.err
    assert "caf\\udce9.txt" in (out / "README.md").read_text(encoding="utf-8")
    for name in ("run.yaml", "data/data.json", "data/ATTRIBUTION.json"):
        assert "caf" in (out / name).read_text(encoding="utf-8")
    fingerprints = []
    for name in ("one", "two"):
        again = command("data", "prepare", odd, "--output-dir", tmp_path / name, "--vocab-size", 300)
        assert again.code == 0, again.err
        fingerprints.append(again.out.split()[-1])
    assert fingerprints[0] == fingerprints[1]
    first, second = (json.loads((tmp_path / name / "data.json").read_text()) for name in ("one", "two"))
    assert first["source"] == second["source"]
    assert first["source"]["files"][0]["name"] == "caf\\udce9.txt"


def test_output_folder_whose_name_is_not_utf8_is_refused_and_nothing_written(command, book, tmp_path):
    out, prepared = tmp_path / os.fsdecode(b"out\xe9"), tmp_path / "prepared"
    assert command("data", "prepare", book, "--output-dir", prepared, "--vocab-size", 300).code == 0
    of_prepared = [word for word in SMALL if word not in ("--vocab-size", 300)]
    for words in (
        ("data", "prepare", book, "--output-dir", out, "--vocab-size", 300),
        ("train", "--data", book, "--output-dir", out, *SMALL, "--max-steps", 1),
        ("train", "--data", prepared, "--output-dir", out, *of_prepared, "--max-steps", 1),
    ):
        refusal = command(*words).refusal()
        assert "out\\udce9" in refusal
        assert "must have a name in UTF-8, got " in refusal
        assert refusal.endswith(": choose another --output-dir")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["book.txt", "prepared"]


def test_size_of_a_vocabulary_beside_a_tokenizer_is_refused(command, book, saved_model, tmp_path):
    words = ("--tokenizer", saved_model, "--vocab-size", 400)
    refusal = command("data", "prepare", book, "--output-dir", tmp_path / "out", *words).refusal()
    assert "`--vocab-size` has no effect on the tokenizer that `--tokenizer` names: leave one of them out" in refusal
    assert not (tmp_path / "out").exists()


def test_pattern_does_not_take_what_an_earlier_process_left_beside_the_output(command, book, tmp_path):
    fingerprints = []
    for name, pattern in (("one", "*.txt"), ("two", "*"), ("three", "**/*")):
        folder = tmp_path / name
        (folder / "out.partial" / "work").mkdir(parents=True)
        (folder / "book.txt").write_text(book.read_text())
        (folder / "out.lock").write_text('{"pid": 1}')
        (folder / "out.partial" / "work" / "heldout.txt").write_text("the cat sat")
        outcome = command("data", "prepare", folder / pattern, "--output-dir", folder / "out", "--vocab-size", 300)
        assert outcome.code == 0, outcome.err
        fingerprints.append(outcome.out.split()[-1])
        assert sorted(path.name for path in folder.iterdir()) == ["book.txt", "out"]
    assert len(set(fingerprints)) == 1
