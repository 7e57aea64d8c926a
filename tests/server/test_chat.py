"""Chat, models, tokenizers and the schema over a real socket, with a model that has a chat template."""

import json
import shutil

import pytest

from fanformer.server.models import ServedModel, SlotSettings
from tests.server.conftest import check_error, running

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('system must be first') }}"
    "{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
HELLO = [{"role": "user", "content": "the cat"}]


@pytest.fixture(scope="module")
def both(saved_model, tmp_path_factory):
    """A client of a server with a base model and one that chats, which are otherwise the same."""
    folder = shutil.copytree(saved_model, tmp_path_factory.mktemp("chat") / "chat")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    models = {
        name: ServedModel.open(path, name, SlotSettings(2, 100, 4), device="cpu")
        for name, path in (("base", saved_model), ("chat", folder))
    }
    with running(models) as client:
        yield client
    for model in models.values():
        model.close()


def chat(client, **fields):
    body = {"model": "chat", "messages": HELLO, "max_tokens": 8, "temperature": 0, **fields}
    status, _, found = client("POST", "/v1/chat/completions", body)
    assert status == 200, found
    return found


def part(content):
    """A message of one part."""
    return {"role": "user", "content": [content]}


def refused(client, **fields):
    return client.refused("/v1/chat/completions", **{"model": "chat", "messages": HELLO, "max_tokens": 8, **fields})


def test_an_answer_continues_what_the_template_writes(both):
    body = chat(both)
    assert set(body) == {"id", "object", "created", "model", "choices", "usage"}
    assert body["object"] == "chat.completion"
    [choice] = body["choices"]
    assert set(choice) == {"index", "message", "logprobs", "finish_reason"}
    assert choice["message"] == {"role": "assistant", "content": choice["message"]["content"], "refusal": None}
    ids = both.service.models["chat"].encode("user: the cat\nassistant:")[1:]
    expected = both.complete(model="chat", prompt=ids, max_tokens=8, temperature=0)
    assert choice["message"]["content"] == expected["choices"][0]["text"]
    assert body["usage"]["prompt_tokens"] == len(ids)


def test_parts_of_text_and_the_developers_role_are_read(both):
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]
    assert chat(both, messages=[{"role": "user", "content": parts}])["choices"] == chat(both)["choices"]
    system = [{"role": "system", "content": "a"}, *HELLO]
    developer = [{"role": "developer", "content": "a"}, *HELLO]
    assert chat(both, messages=system)["choices"] == chat(both, messages=developer)["choices"]


def test_a_stream_begins_with_the_role_and_ends_with_the_reason(both):
    settings = {"model": "chat", "messages": HELLO, "max_tokens": 8, "temperature": 0, "n": 2}
    chunks = both.events("/v1/chat/completions", stream_options={"include_usage": True}, **settings)
    whole = chat(both, n=2)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    for index in range(2):
        mine = [c["choices"][0] for c in chunks[:-1] if c["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        text = "".join(choice["delta"].get("content", "") for choice in mine)
        assert text == whole["choices"][index]["message"]["content"]
        assert [choice["finish_reason"] for choice in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1]["finish_reason"] == whole["choices"][index]["finish_reason"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


def test_log_probabilities_have_bytes_and_alternatives(both):
    [choice] = chat(both, logprobs=True, top_logprobs=2)["choices"]
    content = choice["logprobs"]["content"]
    assert len(content) >= 1
    for token in content:
        assert set(token) == {"token", "logprob", "bytes", "top_logprobs"}
        assert bytes(token["bytes"]).decode(errors="replace") == token["token"]
        assert token["top_logprobs"][0]["logprob"] == token["logprob"]
        assert len(token["top_logprobs"]) == 2
    [choice] = chat(both, logprobs=True)["choices"]
    assert choice["logprobs"]["content"][0]["top_logprobs"] == []
    assert chat(both)["choices"][0]["logprobs"] is None


def test_without_a_length_the_answer_may_fill_the_positions(both):
    body = chat(both, max_tokens=None)
    assert body["usage"]["total_tokens"] <= 100
    assert body["choices"][0]["finish_reason"] == "stop" or body["usage"]["total_tokens"] == 100
    assert chat(both, max_tokens=None, max_completion_tokens=3)["usage"]["completion_tokens"] <= 3


def test_a_second_turn_reads_only_what_is_new(both):
    first = chat(both, max_tokens=4)
    answer = {"role": "assistant", "content": first["choices"][0]["message"]["content"]}
    longer = [*HELLO, answer, {"role": "user", "content": "and"}]
    second = chat(both, messages=longer, max_tokens=4)
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= first["usage"]["prompt_tokens"] - 1


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": "hello"}, "messages", "got a string"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages", "'system'"),
        ({"messages": [{"role": "user"}]}, "messages", "required"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://10.0.0.1/"}}]}
                ]
            },
            "messages[0].content[0]",
            "of type image_url, expected text: the model reads text only",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            "messages[0].content[0]",
            "input_audio",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0]", "no `text`"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 2049}]}, "messages", "2048 parts"),
        ({"messages": [*HELLO, {"role": "system", "content": "b"}]}, "messages", "system must be first"),
        ({"messages": [{"role": "user", "content": "the cat " * 200}]}, "messages", "positions"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "UTF-8"),
        ({"tools": [{"type": "function"}]}, "tools", "does not call tools"),
        ({"tool_choice": "required"}, "tool_choice", "cannot be honoured"),
        ({"response_format": {"type": "json_object"}}, "response_format", "cannot be enforced"),
        ({"top_logprobs": 2}, "top_logprobs", "needs `logprobs`"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"max_completion_tokens": 9}, "max_completion_tokens", "differ"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"num_steps": 3}, "num_steps", "no latent steps"),
        ({"modalities": ["text", "audio"]}, "modalities", "text only"),
        ({"echo": True}, "echo", "cannot be honoured"),
        ({"model": "base"}, "model", "is a base model without a chat template: use /v1/completions"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(both, fields, param, words):
    status, error = refused(both, **fields)
    assert (status, error["param"]) == (400, param)
    assert words in error["message"]


def test_what_routers_add_is_accepted(both):
    added = {
        "continue_final_message": False, "separate_reasoning": True, "stream_reasoning": True, "no_stop_trim": False,
        "include_reasoning": True, "tools": [], "tool_choice": "auto", "response_format": {"type": "text"},
        "parallel_tool_calls": True, "store": False, "modalities": ["text"], "service_tier": "auto", "metadata": None,
    }  # fmt: skip
    assert chat(both, **added)["choices"] == chat(both)["choices"]


def test_a_conversation_that_cannot_fit_is_refused_before_it_is_made_tokens(both, monkeypatch):
    model = both.service.models["chat"]
    monkeypatch.setattr(model.text_model, "encode_messages", None)  # never called
    half = {"role": "user", "content": "a" * (51 * model.reader.longest_token)}
    status, error = refused(both, messages=[half, half])
    assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", "messages")


def test_models_are_listed_and_described(both):
    status, _, body = both("GET", "/v1/models")
    assert (status, body["object"]) == (200, "list")
    assert [model["id"] for model in body["data"]] == ["base", "chat"]
    assert all(model["max_model_len"] == 100 and model["object"] == "model" for model in body["data"])
    assert both("GET", "/v1/models/chat")[2] == body["data"][1]
    status, _, body = both("GET", "/v1/models/a/b")
    assert check_error(status, body)[1]["code"] == "model_not_found"


def test_texts_and_conversations_become_ids_and_back(both):
    model = both.service.models["chat"]
    status, _, body = both("POST", "/tokenize", {"model": "chat", "prompt": "the cat <|endoftext|>"})
    assert (status, body["tokens"]) == (200, model.encode("the cat <|endoftext|>"))
    assert (body["count"], body["max_model_len"]) == (len(body["tokens"]), 100)
    bare = both("POST", "/tokenize", {"prompt": "the cat", "add_special_tokens": False})[2]["tokens"]
    assert bare == model.encode("the cat")[1:]
    assert both("POST", "/detokenize", {"tokens": bare})[2] == {"prompt": "the cat"}
    named = both("POST", "/tokenize", {"prompt": "<|endoftext|>", "add_special_tokens": False})[2]["tokens"]
    assert named == [model.special_ids["eos"]]
    assert both("POST", "/tokenize", {"prompt": "<|endoftext|>"})[2]["tokens"] == model.encode("<|endoftext|>")
    conversation = both("POST", "/tokenize", {"model": "chat", "messages": HELLO})[2]["tokens"]
    assert model.decode(conversation) == "user: the cat\nassistant:"
    assert both.refused("/tokenize", prompt="a", messages=HELLO)[0] == 404  # no model called tiny here
    assert both.refused("/tokenize", model="chat")[1]["param"] == "prompt"
    assert both.refused("/tokenize", model="chat", messages=[])[1]["param"] == "messages"
    assert both.refused("/detokenize", model="chat", tokens=[300])[1]["param"] == "tokens"
    info = both("GET", "/tokenizer_info")[2]
    assert (info["bos_token"], info["eos_token"], info["chat_template"]) == ("<|endoftext|>", "<|endoftext|>", None)


def test_unknown_paths_and_methods_have_errors_of_the_same_shape(both):
    for method, path, expected in (("GET", "/nowhere", 404), ("GET", "/v1/completions", 405), ("POST", "/health", 405)):
        status, _, body = both(method, path, {} if method == "POST" else None)
        assert check_error(status, body)[0] == expected


def test_the_schema_names_every_route_and_field(both):
    status, _, schema = both("GET", "/openapi.json")
    assert status == 200
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/tokenize", "/health"} <= set(schema["paths"])
    responses = schema["paths"]["/v1/completions"]["post"]["responses"]
    assert {"200", "400", "401", "404", "413", "429", "503", "504"} <= set(responses)
    assert "422" not in responses
    assert responses["400"]["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorEnvelope")
    fields = schema["components"]["schemas"]["CompletionFields"]["properties"]
    assert fields["model"]["enum"] == ["base", "chat"]
    [name] = schema["paths"]["/v1/models/{name}"]["get"]["parameters"]
    assert name["schema"]["enum"] == ["base", "chat"]
    tokenized = schema["components"]["schemas"]["TokenizeFields"]["properties"]["model"]
    assert tokenized["anyOf"][0]["enum"] == ["base", "chat"]
    assert list(schema["paths"]["/metrics"]["get"]["responses"]["200"]["content"]) == ["text/plain"]
    assert {"prompt", "best_of", "echo", "logprobs", "min_p", "repetition_penalty", "logit_bias", "seed"} <= set(fields)
