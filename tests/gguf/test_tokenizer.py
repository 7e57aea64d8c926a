"""Taking a tokenizer.json apart for a GGUF file, and putting it together again."""

import json

import pytest
from tokenizers import Tokenizer

from fanformer.gguf.tokenizer import UNUSED, rebuild_json, strip_json


@pytest.fixture
def content(tiny_tokenizer):
    return json.loads(tiny_tokenizer.backend_tokenizer.to_str())


def test_what_was_taken_apart_is_put_together_again(content):
    pipeline, tokens, types, merges = strip_json(content, 400)
    assert len(content["model"]["vocab"]) > 256  # so that it takes several pieces
    assert types.count(UNUSED) == 400 - len(
        {*content["model"]["vocab"], *(x["content"] for x in content["added_tokens"])}
    )
    again = json.loads(rebuild_json(pipeline, tokens, types, merges))
    assert again["model"]["vocab"] == content["model"]["vocab"]
    assert [list(pair) for pair in again["model"]["merges"]] == [pair.split(" ") for pair in merges]
    del again["model"], content["model"]
    assert again == {**content, "truncation": None, "padding": None}


def test_the_rebuilt_tokenizer_gives_the_same_ids(content, tiny_tokenizer):
    pipeline, tokens, types, merges = strip_json(content, 400)
    rebuilt = Tokenizer.from_str(rebuild_json(pipeline, tokens, types, merges))
    text = "the quick brown fox, def main(): 12345 über <|x|>\n\t"
    assert rebuilt.encode(text).ids == tiny_tokenizer.backend_tokenizer.encode(text).ids


def test_a_token_that_is_there_twice_is_refused(content):
    pipeline, tokens, types, merges = strip_json(content, 400)
    tokens[290] = tokens[20]
    with pytest.raises(ValueError, match=r"is there twice"):
        rebuild_json(pipeline, tokens, types, merges)


def test_types_must_be_as_many_as_tokens(content):
    pipeline, tokens, types, merges = strip_json(content, 400)
    with pytest.raises(ValueError, match=r"zip\(\)"):
        rebuild_json(pipeline, tokens, types[1:], merges)
