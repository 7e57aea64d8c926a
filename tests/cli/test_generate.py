"""`fanformer generate`: what it writes where, from which prompts, and how it stops."""

import json
import os
import signal
import sys
import time

import pytest

from fanformer.cli.generate import write_now
from fanformer.generation.torch_model import StopWhenInterrupted

FIXED = ("--seed", "1", "--max-length", "12", "--min-length", "12", "--device", "cpu")


def records(outcome):
    assert (outcome.code, outcome.err) == (0, ""), outcome
    return [json.loads(line) for line in outcome.out.splitlines()]


def test_single_text_is_prompt_and_continuation_and_nothing_else(command, saved_model):
    record = records(command("generate", saved_model, "the cat", *FIXED, "--json"))[0]
    outcome = command("generate", saved_model, "the cat", *FIXED)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == f"the cat{record['text']}\n"
    assert record["tokens"] == 12
    assert record["finish_reason"] == "length"
    assert record["seed"] == 1


def test_commands_draw_as_the_folder_asks_where_no_option_says_otherwise(asking, command):
    folder = asking(do_sample=True, temperature=1.25, top_k=7, top_p=0.7)
    spelt = ("--temperature", 1.25, "--top-k", 7, "--top-p", 0.7)
    usual = ("--temperature", 0.7, "--top-k", 100, "--top-p", 0.85)  # the defaults, said aloud, are an option too
    for verb, prompt, text in (("generate", ("the cat",), ""), ("chat", (), "the cat\n")):
        asked, told, other = (
            command(verb, folder, *prompt, *FIXED, *map(str, more), text=text) for more in ((), spelt, usual)
        )
        assert (asked.code, asked.out) == (0, told.out)
        assert asked.out != other.out


def test_many_prompts_from_words_file_and_standard_input_give_the_same(command, saved_model, tmp_path):
    prompts = ["the cat", "", "def add"]
    from_words = records(command("generate", saved_model, *prompts, *FIXED, "--json"))
    (tmp_path / "prompts.txt").write_text("the cat\n\ndef add\n")
    from_file = records(command("generate", saved_model, "--prompts-file", tmp_path / "prompts.txt", *FIXED, "--json"))
    words = ("generate", saved_model, "--prompts-file", "-", *FIXED, "--json", "--batch-size", "2")
    from_input = records(command(*words, text="the cat\n\ndef add\n"))
    assert [record["prompt"] for record in from_words] == prompts
    for record in [*from_words, *from_file, *from_input]:
        del record["tokens_per_second"]
    assert from_words == from_file == from_input
    outcome = command("generate", saved_model, *prompts, *FIXED)
    assert outcome.out == "".join(f"{record['prompt']}{record['text']}\n\n" for record in from_words)


def test_only_line_feeds_end_a_prompt(command, saved_model, tmp_path):
    prompts = ["a\x0cb", "a\u2028b", "a\x85b\x1c", "a\rb", ""]
    (tmp_path / "prompts.txt").write_bytes("\r\n".join([*prompts, ""]).encode())
    outcome = command("generate", saved_model, "--prompts-file", tmp_path / "prompts.txt", *FIXED, "--json")
    assert [json.loads(line)["prompt"] for line in outcome.out.split("\n")[:-1]] == prompts


def test_no_prompt_begins_a_new_text(command, saved_model):
    outcome = command("generate", saved_model, *FIXED)
    assert outcome.code == 0
    assert len(outcome.out) > 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--top-p", "3"], "`top_p` must be in (0, 1], got 3.0: 1 draws from all tokens."),
        (["--temperature", "-1"], "`temperature` must be in [0, 1.7e+38], got -1.0: 0 is greedy."),
        (["--min-length", "200"], "`min_length` must be between 0 and max_length (100), got 200."),
        (["--batch-size", "0"], "`batch_size` must be at least 1, got 0."),
        (["--device", "tpu"], "`device` must be auto, cpu, cuda, cuda:N or mps, got 'tpu'."),
        (["--dtype", "int4"], "`dtype` must be auto, float32, bfloat16, float16, got 'int4'."),
        (
            ["--max-length", "500", "--device", "cpu"],
            "prompt 'the cat' has 3 tokens with its start token, and max_length 500 more make 503; "
            "the model has 128 positions: lower max_length to 125.",
        ),
    ],
)
def test_settings_out_of_range_are_refused(command, saved_model, words, message):
    outcome = command("generate", saved_model, "the cat", *words)
    assert outcome.refusal() == f"error: {message}"
    assert outcome.out == ""


def test_prompts_from_two_places_or_none_are_refused(command, saved_model, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    words = ("generate", saved_model, "--prompts-file")
    assert "keep one of them" in command(*words, tmp_path / "empty.txt", "the cat").refusal()
    assert f"no prompts in {tmp_path / 'empty.txt'}" in command(*words, tmp_path / "empty.txt").refusal()
    assert "must be UTF-8, got byte 0xe9 in" in command(*words, tmp_path / "latin.txt").refusal()
    assert f"no such file or folder: {tmp_path / 'none'}" in command(*words, tmp_path / "none").refusal()


def test_spoilt_model_folders_are_refused(command, model_copy, tmp_path):
    assert "no model folder" in command("generate", tmp_path / "none", "x").refusal()
    with (model_copy / "model.safetensors").open("r+b") as stream:
        stream.truncate(1000)
    assert "is truncated" in command("generate", model_copy, "x").refusal()
    (model_copy / "model.safetensors").rename(model_copy / "pytorch_model.bin")
    assert "never loaded" in command("generate", model_copy, "x").refusal()


@pytest.fixture(scope="session")
def long_model(tmp_path_factory, tiny_model, tiny_tokenizer):
    """Folder of a model whose texts take a minute."""
    folder = tmp_path_factory.mktemp("long") / "model"
    tiny_model(vocab_size=320, eos_token_id=0, max_position_embeddings=20000).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def read_some(process, count):
    """Return what a process has written once it is `count` bytes; fails after a minute."""
    deadline = time.monotonic() + 60
    while process.stdout.stat().st_size < count:
        assert time.monotonic() < deadline, process.stderr.read_text()
        time.sleep(0.01)
    return process.stdout.read_bytes()


LONG = ("--max-length", "19000", "--min-length", "19000", "--seed", "1", "--device", "cpu")


def test_interrupt_stops_the_streamed_text_where_it_is(warm, long_model, tmp_path):
    process = warm.start(["generate", long_model, "the cat", *LONG], tmp_path)
    first = read_some(process, 30)
    assert first.startswith(b"the cat")  # streamed: the text is there long before its end
    process.kill(signal.SIGINT)
    assert process.wait() == 130
    assert process.stderr.read_bytes() == b""
    text = process.stdout.read_bytes()
    assert text.startswith(first)
    assert text.endswith(b"\n")
    assert len(text) < 19000


def test_interrupt_ends_json_with_a_record_that_says_so(command, long_model, monkeypatch):
    check = StopWhenInterrupted.__call__

    def interrupt_at_20(self, input_ids, scores, **rest):
        if input_ids.shape[1] == 20:
            os.kill(os.getpid(), signal.SIGINT)
        return check(self, input_ids, scores, **rest)

    monkeypatch.setattr(StopWhenInterrupted, "__call__", interrupt_at_20)
    outcome = command("generate", long_model, "a", "b", "--batch-size", "1", *LONG, "--json")
    assert (outcome.code, outcome.err) == (130, "")
    (record,) = [json.loads(line) for line in outcome.out.splitlines()]
    assert record["prompt"] == "a"
    assert record["finish_reason"] == "interrupted"
    assert record["tokens"] < 20


def test_reader_that_goes_away_ends_the_text_quietly(warm, long_model, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    process = warm.start(["generate", long_model, "the cat", *LONG], tmp_path, stdout=pipe)
    with pipe.open("rb", buffering=0) as reader:
        assert reader.read(20)
    assert process.wait() == 141
    assert process.stderr.read_bytes() == b""


def test_chat_goes_on_after_an_interrupted_text(warm, long_model, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    process = warm.start(["chat", long_model, *LONG], tmp_path, stdin=pipe)
    with pipe.open("wb", buffering=0) as lines:
        lines.write(b"the cat\n")
        read_some(process, 30)
        process.kill(signal.SIGINT)
        lines.write(b"/help\n/exit\n")
    assert process.wait() == 0
    err = process.stderr.read_bytes()
    assert err.count(b"stopped.") == 1
    assert err.endswith(b"goes on in the next.\n")


def test_control_characters_of_a_model_do_not_reach_a_terminal(monkeypatch, capsys):
    write_now("a\x1b[2Jb\r\n\tc\x9b")
    assert capsys.readouterr().out == "a\x1b[2Jb\r\n\tc\x9b"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    write_now("a\x1b[2Jb\r\n\tc\x9b")
    assert capsys.readouterr().out == "a\ufffd[2Jb\ufffd\n\tc\ufffd"
