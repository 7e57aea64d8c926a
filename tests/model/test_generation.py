"""Text with a key-value cache is the text without one, alone or in a batch, by every way of decoding."""

import threading

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DynamicCache,
    GenerationConfig,
    PreTrainedTokenizerFast,
    StaticCache,
    TextIteratorStreamer,
    pipeline,
)

from fanformer.model.recurrence_fanformer import CACHE
from tests.tiny_models import FULL_RANK, PAPERS_COLA, TUNED

# A cached and an uncached product sum in another order; logits here are of size 10, and float32 has 7 digits.
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
VARIANTS = [
    {},
    TUNED,
    {"fan_placement": "layer", **FULL_RANK, "norm_placement": "pre", "qkv_norm": "none"},
    {"fan_placement": "none", "gated_residual": False},
    {**PAPERS_COLA, "gate_initial": 2.0},
]
SEED_OF_VARIED_TEXT = 31  # with some others, the greedy text of a variant goes round in a circle of few tokens
GREEDY = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 24}


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model()


@pytest.fixture(scope="module")
def tokenizer():
    """One token per byte, and no special tokens but the padding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytewise, pad_token=alphabet[0])


@torch.no_grad()
def greedy_by_recomputation(model, input_ids, steps):
    """Take the likeliest token again and again, each time from the whole text without a cache."""
    for _ in range(steps):
        logits = model(input_ids, use_cache=False).logits
        input_ids = torch.cat((input_ids, logits[:, -1:].argmax(-1)), dim=1)
    return input_ids


def assert_varied(tokens):
    """Fail where a text repeats a few tokens: then equality would prove little."""
    for row in tokens:
        assert row.unique().numel() >= 8, f"degenerate text: {row.tolist()}"


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_cached_generation_equals_recomputation(tiny_model, token_ids, fields):
    model = tiny_model(seed=SEED_OF_VARIED_TEXT, **fields)
    input_ids = token_ids(2, 7)
    expected = greedy_by_recomputation(model, input_ids, 24)
    assert_varied(expected[:, 7:])
    for options in ({"use_cache": False}, {"cache_implementation": "dynamic"}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(input_ids, **GREEDY, **options), expected), options


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@torch.no_grad()
def test_a_cache_is_taken_by_either_of_its_names(tiny_model, token_ids, name):
    """`transformers` calls it `cache` from 5.24 on; not to know it would be to read every token alone."""
    model, input_ids, cache = tiny_model(), token_ids(2, 9), DynamicCache()
    outputs = model(input_ids[:, :8], **{name: cache})
    assert outputs[CACHE] is cache
    again = model.model(input_ids[:, 8:], **{name: cache}).last_hidden_state
    assert cache.get_seq_length() == 9
    torch.testing.assert_close(model.lm_head(again)[:, 0], model(input_ids).logits[:, -1])
    with pytest.raises(ValueError, match="one of `cache` and `past_key_values` must be given, got both"):
        model(input_ids, cache=cache, past_key_values=cache)


@pytest.mark.parametrize("cache_type", [DynamicCache, StaticCache])
@pytest.mark.parametrize("fields", VARIANTS, ids=str)
@torch.no_grad()
def test_cached_decode_equals_full_forward(tiny_model, token_ids, fields, cache_type):
    model = tiny_model(**fields)
    input_ids = token_ids(2, 33)
    options = {"max_cache_len": 40} if cache_type is StaticCache else {}
    cache = cache_type(config=model.config, **options)
    prefill = model(input_ids[:, :9], past_key_values=cache).logits
    steps = [model(input_ids[:, i : i + 1], past_key_values=cache).logits for i in range(9, 33)]
    expected = model(input_ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat((prefill, *steps), dim=1), expected, **TOLERANCE)


@pytest.mark.parametrize("chunk", [1, 4, 10, 33])
@torch.no_grad()
def test_prefill_in_chunks_equals_full_forward(model, token_ids, chunk):
    input_ids = token_ids(2, 33)
    cache = DynamicCache(config=model.config)
    chunks = [model(part, past_key_values=cache).logits for part in input_ids.split(chunk, dim=1)]
    assert cache.get_seq_length() == 33
    torch.testing.assert_close(torch.cat(chunks, dim=1), model(input_ids, use_cache=False).logits, **TOLERANCE)


@torch.no_grad()
def test_prefill_in_chunks_with_positions_given_equals_full_forward(model, token_ids):
    input_ids = token_ids(2, 33)
    cache = DynamicCache(config=model.config)
    positions = torch.arange(33)[None]
    parts = zip(input_ids.split(10, dim=1), positions.split(10, dim=1), strict=True)
    chunks = [model(part, position_ids=position, past_key_values=cache).logits for part, position in parts]
    torch.testing.assert_close(torch.cat(chunks, dim=1), model(input_ids, use_cache=False).logits, **TOLERANCE)


def test_generate_with_prefill_in_chunks_equals_generate(model, token_ids):
    input_ids = token_ids(2, 19)
    expected = model.generate(input_ids, **GREEDY)
    assert torch.equal(model.generate(input_ids, **GREEDY, prefill_chunk_size=8), expected)


@torch.no_grad()
def test_future_token_does_not_change_past_logits(model, token_ids):
    input_ids = token_ids(2, 33)
    before = model(input_ids).logits
    for position in (1, 17, 32):
        changed = input_ids.clone()
        changed[:, position] = (changed[:, position] + 1) % 256
        after = model(changed).logits
        assert torch.equal(after[:, :position], before[:, :position])
        assert not torch.equal(after[:, position:], before[:, position:])


@torch.no_grad()
def test_rows_of_a_batch_do_not_meet(model, token_ids):
    input_ids = token_ids(5, 17)
    order = torch.tensor([3, 0, 4, 1, 2])
    logits = model(input_ids).logits
    torch.testing.assert_close(model(input_ids[order]).logits, logits[order], **TOLERANCE)
    changed = input_ids.clone()
    changed[2] = (changed[2] + 1) % 256
    others = [0, 1, 3, 4]
    assert torch.equal(model(changed).logits[others], logits[others])


def left_padded(rows):
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.cat((torch.zeros(width - len(row), dtype=torch.int64), row)) for row in rows])
    mask = torch.stack([(torch.arange(width) >= width - len(row)).long() for row in rows])
    return ids, mask


@pytest.mark.parametrize("cache_implementation", ["dynamic", "static"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_left_padded_batch_generates_what_each_row_generates_alone(
    tiny_model, token_ids, attention, cache_implementation
):
    model = tiny_model(seed=SEED_OF_VARIED_TEXT)
    model.set_attn_implementation(attention)
    rows = [token_ids(length, seed=length) for length in (3, 17, 9, 1)]
    ids, mask = left_padded(rows)
    batch = model.generate(ids, attention_mask=mask, **GREEDY, cache_implementation=cache_implementation)
    assert_varied(batch[:, 17:])
    for row, generated in zip(rows, batch, strict=True):
        alone = model.generate(row[None], **GREEDY)[0]
        assert torch.equal(generated[17:], alone[len(row) :])


@torch.no_grad()
def test_left_padded_row_gives_the_logits_of_the_row_alone(model, token_ids):
    rows = [token_ids(length, seed=length) for length in (3, 17, 9)]
    ids, mask = left_padded(rows)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)  # as generate counts them
    ones = torch.where(mask == 0, 1, positions)  # as it counted them earlier
    for position_ids in (positions, ones, None):
        logits = model(ids, attention_mask=mask, position_ids=position_ids).logits
        for row, found in zip(rows, logits, strict=True):
            torch.testing.assert_close(found[-len(row) :], model(row[None]).logits[0], **TOLERANCE)


def test_sampling_with_a_seed_repeats_itself_whatever_the_cache(model, token_ids):
    input_ids = token_ids(2, 7)
    options = {"do_sample": True, "temperature": 0.7, "top_k": 100, "top_p": 0.85, "max_new_tokens": 24}
    texts = []
    for cache in ({}, {}, {"cache_implementation": "static"}, {"use_cache": False}):
        torch.manual_seed(5)
        texts.append(model.generate(input_ids, pad_token_id=0, **options, **cache))
    assert_varied(texts[0][:, 7:])
    assert all(torch.equal(text, texts[0]) for text in texts)
    torch.manual_seed(6)
    assert not torch.equal(model.generate(input_ids, pad_token_id=0, **options), texts[0])


def test_beam_search_finds_a_likelier_text_than_greedy(model, token_ids):
    input_ids = token_ids(1, 7)

    @torch.no_grad()
    def log_likelihood(text):
        log_probabilities = model(text).logits[0, 6:-1].log_softmax(-1)
        return log_probabilities.gather(1, text[0, 7:, None]).sum().item()

    greedy = model.generate(input_ids, **GREEDY)
    beams = model.generate(input_ids, **GREEDY, num_beams=8)
    assert beams.shape == greedy.shape
    assert log_likelihood(beams) > log_likelihood(greedy)
    assert torch.equal(model.generate(input_ids, **GREEDY, num_beams=8, use_cache=False), beams)


def test_assisted_decoding_gives_the_greedy_text(model, tiny_model, token_ids):
    input_ids = token_ids(1, 7)
    draft = tiny_model(num_hidden_layers=1)
    assisted = model.generate(input_ids, **GREEDY, assistant_model=draft)
    assert torch.equal(assisted, model.generate(input_ids, **GREEDY))
    looked_up = model.generate(input_ids, **GREEDY, prompt_lookup_num_tokens=3)
    assert torch.equal(looked_up, model.generate(input_ids, **GREEDY))


def test_streamed_text_is_the_text(model, tokenizer):
    inputs = tokenizer(["def f(x):"], return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    options = {"do_sample": False, "max_new_tokens": 24, "streamer": streamer}
    thread = threading.Thread(target=model.generate, kwargs={**inputs, **options})
    thread.start()
    pieces = list(streamer)
    thread.join()
    expected = model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
    assert len(pieces) > 1
    assert "".join(pieces) == tokenizer.decode(expected)


def test_pipeline_generates_as_generate_does(tiny_model, tokenizer, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generator = pipeline("text-generation", model=str(tmp_path), device="cpu")
    assert type(generator.model) is type(model)
    greedy = GenerationConfig(do_sample=False, max_new_tokens=24, pad_token_id=0)
    results = generator(["def f(x):", "a"], generation_config=greedy, batch_size=2)
    for prompt, result in zip(["def f(x):", "a"], results, strict=True):
        alone = model.generate(**tokenizer([prompt], return_tensors="pt"), **GREEDY)
        assert result[0]["generated_text"] == tokenizer.decode(alone[0], skip_special_tokens=True)


def test_cache_holds_key_value_heads_not_query_heads(model, token_ids):
    cache = model(token_ids(1, 5)).past_key_values
    assert len(cache.layers) == 2
    assert {tuple(layer.keys.shape) for layer in cache.layers} == {(1, 2, 5, 16)}
    assert {tuple(layer.values.shape) for layer in cache.layers} == {(1, 2, 5, 16)}
