"""`fanformer quantize`: a file that the other verbs take, and a report of what it lost."""

import json
import os

import pytest

from tests.saved_models import recurrent_model  # noqa: F401


def test_file_is_written_reported_and_measured(command, saved_model, tmp_path):
    outcome = command("quantize", saved_model, "--format", "gguf", "--type", "f16", "--output-dir", tmp_path / "out")
    assert (outcome.code, outcome.err) == (0, "")
    path = tmp_path / "out/model-f16.gguf"
    lines = outcome.out.splitlines()
    assert lines[0].split() == ["tensor", "shape", "type", "bits", "error"]
    assert lines[1].split()[:6] == ["token_embd.weight", "320", "x", "64", "f16", "16.00"]
    assert "norms, gates and biases stay float32" in outcome.out
    assert f"{path}: {path.stat().st_size:,} bytes" in outcome.out
    assert json.loads(path.with_suffix(".json").read_text())["asked_type"] == "f16"

    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 20)
    words = ("--text", text, "--device", "cpu", "--json", "-")
    before = json.loads(command("eval", saved_model, *words).out)
    after = json.loads(command("eval", path, *words).out)
    assert after["tokens"] == before["tokens"]
    assert after["bits_per_byte"] == pytest.approx(before["bits_per_byte"], rel=1e-3)  # float16 has 11 bits
    assert after["bits_per_byte"] != before["bits_per_byte"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "onnx"], "`--format` must be gguf, gptq, awq or gptq-v1, got 'onnx'."),
        ([], "`--format` or `--scan` is needed, and not both: gguf, gptq, awq or gptq-v1 write a model."),
        (["--format", "gptq", "--type", "q8_0"], "`--type` has no effect on `--format gptq`: leave it out."),
        (["--format", "gguf", "--bits", "8"], "`--bits` has no effect on `--format gguf`: leave it out."),
        (["--format", "awq", "--bits", "3"], "`--bits` must be 4 or 8, got 3."),
        (
            ["--scan", "--group-size", "48"],
            "`--group-size` must be a power of two from 16 on, such as 32, 64 or 128, got 48.",
        ),
        (["--format", "gguf", "--type", "q3_k"], "`--type` is 'q3_k': did you mean `q6_k`?"),
        (
            ["--format", "gguf", "--type", "f16", "--calibration", "stdlib"],
            "`--calibration` has no effect on the type f16: leave it out.",
        ),
        (
            ["--format", "gguf", "--calibration-tokens", "2048"],
            "`--calibration-tokens` has no effect on `--format gguf` without `--calibration`: leave it out.",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(command, saved_model, tmp_path, words, message):
    outcome = command("quantize", saved_model, "--output-dir", tmp_path, *words)
    assert outcome.refusal() == f"error: {message}"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["gptq", "awq", "gptq-v1"])
def test_a_recurrent_depth_is_left_to_what_sums_over_its_steps(command, recurrent_model, tmp_path, kind):  # noqa: F811
    words = ["quantize", recurrent_model, "--format", kind, "--calibration", tmp_path / "text.txt"]
    refusal = command(*words, "--output-dir", tmp_path / "out").refusal()
    library = "GPTQModel" if kind == "gptq-v1" else "llm-compressor"
    assert f"{recurrent_model} runs blocks several times, and {library} sees their inputs once: take" in refusal


FOLDERS = [["--format", kind] for kind in ("gptq", "awq", "gptq-v1")]


@pytest.mark.parametrize("words", [*FOLDERS, ["--format", "gguf"], ["--scan"]], ids=" ".join)
def test_a_read_only_place_is_refused_before_the_model_is_read(command, tmp_path, mount_disk, words):
    disk = mount_disk("size=64k,ro")
    refusal = command("quantize", tmp_path / "none", *words, "--output-dir", disk / "deep/out").refusal()
    assert f"{disk} cannot be written to, expected a folder for " in refusal


@pytest.mark.parametrize("words", FOLDERS, ids=" ".join)
def test_a_mount_point_is_refused_before_the_model_is_read(command, tmp_path, mount_disk, words):
    disk = mount_disk("size=64k")
    refusal = command("quantize", tmp_path / "none", *words, "--output-dir", disk).refusal()
    assert refusal == (
        f"error: {disk} is a mount point, which cannot be replaced: give a name in it as `--output-dir`."
    )


@pytest.mark.parametrize("words", FOLDERS, ids=" ".join)
def test_a_folder_that_cannot_be_made_is_refused_before_the_model_is_read(command, tmp_path, monkeypatch, words):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    command_words = ["quantize", tmp_path / "none", *words, "--output-dir"]
    assert f"{tmp_path / 'empty'} is the current folder" in command(*command_words, ".").refusal()
    odd = tmp_path / os.fsdecode(b"out\xe9")
    assert "must have a name in UTF-8, got " in command(*command_words, odd).refusal()
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_report_that_is_there_is_kept(command, saved_model, tmp_path):
    (tmp_path / "mine.json").write_text("my own")
    words = ["quantize", saved_model, "--format", "gguf", "--type", "f16", "--output-dir", tmp_path / "mine.gguf"]
    refusal = command(*words).refusal()
    assert f"{tmp_path}/mine.json is there already: give another `--output-dir`, or `--overwrite`." in refusal
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("mine.json", "my own")]


def test_disk_that_is_full_at_the_report_gets_no_file(command, saved_model, tmp_path, mount_disk):
    words = ["quantize", saved_model, "--format", "gguf", "--type", "f16", "--output-dir"]
    assert command(*words, tmp_path / "whole.gguf").code == 0
    pages = -(-(tmp_path / "whole.gguf").stat().st_size // os.sysconf("SC_PAGE_SIZE"))
    disk = mount_disk(f"nr_blocks={pages + 1}")
    assert "no space left on the disk" in command(*words, disk / "a.gguf").refusal()
    assert list(disk.iterdir()) == []


def test_damaged_file_is_one_line(command, tmp_path):
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\0\0\0")
    (tmp_path / "text.txt").write_text("a")
    outcome = command("eval", tmp_path / "cut.gguf", "--text", tmp_path / "text.txt")
    assert outcome.refusal() == f"error: {tmp_path}/cut.gguf: is truncated: 8 bytes; copy it again."


def test_help_names_the_types_and_defaults_that_there_are(command):
    from fanformer.gguf.importance import DEFAULT_TOKENS
    from fanformer.gguf.plan import OFFERED

    text = command("quantize", "--help").out
    assert "|".join(OFFERED) in text
    assert f"[default: {DEFAULT_TOKENS}]" in text


def test_scan_prints_and_saves_a_line_for_every_part(command, saved_model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 400)
    outcome = command("quantize", saved_model, "--scan", "--calibration", text, "--output-dir", tmp_path / "out")
    assert (outcome.code, outcome.err) == (0, "")
    saved = json.loads((tmp_path / "out/sensitivity.json").read_text())
    names = ["embedding", "qkv_input", "q", "k", "v", "o", "gate_up_input", "gate", "up", "down", "head"]
    assert [part["part"] for part in saved["parts"]] == names
    assert [line.split()[0] for line in outcome.out.splitlines()[2:-1]] == names
    assert all(part["bits_per_byte"] != saved["bits_per_byte"] for part in saved["parts"])


def test_scan_that_is_there_is_kept_unless_it_may_be_replaced(command, saved_model, tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 400)
    (tmp_path / "out").mkdir()
    file = tmp_path / "out/sensitivity.json"
    file.write_text("old")
    words = ["quantize", saved_model, "--scan", "--calibration", tmp_path / "text.txt", "--output-dir", file.parent]
    refusal = command(*words).refusal()
    assert refusal == f"error: {file} is there already: give another `--output-dir`, or `--overwrite`."
    assert file.read_text() == "old"
    assert command(*words, "--overwrite").code == 0
    assert json.loads(file.read_text())["bits"] == 4


def test_without_held_out_data_text_is_asked_for(command, saved_model, tmp_path):
    outcome = command("quantize", saved_model, "--scan", "--output-dir", tmp_path / "out")
    assert outcome.refusal() == (
        f"error: `--calibration` is needed, since {saved_model} has no run.yaml: give text that it was not trained on "
        "as `--calibration SPEC`."
    )
