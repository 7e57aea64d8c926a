"""Fixtures of this folder: the tiny model behind a scheduler, on torch and on ggml."""

import importlib.util
import queue

import pytest

from fanformer.generation.settings import GenerationSettings
from fanformer.server.models import ServedModel, SlotSettings
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


def submit(served, *requests):
    """Submit requests; return what is heard of each, and the tickets."""
    heard = [Heard() for _ in requests]
    return heard, served.scheduler.submit(requests, heard)


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
