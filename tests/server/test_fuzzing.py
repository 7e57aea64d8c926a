"""Whatever is sent, the server answers in its own shape, never fails, and keeps on serving."""

import contextlib
import http.client
import json
import random
import shutil
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fanformer.server.fields import ChatFields, CompletionFields, DetokenizeFields, TokenizeFields
from fanformer.server.limits import Limits
from fanformer.server.models import ServedModel, SlotSettings
from tests.server.conftest import check_error, running
from tests.server.test_chat import TEMPLATE
from tests.server.test_gate import HEAD

GOOD = {
    "/v1/completions": {"prompt": "the cat", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
    "/tokenize": {"prompt": "the cat"},
    "/detokenize": {"tokens": [5, 6]},
}
FIELDS = {
    "/v1/completions": CompletionFields,
    "/v1/chat/completions": ChatFields,
    "/tokenize": TokenizeFields,
    "/detokenize": DetokenizeFields,
}
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 8),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.sampled_from(["tiny", "user", "text", "\ud800", "0", "299", "\x00", "the cat"]),
)
KEYS = ["role", "content", "type", "text", "image_url", "url", "include_usage", "0", "5"]
NAMES = st.sampled_from(KEYS) | st.text(max_size=4)
STATUSES = Counter()
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=8
)


@pytest.fixture(scope="module")
def client(saved_model, tmp_path_factory):
    """A client of a server with the tiny model and a chat template, whose answers are short."""
    folder = shutil.copytree(saved_model, tmp_path_factory.mktemp("chat") / "tiny")
    settings_file = folder / "tokenizer_config.json"
    settings_file.write_text(json.dumps({**json.loads(settings_file.read_text()), "chat_template": TEMPLATE}))
    model = ServedModel.open(folder, "tiny", SlotSettings(4, 24, queue_size=300), device="cpu")
    with running({"tiny": model}, None, Limits(body_bytes=1 << 16)) as found:
        yield found
    model.close()


@st.composite
def bodies(draw):
    """A route, and a body in which some fields of its are replaced by anything."""
    path = draw(st.sampled_from(sorted(FIELDS)))
    names = st.sampled_from([*FIELDS[path].model_fields, "num_steps", "tools", "user", "unknown"])
    changed = draw(st.dictionaries(names, VALUES, max_size=4))
    return path, {"model": "tiny", **GOOD[path], **changed}


@settings(max_examples=250, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(bodies())
def test_any_values_of_any_fields_are_answered_or_refused_by_name(client, asked):
    path, body = asked
    body.pop("stream", None) if body.get("stream") is True else None
    status, _, found = client("POST", path, body)
    STATUSES[path, status] += 1
    assert status == 200 or check_error(status, found)[0] in (400, 404), (body, found)


def test_the_fuzzed_requests_were_of_all_kinds():
    assert {(path, status) for path in FIELDS for status in (200, 400)} <= set(STATUSES)


def test_spoilt_requests_leave_a_server_that_serves(client):
    draw = random.Random(0)
    whole = HEAD + b'content-length: 54\r\n\r\n{"model": "tiny", "prompt": "the cat", "max_tokens":2}'
    for _ in range(150):
        spoilt = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(len(spoilt))
            kind = draw.randrange(3)
            if kind == 0:
                spoilt[place] = draw.randrange(256)
            elif kind == 1:
                del spoilt[place : place + draw.randint(1, 9)]
            else:
                spoilt[place:place] = draw.randbytes(draw.randint(1, 9))
        with client.socket() as sent, contextlib.suppress(ConnectionError):
            sent.sendall(spoilt)
            sent.settimeout(0.02)
            with contextlib.suppress(TimeoutError):
                head = sent.recv(65536).split(b"\r\n")[0]
                assert not head or head.split()[1] in (b"200", b"400", b"403", b"404", b"405", b"413"), head
    assert client.complete(prompt="the cat", max_tokens=2)


def test_unusual_methods_paths_and_headers_have_answers(client):
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "HEAD"):
        status, _, _ = client(method, "/v1/completions")
        assert 400 <= status < 500
    for path in (
        "//",
        "/v1/models/%00",
        "/v1/models/..%2f..",
        "/v1/models/" + "a" * 3000,
        "/v1/nothing?a=" + "b" * 3000,
        "/%ff",
    ):
        status, _, body = client("GET", path)
        assert check_error(status, body)[0] == 404
    for name, value in (("connection", "upgrade"), ("expect", "100-continue"), ("accept-encoding", "\x01")):
        with contextlib.suppress(http.client.HTTPException, ValueError):
            assert client("GET", "/health", headers={name: value, "upgrade": "websocket"})[0] in (200, 400)
    assert client.complete(prompt="the cat", max_tokens=2)
