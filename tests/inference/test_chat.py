"""A conversation: history under a chat template, single texts without one."""

import copy

import pytest

from fanformer.errors import ConfigError
from fanformer.inference.chat import Conversation
from fanformer.inference.generation import generate
from fanformer.inference.interruption import Interruption
from fanformer.inference.settings import GenerationSettings

SETTINGS = GenerationSettings(max_length=10, min_length=10, seed=1)
TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"


@pytest.fixture
def templated(loaded):
    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.chat_template = TEMPLATE
    return loaded.model, tokenizer


def answer(conversation, message):
    pieces = []
    forgotten = conversation.answer(message, pieces.append, Interruption())
    return "".join(pieces), forgotten


def test_base_model_continues_each_message_as_a_text_of_its_own(loaded):
    conversation = Conversation(*loaded, SETTINGS)
    assert not conversation.has_template
    assert answer(conversation, "the cat")[0] == generate(*loaded, ["the cat"], SETTINGS)[0].text
    assert conversation.messages == []


def test_second_answer_of_a_fixed_seed_is_not_the_first_again(loaded):
    conversation = Conversation(*loaded, SETTINGS)
    assert answer(conversation, "the cat") != answer(conversation, "the cat")


def test_history_is_in_front_of_the_next_answer_until_reset(templated):
    talked, fresh = Conversation(*templated, SETTINGS), Conversation(*templated, SETTINGS)
    first, _ = answer(talked, "hi")
    assert talked.messages == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": first}]
    ids, forgotten = talked._fit([*talked.messages, {"role": "user", "content": "so?"}])
    assert templated[1].decode(ids) == f"u:hi\na:{first}\nu:so?\na:"
    assert forgotten == 0
    talked.reset()
    assert talked.messages == fresh.messages == []


def test_oldest_messages_are_forgotten_when_they_no_longer_fit(templated):
    conversation = Conversation(*templated, SETTINGS)
    lost = [answer(conversation, f"message {number}, some words long")[1] for number in range(6)]
    assert lost[0] == 0
    assert sum(lost) >= 2
    assert conversation.messages[0]["role"] == "user"
    assert conversation.messages[-2]["content"] == "message 5, some words long"


def test_message_too_long_for_an_answer_is_refused_and_not_kept(templated):
    conversation = Conversation(*templated, SETTINGS)
    with pytest.raises(ConfigError, match="and max_length 10 more do not fit the model's 128 positions"):
        answer(conversation, "!?" * 200)
    assert conversation.messages == []
