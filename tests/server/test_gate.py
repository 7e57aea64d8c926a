"""Who may ask and how much: keys, names, sizes, seconds, numbers; and what never reaches a log."""

import hmac
import http.client
import json
import logging
import socket
import time

import pytest

from fanformer.server.gate import route_of
from fanformer.server.limits import Access, Limits, is_loopback
from fanformer.server.models import ServedModel, SlotSettings
from tests.server.conftest import PATIENCE_SECONDS, check_error, running

KEY, OTHER = "sk-right-0123456789", "sk-other-0123456789"
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
SHORT = {"model": "tiny", "prompt": "the cat", "max_tokens": 2}


@pytest.fixture(scope="module")
def model(saved_model):
    """The tiny model on torch with two slots."""
    found = ServedModel.open(saved_model, "tiny", SlotSettings(2, 100, queue_size=2), device="cpu")
    yield found
    found.close()


@pytest.fixture(scope="module")
def keyed(model):
    """A client of a server with two keys."""
    with running({"tiny": model}, Access(keys=(KEY, OTHER))) as found:
        yield found


@pytest.fixture(scope="module")
def strict(model):
    """A client of a server with narrow limits."""
    limits = Limits(
        body_bytes=4096, header_bytes=2048, header_seconds=1, body_seconds=1, idle_seconds=1
    )  # fmt: skip
    with running({"tiny": model}, None, limits) as found:
        yield found


def bearer(key):
    return {"authorization": f"Bearer {key}"}


def test_a_key_is_needed_for_everything_but_health_and_loopback_metrics(keyed):
    for method, path in (("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/openapi.json"), ("GET", "/x")):
        status, headers, body = keyed(method, path, SHORT if method == "POST" else None)
        assert check_error(status, body) == (
            401,
            {
                "message": "the API key is missing or wrong: send `Authorization: Bearer KEY`.",
                "type": "authentication_error",
                "param": None,
                "code": "invalid_api_key",
            },
        )
        assert headers["www-authenticate"] == "Bearer"
    assert keyed("GET", "/health")[0] == 200
    assert keyed("GET", "/metrics")[0] == 200


@pytest.mark.parametrize("key", [KEY, OTHER])
def test_each_key_opens(keyed, key):
    assert keyed("POST", "/v1/completions", SHORT, bearer(key))[0] == 200
    assert keyed("POST", "/v1/completions", SHORT, {"authorization": f"bearer  {key} "})[0] == 200


@pytest.mark.parametrize("value", ["", "Bearer", f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", KEY])
def test_wrong_keys_do_not(keyed, value):
    assert keyed("POST", "/v1/completions", SHORT, {"authorization": value})[0] == 401


def test_every_key_is_compared_in_constant_time(keyed, monkeypatch):
    compared, compare = [], hmac.compare_digest

    def noted(given, key):
        compared.append(key)
        return compare(given, key)

    monkeypatch.setattr("fanformer.server.gate.hmac.compare_digest", noted)
    for value, status in ((KEY, 200), (OTHER, 200), ("sk-wrong", 401)):
        assert keyed("GET", "/v1/models", headers=bearer(value))[0] == status
    assert compared == [KEY.encode(), OTHER.encode()] * 3  # the first right one ends nothing


def test_metrics_need_a_key_where_others_reach_the_server(model):
    access = Access(host="0.0.0.0", keys=(KEY,))
    with running({"tiny": model}, access) as client:
        assert client("GET", "/metrics")[0] == 401
        assert client("GET", "/metrics", headers=bearer(KEY))[0] == 200
        assert client("GET", "/health", headers={"host": "model.example.org"})[0] == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("localhost:8000", 200),
        ("LOCALHOST", 200),
        ("[::1]:80", 200),
        ("evil.example", 403),
        ("evil.example:8000", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example", 403),
        ("", 403),
        ("169.254.169.254", 403),
        ("model.example.org", 200),
        ("model.example.org:443", 200),
    ],
)
def test_only_names_of_this_server_are_answered(model, host, status):
    with running({"tiny": model}, Access(hosts=frozenset({"model.example.org"}))) as client:
        assert client("GET", "/v1/models", headers={"host": host})[0] == status
        assert client("GET", "/health", headers={"host": host})[0] == status


def test_web_pages_of_other_origins_may_not_ask_unless_named(model):
    named = "https://page.example"
    with running({"tiny": model}, Access(origins=frozenset({named}))) as client:
        for origin in ("https://evil.example", "null", f"http://127.0.0.1:{client.port + 1}"):
            status, headers, body = client("POST", "/v1/completions", SHORT, {"origin": origin})
            assert check_error(status, body)[0] == 403
            assert "access-control-allow-origin" not in headers
        own = f"http://127.0.0.1:{client.port}"
        status, headers, _ = client("POST", "/v1/completions", SHORT, {"origin": own})
        assert (status, "access-control-allow-origin" in headers) == (200, False)
        status, headers, _ = client("POST", "/v1/completions", SHORT, {"origin": named})
        assert (status, headers["access-control-allow-origin"]) == (200, named)
        assert headers["access-control-expose-headers"] == "Retry-After"
        names = "authorization,content-type,x-stainless-lang,x-stainless-retry-count"  # some of OpenAI's client
        asked = {"origin": named, "access-control-request-headers": names}
        status, headers, _ = client("OPTIONS", "/v1/completions", headers=asked)
        assert (status, headers["access-control-allow-origin"]) == (204, named)
        assert headers["access-control-allow-headers"] == names
        assert "*" not in json.dumps(headers)


def test_a_request_that_no_page_could_send_without_asking_is_needed(model):
    with running({"tiny": model}) as client:  # a form of another site sends text/plain without a preflight
        status, _, body = client("POST", "/v1/completions", SHORT, {"content-type": "text/plain"})
    assert "Content-Type: application/json" in check_error(status, body)[1]["message"]


def test_huge_bodies_are_refused_whether_or_not_they_say_so(strict):
    huge = {**SHORT, "prompt": "a" * 6000}
    status, _, body = strict("POST", "/v1/completions", huge)
    assert check_error(status, body)[0] == 413
    connection = http.client.HTTPConnection("127.0.0.1", strict.port, timeout=PATIENCE_SECONDS)
    connection.request("POST", "/v1/completions", iter([b"x" * 1000] * 6), encode_chunked=True,
                       headers={"transfer-encoding": "chunked"})  # fmt: skip
    response = connection.getresponse()
    assert check_error(response.status, json.loads(response.read()))[0] == 413
    connection.close()
    with strict.socket() as claiming:  # claims much, sends nothing
        claiming.sendall(HEAD + b"content-length: 99999999999999999999\r\n\r\n")
        claiming.shutdown(socket.SHUT_WR)
        closed_after(claiming)
    assert strict.complete(**SHORT)


def test_huge_heads_are_refused(strict):
    with strict.socket() as client:
        client.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 5000)
        assert client.recv(4096).startswith(b"HTTP/1.1 400 ")


def closed_after(client):
    """Read until the server closes; return what came, and after how many seconds."""
    began, data = time.monotonic(), b""
    while True:
        try:
            more = client.recv(4096)
        except ConnectionResetError:
            more = b""
        if not more:
            return data, time.monotonic() - began
        data += more


def test_a_slow_head_ends_the_connection(strict):
    for beginning in (b"", b"GET /health HT"):
        with strict.socket() as client:
            client.sendall(beginning)
            data, seconds = closed_after(client)
        assert data.startswith(b"HTTP/1.1 408 ")
        assert 0.3 < seconds < PATIENCE_SECONDS


def test_a_head_that_comes_byte_by_byte_gets_no_more_time(strict):
    with strict.socket() as client:
        began = time.monotonic()
        try:
            for byte in b"GET /health HTTP/1.1\r\nhost: localhost\r\n" * 20:
                client.sendall(bytes([byte]))
                time.sleep(0.02)
        except OSError:
            pass
        assert time.monotonic() - began < 10


def test_a_slow_body_ends_the_request(strict):
    with strict.socket() as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{")
        data, _ = closed_after(client)
    head, _, body = data.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    check_error(408, json.loads(body))


@pytest.mark.parametrize("path", [b"/v1/completions", b"/health", b"/x"])
def test_who_is_answered_before_his_body_came_cannot_keep_the_connection(keyed, path, monkeypatch):
    monkeypatch.setattr("fanformer.server.gate._DISCARD_SECONDS", 0.3)
    with keyed.socket() as client:
        client.sendall(b"POST " + path + b" HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n")
        time.sleep(0.1)
        client.sendall(b"a")
        data, seconds = closed_after(client)
    assert b"connection: close" in data.lower()
    assert seconds < PATIENCE_SECONDS


def test_who_is_refused_reads_why_however_much_he_was_sending(model, monkeypatch):
    monkeypatch.setattr("fanformer.server.gate._DISCARD_SECONDS", PATIENCE_SECONDS)
    large = {**SHORT, "prompt": "a" * (3 << 20)}

    def refused(client, headers):
        status, _, body = client("POST", "/v1/completions", large, headers)
        return status, check_error(status, body)[1]["code"]

    with running({"tiny": model}, Access(keys=(KEY,)), Limits(bodies_bytes=1 << 20)) as client:
        assert refused(client, {}) == (401, "invalid_api_key")
        assert refused(client, {"host": "evil.example"}) == (403, "unknown_host")
        assert refused(client, bearer(KEY)) == (429, "rate_limit_exceeded")
        client.service.gate.draining = True
        assert refused(client, bearer(KEY)) == (503, "shutting_down")
        assert client("GET", "/v1/models", headers=bearer(KEY))[0] == 503  # at once: no body is to come
    with running({"tiny": model}, None, Limits(requests_per_client=0)) as client:
        assert refused(client, {}) == (429, "rate_limit_exceeded")


def test_an_idle_connection_is_closed(strict):
    with strict.socket() as client:
        client.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        data, seconds = closed_after(client)
    assert data.startswith(b"HTTP/1.1 200 ")
    assert seconds < PATIENCE_SECONDS


def test_too_many_connections_are_sent_away_and_room_comes_back(model):
    with running({"tiny": model}, None, Limits(connections=8)) as client:
        held = [client.socket() for _ in range(8)]
        time.sleep(0.1)
        with client.socket() as one_more:
            assert b" 503 " in closed_after(one_more)[0].split(b"\r\n")[0]
        for one in held:
            one.close()
        until = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                assert client("GET", "/health")[0] == 200
                break
            except (http.client.HTTPException, OSError, AssertionError):
                assert time.monotonic() < until


def streaming(client, key=None):
    """Begin a stream and return its socket."""
    body = json.dumps({**SHORT, "max_tokens": 90, "stream": True, "min_tokens": 90}).encode()
    head = HEAD + b"content-length: %d\r\n" % len(body)
    if key is not None:
        head += f"authorization: Bearer {key}\r\n".encode()
    begun = client.socket()
    begun.sendall(head + b"\r\n" + body)
    assert b" 200 " in begun.recv(4096).split(b"\r\n")[0]
    return begun


def slowed(model, monkeypatch, seconds=0.05):
    """Let every step take so long."""
    forward = model.slots.forward

    def slow(tokens, every=False):
        time.sleep(seconds)
        return forward(tokens, every)

    monkeypatch.setattr(model.slots, "forward", slow)


def test_a_client_has_so_many_requests_in_work_and_no_more(model, monkeypatch):
    slowed(model, monkeypatch)
    with running({"tiny": model}, None, Limits(requests_per_client=3)) as client:
        begun = [streaming(client) for _ in range(2)]
        begun.append(client.socket())
        begun[2].sendall(HEAD + b"content-length: 10\r\n\r\n")  # its body is still to come
        time.sleep(0.1)
        status, headers, body = client("POST", "/v1/completions", SHORT)
        assert check_error(status, body)[1]["code"] == "rate_limit_exceeded"
        assert (status, headers["retry-after"]) == (429, "1")
        assert client("GET", "/health")[0] == 200
        for one in begun:
            one.close()


def test_clients_are_told_apart_by_their_keys(model, monkeypatch):
    slowed(model, monkeypatch)
    with running({"tiny": model}, Access(keys=(KEY, OTHER)), Limits(requests_per_client=1)) as client:
        begun = streaming(client, KEY)
        for value in (f"Bearer {KEY}", f"bearer {KEY}", f"Bearer   {KEY} "):
            assert client("POST", "/v1/completions", SHORT, {"authorization": value})[0] == 429
        assert client("POST", "/v1/completions", SHORT, bearer(OTHER))[0] == 200
        begun.close()


def test_a_full_queue_answers_429_with_retry_after(model, monkeypatch):
    slowed(model, monkeypatch)
    with running({"tiny": model}) as client:
        begun = [streaming(client) for _ in range(4)]  # two slots, two that wait
        status, headers, body = client("POST", "/v1/completions", SHORT)
        assert check_error(status, body)[1]["code"] == "rate_limit_exceeded"
        assert status == 429
        assert int(headers["retry-after"]) >= 1
        for one in begun:
            one.close()


def test_one_client_does_not_keep_others_from_being_answered(saved_model, monkeypatch):
    model = ServedModel.open(saved_model, "tiny", SlotSettings(2, 100, queue_size=8), device="cpu")
    slowed(model, monkeypatch)
    with running({"tiny": model}, Access(keys=(KEY, OTHER))) as client:
        status, _, body = client("POST", "/v1/completions", {**SHORT, "prompt": ["a"] * 9}, bearer(KEY))
        assert (status, "may have 8 answers here, got 9" in check_error(status, body)[1]["message"]) == (400, True)
        begun = client.socket()
        data = json.dumps({**SHORT, "prompt": ["a"] * 8, "max_tokens": 60, "min_tokens": 60}).encode()
        begun.sendall(HEAD + f"authorization: Bearer {KEY}\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)
        while model.scheduler.waiting < 6:
            time.sleep(0.01)
        assert client("POST", "/v1/completions", SHORT, bearer(KEY))[0] == 429
        assert client("POST", "/v1/completions", SHORT, bearer(OTHER))[0] == 200
        assert model.scheduler.waiting > 0  # the other's answer overtook what waits
        begun.close()
    model.close()


def test_no_prompt_key_answer_or_path_is_logged(keyed, model, monkeypatch):
    lines = []

    class Collector(logging.Handler):
        def emit(self, record):
            lines.append(logging.Formatter().format(record))

    collector = Collector()
    logging.getLogger("fanformer.server").setLevel(logging.INFO)
    for name in ("fanformer.server", "uvicorn.error", "uvicorn.access", "uvicorn", "fastapi", ""):
        logging.getLogger(name).addHandler(collector)
    try:
        private = secret = "the cat sat upon a secret"
        text = keyed("POST", "/v1/completions", {**SHORT, "prompt": secret, "max_tokens": 9}, bearer(KEY))[2]
        keyed("POST", "/v1/completions", {**SHORT, "prompt": secret, "temperature": "secret"}, bearer(KEY))
        keyed("GET", "/secret/path?secret=1", headers=bearer(KEY))
        keyed("GET", "/v1/models/secret", headers=bearer(KEY))
        keyed("POST", "/v1/completions", SHORT, bearer("sk-secret"))

        def failing(tokens, every=False):
            raise RuntimeError(private)

        with monkeypatch.context() as patch:
            patch.setattr(model.slots, "forward", failing)
            assert keyed("POST", "/v1/completions", {**SHORT, "prompt": secret}, bearer(KEY))[0] == 500
        with keyed.socket() as client:
            client.sendall(b"secret nonsense\r\n\r\n")
            client.recv(4096)
    finally:
        logging.getLogger("fanformer.server").setLevel(logging.NOTSET)
        for name in ("fanformer.server", "uvicorn.error", "uvicorn.access", "uvicorn", "fastapi", ""):
            logging.getLogger(name).removeHandler(collector)
    logged = "\n".join(lines)
    assert "POST /v1/completions 200" in logged
    assert "RuntimeError" in logged
    for word in ("secret", KEY, "sk-right", text["choices"][0]["text"].strip() or "secret"):
        assert word not in logged
    metrics = keyed("GET", "/metrics")[2]
    assert "secret" not in metrics


def test_metrics_count_what_happened(model):
    with running({"tiny": model}) as client:
        client.complete(**SHORT)
        client("GET", "/nowhere")
        status, headers, text = client("GET", "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    values = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            values[name] = float(value)
    assert values['fanformer_responses_total{route="/v1/completions",status="200"}'] == 1
    assert values['fanformer_responses_total{route="other",status="404"}'] == 1
    assert values['fanformer_completion_tokens_total{model="tiny"}'] >= 1
    assert values['fanformer_slots{model="tiny"}'] == 2
    assert values['fanformer_memory_bytes{model="tiny"}'] > 1000
    assert values['fanformer_first_token_seconds{model="tiny",quantile="0.5"}'] > 0
    assert values["fanformer_draining"] == 0


def test_addresses_of_this_machine_are_known_as_such():
    assert all(is_loopback(host) for host in ("localhost", "127.0.0.1", "127.8.0.1", "::1"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.example.org"))


def test_paths_are_told_by_their_route_alone():
    paths = ("/health", "/v1/models/secret", "/secret")
    assert [route_of(path) for path in paths] == ["/health", "/v1/models/{id}", "other"]


def test_garbage_never_ends_the_server(strict):
    garbage = [b"\x00" * 100, b"GET\r\n\r\n", b"\x16\x03\x01\x02\x00", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]
    for data in [*garbage, b"GET / HTTP/9.9\r\n\r\n"]:
        with strict.socket() as client:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            closed_after(client)
    assert strict("GET", "/health")[0] == 200
