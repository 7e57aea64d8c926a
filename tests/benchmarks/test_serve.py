"""The load benchmark: its dry run asks a real server, and it tells right answers from others."""

import asyncio
import json
import os
import random
import socket
import subprocess
import sys
from collections import Counter

import numpy as np
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
    assert lines["wrong or lost"] == "0 answers"
    assert 0 < float(lines["prompt tokens not read"].split()[0]) < 0.3  # the start token is everybody's
    for load in ("1 clients stream", "1 clients whole", "4 clients stream", "4 clients whole"):
        assert lines[f"wrong {load}"] == lines[f"lost mixed or repeated {load}"] == "0 answers"
        assert int(lines[f"right {load}"].split()[0]) >= 5
        assert float(lines[f"tokens per second {load}"].split()[0]) > 0


def test_ids_are_read_off_a_text_and_what_is_none_is_told(serve):
    assert serve.tokens_of("w300;w4000;") == [300, 4000]
    assert serve.tokens_of("w300;x") == [300, -1]
    assert serve.tokens_of("w300;w40") == [300, -1]
    assert serve.tokens_of("") == []


def test_no_answer_of_the_random_model_holds_a_single_byte_which_would_be_no_text(serve, tmp_path):
    from fanformer.loading import load_text_model

    serve.save_model(tmp_path / "model", dry=True)
    model = load_text_model(tmp_path / "model", device="cpu")
    cases = serve.make_cases(model, 12, 24, 12, 512)
    assert {len(case.expected) for case in cases} == {12}
    assert all(number not in serve.BYTES and number > 0 for case in cases for number in [*case.ids[1:], *case.expected])
    assert len({tuple(case.expected) for case in cases}) == 12


def test_streams_are_read_in_chunks_and_one_that_was_cut_off_is_no_text(serve):
    events = [json.dumps({"choices": [{"text": text}]}) for text in ("w1;", "w2;")]
    whole = "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"]).encode()
    assert serve.streamed_text(whole) == "w1;w2;"
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (whole[:7], whole[7:])) + b"0\r\n\r\n"
    assert serve.streamed_text(chunks) == "w1;w2;"
    assert serve.streamed_text(whole[: whole.index(b"data: [DONE]")]) == "cut off"


@pytest.fixture
def served(saved_model):  # noqa: F811
    """The tiny model with two slots, and a client of its server, which calls it `model`."""
    from fanformer.server.models import ServedModel, SlotSettings
    from tests.server.conftest import running

    model = ServedModel.open(saved_model, "model", SlotSettings(2, 100, queue_size=8), device="cpu")
    with running({"model": model}) as client:
        yield model, client
    model.close()


def load_of(serve, port, seed=None, new=60):
    return serve.Load(port, [serve.Case([0, *range(40, 70)], seed, [])], new, 0.0)


def test_the_first_token_is_timed_by_its_text_and_not_by_a_ping_before(serve, served, monkeypatch):
    import fanformer.server.answering as answering
    from tests.server.test_gate import slowed

    model, client = served
    slowed(model, monkeypatch, 0.4)
    monkeypatch.setattr(answering, "_PING_SECONDS", 0.02)
    load = load_of(serve, client.port, new=2)
    status, data, first = asyncio.run(load._answer(load.cases[0], True))
    assert status == 200
    assert data.index(b": ping") < data.index(b"data: ")
    assert first >= 0.4


@pytest.mark.parametrize(("stream", "seconds"), [(True, None), (True, 0.1), (False, 0.1)])
def test_who_leaves_is_seen_by_the_server_at_once(serve, served, monkeypatch, stream, seconds):
    from tests.server.test_faults import wait_for
    from tests.server.test_gate import slowed

    model, client = served
    slowed(model, monkeypatch, 0.05)
    load = load_of(serve, client.port)

    async def leave():
        await load._leave(load.cases[0], stream, seconds)
        await asyncio.to_thread(wait_for, lambda: model.scheduler.counters.finished["cancelled"] == 1)

    asyncio.run(leave())
    assert model.scheduler.counters.completion_tokens < 60


def test_a_prompt_that_comes_again_is_read_again_once_the_slots_were_filled(serve, served):
    model, client = served
    load, counters = load_of(serve, client.port, new=2), model.scheduler.counters

    def cached():
        before = counters.cached_tokens
        asyncio.run(load._answer(load.cases[0], False))
        return counters.cached_tokens - before

    assert cached() <= 1  # the start token is everybody's
    assert cached() == len(load.cases[0].ids) - 1
    for _ in range(2):
        serve.fill_slots(client.port, 2)
        assert cached() <= 1
    assert serve.metrics(client.port)["fanformer_cached_tokens_total"] == counters.cached_tokens


def test_what_gets_no_answer_or_is_refused_is_lost_and_malformed_requests_need_a_4xx(serve, served):
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and nobody listens
        load, tally = load_of(serve, bound.getsockname()[1]), serve.Tally()
        asyncio.run(load._ask(load.cases[0], True, tally))
        assert asyncio.run(load._malformed(random.Random(0))) == 0
    load = load_of(serve, served[1].port, new=90)  # more than there are positions
    asyncio.run(load._ask(load.cases[0], True, tally))
    assert tally.outcomes == {serve.LOST: 1, "refused 400": 1}
    told = {"malformed 0": 1, "malformed 500": 1, "malformed 404": 5, serve.WRONG: 1, serve.RIGHT: 9, serve.NEAR_TIE: 2}
    assert serve.wrong_or_lost(tally.outcomes + Counter(told)) == 5


@pytest.mark.parametrize("seed", [None, 5])
def test_an_answer_that_differs_is_wrong_unless_its_token_was_nearly_drawn(serve, saved_model, seed):  # noqa: F811
    from fanformer.generation.interruption import Interruption
    from fanformer.generation.sampling import nucleus
    from fanformer.generation.settings import GenerationSettings
    from fanformer.generation.text_model import Batch, row_seed
    from fanformer.loading import load_text_model

    model, ids, new, place = load_text_model(saved_model, device="cpu"), [0, *range(40, 60)], 8, 5
    how = {"temperature": 0.0, "top_p": 1.0} if seed is None else serve.SAMPLED
    settings = GenerationSettings(max_length=new, min_length=new, top_k=0, seed=seed or 0, **how)
    [expected] = model.continue_batch(
        Batch([ids], [""], settings, None, Interruption(), seeds=[row_seed(seed or 0, 0)])
    )
    slot = serve.one_slot(model, 300, len(ids) + new)
    logits = slot.forward({0: [*ids, *expected[:place]]})[0][-1][:300]
    logits[0] = -np.inf  # the end token, which does not come before the last
    scores, kept = logits.astype(np.float64), np.arange(300)
    if seed is not None:
        scores = scores / how["temperature"]
        kept = nucleus(kept, (scores - scores.max()).astype(np.float32), how["top_p"])
        noise = slot.noise(row_seed(seed, 0))
        scores = scores - np.log([noise() for _ in range(place + 1)][-1])
    order = sorted(kept, key=lambda number: scores[number])
    assert order[-1] == expected[place]
    gap = float(scores[order[-1]] - scores[order[-2]]) * (1 if seed is None else how["temperature"])
    assert gap > 0.02  # so that a margin of 0.01 is no near tie
    for margin, other, is_tie in (
        (gap + 1e-3, order[-2], True),  # float32 rounds at some 1e-6
        (0.01, order[-2], False),
        (0.01, int(logits[1:].argmin()) + 1, False),
    ):
        judge = serve.Judge(slot, 300, model.end_ids, margin)
        found = [*expected[:place], int(other), *[1] * (new - place - 1)]
        assert judge.is_near_tie(serve.Case(ids, seed, expected), found) == is_tie
    slot.close()


@pytest.mark.parametrize("name", ["serve", "serve_beside"])
def test_a_dry_run_writes_nothing_into_the_ledger(serve, beside, monkeypatch, capsys, name):
    words = ["--llama-server", "x"] if name == "serve_beside" else []
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--dry-run", "--write", *words])
    with pytest.raises(SystemExit):
        {"serve": serve, "serve_beside": beside}[name].parse()
    assert "--write has no effect with --dry-run" in capsys.readouterr().err


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
