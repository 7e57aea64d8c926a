"""`fanformer data prepare`: a folder that training can use, and what it says about it."""

import json

import pytest


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("the cat sat on the mat, and a small model spoke of small things.\n" * 200)
    return path


def test_prepared_folder_is_what_the_summary_says(command, book, tmp_path):
    from fanformer.data.shards import open_prepared

    outcome = command("data", "prepare", book, "--output-dir", tmp_path / "out", "--vocab-size", "300")
    assert (outcome.code, outcome.err) == (0, "")
    prepared = open_prepared(tmp_path / "out")
    assert prepared.fingerprint[:16] in outcome.out
    assert f"{len(prepared.split('train').tokens):,} tokens" in outcome.out.splitlines()[0]
    assert len(prepared.tokenizer()) <= 300


def test_given_tokenizer_is_used(command, book, saved_model, tmp_path):
    from fanformer.data.shards import open_prepared

    command("data", "prepare", book, "--output-dir", tmp_path / "out", "--tokenizer", saved_model)
    assert len(open_prepared(tmp_path / "out").tokenizer()) == 300


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
