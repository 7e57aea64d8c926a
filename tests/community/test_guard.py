"""What the public port of a host lets through: members' calls within bounds, the run's status, and nothing else."""

import asyncio
import base64
import hashlib
import json

import pytest

from fanformer.community.flower.link import LARGEST_REQUEST, MEMBERS_CALLS, Budget, Guard
from fanformer.community.flower.outcome import NODES_FILE
from fanformer.community.folder import STATUS_FILE
from tests.community.test_status import a_status

LOCAL, PUBLIC = 4001, 4002
KEYS = {"alice": b"the key of alice", "bob": b"the key of bob"}
KEY, BOB, STRANGER = ((b"flwr-key", base64.b64encode(key)) for key in (*KEYS.values(), b"another key"))


class Inside:
    """Stands where Flower's app is: reads the whole request, answers with `status`, and says what came."""

    def __init__(self, status=200):
        self.status, self.seen = status, []

    async def __call__(self, scope, receive, send):
        size = 0
        while (event := await receive())["type"] == "http.request":
            size += len(event["body"])
            if not event["more_body"]:
                break
        self.seen.append((scope["path"], size, event["type"]))
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": b"inside"})


def ask(guard, path, port=PUBLIC, method="POST", pieces=(b"",), headers=(KEY,)):
    """Return status and body of an answer."""
    left, sent = list(pieces), []

    async def receive():
        body = left.pop(0)
        return {"type": "http.request", "body": body, "more_body": bool(left)}

    async def send(event):
        sent.append(event)

    scope = {"type": "http", "server": ("127.0.0.1", port), "path": path, "method": method, "headers": list(headers)}
    asyncio.run(guard(scope, receive, send))
    return sent[0]["status"], b"".join(event.get("body", b"") for event in sent)


@pytest.fixture
def guard(tmp_path):
    def make(inside=None, **status):
        (tmp_path / STATUS_FILE).write_text(json.dumps(a_status(**status)))
        (tmp_path / "flower").mkdir(exist_ok=True)
        nodes = [{"number": number, "name": name, "fingerprint": hashlib.sha256(key).hexdigest()}
                 for number, (name, key) in enumerate(KEYS.items())]  # fmt: skip
        (tmp_path / "flower" / NODES_FILE).write_text(json.dumps(nodes))
        return Guard(inside or Inside(), LOCAL, tmp_path, "Flwr-Key")

    return make


def test_members_calls_pass_and_commands_do_not(guard):
    inside = Inside()
    both = guard(inside)
    for path in sorted(MEMBERS_CALLS):
        assert ask(both, path) == (200, b"inside")
    assert len(inside.seen) == len(MEMBERS_CALLS) == 8
    refused = (
        "/v1/control/start-run", "/v1/control/register-node", "/v1/runtime/pull-messages", "/v1/fleet/get-fab",
        "/v1/fleet/register-node", "/v1/fleet/unregister-node", "/docs", "/openapi.json", "/v1/fleet/pull-messages/",
        "//v1/control/start-run", "/V1/FLEET/PULL-MESSAGES", "/v1/fleet/../control/start-run",
    )  # fmt: skip
    for path in refused:
        assert ask(both, path)[0] == 404, path
    assert len(inside.seen) == 8


def test_the_loopback_port_lets_flowers_own_processes_through(guard):
    inside = Inside()
    assert ask(guard(inside), "/v1/control/start-run", port=LOCAL) == (200, b"inside")
    assert inside.seen == [("/v1/control/start-run", 0, "http.request")]


def test_a_connection_that_is_no_request_is_closed(guard):
    inside, sent = Inside(), []

    async def send(event):
        sent.append(event)

    scope = {"type": "websocket", "server": ("127.0.0.1", PUBLIC), "path": "/v1/control/start-run"}
    asyncio.run(guard(inside)(scope, None, send))
    assert sent == [{"type": "websocket.close"}]
    assert inside.seen == []


def test_a_request_without_end_is_cut_off(guard):
    inside = Inside()
    piece = bytes(1 << 20)
    ask(guard(inside), "/v1/fleet/push-object", pieces=[piece] * ((LARGEST_REQUEST >> 20) + 9))
    [(_, size, last)] = inside.seen
    assert size == LARGEST_REQUEST
    assert last == "http.disconnect"


@pytest.mark.parametrize("headers", [[STRANGER], [(b"flwr-key", b"no base64")], []], ids=["key", "garbage", "none"])
def test_what_comes_without_a_registered_key_is_not_read(guard, headers):
    """Flower reads a request before it looks at the signature."""
    inside = Inside()
    assert ask(guard(inside), "/v1/fleet/activate-node", headers=headers)[0] == 401
    assert inside.seen == []


def test_a_member_may_send_two_updates_and_a_little_in_a_round(guard, tmp_path):
    inside = Inside()
    public = guard(inside, round=3, update_bytes=1000)
    megabyte = bytes(1 << 20)
    for _ in range(5):
        assert ask(public, "/v1/fleet/push-object", pieces=[megabyte])[0] == 200
    assert ask(public, "/v1/fleet/push-object", pieces=[megabyte])[0] == 429
    assert ask(public, "/v1/fleet/push-object", pieces=[megabyte], headers=[BOB])[0] == 200
    assert len(inside.seen) == 6
    (tmp_path / STATUS_FILE).write_text(json.dumps(a_status(round=4, update_bytes=1000)))
    assert ask(public, "/v1/fleet/push-object", pieces=[megabyte])[0] == 200


def test_nobody_spends_what_is_anothers(guard):
    """A request that Flower refuses, since its signature is not the key's, counts for nobody."""
    inside = Inside(status=401)
    public = guard(inside, round=3, update_bytes=1000)
    for _ in range(9):
        assert ask(public, "/v1/fleet/push-object", pieces=[bytes(1 << 20)])[0] == 401
    inside.status = 200
    assert ask(public, "/v1/fleet/push-object", pieces=[bytes(1 << 20)])[0] == 200


def test_a_key_in_another_spelling_has_spent_the_same_bytes(guard):
    """The last letter of base64 has bits that say nothing."""
    name, text = KEY
    other = name, text.replace(b"Q==", b"R==")
    assert other != KEY
    assert base64.b64decode(other[1], validate=True) == KEYS["alice"]
    public = guard(round=3, update_bytes=1000)
    for _ in range(5):
        assert ask(public, "/v1/fleet/push-object", pieces=[bytes(1 << 20)])[0] == 200
    assert ask(public, "/v1/fleet/push-object", headers=[other])[0] == 429


def test_before_the_run_has_a_status_little_may_be_sent(tmp_path):
    budget = Budget(tmp_path)
    assert not budget.is_spent("alice")
    budget.spend("alice", 5 << 20)
    assert budget.is_spent("alice")


def test_everybody_may_read_the_status(guard, tmp_path):
    public = guard()
    status, body = ask(public, "/status.json", method="GET", headers=())
    assert (status, json.loads(body)) == (200, a_status())
    status, page = ask(public, "/", method="GET", headers=())
    assert status == 200
    assert b"<h1>community run cafe" in page
    _, inside = ask(public, "/main", method="GET", headers=())
    assert b"<h1>" in inside
    assert b"<script" not in inside
    assert ask(public, "/", method="POST")[0] == 404
    (tmp_path / STATUS_FILE).unlink()
    assert ask(public, "/status.json", method="GET")[0] == 503
    assert ask(public, "/", method="GET")[0] == 503
