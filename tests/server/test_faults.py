"""What goes wrong on the way: hang-ups, clients that never read, drains, full disks, jumping clocks."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from fanformer.server import scheduler
from fanformer.server.limits import Limits
from fanformer.server.models import ServedModel, SlotSettings
from tests.server.conftest import PATIENCE_SECONDS, Client, check_error, offline, running
from tests.server.test_gate import HEAD, SHORT, slowed, streaming

LONG = {"model": "tiny", "prompt": "the cat", "max_tokens": 90, "min_tokens": 90}


@pytest.fixture(scope="module")
def model(saved_model):
    """The tiny model on torch with two slots."""
    found = ServedModel.open(saved_model, "tiny", SlotSettings(2, 100, queue_size=4), device="cpu")
    yield found
    found.close()


def wait_for(condition):
    until = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def sent(client, body, path="/v1/completions", **fields):
    """Send a request without reading the answer; return the socket."""
    data = json.dumps({**body, **fields}).encode()
    begun = client.socket()
    begun.sendall(HEAD.replace(b"/v1/completions", path.encode()) + b"content-length: %d\r\n\r\n" % len(data) + data)
    return begun


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("ending", ["close", "reset", "half"])
def test_a_hang_up_frees_its_slot_while_it_writes(model, monkeypatch, stream, ending):
    slowed(model, monkeypatch, 0.02)
    with running({"tiny": model}) as client:
        before = model.scheduler.counters.finished["cancelled"]
        begun = sent(client, LONG, stream=stream)
        wait_for(lambda: model.scheduler.running == 1)
        if ending == "reset":
            begun.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        if ending == "half":
            begun.shutdown(socket.SHUT_WR)
        else:
            begun.close()
        wait_for(lambda: model.scheduler.counters.finished["cancelled"] == before + 1)
        assert model.scheduler.running == 0
        wait_for(lambda: client.service.gate.in_work == 0)
        begun.close()


@pytest.mark.parametrize("at_once", [True, False])
def test_a_hang_up_behind_a_next_request_is_seen_too(model, monkeypatch, at_once):
    slowed(model, monkeypatch, 0.02)
    with running({"tiny": model}) as client:
        before = model.scheduler.counters.finished["cancelled"]
        data = json.dumps(LONG).encode()
        request, following = HEAD + b"content-length: %d\r\n\r\n" % len(data) + data, b"GET /health HTTP/1.1\r\n"
        begun = client.socket()
        begun.sendall(request + following if at_once else request)
        wait_for(lambda: model.scheduler.running == 1)
        begun.sendall(following)
        begun.close()
        wait_for(lambda: model.scheduler.counters.finished["cancelled"] == before + 1)


def test_a_next_request_sent_too_early_ends_the_connection_with_the_answer(model, monkeypatch):
    slowed(model, monkeypatch, 0.02)
    with running({"tiny": model}) as client:
        data = json.dumps(SHORT).encode()
        with client.socket() as begun:
            begun.sendall((HEAD + b"content-length: %d\r\n\r\n" % len(data) + data) * 2)
            answer = b""
            while more := begun.recv(65536):
                answer += more
        assert answer.count(b"HTTP/1.1 200 ") == 1


def test_a_large_request_keeps_its_connection(model):
    with running({"tiny": model}) as client, client.socket() as begun:
        wait_for(lambda: client.server.server_state.connections)
        [connection] = client.server.server_state.connections
        data = json.dumps({**SHORT, "prompt": "a" * 100_000}).encode()
        request = HEAD + b"content-length: %d\r\n\r\n" % len(data) + data
        for _ in range(2):
            connection.loop.call_soon_threadsafe(connection.data_received, request)  # in one piece, as it may come
            response = http.client.HTTPResponse(begun)
            response.begin()
            check_error(response.status, json.loads(response.read()))


def test_a_hang_up_while_it_waits_or_is_read_leaves_nothing_behind(model, monkeypatch):
    monkeypatch.setattr(model.slots, "chunk_tokens", 2)
    slowed(model, monkeypatch, 0.02)
    with running({"tiny": model}) as client:
        before = dict(model.scheduler.counters.finished)
        reading = [sent(client, {**SHORT, "prompt": "the cat sat on the mat. " * 5}) for _ in range(2)]
        wait_for(lambda: model.scheduler.running == 2)
        waiting = [sent(client, SHORT) for _ in range(2)]
        wait_for(lambda: model.scheduler.waiting == 2)
        waiting[0].close()
        reading[0].close()
        wait_for(lambda: model.scheduler.counters.finished["cancelled"] == before["cancelled"] + 2)
        answers = [one.recv(65536) for one in (reading[1], waiting[1])]
        assert all(answer.startswith(b"HTTP/1.1 200 ") for answer in answers)
        wait_for(lambda: client.service.gate.in_work == 0)
        for one in (reading[1], waiting[1]):
            one.close()


def test_others_keep_their_answers_when_neighbours_hang_up(model, monkeypatch, saved_model):
    slowed(model, monkeypatch, 0.01)
    from fanformer.loading import load_text_model

    model.offline = load_text_model(saved_model, device="cpu")
    expected = offline(model, ["def"], temperature=0, max_length=40)[0].text
    with running({"tiny": model}) as client:
        found = []

        def ask():
            found.append(client.complete(prompt="def", max_tokens=40, temperature=0)["choices"][0]["text"])

        asking = threading.Thread(target=ask)
        asking.start()
        for index in range(6):
            neighbour = sent(client, LONG, stream=bool(index % 2))
            time.sleep(0.03)
            neighbour.close()
        asking.join(PATIENCE_SECONDS)
        assert found == [expected]


def test_a_client_that_never_reads_is_cut_off_and_holds_up_nobody(saved_model):
    model = ServedModel.open(saved_model, "tiny", SlotSettings(2, 100, queue_size=300), device="cpu")
    with running({"tiny": model}, None, Limits(write_seconds=0.5)) as client:
        stuck = socket.socket()
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        stuck.connect(("127.0.0.1", client.port))
        body = {**SHORT, "prompt": ["the cat"] * 64, "max_tokens": 90, "logprobs": 5, "stream": True, "min_tokens": 90}
        data = json.dumps(body).encode()
        stuck.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(data) + data)
        wait_for(lambda: model.scheduler.counters.finished["cancelled"] > 0)
        wait_for(lambda: model.scheduler.running == 0)
        assert client.complete(**SHORT)
        stuck.close()
    model.close()


def asked_for_much(client, model):
    """Ask for 280 kB without reading them, where the system keeps little; return the connection and the text."""
    tokens = model.encode("the cat")[1:] * 40_000
    begun = socket.socket()
    begun.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
    begun.settimeout(PATIENCE_SECONDS)
    begun.connect(("127.0.0.1", client.port))
    data = json.dumps({"model": "tiny", "tokens": tokens}).encode()
    begun.sendall(HEAD.replace(b"/v1/completions", b"/detokenize") + b"content-length: %d\r\n\r\n" % len(data) + data)
    wait_for(lambda: client.service.gate.responses["/detokenize", 200] == 1)
    return begun, model.reader.decode(tokens)


def test_a_client_that_reads_slowly_is_cut_off_only_where_it_stops(model, monkeypatch):
    monkeypatch.setattr("fanformer.server.process._SEND_BYTES", 16384)
    with running({"tiny": model}) as client:
        slow, _ = asked_for_much(client, model)
        [connection] = client.server.server_state.connections
        transport = connection.transport

        def is_ended_when_time_is_up():
            done = threading.Event()

            def run():
                if not transport.is_closing():
                    connection._write_timer._run()
                done.set()

            connection.loop.call_soon_threadsafe(run)
            assert done.wait(PATIENCE_SECONDS)
            return transport.is_closing()

        for _ in range(2):
            unread = transport.get_write_buffer_size()
            while transport.get_write_buffer_size() == unread:
                assert slow.recv(4096)
            assert not is_ended_when_time_is_up()
        wait_for(is_ended_when_time_is_up)
        slow.close()


def test_an_answer_that_takes_too_long_is_ended(model, monkeypatch):
    slowed(model, monkeypatch, 0.05)
    with running({"tiny": model}, None, Limits(answer_seconds=1)) as client:
        status, headers, body = client("POST", "/v1/completions", LONG)
        assert check_error(status, body) == (504, body["error"])
        assert headers["x-should-retry"] == "false"
        assert body["error"]["code"] == "timeout"
        status, _, text = client("POST", "/v1/completions", {**LONG, "stream": True})
        *pieces, error, done, end = text.split("\n\n")
        assert status == 200
        assert pieces
        check_error(504, json.loads(error[6:]))
        assert (done, end) == ("data: [DONE]", "")
        wait_for(lambda: model.scheduler.running == 0)


def test_a_failing_step_is_an_error_to_its_clients_and_broken_health_after_three(model, monkeypatch):
    def failing(tokens, every=False):
        raise MemoryError

    with running({"tiny": model}) as client:
        with monkeypatch.context() as patch:
            patch.setattr(model.slots, "forward", failing)
            for _ in range(3):
                assert client.refused(prompt="a")[0] == 500
            assert client("GET", "/health")[2] == {"status": "broken"}
            status, _, text = client("POST", "/v1/completions", {**SHORT, "stream": True})
            assert status == 200
            check_error(500, json.loads(text.split("\n\n")[0][6:]))
            assert client("GET", "/health")[2] == {"status": "broken"}
            patch.setattr(scheduler, "_BROKEN_SECONDS", 0.0)  # routers ask healthy servers alone
            assert client("GET", "/health")[2] == {"status": "ok"}
        assert client.complete(**SHORT)
        assert client("GET", "/health")[2] == {"status": "ok"}


def test_draining_finishes_what_is_in_work_and_sends_newcomers_away(saved_model, monkeypatch):
    model = ServedModel.open(saved_model, "tiny", SlotSettings(2, 100), device="cpu")
    slowed(model, monkeypatch, 0.05)
    with running({"tiny": model}) as client:
        begun = streaming(client)
        client.server.handle_exit(signal.SIGTERM, None)
        status, headers, body = client("POST", "/v1/completions", SHORT)
        assert check_error(status, body)[1]["code"] == "shutting_down"
        assert (status, headers["retry-after"]) == (503, "1")
        assert client("GET", "/health")[::2] == (503, {"status": "draining"})
        data = b""
        while more := begun.recv(65536):
            data += more
        assert b"data: [DONE]" in data
        client.thread.join(PATIENCE_SECONDS)
        assert not client.thread.is_alive()


def test_draining_waits_for_clients_that_are_still_reading(saved_model, monkeypatch):
    monkeypatch.setattr("fanformer.server.process._SEND_BYTES", 16384)
    monkeypatch.setattr("fanformer.server.process._GRACE_SECONDS", 0.1)
    model = ServedModel.open(saved_model, "tiny", SlotSettings(2, 100), device="cpu")
    with running({"tiny": model}) as client:
        slow, text = asked_for_much(client, model)
        assert client.service.gate.in_work == 0
        client.server.handle_exit(signal.SIGTERM, None)
        client.thread.join(1)
        assert client.thread.is_alive()
        response = http.client.HTTPResponse(slow)
        response.begin()
        assert json.loads(response.read()) == {"prompt": text}
        client.thread.join(PATIENCE_SECONDS)
        assert not client.thread.is_alive()
        slow.close()


def test_a_drain_that_takes_too_long_ends_answers_with_an_error(saved_model, monkeypatch):
    model = ServedModel.open(saved_model, "tiny", SlotSettings(2, 100), device="cpu")
    slowed(model, monkeypatch, 0.1)
    with running({"tiny": model}, None, Limits(drain_seconds=0.3)) as client:
        begun, whole = streaming(client), sent(client, LONG)
        wait_for(lambda: model.scheduler.running == 2)
        client.server.handle_exit(signal.SIGTERM, None)
        data, answer = b"", b""
        while more := begun.recv(65536):
            data += more
        while more := whole.recv(65536):
            answer += more
        assert b'"error":{"message":"the server is shutting down' in data
        assert answer.startswith(b"HTTP/1.1 503 ")  # after which a router asks another replica
        assert b"\r\nretry-after: 1\r\n" in answer
        client.thread.join(PATIENCE_SECONDS)
        assert not client.thread.is_alive()


def test_clocks_that_jump_change_nothing(model, monkeypatch):
    ticks = iter(range(10**6))
    with running({"tiny": model}, None, Limits(answer_seconds=60)) as client:
        expected = client.complete(prompt="the cat", max_tokens=20, temperature=0)["choices"]
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda: 1e9 * (next(ticks) % 3))  # years forth and back at every look
            assert client.complete(prompt="the cat", max_tokens=20, temperature=0)["choices"] == expected


@pytest.fixture
def process(saved_model, tmp_path, repository):
    """Start `fanformer serve` as a process; return a function that does, with further words, and its client."""
    begun = []

    def start(*words, models=(saved_model,)):
        command = [sys.executable, "-m", "fanformer.cli.main", "serve", *map(str, models), "--port", "0", *words]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(repository / "src"), *sys.path])}
        made = subprocess.Popen(
            [*command, "--device", "cpu"], cwd=tmp_path, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        begun.append(made)
        lines = []
        while not (line := made.stdout.readline()).startswith("listening at "):
            assert line, made.stderr.read()
            lines.append(line)
        client = Client(int(line.rpartition(":")[2].removesuffix("/v1\n")))
        client.lines = lines
        return made, client

    yield start
    for made in begun:
        made.kill()
        made.communicate()


@pytest.mark.ci
def test_one_command_serves_and_sigterm_ends_it_well(process, saved_model):
    made, client = process("--slots", "3", "--context", "64")
    [serving, page] = client.lines
    assert serving == f"serving tiny: 3 texts of 64 tokens at once, {0.0:.2f} GiB\n"
    assert page == f"playground at http://127.0.0.1:{client.port}/\n"
    assert client.complete(**SHORT)
    made.send_signal(signal.SIGTERM)
    _, errors = made.communicate(timeout=PATIENCE_SECONDS)
    assert made.returncode == 0, errors
    assert "POST /v1/completions 200" in errors
    assert "Traceback" not in errors


@pytest.mark.ci
def test_a_full_disk_for_the_log_stops_no_answer(process):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    made, client = process("--log-file", "/dev/full")
    for _ in range(3):
        assert client.complete(**SHORT)
    [lost] = [line for line in client("GET", "/metrics")[2].splitlines() if line.startswith("fanformer_log_lines_lost")]
    assert float(lost.split()[1]) >= 3
    made.send_signal(signal.SIGTERM)
    _, errors = made.communicate(timeout=PATIENCE_SECONDS)
    assert (made.returncode, errors) == (0, "")


@pytest.mark.ci
def test_a_killed_worker_loses_nothing_but_what_it_had_in_work(process):
    """Two workers as a router sees them: one is killed, its clients see the end, and the other one answers the same."""
    (first, client), (_, other) = process(), process()
    expected = other.complete(prompt="def", max_tokens=20, temperature=0)["choices"]
    begun = streaming(client)
    first.kill()
    first.wait(PATIENCE_SECONDS)
    data = b""
    try:
        while more := begun.recv(65536):
            data += more
    except ConnectionResetError:
        pass
    assert b"[DONE]" not in data
    with pytest.raises(OSError):
        client("GET", "/health")
    assert other.complete(prompt="def", max_tokens=20, temperature=0)["choices"] == expected
