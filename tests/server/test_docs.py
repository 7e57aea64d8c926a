"""docs/serving.md says what the code says: fields, routes, limits, defaults."""

import pytest

from fanformer.cli.serve import serve
from fanformer.gguf.engine import _MOST_GRAPHS
from fanformer.model.media_fanformer import MOST_PIXELS
from fanformer.server.fields import _MOST_WITHOUT_EFFECT, MAX_SEQUENCES, ChatFields, CompletionFields
from fanformer.server.gate import ROUTES
from fanformer.server.ggml_slots import CHUNK
from fanformer.server.limits import Limits
from fanformer.server.messages import MAX_MEDIA, MAX_PARTS
from fanformer.server.scheduler import _BROKEN_SECONDS, _FAILURES, _LEAST_SHARED
from fanformer.server.torch_slots import _CHUNK


@pytest.fixture(scope="module")
def page(repository):
    """The page as one line."""
    return " ".join((repository / "docs/serving.md").read_text(encoding="utf-8").split())


def test_every_field_and_route_is_named(page):
    fields = {*CompletionFields.model_fields, *ChatFields.model_fields} - {"model", "prompt", "messages"}
    assert [name for name in sorted(fields) if f"`{name}" not in page and f".{name}" not in page] == []
    assert [route for route in ROUTES if f"{route}`" not in page] == []


def test_every_option_of_the_command_is_a_known_one(page):
    options = {option for parameter in serve.params for option in parameter.opts}
    named = {word.strip("`,.;:()") for word in page.split() if word.startswith(("`--", "--"))}
    assert named - options == {
        *("--dry-run",),  # the benchmark's
        *("--multimodal", "--image"),  # other verbs'
        *("--model", "--tasks", "--model_args"),  # lm-evaluation-harness's
        *("--policy", "--worker-urls"),  # the router's
        *("--trust-remote-code", "--model-impl", "--model-path"),  # the engines'
    }


def test_numbers_are_those_of_the_code(page):
    limits, defaults = Limits(), {parameter.name: parameter.default for parameter in serve.params}
    for words in (
        f"are written at once ({defaults['slots']})",
        f"requests wait ({defaults['queue_size']})",
        f"each may have {_MOST_WITHOUT_EFFECT} characters",
        f"{limits.requests_per_client} requests in work, a request {MAX_SEQUENCES} prompts, messages or parts of them, "
        f"and there may be {limits.connections} connections",
        f"A head has {limits.header_seconds:g} seconds, a body {limits.body_seconds:g}, an idle connection "
        f"{limits.idle_seconds:g}, an answer that is not read {limits.write_seconds:g}",
        f"too large ({limits.body_bytes >> 20} MiB; {limits.media_body_bytes >> 20} MiB where a model takes pictures",
        f"A request may show {MAX_MEDIA}, and its body have {limits.media_body_bytes >> 20} MiB",
        f"too large together ({limits.bodies_bytes >> 20} MiB)",
        f"Pixels ({MOST_PIXELS // 10**6} million)",
        f"({CHUNK} tokens on ggml, {_CHUNK} on torch)",
        f"begins with at least {_LEAST_SHARED} of its tokens",
        f"keeps at most {_MOST_GRAPHS} graphs",
    ):
        assert words in page
    assert MAX_PARTS == MAX_SEQUENCES
    assert _FAILURES == 3
    assert f"for {_BROKEN_SECONDS:g} seconds after three failed steps in a row" in page
