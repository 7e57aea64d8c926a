"""/v1/completions over a real socket: each field does what it says, and the answer has the shape that clients read."""

import json

import pytest
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fanformer.server.fields import ChatFields, CompletionFields, DetokenizeFields, TokenizeFields
from fanformer.server.models import TokenReader, _byte_reader
from fanformer.server.planning import plan_completion
from tests.server.conftest import PROMPTS, offline


def texts(body):
    return [choice["text"] for choice in sorted(body["choices"], key=lambda choice: choice["index"])]


def test_greedy_text_is_the_offline_one_and_the_answer_has_the_shape(client, served):
    body = client.complete(prompt="the cat", max_tokens=12, temperature=0)
    [expected] = offline(served, ["the cat"], temperature=0, max_length=12)
    assert texts(body) == [expected.text]
    assert set(body) == {"id", "object", "created", "model", "choices", "usage"}
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["model"] == "tiny"
    [choice] = body["choices"]
    assert set(choice) == {"index", "text", "logprobs", "finish_reason"}
    assert choice["logprobs"] is None
    assert choice["finish_reason"] in ("stop", "length")
    length = len(served.encode("the cat"))
    usage = {key: body["usage"][key] for key in ("prompt_tokens", "completion_tokens", "total_tokens")}
    assert usage == {
        "prompt_tokens": length,
        "completion_tokens": expected.tokens,
        "total_tokens": length + expected.tokens,
    }


def test_prompts_come_as_texts_as_ids_and_as_lists_of_both(client, served):
    ids = [served.encode(prompt) for prompt in PROMPTS[:3]]
    settings = {"max_tokens": 6, "temperature": 0}
    single = [texts(client.complete(prompt=prompt, **settings))[0] for prompt in PROMPTS[:3]]
    assert texts(client.complete(prompt=PROMPTS[:3], **settings)) == single
    assert texts(client.complete(prompt=ids, **settings)) == single
    assert texts(client.complete(prompt=ids[1], **settings)) == single[1:2]
    begun = [offline(served, [""], temperature=0, max_length=6)[0].text]
    assert [texts(client.complete(**one, **settings)) for one in ({}, {"prompt": ""}, {"prompt": None})] == [begun] * 3


def test_the_same_seed_gives_the_offline_text_and_every_choice_its_own(client, served):
    settings = {"temperature": 0.9, "top_k": 50, "top_p": 0.9}
    body = client.complete(prompt="the cat", max_tokens=10, n=3, seed=5, **settings)
    expected = offline(served, ["the cat"] * 3, seed=5, max_length=10, **settings)
    assert texts(body) == [completion.text for completion in expected]
    assert len(set(texts(body))) == 3
    assert texts(client.complete(prompt="the cat", max_tokens=10, seed=6, **settings)) != texts(body)[:1]


def test_without_a_seed_answers_differ(client):
    found = {texts(client.complete(prompt="the cat", max_tokens=16))[0] for _ in range(4)}
    assert len(found) > 1


def test_a_stream_is_the_same_text_piece_by_piece(client):
    for prompt in PROMPTS:
        settings = {"prompt": prompt, "max_tokens": 12, "temperature": 0}
        whole = client.complete(**settings)
        chunks = client.events(**settings)
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == texts(whole)[0]
        assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
        assert all(set(chunk) == {"id", "object", "created", "model", "choices"} for chunk in chunks)
        reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
        assert reasons[:-1] == [None] * (len(chunks) - 1)
        assert reasons[-1] == whole["choices"][0]["finish_reason"]


def test_usage_comes_last_in_a_stream_that_asks_for_it(client):
    settings = {"prompt": ["def", "the cat"], "max_tokens": 5, "temperature": 0}
    *chunks, last = client.events(stream_options={"include_usage": True}, **settings)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    expected = client.complete(**settings)["usage"]
    assert last["usage"]["total_tokens"] == expected["total_tokens"]


def test_several_choices_share_a_stream(client):
    settings = {"prompt": ["def", "the cat"], "n": 2, "max_tokens": 8, "seed": 1}
    pieces = [""] * 4
    for chunk in client.events(**settings):
        [choice] = chunk["choices"]
        pieces[choice["index"]] += choice["text"]
    assert pieces == texts(client.complete(**settings))


def test_stop_strings_never_leak_into_a_stream(client):
    [whole] = texts(client.complete(prompt="the cat", max_tokens=30, temperature=0))
    stops = [f"nothing {number}" for number in range(5)]
    for start in range(0, 9, 2):
        stop = whole[start : start + 3]
        chunks = client.events(prompt="the cat", max_tokens=30, temperature=0, stop=[*stops, stop])
        sent = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        assert sent == whole[: whole.index(stop)]
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert texts(client.complete(prompt="the cat", max_tokens=30, temperature=0, stop=whole[4:6])) == [
        whole[: whole.index(whole[4:6])]
    ]


def test_characters_never_split_in_a_stream(client, served):
    ids = [
        next(number for number in range(served.known) if served.token_bytes(number) == bytes([byte]))
        for byte in "\u4e16".encode()
    ]
    bias = {str(number): 100 for number in ids}
    chunks = client.events(prompt="a", max_tokens=20, seed=3, temperature=2, logit_bias=bias)
    whole = texts(client.complete(prompt="a", max_tokens=20, seed=3, temperature=2, logit_bias=bias))[0]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole
    sent = ""
    for chunk in chunks:  # half a character would come as U+FFFD where the whole text has something else
        sent += chunk["choices"][0]["text"]
        assert whole.startswith(sent)
    assert "\u4e16" in whole or "\ufffd" in whole


def _bytes_of(token):
    """The bytes that a token's name stands for."""
    if token.startswith("bytes:"):
        return bytes.fromhex(token[6:].replace("\\x", ""))
    return token.encode()


def test_log_probabilities_of_new_tokens(client, served):
    body = client.complete(prompt="the cat", max_tokens=6, temperature=0, logprobs=3)
    [choice] = body["choices"]
    scores = choice["logprobs"]
    assert set(scores) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert len({len(column) for column in scores.values()}) == 1
    raw = b"".join(_bytes_of(token) for token in scores["tokens"] if token != "<|endoftext|>")
    assert raw.decode(errors="replace") == choice["text"]
    for token, value, top in zip(scores["tokens"], scores["token_logprobs"], scores["top_logprobs"], strict=True):
        assert top[token] == value == max(top.values())
        assert len(top) == 3
    assert (
        client.complete(prompt="the cat", max_tokens=2, logprobs=0)["choices"][0]["logprobs"]["top_logprobs"]
        == [None] * 2
    )


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.Metaspace(),
        decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
    ],
    ids=["Metaspace", "Strip"],
)
def test_names_of_tokens_that_begin_a_word_keep_its_space(decoder):
    words = ["<unk>", "\u2581the", "\u2581cat", "cat", "s", "\u2581"]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoder
    reader = TokenReader(backend)
    ids = [1, 2, 4, 5, 3, 1]
    names = [_byte_reader(reader)(number).decode() for number in ids]
    assert names == [" the", " cat", "s", " ", "cat", " the"]
    assert "".join(names[1:]) == reader.decode(ids).removeprefix("the")


def test_echo_tells_the_prompt_with_its_log_probabilities(client, served):
    """What lm-evaluation-harness asks: the prompt's tokens and one new one come back."""
    ids = served.encode("the cat sat on the mat")
    body = client.complete(prompt=[ids], max_tokens=1, temperature=0, logprobs=1, echo=True, seed=1234)
    [choice] = body["choices"]
    values = choice["logprobs"]["token_logprobs"]
    assert len(values) == len(ids) + 1
    assert values[0] is None
    assert values[1:-1] == pytest.approx(served.offline.log_likelihoods(ids), abs=1e-4)
    assert choice["text"].startswith("the cat sat on the mat")
    offsets = choice["logprobs"]["text_offset"]
    assert offsets == sorted(offsets)
    assert offsets[-1] == len("the cat sat on the mat")
    tokens = choice["logprobs"]["tokens"]
    assert [choice["text"][offset : offset + len(token)] for offset, token in zip(offsets, tokens, strict=True)][
        1:-1
    ] == tokens[1:-1]


def test_echo_alone_reads_and_writes_nothing(client, served):
    body = client.complete(prompt="the cat", max_tokens=0, echo=True)
    assert texts(body) == ["the cat"]
    assert body["usage"]["completion_tokens"] == 0
    chunks = client.events(prompt="the cat", max_tokens=3, echo=True, temperature=0)
    assert (
        "".join(chunk["choices"][0]["text"] for chunk in chunks)
        == texts(client.complete(prompt="the cat", max_tokens=3, echo=True, temperature=0))[0]
    )


def test_best_of_tells_the_likeliest_of_its_answers(client):
    settings = {"prompt": "the cat", "max_tokens": 6, "seed": 2, "logprobs": 0}
    every = client.complete(n=5, **settings)["choices"]

    def mean(choice):
        values = choice["logprobs"]["token_logprobs"]
        return sum(values) / len(values)

    best = client.complete(n=2, best_of=5, **settings)
    expected = sorted(every, key=mean, reverse=True)[:2]
    assert texts(best) == [choice["text"] for choice in expected]
    assert best["usage"]["completion_tokens"] > sum(len(c["logprobs"]["tokens"]) for c in best["choices"])


def test_bias_penalties_and_least_tokens_take_effect(client, served):
    settings = {"prompt": "the cat", "max_tokens": 8, "temperature": 0}
    plain = texts(client.complete(**settings))
    assert texts(client.complete(**settings, logit_bias={"5": 100})) == [served.decode([5]) * 8]
    assert texts(client.complete(**settings, frequency_penalty=2, presence_penalty=2, repetition_penalty=1.5)) != plain
    assert client.complete(**settings, repetition_penalty=0.01)
    ended = client.complete(**settings, logit_bias={"0": 100})
    assert (texts(ended), ended["choices"][0]["finish_reason"]) == ([""], "stop")
    held = client.complete(**settings, logit_bias={"0": 100}, min_tokens=4)
    assert held["usage"]["completion_tokens"] == 5
    assert (
        len({texts(client.complete(**{**settings, "temperature": 1}, min_p=1, seed=seed))[0] for seed in range(3)}) == 1
    )


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"temperature": 3}, "temperature", "less than or equal to 2, got 3"),
        ({"temperature": "hot"}, "temperature", "valid number, got a string"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"repetition_penalty": 1e-45}, "repetition_penalty", "greater than or equal to 0.01"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": True}, "n", "got True"),
        ({"max_tokens": 0}, "max_tokens", "without `echo`"),
        ({"max_tokens": 1.5}, "max_tokens", "valid integer"),
        ({"logprobs": 6}, "logprobs", "less than or equal to 5"),
        ({"best_of": 1, "n": 2}, "best_of", "at least n"),
        ({"best_of": 3, "stream": True}, "best_of", "stream"),
        ({"stop": [""]}, "stop", "1 to 1024 characters"),
        ({"stop": 5}, "stop", "got 5"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "the key 'x'"),
        ({"logit_bias": {"300": 1}}, "logit_bias", "ids in [0, 300)"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "less than or equal to 100"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "without `stream`"),
        ({"prompt": []}, "prompt", "an empty list"),
        ({"prompt": [[]]}, "prompt", "no token ids"),
        ({"prompt": [300]}, "prompt", "ids below 300"),
        ({"prompt": [-1]}, "prompt", ""),
        ({"prompt": [2**40], "echo": True}, "prompt", "ids below 300"),
        ({"prompt": [[5], [2**70]], "echo": True, "logprobs": 1}, "prompt", "ids below 300"),
        ({"prompt": {"a": 1}}, "prompt", "got an object"),
        ({"prompt": ["a", 1]}, "prompt", ""),
        ({"prompt": "a", "min_tokens": 5, "max_tokens": 4}, "min_tokens", "at most max_tokens"),
        ({"num_steps": 4}, "num_steps", "no latent steps"),
        ({"suffix": "end"}, "suffix", "only continues"),
        ({"grammar": "root ::= x"}, "grammar", "cannot be honoured"),
        ({"ignore_eos": True}, "ignore_eos", "cannot be honoured"),
        ({"skip_special_tokens": False, "stop_token_ids": [5]}, "stop_token_ids", "cannot be honoured"),
        ({"stream": True, "stream_options": {"include_usage": True, "chunk": 5}}, "stream_options.chunk", "honoured"),
        ({"prompt": "\ud800"}, "prompt", "UTF-8"),
        ({"metadata": [[]] * 2000}, "metadata", "may have 4096 characters, got 8000"),
    ],
)
def test_wrong_and_unsupported_fields_are_refused_by_name(client, fields, param, words):
    status, error = client.refused(**{"prompt": "a", **fields})
    assert status == 400
    assert error["param"] == param
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (CompletionFields, {"prompt": [-1] * 1000}),
        (CompletionFields, {"prompt": [[-1] * 1000] * 1000}),
        (CompletionFields, {"prompt": "a", "stop": [1] * 1000}),
        (CompletionFields, {"prompt": "a", "logit_bias": {str(number): "a" for number in range(1000)}}),
        (ChatFields, {"messages": [1] * 1000}),
        (ChatFields, {"messages": [{"role": "user", "content": [1] * 1000}]}),
        (DetokenizeFields, {"tokens": [-1] * 1000}),
        (TokenizeFields, {"messages": [1] * 1000}),
    ],
)
def test_of_many_wrong_items_the_first_is_told_and_the_others_take_no_memory(kind, fields):
    with pytest.raises(ValidationError) as error:
        kind.model_validate({"model": "tiny", **fields})
    assert error.value.error_count() <= 4  # one for each type that the field could have


def test_answers_of_one_request_share_their_settings_and_not_their_seed(served):
    fields = CompletionFields(model="tiny", prompt=["a", "b"], n=2, logit_bias={"5": 1.0}, seed=1)
    samplings = [request.sampling for request in plan_completion(fields, served).requests]
    assert len({id(one.logit_bias) for one in samplings}) == 1
    assert len({one.seed for one in samplings}) == 4


def test_numbers_that_json_lacks_are_refused(client):
    for value in ("NaN", "Infinity", "1e999"):
        body = b'{"model": "tiny", "prompt": "a", "temperature": %s}' % value.encode()
        status, _, found = client("POST", "/v1/completions", body)
        assert status == 400, found


def test_what_routers_and_clients_add_without_asking_for_anything_is_accepted(client):
    added = {
        "no_stop_trim": False, "ignore_eos": False, "skip_special_tokens": True, "return_hidden_states": False,
        "user": "somebody", "suffix": None, "num_steps": None, "lora_path": None, "regex": None, "stop": "",
        "logit_bias": {}, "top_k": -1, "min_p": 0, "repetition_penalty": 1.0, "best_of": 1, "stop_token_ids": [],
    }  # fmt: skip
    plain = client.complete(prompt="the cat", max_tokens=5, temperature=0)
    assert texts(client.complete(prompt="the cat", max_tokens=5, temperature=0, **added)) == texts(plain)


def test_a_prompt_that_is_too_long_says_how_long_it_may_be(client):
    status, error = client.refused(prompt="the cat " * 200, max_tokens=5)
    assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", "prompt")
    assert "100 positions" in error["message"]
    status, error = client.refused(prompt="the cat", max_tokens=99)
    assert (status, error["code"]) == (400, "context_length_exceeded")


def test_a_text_that_cannot_fit_is_refused_before_it_is_made_tokens(client, served, monkeypatch):
    longest = served.reader.longest_token
    assert longest == max(len(served.token_bytes(number)) for number in range(served.known))
    assert not served.surely_exceeds(100 * longest)
    monkeypatch.setattr(served.reader, "encode", None)  # never called
    status, error = client.refused(prompt="a" * (100 * longest + 1))
    assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", "prompt")
    assert f"{100 * longest + 1} characters" in error["message"]


def test_unknown_models_are_not_found(client):
    status, error = client.refused(model="gpt-4", prompt="a")
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "expected one of: tiny" in error["message"]
    assert "gpt-4" not in json.dumps(error)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe", b"[" * 100_000, b'{"model": "tiny"', b"1" * 5000]
)
def test_bodies_that_are_no_json_objects_are_refused(client, body):
    status, _, found = client("POST", "/v1/completions", body)
    assert status == 400
    assert found["error"]["code"] == "invalid_json" or "JSON" in found["error"]["message"]


def test_more_answers_than_can_wait_are_refused_for_good(client):
    status, error = client.refused(prompt=["a"] * 13)
    assert status == 400
    assert "may have 10 answers here, got 13" in error["message"]
