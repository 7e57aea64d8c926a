"""The load benchmark: its dry run asks a real server, and it tells right answers from others."""

import asyncio
import json
import os
import subprocess
import sys

import pytest

from tests.saved_models import saved_model, tiny_tokenizer  # noqa: F401

pytest.importorskip("fastapi", reason="needs the extra `serve` (fastapi)")


@pytest.fixture
def serve(repository, monkeypatch):
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    import serve

    return serve


@pytest.fixture
def beside(serve):
    import serve_beside

    return serve_beside


@pytest.mark.ci
def test_the_dry_run_loses_nothing(repository):
    done = subprocess.run(
        [sys.executable, repository / "benchmarks" / "serve.py", "--dry-run"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = dict(line.rsplit(": ", 1) for line in done.stdout.splitlines() if ": " in line and "{" not in line)
    assert lines["requests"] == "48 requests"
    for load in ("1 clients stream", "1 clients whole", "4 clients stream", "4 clients whole"):
        assert lines[f"wrong {load}"] == lines[f"lost mixed or repeated {load}"] == "0 answers"
        assert int(lines[f"right {load}"].split()[0]) >= 5
        assert float(lines[f"tokens per second {load}"].split()[0]) > 0


def test_ids_are_read_off_a_text_and_what_is_none_is_told(serve):
    assert serve.tokens_of("w300;w4000;") == [300, 4000]
    assert serve.tokens_of("w300;x") == [300, -1]
    assert serve.tokens_of("w300;w40") == [300, -1]
    assert serve.tokens_of("") == []


def test_streams_are_read_in_chunks_and_one_that_was_cut_off_is_no_text(serve):
    events = [json.dumps({"choices": [{"text": text}]}) for text in ("w1;", "w2;")]
    whole = "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"]).encode()
    assert serve.streamed_text(whole) == "w1;w2;"
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (whole[:7], whole[7:])) + b"0\r\n\r\n"
    assert serve.streamed_text(chunks) == "w1;w2;"
    assert serve.streamed_text(whole[: whole.index(b"data: [DONE]")]) == "cut off"


def test_only_the_first_other_token_of_a_greedy_answer_is_weighed(serve):
    class Model:
        def log_likelihoods(self, ids):
            assert ids[:3] == [0, 9, 5]
            return [0.0, {6: -1.0, 7: -1.25}[ids[-1]]]

    assert serve.gap(Model(), serve.Case([0, 9], None, [5, 6, 1]), [5, 7, 2]) == 0.25


def test_the_load_beside_another_server_asks_what_nobody_asked_and_counts_whole_answers(beside, saved_model):  # noqa: F811
    from fanformer.server.models import ServedModel, SlotSettings
    from tests.server.conftest import running

    model = ServedModel.open(saved_model, "model", SlotSettings(2, 60, queue_size=8), device="cpu")
    counters = model.scheduler.counters
    with running({"model": model}) as client:
        asker = beside.Asker(client.port, 290, 20, 7, {"min_tokens": 7})
        assert asyncio.run(asker.rate(3, 6)) > 0
        assert (counters.prompt_tokens, counters.completion_tokens, counters.cached_tokens) == (6 * 20, 6 * 7, 0)
        short = beside.Asker(client.port, 290, 20, 7, {"min_tokens": 0, "logit_bias": {"0": 100}})
        with pytest.raises(SystemExit, match="an answer must have 7 tokens, got 1"):
            asyncio.run(short.rate(1, 1))
        wrong = beside.Asker(client.port, 290, 20, 7, {"min_tokens": 99})
        with pytest.raises(SystemExit, match=r"a server refused: b'HTTP/1\.1 400 "):
            asyncio.run(wrong.rate(1, 1))
    model.close()
