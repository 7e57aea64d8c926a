"""The tokenizer in a GGUF file: a whole tokenizer.json, and what files had before it."""

import copy
import json

import numpy as np
import pytest
from tokenizers import Tokenizer

from fanformer.data.conversations.chatml import TEMPLATE
from fanformer.errors import CheckpointError
from fanformer.gguf.file import GGUFFile, Texts
from fanformer.gguf.tokenizer import UNUSED, WHOLE, GGUFTokenizer, put_together, split_json, without_generation_tags
from tests.gguf_models import export, save


@pytest.fixture
def content(tiny_tokenizer):
    return json.loads(tiny_tokenizer.backend_tokenizer.to_str())


def taken_apart(content):
    """What files had before: all but tokens and merges as text, and these."""
    tokens, types, merges = split_json(content, 400)
    rest = {key: value for key, value in content["model"].items() if key not in ("vocab", "merges")}
    outside = [item["id"] for item in content["added_tokens"] if item["content"] not in content["model"]["vocab"]]
    pipeline = {**content, "model": rest, "truncation": None, "padding": None, "outside_vocabulary": outside}
    return json.dumps(pipeline), tokens, types, merges


def test_what_was_taken_apart_is_put_together_again(content):
    pipeline, tokens, types, merges = taken_apart(content)
    assert types.count(UNUSED) == 400 - len(
        {*content["model"]["vocab"], *(x["content"] for x in content["added_tokens"])}
    )
    again = json.loads(put_together(pipeline, tokens, types, merges))
    assert again["model"]["vocab"] == content["model"]["vocab"]
    assert [list(pair) for pair in again["model"]["merges"]] == [pair.split(" ") for pair in merges]
    del again["model"], content["model"]
    assert again == {**content, "truncation": None, "padding": None}


def test_the_rebuilt_tokenizer_gives_the_same_ids(content, tiny_tokenizer):
    rebuilt = Tokenizer.from_str(put_together(*taken_apart(content)))
    text = "the quick brown fox, def main(): 12345 \u00fcber <|x|>\n\t"
    assert rebuilt.encode(text).ids == tiny_tokenizer.backend_tokenizer.encode(text).ids


def test_types_must_be_as_many_as_tokens(content):
    pipeline, tokens, types, merges = taken_apart(content)
    with pytest.raises(ValueError, match=r"zip\(\)"):
        put_together(pipeline, tokens, types[1:], merges)


def test_the_file_has_the_folders_tokenizer_json(saved_model, content):
    whole = json.loads(GGUFFile(export(saved_model)).metadata[WHOLE])
    assert whole == {**content, "truncation": None, "padding": None}


@pytest.mark.parametrize("name", ["tokenizer.ggml.tokens", "tokenizer.fanformer.pipeline"])
def test_tokens_that_differ_from_the_tokenizers_or_are_there_twice_are_refused(saved_model, content, name):
    file = GGUFFile(export(saved_model))
    pipeline = taken_apart(content)[0]
    if "pipeline" in name:
        del file.metadata[WHOLE]
        file.metadata[name] = pipeline
        GGUFTokenizer(file, 320)
    words = file.metadata["tokenizer.ggml.tokens"][:]
    words[290] = words[20]
    file.metadata["tokenizer.ggml.tokens"] = Texts(
        "".join(words).encode(), np.cumsum([len(word.encode()) for word in words])
    )
    with pytest.raises(CheckpointError, match=r"has other tokens than `tokenizer.ggml.tokens`|out of vocabulary"):
        GGUFTokenizer(file, 320)


TAGGED = {
    "ours": TEMPLATE,
    "tags on lines of their own": """{% for m in messages %}
  {% if m.role == 'assistant' %}
    {% generation %}
    {{ m.content }} .
    {% endgeneration %}
  {% endif %}

  {{ m.role }}
{% endfor %}""",
    "trimmed on both sides": "{% for m in messages %}a \n {%- generation -%} \n\n {{ m.content }} \n"
    "{%- endgeneration %}\n\nb{% endfor %}",
    "kept on both sides": "{% for m in messages %}a\n  {%+ generation +%}\n{{ m.content }}"
    "{%+endgeneration+%}\nb{% endfor %}",
    "after another tag": "{% for m in messages %}{% generation %}\n\n{{ m.content }}{%endgeneration%}{% endfor %}\nend",
    "at the ends": "{% generation %}{{ messages[0].content }}{% endgeneration %}",
}


@pytest.mark.parametrize("template", TAGGED.values(), ids=TAGGED)
def test_a_template_without_its_generation_tags_writes_the_same(saved_model, loaded, template):
    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.chat_template = template
    messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    expected = tokenizer.apply_chat_template(messages, tokenize=False)
    tokenizer.chat_template = without_generation_tags(template)
    assert "generation %" not in tokenizer.chat_template
    assert tokenizer.apply_chat_template(messages, tokenize=False) == expected
    file = GGUFFile(export(saved_model))
    file.metadata["tokenizer.chat_template"] = template  # as another program may have written it
    theirs = GGUFTokenizer(file, 320).apply_chat_template(messages, add_generation_prompt=False, tokenize=False)
    assert theirs == expected


def test_a_written_file_has_the_template_without_the_tags(loaded, tmp_path):
    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.chat_template = TEMPLATE
    template = GGUFFile(export(save(tmp_path / "model", loaded.model, tokenizer))).metadata["tokenizer.chat_template"]
    assert template == TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
