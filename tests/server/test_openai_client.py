"""The official Python client against a real socket: what it reads, what it raises, what it tries again."""

import base64
import json
import re
import shutil
import threading

import pytest

from fanformer.server.limits import Access
from fanformer.server.models import ServedModel, SlotSettings
from tests.server.conftest import offline, running
from tests.server.test_chat import TEMPLATE
from tests.server.test_gate import slowed, streaming

openai = pytest.importorskip("openai", reason="needs the official client (openai)")
pytestmark = pytest.mark.ci
KEY = "sk-right-0123456789"


@pytest.fixture(scope="module")
def model(saved_model, tmp_path_factory):
    """The tiny model with a chat template, on torch with two slots."""
    from fanformer.loading import load_text_model

    folder = shutil.copytree(saved_model, tmp_path_factory.mktemp("chat") / "tiny")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    found = ServedModel.open(folder, "tiny", SlotSettings(2, 100, queue_size=2), device="cpu")
    found.offline = load_text_model(folder, device="cpu")
    yield found
    found.close()


@pytest.fixture
def api(model):
    """The official client of a server with a key, that tries nothing again."""
    with running({"tiny": model}, Access(keys=(KEY,))) as client:
        made = openai.OpenAI(base_url=f"http://127.0.0.1:{client.port}/v1", api_key=KEY, max_retries=0)
        made.plain = client
        yield made
        made.close()


def test_completions_whole_and_streamed(api, model):
    [expected] = offline(model, ["the cat"], temperature=0, max_length=12)
    whole = api.completions.create(model="tiny", prompt="the cat", max_tokens=12, temperature=0, logprobs=2)
    assert whole.choices[0].text == expected.text
    assert whole.usage.completion_tokens == expected.tokens
    assert len(whole.choices[0].logprobs.tokens) == expected.tokens
    stream = api.completions.create(
        model="tiny",
        prompt="the cat",
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    *pieces, last = list(stream)
    assert "".join(piece.choices[0].text for piece in pieces) == expected.text
    assert (last.choices, last.usage.total_tokens) == ([], whole.usage.total_tokens)


def test_the_page_s_first_program_prints_the_text_of_a_model_as_it_comes(model, repository, monkeypatch, capsys):
    page = (repository / "docs/serving.md").read_text(encoding="utf-8")
    program = re.search(r"```python\n(.*?)```", page, re.DOTALL).group(1)
    monkeypatch.setattr("fanformer.server.planning.secrets.randbits", lambda bits: 1)  # the seed of who gives none
    with running({"nano": model}) as client:
        exec(program.replace(":8000/", f":{client.port}/"), {})
    [expected] = offline(model, ["def "], seed=1, max_length=50)
    assert capsys.readouterr().out == expected.text != ""


def test_chat_whole_and_streamed(api):
    messages = [{"role": "user", "content": "the cat"}]
    settings = {"model": "tiny", "messages": messages, "max_tokens": 10, "temperature": 0, "seed": 1}
    whole = api.chat.completions.create(**settings, logprobs=True, top_logprobs=2)
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2
    stream = api.chat.completions.create(**settings, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == whole.choices[0].message.content
    assert [one.id for one in api.models.list()] == ["tiny"]
    assert api.models.retrieve("tiny").id == "tiny"


def test_errors_come_with_their_class_code_and_param(api):
    with pytest.raises(openai.NotFoundError) as missing:
        api.completions.create(model="other", prompt="a")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as long:
        api.completions.create(model="tiny", prompt="the cat " * 200)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as wrong:
        api.chat.completions.create(model="tiny", messages=[], tools=[])
    assert wrong.value.param == "messages"
    stranger = openai.OpenAI(base_url=str(api.base_url), api_key="sk-wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError) as unknown:
        stranger.models.list()
    assert unknown.value.code == "invalid_api_key"


def test_a_failure_within_a_stream_is_raised(api, model, monkeypatch):
    def failing(tokens, every=False):
        raise MemoryError

    stream = api.completions.create(model="tiny", prompt="the cat", max_tokens=90, stream=True)
    slowed(model, monkeypatch, 0.02)
    next(stream)
    monkeypatch.setattr(model.slots, "forward", failing)
    with pytest.raises(openai.APIError, match="failed to compute"):
        list(stream)


def test_a_full_queue_is_tried_again_when_it_says(api, model, monkeypatch):
    slowed(model, monkeypatch, 0.01)
    begun = [streaming(api.plain, KEY) for _ in range(4)]
    with pytest.raises(openai.RateLimitError) as full:
        api.completions.create(model="tiny", prompt="a", max_tokens=1)
    assert full.value.code == "rate_limit_exceeded"
    threading.Timer(0.5, lambda: [one.close() for one in begun]).start()
    patient = api.with_options(max_retries=5)
    assert patient.completions.create(model="tiny", prompt="a", max_tokens=1).choices


def test_closing_a_stream_frees_its_slot(api, model, monkeypatch):
    slowed(model, monkeypatch, 0.02)
    before = model.scheduler.counters.finished["cancelled"]
    with api.completions.create(model="tiny", prompt="the cat", max_tokens=90, stream=True) as stream:
        next(iter(stream))
    for _ in range(1000):
        if model.scheduler.counters.finished["cancelled"] > before:
            break
        threading.Event().wait(0.01)
    assert model.scheduler.counters.finished["cancelled"] == before + 1


def test_pictures_and_recordings_are_sent_as_openai_writes_them(saved_model, tmp_path):
    from fanformer.generation.media_model import load_media_model
    from tests.multimodal_files import save_with_towers, write_picture, write_tone

    folder = save_with_towers(saved_model, tmp_path / "sees")
    picture, tone = write_picture(tmp_path / "red.png", "red"), write_tone(tmp_path / "low.wav", "low")
    expected = load_media_model(folder, "cpu").generate(
        "what?", images=[picture], audio=[tone], max_length=10, min_length=0, temperature=0.0
    )
    coded = [base64.b64encode(file.read_bytes()).decode() for file in (picture, tone)]
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{coded[0]}", "detail": "auto"}},
        {"type": "input_audio", "input_audio": {"data": coded[1], "format": "wav"}},
        {"type": "text", "text": "what?"},
    ]
    served = ServedModel.open(folder, "sees", SlotSettings(2, 100, queue_size=2), device="cpu")
    with running({"sees": served}) as client:
        made = openai.OpenAI(base_url=f"http://127.0.0.1:{client.port}/v1", api_key="none", max_retries=0)
        asked = {"model": "sees", "messages": [{"role": "user", "content": parts}], "max_tokens": 10, "temperature": 0}
        assert made.chat.completions.create(**asked).choices[0].message.content == expected
        parts[0]["image_url"]["url"] = "https://example.org/a.png"
        with pytest.raises(openai.BadRequestError, match="no address is opened"):
            made.chat.completions.create(**asked)
        made.close()
    served.close()
