"""Generation: what the settings mean, what a seed reproduces, and that batches change nothing."""

import dataclasses

import pytest
import torch
from transformers import GenerationConfig

from fanformer.data.multimodal.placeholders import add_placeholders
from fanformer.errors import CheckpointError, ConfigError
from fanformer.generation.interruption import Interruption
from fanformer.generation.settings import GenerationSettings
from fanformer.generation.text_model import excluded_first, withhold_spaces
from fanformer.generation.torch_model import GumbelNoise, encode_prompt
from fanformer.machine.compiling import fixed_cache
from tests.saved_models import complete_on_torch as generate

SHORT = GenerationSettings(max_length=12, seed=3)


def texts(loaded, prompts, settings=SHORT, **arguments):
    return [completion.text for completion in generate(*loaded, prompts, settings, **arguments)]


def test_greedy_text_equals_argmax_of_full_forward_passes(loaded):
    model, tokenizer = loaded
    ids = encode_prompt(tokenizer, "the cat")
    new = []
    with torch.no_grad():
        for _ in range(12):
            logits = model(torch.tensor([ids + new]), use_cache=False).logits[0, -1]
            logits[len(tokenizer) :] = -torch.inf
            if not new:
                logits[0] = -torch.inf  # min_length 1: no end token at first
            new.append(int(logits.argmax()))
            if new[-1] == 0:
                break
    completion = generate(model, tokenizer, ["the cat"], dataclasses.replace(SHORT, temperature=0))[0]
    assert completion.text == tokenizer.decode(new, skip_special_tokens=True)
    assert completion.tokens == len(new)


def test_prompt_gets_the_start_token_in_front(loaded):
    assert encode_prompt(loaded.tokenizer, "cat")[0] == loaded.tokenizer.bos_token_id
    assert encode_prompt(loaded.tokenizer, "") == [loaded.tokenizer.bos_token_id]


def test_empty_prompt_begins_a_text(loaded):
    assert generate(*loaded, [""], SHORT)[0].tokens > 0


def test_prompt_that_names_the_end_token_is_plain_text(loaded):
    assert encode_prompt(loaded.tokenizer, "<|endoftext|>")[1:] != [loaded.tokenizer.eos_token_id]


def test_same_seed_same_text_other_seed_other_text(loaded):
    assert texts(loaded, ["the cat"]) == texts(loaded, ["the cat"])
    assert texts(loaded, ["the cat"]) != texts(loaded, ["the cat"], dataclasses.replace(SHORT, seed=4))


def test_drawn_seed_is_reported_and_reproduces_the_text(loaded):
    first = generate(*loaded, ["the cat"], dataclasses.replace(SHORT, seed=None))[0]
    again = generate(*loaded, ["the cat"], dataclasses.replace(SHORT, seed=first.seed))[0]
    assert again.text == first.text


def test_sampling_leaves_the_global_random_state_alone(loaded):
    before = torch.get_rng_state()
    texts(loaded, ["the cat"])
    assert torch.equal(before, torch.get_rng_state())


def test_text_does_not_depend_on_the_other_prompts_of_the_batch(loaded):
    prompts = ["the cat sat on the mat", "def", "a small model", ""]
    together = texts(loaded, prompts)
    assert together == texts(loaded, prompts, batch_size=1) == texts(loaded, prompts, batch_size=3)
    assert together[1] == texts(loaded, ["another one", "def", "x" * 30])[1]


def test_equal_prompts_of_one_call_get_different_texts(loaded):
    assert len(set(texts(loaded, ["the cat"] * 4))) == 4


def test_gumbel_noise_samples_the_softmax():
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]])
    noise = GumbelNoise([7])
    draws = torch.stack([noise(None, logits).argmax(-1) for _ in range(4000)]).flatten()
    shares = torch.bincount(draws, minlength=4) / len(draws)
    # 4 standard errors of a share of 4000 draws are at most 4 * 0.5 / sqrt(4000) = 0.032.
    torch.testing.assert_close(shares, logits.softmax(-1)[0], atol=0.032, rtol=0)
    assert shares[3] == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ids_that_the_tokenizer_lacks_are_never_drawn(loaded, temperature):
    model, tokenizer = loaded
    bias = torch.zeros(model.config.vocab_size)
    bias[len(tokenizer) :] = 100.0  # without the mask no other id would ever be drawn, and the text be empty
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: output + bias)
    try:
        settings = GenerationSettings(max_length=20, min_length=20, temperature=temperature, seed=1, top_k=0, top_p=1)
        assert len(texts(loaded, ["the cat"], settings)[0].encode()) >= 20
    finally:
        handle.remove()


@pytest.fixture
def eager_to_end(loaded):
    """The model with an end token that is always the most likely."""
    model, tokenizer = loaded
    bias = torch.zeros(model.config.vocab_size)
    bias[tokenizer.eos_token_id] = 100.0
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: output + bias)
    yield loaded
    handle.remove()


def test_end_token_is_masked_before_min_length_and_ends_the_text_after(eager_to_end):
    for length in (1, 5):
        completion = generate(*eager_to_end, ["the cat"], GenerationSettings(max_length=20, min_length=length, seed=0))[
            0
        ]
        assert completion.tokens == length + 1  # the end token itself is the last
        assert completion.finish_reason == "end"


def test_max_length_counts_new_tokens(loaded):
    settings = GenerationSettings(max_length=7, min_length=7, seed=0)
    for prompt in ("", "the cat sat on the mat"):
        completion = generate(*loaded, [prompt], settings)[0]
        assert completion.tokens == 7
        assert completion.finish_reason == "length"
        assert completion.tokens_per_second > 0


def test_top_k_1_and_tiny_top_p_are_greedy(loaded):
    greedy = texts(loaded, ["the cat"], dataclasses.replace(SHORT, temperature=0))
    assert texts(loaded, ["the cat"], dataclasses.replace(SHORT, top_k=1)) == greedy
    assert texts(loaded, ["the cat"], dataclasses.replace(SHORT, top_p=1e-6)) == greedy


@pytest.mark.parametrize("temperature", [1e-320, 1e-42, 1e-37, 1e-30])
def test_temperatures_that_logits_overflow_by_are_greedy(loaded, temperature):
    greedy = texts(loaded, ["the cat", "def "], dataclasses.replace(SHORT, temperature=0))
    assert texts(loaded, ["the cat", "def "], dataclasses.replace(SHORT, temperature=temperature)) == greedy


def test_too_long_prompt_names_the_numbers(loaded):
    with pytest.raises(ConfigError, match=r"has 3 tokens .* max_length 200 .* 203; .* 128 positions: lower .* to 125"):
        generate(*loaded, ["!?"], GenerationSettings(max_length=200))
    with pytest.raises(ConfigError, match="shorten the prompt to fewer than 128 tokens"):
        generate(*loaded, ["!?" * 100], GenerationSettings(max_length=5))


def test_longest_text_that_fits_is_written(loaded):
    settings = GenerationSettings(max_length=125, min_length=125, seed=0)
    assert generate(*loaded, ["!?"], settings)[0].tokens == 125


def test_prompt_that_is_no_unicode_is_refused(loaded):
    with pytest.raises(ConfigError, match="must be valid UTF-8"):
        generate(*loaded, ["\udcff"], SHORT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 0}, "`max_length` must be at least 1 new token, got 0."),
        ({"min_length": 101}, r"`min_length` must be between 0 and max_length \(100\), got 101."),
        ({"top_k": -1}, "`top_k` must be at least 0, got -1: 0 draws from all tokens."),
        ({"top_p": 0.0}, r"`top_p` must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"`top_p` must be in \(0, 1\], got 1.5"),
        ({"top_p": float("nan")}, r"`top_p` must be in \(0, 1\], got nan"),
        ({"temperature": -0.5}, r"`temperature` must be in \[0, 1.7e\+38\], got -0.5: 0 is greedy."),
        ({"temperature": float("nan")}, r"`temperature` must be in \[0, 1.7e\+38\], got nan"),
        ({"temperature": 1e39}, r"`temperature` must be in \[0, 1.7e\+38\], got 1e\+39"),
        ({"seed": -1}, "`seed` must be at least 0, got -1."),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        GenerationSettings(**changes)


def test_streaming_several_prompts_and_an_empty_batch_are_refused(loaded):
    with pytest.raises(ConfigError, match="streams the text of one prompt, got 2"):
        generate(*loaded, ["a", "b"], SHORT, on_text=print)
    with pytest.raises(ConfigError, match="`batch_size` must be at least 1, got 0"):
        generate(*loaded, ["a"], SHORT, batch_size=0)


def test_interruption_ends_the_text_and_leaves_out_what_has_not_begun(loaded):
    interruption = Interruption()
    pieces = []

    def stop_at_third(piece):
        pieces.append(piece)
        if len(pieces) == 3:
            interruption.request()

    settings = GenerationSettings(max_length=100, min_length=100, seed=0)
    completion = generate(*loaded, ["the cat"], settings, stop_at_third, interruption=interruption)[0]
    assert completion.finish_reason == "interrupted"
    assert completion.tokens < 20
    assert completion.text == "".join(pieces)
    assert generate(*loaded, ["a", "b"], settings, interruption=interruption) == []


def test_values_that_are_no_numbers_are_an_error_not_a_text(loaded):
    handle = loaded.model.lm_head.register_forward_hook(lambda module, inputs, output: output * torch.nan)
    try:
        with pytest.raises(CheckpointError, match="values that are no numbers"):
            texts(loaded, ["the cat"])
    finally:
        handle.remove()


@pytest.mark.parametrize("spaces", [" ", "    "], ids=["one", "four"])
def test_spaces_at_the_end_of_a_prompt_begin_the_first_new_token(loaded, spaces):
    model, tokenizer = loaded
    pieces = []
    prompt = f"the cat{spaces}"
    settings = GenerationSettings(max_length=8, seed=3)
    streamed = generate(model, tokenizer, [prompt], settings, pieces.append)[0]
    assert "".join(pieces) == streamed.text
    encoded = encode_prompt(tokenizer, prompt)
    ids, withheld = withhold_spaces(tokenizer, encoded)
    assert ids == encoded[:-1]
    assert withheld.strip(" ") == ""
    # the text after the prompt does not repeat the spaces that its first token begins with
    beginnings = {tokenizer.decode([t])[len(withheld) :] for t in range(len(tokenizer)) if
                  tokenizer.decode([t]).startswith(withheld)}  # fmt: skip
    assert any(streamed.text.startswith(beginning) for beginning in beginnings)


def test_a_prompt_that_ends_in_a_word_is_left_as_it_is(loaded):
    _, tokenizer = loaded
    for prompt in ("the cat", "the cat\n", ""):
        ids = encode_prompt(tokenizer, prompt)
        assert withhold_spaces(tokenizer, ids) == (ids, "")


def test_a_trained_word_after_a_space_is_one_token_with_it(loaded):
    model, tokenizer = loaded
    # greedily, among the tokens that begin with a space: " " alone is only one of them
    text = generate(model, tokenizer, ["sat "], GenerationSettings(max_length=1, temperature=0))[0].text
    ids = torch.tensor([encode_prompt(tokenizer, "sat")])
    with torch.no_grad():
        scores = model(ids).logits[0, -1, : len(tokenizer)]
    allowed = [t for t in range(len(tokenizer)) if tokenizer.decode([t]).startswith(" ")]
    best = max(allowed, key=lambda token_id: scores[token_id])
    assert " " + text == tokenizer.decode([best])


def test_spaces_at_the_end_of_a_prompt_where_placeholders_lie_beyond_the_scores(tiny_model, tiny_tokenizer):
    model = tiny_model(vocab_size=300).eval()
    tokenizer = add_placeholders(tiny_tokenizer, 300, ["audio"]).tokenizer
    assert len(tokenizer) > model.config.vocab_size
    assert texts((model, tokenizer), ["the cat "]) == texts((model, tiny_tokenizer), ["the cat "])


def test_only_tokens_that_begin_with_the_spaces_can_be_first(tiny_tokenizer):
    excluded = excluded_first(tiny_tokenizer, " ", 300)
    assert [tiny_tokenizer.decode([token]).startswith(" ") for token in range(300)] == (~excluded).tolist()
    assert excluded_first(tiny_tokenizer, "", 300) is None


def test_greedy_is_the_likeliest_token_whatever_the_folder_asks_for(loaded, monkeypatch):
    model, _ = loaded
    greedy = GenerationSettings(max_length=20, temperature=0)
    prompts = ["the cat", "a small"]
    expected = texts(loaded, prompts, greedy)
    theirs = GenerationConfig(
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        suppress_tokens=list(range(100, 200)),
        return_dict_in_generate=True,
        cache_implementation="static",
        **{name: getattr(model.generation_config, name) for name in ("eos_token_id", "pad_token_id")},
    )
    monkeypatch.setattr(model, "generation_config", theirs)
    assert texts(loaded, prompts, greedy) == expected
    assert model.generation_config is theirs
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: output * torch.nan)
    with handle, pytest.raises(CheckpointError, match="no numbers"):
        texts(loaded, prompts, greedy)
    assert model.generation_config is theirs


@pytest.mark.slow
def test_compiled_decoding_writes_the_same_texts(loaded):
    model, tokenizer = loaded
    prompts = ["the cat", "a", "the old dog runs over the river"]
    for settings in (
        GenerationSettings(max_length=20, temperature=0.0),
        GenerationSettings(max_length=12, min_length=12, seed=3),
    ):
        eager = generate(model, tokenizer, prompts, settings, batch_size=2)
        compiled = generate(model, tokenizer, prompts, settings, batch_size=2, compiled=True)
        assert [one.text for one in compiled] == [one.text for one in eager]


def test_a_long_text_leaves_no_long_cache_behind(loaded):
    model, _ = loaded
    caches = [fixed_cache(model, positions) for positions in (1000, 20)]
    ids = torch.tensor([[5, 6, 7]])
    for cache in caches:
        model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=2)
    assert [cache.layers[0].keys.shape[2] for cache in caches] == [1024, 256]


def test_compiling_without_a_compiler_is_refused(loaded, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    settings = GenerationSettings(max_length=2)
    with pytest.raises(ConfigError, match=r"`compile` is on, but no C\+\+ compiler \(g\+\+\) found: leave it off"):
        generate(*loaded, ["a"], settings, compiled=True)
