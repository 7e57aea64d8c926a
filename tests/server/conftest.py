"""Fixtures of this folder: the tiny model behind a scheduler, on torch and on ggml."""

import contextlib
import http.client
import importlib.util
import json
import queue
import socket
import threading

import pytest

from fanformer.generation.settings import GenerationSettings
from fanformer.server.app import build
from fanformer.server.models import ServedModel, SlotSettings
from fanformer.server.process import bind, server
from fanformer.server.scheduler import Failure, Finish, PromptScores, Written
from tests.gguf_models import export
from tests.saved_models import loaded, saved_model, tiny_tokenizer  # noqa: F401

PATIENCE_SECONDS = 120
"""A test waits so long for what should take a moment: the machine may be busy."""
PROMPTS = [
    "the cat sat on the mat",
    "def",
    "a small model",
    "",
    "\u4e16\u754c \U0001f680",
    "def add(a, b):\n    ",
    "the ",
]


class Heard:
    """What a request's listener heard."""

    def __init__(self):
        self.events = queue.Queue()
        self.all = []

    def __call__(self, event):
        self.events.put(event)

    def next(self):
        event = self.events.get(timeout=PATIENCE_SECONDS)
        self.all.append(event)
        return event

    def wait(self):
        """Wait for the last event; return it."""
        while not isinstance(event := self.next(), Finish | Failure):
            pass
        return event

    @property
    def text(self):
        return "".join(event.text for event in self.all if isinstance(event, Written))

    @property
    def tokens(self):
        return [token for event in self.all if isinstance(event, Written) for token in event.tokens]

    @property
    def prompt(self):
        return next(event.tokens for event in self.all if isinstance(event, PromptScores))


def submit(served, *requests, client=""):
    """Submit a client's requests; return what is heard of each, and the tickets."""
    heard = [Heard() for _ in requests]
    return heard, served.scheduler.submit(requests, heard, client)


def run(served, *requests):
    """Submit requests and wait for all; return what was heard of each."""
    heard, _ = submit(served, *requests)
    for one in heard:
        assert isinstance(one.wait(), Finish), one.all[-1]
    return heard


def offline(served, prompts, **settings):
    """Return the texts that `TextModel.complete` writes of the same model, with the end token allowed at once."""
    chosen = GenerationSettings(**{"min_length": 0, "top_k": 0, "top_p": 1.0, "temperature": 1.0, **settings})
    return list(served.offline.complete(prompts, chosen))


ENGINES = ["torch", "ggml"] if importlib.util.find_spec("ggml") else ["torch"]


@pytest.fixture(scope="session", params=ENGINES)
def served(request, saved_model):  # noqa: F811
    """The tiny model with four slots of 100 positions, and an offline one beside it as `offline`."""
    from fanformer.loading import load_text_model

    path = saved_model if request.param == "torch" else export(saved_model)
    threads = None if request.param == "torch" else 1
    model = ServedModel.open(path, "tiny", SlotSettings(4, 100, queue_size=8), device="cpu", threads=threads)
    model.offline = load_text_model(path, device="cpu", threads=threads)
    yield model
    model.close()


@contextlib.contextmanager
def running(models, access=None, limits=None):
    """Run a server of these models in a thread; yield a client of it."""
    service = build(models, access, limits)
    started = threading.Event()
    made = server(service, started.set)
    with bind("127.0.0.1", 0) as bound:
        thread = threading.Thread(target=made.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        assert started.wait(PATIENCE_SECONDS)
        client = Client(bound.getsockname()[1])
        client.service, client.server, client.thread = service, made, thread
        yield client
        made.should_exit = True
        thread.join(PATIENCE_SECONDS)


class Client:
    """A plain client of HTTP on loopback."""

    def __init__(self, port):
        self.port = port

    def __call__(self, method, path, body=None, headers=None):
        """Return status, headers and the body, parsed where it is JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_SECONDS)
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        connection.request(method, path, body, {"content-type": "application/json", **(headers or {})})
        response = connection.getresponse()
        data = response.read()
        connection.close()
        found = {name.lower(): value for name, value in response.getheaders()}
        is_json = found.get("content-type", "").startswith("application/json")
        return response.status, found, json.loads(data) if is_json and data else data.decode()

    def complete(self, **fields):
        """Return the response of /v1/completions, which must be good."""
        status, _, body = self("POST", "/v1/completions", {"model": "tiny", **fields})
        assert status == 200, body
        return body

    def refused(self, path="/v1/completions", **fields):
        """Return status and error object of a request that must be refused, after checking its shape."""
        status, _, body = self("POST", path, {"model": "tiny", **fields})
        assert status >= 400, body
        return check_error(status, body)

    def events(self, path="/v1/completions", **fields):
        """Return the events of a stream: objects, and at the end the words [DONE]."""
        status, headers, body = self("POST", path, {"model": "tiny", "stream": True, **fields})
        assert status == 200, body
        assert headers["content-type"].startswith("text/event-stream")
        lines = body.split("\n\n")
        assert lines.pop() == ""
        assert all(line.startswith("data: ") for line in lines)
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line[6:]) for line in lines[:-1]]

    def socket(self):
        """Return a connected socket."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_SECONDS)


def check_error(status, body):
    """Check that an error has OpenAI's shape; return status and error."""
    assert set(body) == {"error"}, body
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "\n" not in body["error"]["message"]
    return status, body["error"]


@pytest.fixture(scope="session")
def client(served):
    """A client of a server with the tiny model."""
    with running({"tiny": served}) as found:
        yield found
