"""`fanformer eval`: the figures are those of a plain forward pass, per file and in total."""

import json
import math

import pytest

from tests.evaluation.released_files import write_released_files


@pytest.fixture
def texts(tmp_path):
    paths = tmp_path / "a.txt", tmp_path / "b.txt"
    paths[0].write_text("the cat sat on the mat. ")
    paths[1].write_text("def add(a, b):\n    return a + b\n")
    return paths


def evaluate(command, model, *words):
    outcome = command("eval", model, *words, "--device", "cpu", "--json", "-")
    assert outcome.code == 0, outcome
    return json.loads(outcome.out)


def test_figures_are_those_of_a_forward_pass(command, saved_model, loaded, texts):
    import torch

    result = evaluate(command, saved_model, "--text", texts[0])
    model, tokenizer = loaded
    ids = torch.tensor([[0, *tokenizer.encode(texts[0].read_text()), 0]])
    with torch.no_grad():
        loss = float(model(ids, labels=ids, use_cache=False).loss)
    # float32 sums over a row that is packed here and single there
    assert result["loss"] == pytest.approx(loss, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert result["tokens"] == ids.shape[1] - 1
    assert result["bytes"] == texts[0].stat().st_size
    assert result["bits_per_byte"] == pytest.approx(loss * result["tokens"] / math.log(2) / result["bytes"], rel=1e-5)


def test_total_is_the_sum_over_files_however_they_are_named(command, saved_model, texts):
    together = evaluate(command, saved_model, "--text", *texts)
    assert together["files"] == evaluate(command, saved_model, "--text", texts[0], "--text", texts[1])["files"]
    parts = together["files"].values()
    assert together["tokens"] == sum(part["tokens"] for part in parts)
    assert together["bytes"] == sum(part["bytes"] for part in parts)
    nats = sum(part["loss"] * part["tokens"] for part in parts)
    assert together["loss"] == pytest.approx(nats / together["tokens"])


def test_table_and_json_file_say_the_same(command, saved_model, texts, tmp_path):
    outcome = command("eval", saved_model, "--text", *texts, "--device", "cpu", "--json", tmp_path / "result.json")
    total = json.loads((tmp_path / "result.json").read_text())
    line = next(line for line in outcome.out.splitlines() if line.endswith("total"))
    assert f"{total['loss']:8.4f} +-{total['loss_stderr']:6.4f}" in line


@pytest.fixture
def records(tmp_path):
    path = tmp_path / "mixed.jsonl"
    rows = [("prose", "the cat sat on the mat. "), ("code", "x = 1\n"), ("prose", "a small model. ")]
    path.write_text("".join(json.dumps({"text": text, "src": src, "id": 1}) + "\n" for src, text in rows))
    return path


def test_figures_by_source_are_those_of_its_documents(command, saved_model, texts, records, tmp_path):
    result = evaluate(command, saved_model, "--text", records, texts[0])
    assert result["by"] == "src"
    assert list(result["sources"]) == ["code", "prose"]
    assert [result["sources"][name]["documents"] for name in ("code", "prose")] == [1, 2]
    alone = tmp_path / "alone.txt"
    alone.write_text("x = 1\n")
    code = evaluate(command, saved_model, "--text", alone)
    assert result["sources"]["code"]["loss"] == pytest.approx(code["loss"], rel=1e-5)
    assert result["sources"]["code"]["loss_stderr"] is None
    assert result["sources"]["prose"]["bits_per_byte_stderr"] > 0
    assert "sources" not in evaluate(command, saved_model, "--text", records, "--by", "none")
    outcome = command("eval", saved_model, "--text", records, "--device", "cpu")
    assert "src prose" in outcome.out
    assert "no standard error (-) where there is one document only" in outcome.out


def test_field_of_sources_that_is_not_there_is_refused(command, saved_model, texts, records):
    outcome = command("eval", saved_model, "--text", records, "--by", "origin")
    assert "no field `origin`; it has `text`, `src`, `id`" in outcome.err.splitlines()[-1]
    refusal = command("eval", saved_model, "--text", texts[0], "--by", "src").refusal()
    assert f"`--by src` applies to jsonl and parquet files, got {texts[0]}: leave it out." in refusal


def test_model_without_tokenizer_is_refused(command, model_copy, texts):
    for file in model_copy.glob("tokenizer*"):
        file.unlink()
    assert "no tokenizer in" in command("eval", model_copy, "--text", texts[0]).refusal()


def test_bad_input_is_refused_and_nothing_written(command, saved_model, texts, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    out = tmp_path / "result.json"
    for words, message in (
        ([], "`--text` or `--tasks` is needed to evaluate"),
        (["--text", tmp_path / "none.txt"], f"no such file or folder: {tmp_path / 'none.txt'}"),
        (["--text", tmp_path / "empty.txt"], "holds no text"),
        (
            ["--text", texts[0], "--sequence-length", "999"],
            "`sequence_length` must be at most the model's 128 positions",
        ),
        (["--text", texts[0], "--batch-size", "0"], "`batch_size` must be at least 1, got 0."),
        (["--text", texts[0], texts[0]], "`--text` must name every file once"),
    ):
        outcome = command("eval", saved_model, *words, "--device", "cpu", "--json", out)
        assert outcome.code == 2
        assert message in outcome.err.splitlines()[-1]
        assert not out.exists()
    assert (
        "must be a file in an existing folder"
        in command("eval", saved_model, "--text", texts[0], "--json", tmp_path / "no" / "x.json").refusal()
    )


def test_empty_file_is_refused_before_anything_is_measured(command, saved_model, texts, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    for name in ("empty.txt", "empty.jsonl"):
        refusal = command("eval", saved_model, "--text", texts[0], tmp_path / name, "--device", "cpu").refusal()
        assert refusal == f"error: data `{tmp_path / name}` holds no text: name a source that does"


def test_figures_of_files_before_a_damaged_one_are_told(command, saved_model, texts, tmp_path):
    broken, out = tmp_path / "broken.jsonl", tmp_path / "result.json"
    broken.write_text('{"text": "a good line"}\n{"text":\n')
    words = ("eval", saved_model, "--text", *texts, broken, "--device", "cpu")
    outcome = command(*words, "--json", out)
    assert outcome.code == 2
    assert "broken.jsonl:2: expected a JSON object on every line" in outcome.err.splitlines()[-1]
    assert [line.split()[-1] for line in outcome.out.splitlines()[1:3]] == [str(path) for path in texts]
    told = json.loads(out.read_text())
    assert told.pop("incomplete")
    assert told == evaluate(command, saved_model, "--text", *texts)


def test_figures_of_texts_are_told_if_the_tasks_cannot_be_done(command, saved_model, texts, tmp_path):
    pytest.importorskip("lm_eval", reason="needs the extra `eval` (lm-evaluation-harness)")
    words = ("--tasks", "sciq", "--data-dir", tmp_path, "--cache-dir", tmp_path / "cache", "--device", "cpu")
    outcome = command("eval", saved_model, "--text", texts[0], *words)
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1].startswith("error: `sciq` needs ")
    assert outcome.out.splitlines()[1].endswith(str(texts[0]))


def test_tasks_and_text_go_into_one_json(command, saved_model, texts, tmp_path):
    pytest.importorskip("lm_eval", reason="needs the extra `eval` (lm-evaluation-harness)")
    data = write_released_files(tmp_path / "data")
    words = ["--text", texts[0], "--tasks", "arc_easy,lambada", "--data-dir", data, "--cache-dir", tmp_path / "cache"]
    result = evaluate(command, saved_model, *words, "--limit", "4")
    assert result["tokens"] > 0
    assert result["tasks"]["arc_easy"]["documents"] == result["limit"] == 4
    assert set(result["tasks"]["lambada"]) >= {"perplexity", "perplexity_stderr", "acc", "answer_bits_per_byte"}
    again = command("eval", saved_model, *words, "--limit", "4", "--device", "cpu")
    assert f"{result['tasks']['arc_easy']['answer_bits_per_byte']:.4f}" in again.out
    assert "requests in" in again.err


def test_options_of_tasks_without_tasks_are_refused(command, saved_model, texts, tmp_path):
    refusal = command("eval", saved_model, "--text", texts[0], "--limit", "3").refusal()
    assert "`--limit` applies to `--tasks`, got 3 without: leave it out." in refusal
    refusal = command("eval", saved_model, texts[0], "--tasks", "piqa").refusal()
    assert f"`{texts[0]}` stands alone: give files to predict as `--text FILE ...`." in refusal
    refusal = command("eval", saved_model, "--tasks", "pica", "--data-dir", tmp_path).refusal()
    assert "no task `pica`: did you mean `piqa`?" in refusal
