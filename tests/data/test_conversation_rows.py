"""Rows of instruction data: five forms, one type, and a line for each that is wrong."""

import json
import lzma
import re

import pytest

from fanformer.data.conversations.examples import Example, Message, example_of
from fanformer.data.conversations.reading import read_examples
from fanformer.errors import DataError

SYSTEM = {"role": "system", "content": "Be brief."}
ASK, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
MORE, LAST = {"role": "user", "content": "So?"}, {"role": "assistant", "content": "Nothing."}
WORSE = {"role": "assistant", "content": "Hm."}


def messages(*rows):
    return tuple(Message(row["role"], row["content"]) for row in rows)


PAIR = messages(ASK, ANSWER)
FORMS = {
    "messages": ({"messages": [SYSTEM, ASK, ANSWER, MORE, LAST]}, Example(messages(SYSTEM, ASK, ANSWER, MORE, LAST))),
    "completion as text": ({"prompt": "Hi", "completion": "Hello."}, Example(PAIR, 1)),
    "completion as messages": (
        {"prompt": [SYSTEM, ASK, ANSWER, MORE], "completion": [LAST]},
        Example(messages(SYSTEM, ASK, ANSWER, MORE, LAST), 4),
    ),
    "preference as text": (
        {"prompt": "Hi", "chosen": "Hello.", "rejected": "Hm."},
        Example(PAIR, 1, messages(WORSE)),
    ),
    "preference as messages": (
        {"prompt": [SYSTEM, ASK], "chosen": [ANSWER], "rejected": [WORSE]},
        Example(messages(SYSTEM, ASK, ANSWER), 2, messages(WORSE)),
    ),
    "preference as whole conversations": (
        {"prompt": "So?", "chosen": [ASK, ANSWER, MORE, LAST], "rejected": [ASK, ANSWER, MORE, WORSE]},
        Example(messages(ASK, ANSWER, MORE, LAST), 3, messages(WORSE)),
    ),
    "conversations": (
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello."},
            ]
        },
        Example(messages(SYSTEM, ASK, ANSWER)),
    ),
    "conversations with roles": ({"conversations": [ASK, ANSWER]}, Example(PAIR)),
    "Alpaca": (
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        Example((Message("user", "Add.\n\n1 2"), Message("assistant", "3")), 1),
    ),
    "Alpaca without input": ({"instruction": "Hi", "input": "", "output": "Hello."}, Example(PAIR, 1)),
    "fields that say nothing": ({"messages": [ASK, {**ANSWER, "weight": 1, "tool_calls": []}]}, Example(PAIR)),
    "plain text": ({"text": "Once there was."}, Example((), text="Once there was.")),
    "an answer before a text": ({"prompt": "Hi", "completion": "Hello.", "text": "all of it"}, Example(PAIR, 1)),
    "null columns": ({"messages": None, "prompt": "Hi", "completion": "Hello.", "text": None}, Example(PAIR, 1)),
    "an empty system message": ({"messages": [{"role": "system", "content": ""}, ASK, ANSWER]}, Example(PAIR)),
}


@pytest.mark.parametrize(("row", "expected"), FORMS.values(), ids=FORMS)
def test_every_form_becomes_one_type(row, expected):
    assert example_of(row) == expected


def test_a_preference_is_looked_for_where_it_is_asked_for():
    row = {"prompt": "Hi", "chosen": [ASK, ANSWER], "rejected": [ASK, WORSE], "messages": [ASK, ANSWER], "score": 1}
    assert example_of(row) == Example(PAIR)
    assert example_of(row, preference=True) == Example(PAIR, 1, messages(WORSE))


WRONG = {
    "no JSON": ("{", "Expecting property name"),
    "nested too deep": ('{"messages": ' + "[" * 100_000, "one nested too deep to be read"),
    "no object": ("[1]", "expected a JSON object on every line, got list"),
    "no form": ({"body": "Hi"}, r"got `body`"),
    "no field": ({}, "got no field"),
    "no messages": ({"messages": []}, "`messages` must be a list of messages, got none"),
    "a text as messages": ({"messages": "Hi"}, "`messages` must be a list of messages, got str"),
    "a message that is text": ({"messages": ["Hi"]}, r"`messages\[0\]` must be an object .*, got str"),
    "only a system message": ({"messages": [SYSTEM]}, "must end with an answer of the assistant, got system"),
    "only an empty system message": ({"messages": [{"role": "system", "content": ""}]}, "got nothing at the end"),
    "no answer": ({"messages": [ASK]}, "must end with an answer of the assistant, got user"),
    "an answer without text": (
        {"messages": [ASK, {"role": "assistant", "content": " \n"}]},
        r"`messages\[1\].content` must say something, got an empty text",
    ),
    "an answer missing": ({"prompt": "Hi", "completion": None}, "`completion` must be text, got NoneType"),
    "no prompt": ({"completion": "Hello."}, "`prompt` is missing, got `completion`"),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "a.png"}]}, ANSWER]},
        r"`messages\[0\].content` must be text, got list",
    ),
    "pictures": ({"messages": [ASK, ANSWER], "images": ["a.png"]}, "`images` must not be there"),
    "a tool": ({"messages": [{**ASK, "tool_calls": [1]}, ANSWER]}, r"`messages\[0\].tool_calls` must not be there"),
    "a weight": ({"messages": [ASK, {**ANSWER, "weight": 0}]}, r"`messages\[1\].weight` must not be there"),
    "a role of its own": (
        {"messages": [{"role": "tool", "content": "3"}]},
        "must be system, user or assistant, got 't",
    ),
    "a role that is no text": ({"messages": [{"role": 3, "content": "3"}]}, "must be system, user or assistant, got 3"),
    "answer first": ({"messages": [ANSWER, ASK, ANSWER]}, "message 1 must be of the user, got assistant"),
    "two questions": ({"messages": [SYSTEM, ASK, MORE, LAST]}, "message 3 must be of the assistant, got user"),
    "system in the middle": ({"messages": [ASK, ANSWER, SYSTEM, LAST]}, "message 3 must be of the user, got system"),
    "a prompt that ends with an answer": (
        {"prompt": [ASK, ANSWER], "completion": [LAST]},
        "the prompt of `completion` must end with a message of the user, got assistant",
    ),
    "the same answer twice": ({"prompt": "Hi", "chosen": "a", "rejected": "a"}, "must differ, got the same twice"),
    "another prompt": (
        {"prompt": "So?", "chosen": [ASK, ANSWER], "rejected": [ASK, WORSE]},
        "`prompt` must be what `chosen` and `rejected` begin with",
    ),
    "pairs that part at a question": (
        {"chosen": [ASK, ANSWER], "rejected": [MORE, WORSE]},
        "the prompt of `chosen` must end with a message of the user, got nothing",
    ),
    "no Unicode": ('{"prompt": "Hi", "completion": "\\ud800"}', r"must be valid UTF-8, got '\\ud800'"),
    "Alpaca with a list": ({"instruction": "a", "input": ["b"], "output": "c"}, "`input` must be text, got list"),
}


def write(path, rows):
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(("row", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_row_costs_one_line_and_is_counted(tmp_path, row, message):
    spec = write(tmp_path / "a.jsonl", [{"messages": [ASK, ANSWER]}, row, {"prompt": "Hi", "completion": "Hello."}])
    notes = []
    found = read_examples(spec, notes.append)
    assert found.examples == (Example(PAIR), Example(PAIR, 1))
    assert [example.place for example in found.examples] == [f"{spec}:1", f"{spec}:3"]
    assert found.wrong == len(notes) == 1
    assert notes[0].startswith(f"{spec}:2: ")
    assert notes[0].endswith("; left out")
    assert "\n" not in notes[0]
    assert re.search(message, notes[0]), notes[0]


def test_bytes_that_are_not_utf8_make_a_row_wrong(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "Hi", "completion": "\xff"}\n{"prompt": "Hi", "completion": "Hello."}\n')
    notes = []
    assert read_examples(str(path), notes.append).examples == (Example(PAIR, 1),)
    assert "`completion` must be valid UTF-8" in notes[0]


def test_preferences_leave_other_rows_out(tmp_path):
    rows = [FORMS["preference as text"][0], {"messages": [ASK, ANSWER]}]
    notes = []
    found = read_examples(write(tmp_path / "a.jsonl", rows), notes.append, preference=True)
    assert (len(found.examples), found.wrong) == (1, 1)
    assert "a row must have `chosen` and `rejected`, got `messages`" in notes[0]


def test_a_pattern_reads_compressed_files_too(tmp_path):
    write(tmp_path / "a.jsonl", [{"messages": [ASK, ANSWER]}])
    with lzma.open(tmp_path / "b.jsonl.xz", "wt") as file:
        file.write(json.dumps({"prompt": "Hi", "completion": "Hello."}))
    assert len(read_examples(str(tmp_path / "*.jsonl*"), pytest.fail).examples) == 2


def test_no_row_at_all_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"holds no row to learn from, got 1 wrong ones: expected jsonl of messages"):
        read_examples(write(tmp_path / "a.jsonl", [{"body": "Hi"}]), lambda line: None)
    with pytest.raises(DataError, match=r"no file .*b.jsonl: expected a .jsonl file or a pattern"):
        read_examples(str(tmp_path / "b.jsonl"), pytest.fail)
    (tmp_path / "c.txt").write_text("Hi")
    with pytest.raises(DataError, match=r"expected a .jsonl file .*, got c.txt"):
        read_examples(str(tmp_path / "c.txt"), pytest.fail)
