"""A base model made ready for conversations: tokens, rows, ends and the template, in memory and in a folder."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fanformer.data.conversations.chat_tokens import add_chat_tokens, document_ends
from fanformer.data.conversations.chatml import END, START, TEMPLATE, chatml_of
from fanformer.errors import ConfigError
from tests.saved_models import tiny_tokenizer  # noqa: F401


def reserved(tokenizer, *names):
    """A copy with more tokens, as some tokenizers have for later use."""
    copied = copy.deepcopy(tokenizer)
    copied.add_special_tokens({"extra_special_tokens": list(names)})
    return copied


def test_missing_tokens_take_rows_that_only_fill_up(tiny_model, tiny_tokenizer):  # noqa: F811
    model = tiny_model(vocab_size=320)
    assert len(tiny_tokenizer) == 300
    prepared = add_chat_tokens(model, tiny_tokenizer)
    tokenizer = prepared.tokenizer
    assert sorted(prepared.new_ids) == [300, 301]
    assert {tokenizer.convert_tokens_to_ids(token) for token in (START, END)} == {300, 301}
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (END, "<|endoftext|>", "<|endoftext|>")
    end = tokenizer.eos_token_id
    assert (model.config.eos_token_id, model.config.pad_token_id) == (end, 0)
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == ([end, 0], 0)
    assert len(tiny_tokenizer) == 300  # that of the caller is as it was
    assert tiny_tokenizer.eos_token == "<|endoftext|>"


def test_plain_text_ends_as_it_did_before(tiny_model, tiny_tokenizer):  # noqa: F811
    tokenizer = add_chat_tokens(tiny_model(vocab_size=320), tiny_tokenizer).tokenizer
    assert tokenizer.eos_token_id != 0
    assert document_ends(tokenizer) == document_ends(tiny_tokenizer) == (0, 0)
    other = copy.deepcopy(tiny_tokenizer)
    other.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"})
    assert document_ends(other) == (other.bos_token_id, other.eos_token_id)


def test_rows_of_new_tokens_begin_as_the_docstring_says(tiny_model, tiny_tokenizer):  # noqa: F811
    model = tiny_model(vocab_size=320)
    before = copy.deepcopy(model.state_dict())
    chatml = add_chat_tokens(model, tiny_tokenizer).chatml
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    assert torch.equal(embedding[chatml.start_id], before["model.embed_tokens.weight"][0])
    assert torch.equal(head[chatml.end_id], before["lm_head.weight"][0])
    assert torch.allclose(head[chatml.start_id], head[:300].mean(0), atol=1e-6)  # one rounding of a sum
    # 64 normal channels: their mean square is within a factor of 2 of the expected one
    expected = embedding[:300].square().mean()
    assert expected / 2 < embedding[chatml.end_id].square().mean() < expected * 2
    others = [number for number in range(320) if number not in (chatml.start_id, chatml.end_id)]
    assert torch.equal(embedding[others], before["model.embed_tokens.weight"][others])
    assert torch.equal(head[others], before["lm_head.weight"][others])


def test_a_tied_matrix_gives_the_two_different_rows(tiny_model, tiny_tokenizer):  # noqa: F811
    model = tiny_model(vocab_size=320, tie_word_embeddings=True)
    chatml = add_chat_tokens(model, tiny_tokenizer).chatml
    weight = model.lm_head.weight
    assert torch.equal(weight[chatml.end_id], weight[0])
    assert not torch.equal(weight[chatml.start_id], weight[0])
    assert weight is model.model.embed_tokens.weight


def test_another_architecture_is_prepared_alike(tiny_tokenizer):  # noqa: F811
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=320, **sizes))
    prepared = add_chat_tokens(model, tiny_tokenizer)
    assert model.generation_config.eos_token_id == [prepared.chatml.end_id, 0]
    assert torch.equal(model.lm_head.weight[prepared.chatml.end_id], model.lm_head.weight[0])


def test_a_full_vocabulary_gives_reserved_tokens(tiny_model, tiny_tokenizer):  # noqa: F811
    full = reserved(tiny_tokenizer, "<|kept|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>")
    prepared = add_chat_tokens(tiny_model(vocab_size=303), full)
    assert prepared.tokenizer.convert_ids_to_tokens([300, 301, 302]) == ["<|kept|>", START, END]
    assert prepared.notes[0] == f"{START} takes the reserved token <|reserved_special_token_0|>"
    assert set(prepared.new_ids) == {301, 302}
    assert len(prepared.tokenizer) == 303
    text = "the cat <|kept|> sat"
    assert prepared.tokenizer(text).input_ids == full(text).input_ids
    assert prepared.tokenizer.padding_side == full.padding_side


def test_one_row_and_no_reserved_token_is_one_clear_error(tiny_model, tiny_tokenizer):  # noqa: F811
    with pytest.raises(
        ConfigError,
        match=r"room for <\|im_start\|> and <\|im_end\|>, got 300 tokens in a vocabulary of 301 and 0 reserved ones",
    ):
        add_chat_tokens(tiny_model(vocab_size=301), tiny_tokenizer)


@pytest.mark.parametrize("tied", [False, True])
def test_a_full_vocabulary_may_grow_where_that_is_asked_for(tiny_model, tiny_tokenizer, tied):  # noqa: F811
    model = tiny_model(vocab_size=301, tie_word_embeddings=tied)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        logits = model(torch.tensor([[1, 2, 3]])).logits
    prepared = add_chat_tokens(model, tiny_tokenizer, grow=True)
    assert model.config.vocab_size == len(model.lm_head.weight) == len(model.model.embed_tokens.weight) == 320
    assert prepared.notes == ("the vocabulary grows from 301 to 320",)
    assert sorted(prepared.new_ids) == [300, 301]
    assert torch.equal(model.lm_head.weight[:300], before["lm_head.weight"][:300])
    again = tiny_model(vocab_size=301, tie_word_embeddings=tied)
    torch.manual_seed(1)
    add_chat_tokens(again, tiny_tokenizer, grow=True)
    for weight, same in ((one.lm_head.weight, one.model.embed_tokens.weight) for one in (model, again)):
        assert not weight[302:].any()
        assert not same[302:].any()
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)
    with torch.no_grad():
        # the same products in a larger matrix
        torch.testing.assert_close(model(torch.tensor([[1, 2, 3]])).logits[..., :300], logits[..., :300])
    assert add_chat_tokens(tiny_model(vocab_size=320), tiny_tokenizer, grow=True).notes == ()


def test_tokens_that_are_there_keep_their_rows(tiny_model, tiny_tokenizer):  # noqa: F811
    there = reserved(tiny_tokenizer, START, END)
    model = tiny_model(vocab_size=302)
    before = copy.deepcopy(model.state_dict())
    prepared = add_chat_tokens(model, there)
    assert prepared.new_ids == ()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (prepared.tokenizer.eos_token, prepared.tokenizer.pad_token) == (END, "<|endoftext|>")


def test_padding_is_never_the_end_of_a_turn(tiny_model, tiny_tokenizer):  # noqa: F811
    chat = reserved(tiny_tokenizer, START, END)
    chat.add_special_tokens({"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": "<|endoftext|>"})
    assert add_chat_tokens(tiny_model(vocab_size=302), chat).tokenizer.pad_token == "<|endoftext|>"
    alone = PreTrainedTokenizerFast(tokenizer_object=chat.backend_tokenizer, bos_token=START, eos_token=END)
    with pytest.raises(ConfigError, match=r"must have a token to pad with beside <\|im_end\|>, got none"):
        add_chat_tokens(tiny_model(vocab_size=302), alone)


def test_a_template_that_is_replaced_is_told(tiny_model, tiny_tokenizer):  # noqa: F811
    other = copy.deepcopy(tiny_tokenizer)
    other.chat_template = "x"
    prepared = add_chat_tokens(tiny_model(vocab_size=320), other)
    assert prepared.notes == ("the tokenizer's chat template, which is not ChatML, is replaced by it",)


def test_a_template_that_is_chatml_stays_with_its_own_system_message(tiny_model, tiny_tokenizer):  # noqa: F811
    own = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + TEMPLATE
    answering = add_chat_tokens(tiny_model(vocab_size=320), tiny_tokenizer).tokenizer
    answering.chat_template = own
    again = add_chat_tokens(tiny_model(vocab_size=320), answering)
    assert (again.tokenizer.chat_template, again.notes, again.new_ids) == (own, (), ())
    assert again.chatml.default_system == "Be kind."


@pytest.mark.parametrize("size", [320, 302])
def test_the_saved_folder_holds_all_of_it(tiny_model, tiny_tokenizer, tmp_path, size):  # noqa: F811
    given = tiny_tokenizer if size == 320 else reserved(tiny_tokenizer, "<unused0>", "<unused1>")
    model = tiny_model(vocab_size=size)
    prepared = add_chat_tokens(model, given)
    model.save_pretrained(tmp_path)
    prepared.tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == TEMPLATE
    ends = prepared.chatml.end_id
    for name, expected in (("config.json", ends), ("generation_config.json", [ends, 0])):
        saved = json.loads((tmp_path / name).read_text())
        assert (saved["eos_token_id"], saved["pad_token_id"]) == (expected, 0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (ends, 0)
    again = chatml_of(tokenizer)
    assert (again.start_id, again.end_id) == (prepared.chatml.start_id, ends)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert loaded.generation_config.eos_token_id == [ends, 0]
