"""The depth of a loaded model: who chooses it, what it costs, and drafts that change no text."""

import pytest
import torch

from fanformer.errors import ConfigError
from fanformer.generation.depth import cache_layers, check_steps, chosen_depth, counted_steps, parse_steps, set_depth
from fanformer.generation.settings import GenerationSettings
from fanformer.generation.speculation import SelfSpeculation
from fanformer.loading import load, load_text_model
from tests.saved_models import recurrent_model, saved_model, tiny_tokenizer  # noqa: F401

GREEDY = GenerationSettings(max_length=24, temperature=0)
PROMPTS = ["the cat", "def add(", ""]


@pytest.fixture
def deep(recurrent_model):  # noqa: F811
    """The model, which a test may set as it likes."""
    return load(recurrent_model, device="cpu")


def texts(model, prompts=PROMPTS, settings=GREEDY):
    return [completion.text for completion in model.complete(prompts, settings)]


def test_the_mean_of_training_is_the_default_and_another_number_another_text(recurrent_model):  # noqa: F811
    default = load_text_model(recurrent_model, "cpu")
    assert default.depth_note == (
        "recurrent depth: 4 steps, the mean that the model was trained with (--num-steps 1 to 8 takes others)."
    )
    assert texts(default) == texts(load_text_model(recurrent_model, "cpu", num_steps=4))
    assert texts(default) != texts(load_text_model(recurrent_model, "cpu", num_steps=1))


@pytest.mark.parametrize("num_steps", [2, 4, 8])
@pytest.mark.parametrize("draft_tokens", [1, 3, 7])
def test_speculation_gives_the_greedy_text(recurrent_model, num_steps, draft_tokens):  # noqa: F811
    plain = load_text_model(recurrent_model, "cpu", "float32", num_steps=num_steps)
    drafting = load_text_model(recurrent_model, "cpu", "float32", num_steps=num_steps, draft_tokens=draft_tokens)
    for model in (plain, drafting):
        model.model.double()  # so that sums in another order never change which token is likeliest
    assert texts(drafting) == texts(plain)
    assert drafting.speculation.accepted < drafting.speculation.drafted
    assert drafting.speculation.accepted > 0 or num_steps == 8  # one step of random weights seldom knows the eighth


def test_speculation_ends_where_greedy_decoding_ends(recurrent_model):  # noqa: F811
    drafting = load_text_model(recurrent_model, "cpu", draft_tokens=5)
    ids = drafting.encode("the cat")
    whole = texts(load_text_model(recurrent_model, "cpu"), ["the cat"], GenerationSettings(max_length=9, temperature=0))
    heard = []

    def on_token(token):
        heard.append(token)
        return len(heard) == 4

    found = drafting.speculation.continue_ids(ids, 9, lambda ids, logits: int(logits[:, :300].argmax(-1)), on_token)
    assert found == heard
    assert len(found) == 4  # though five are drafted at once
    streamed = []
    completion = next(drafting.complete(["the cat"], GenerationSettings(max_length=9, temperature=0), streamed.append))
    assert "".join(streamed) == completion.text == whole[0]


def test_a_draft_that_always_holds_takes_few_rounds(deep):
    with torch.no_grad():  # a bridge that is the identity, and a core that leaves its input alone but for a norm
        for parameter in deep.model.model.layers[1].parameters():
            if parameter.ndim == 2:
                parameter.zero_()
        for name, parameter in deep.model.model.layers[1].named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
        deep.model.model.layers[1].post_attention_layernorm.weight.fill_(1)
        deep.model.model.bridge.scale.fill_(1)
        deep.model.model.bridge.norm_weight.zero_()
    speculation = SelfSpeculation(deep.model, 4)
    speculation.continue_ids([0, 5], 12, lambda ids, logits: int(logits.argmax(-1)), lambda token: False)
    assert speculation.drafted == speculation.accepted == 12


def test_batches_under_exit_are_what_each_prompt_gets_alone(recurrent_model):  # noqa: F811
    model = load_text_model(recurrent_model, "cpu", num_steps=8, exit_threshold=0.3)
    with counted_steps(model.model) as count:
        together = texts(model)
    assert 1 < count.mean < 8
    assert together == [texts(model, [prompt])[0] for prompt in PROMPTS]


def test_chosen_depth_holds_for_its_block_and_tells_the_steps(deep):
    ids = torch.arange(1, 30)[None]
    with chosen_depth(deep.model, 8, 0.3) as told:
        deep.model(ids)
        assert told == {"num_steps": 8}
    assert told["exit_threshold"] == 0.3
    assert 1 < told["mean_steps"] < 8
    assert deep.model.model.depth.num_steps == 4
    assert deep.model.model.depth.exit_threshold is None


def test_steps_of_a_text_are_those_of_its_tokens_and_of_nothing_that_fills_rows_up(deep):
    from fanformer.evaluation.loss import evaluate_documents
    from fanformer.evaluation.scoring import Scorer

    model, tokenizer = deep
    text = "the cat sat on the mat. a small model speaks of small things. " * 2
    seen = []
    handle = model.register_forward_pre_hook(lambda _, args, inputs: seen.append(inputs["input_ids"]), with_kwargs=True)
    with chosen_depth(model, 8, 0.3) as told:
        sums = evaluate_documents(model, tokenizer, [text], sequence_length=25, batch_size=3)
    handle.remove()
    whole = [0, *tokenizer.encode(text, add_special_tokens=False)]
    pieces = [whole[at : at + 25] for at in range(0, len(whole), 25)]
    assert len(whole) % 25
    assert sum(ids.numel() for ids in seen) > len(whole)  # so that there is something not to be counted
    assert sum(map(len, pieces)) == sums.tokens.sum()
    with torch.no_grad():
        steps = [model(torch.tensor([piece]), num_steps=8, exit_threshold=0.3).steps.sum().item() for piece in pieces]
    assert told["mean_steps"] == pytest.approx(sum(steps) / len(whole))
    with chosen_depth(model, 8, 0.3) as told:
        Scorer(model).score("task", [(whole[:9], whole[9:12]), (whole[:4], whole[4:5])])
    with torch.no_grad():
        rows = [model(torch.tensor([whole[:count]]), num_steps=8, exit_threshold=0.3).steps for count in (11, 4)]
    assert told["mean_steps"] == pytest.approx(sum(row.sum().item() for row in rows) / 15)


def test_a_plain_model_tells_no_depth(loaded_plain):
    with chosen_depth(loaded_plain) as told:
        assert told == {}
    with pytest.raises(ConfigError, match="`num_steps` needs a model with recurrent depth, got 2 for one whose blocks"):
        set_depth(loaded_plain, 2)
    with pytest.raises(ConfigError, match="`draft_tokens` needs a model with recurrent depth, got 3 for a fanformer"):
        SelfSpeculation(loaded_plain, 3)


@pytest.fixture
def loaded_plain(saved_model):  # noqa: F811
    return load(saved_model, device="cpu").model


def test_another_architecture_has_no_depth():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=1, **sizes))
    with pytest.raises(ConfigError, match="need a model with recurrent depth, got a llama: leave them out"):
        set_depth(model, 2)
    with pytest.raises(ConfigError, match="`draft_tokens` needs a model with recurrent depth, got 3 for a llama"):
        SelfSpeculation(model, 3)
    assert cache_layers(model) == 1


def test_layers_of_keys_and_values_are_one_for_each_block_that_runs(deep):
    assert cache_layers(deep.model) == 6
    set_depth(deep.model, 8)
    assert cache_layers(deep.model) == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 9}, "`num_steps` must be in [1, 8], got 9: the model's configuration says how large it may be."),
        ({"exit_threshold": -1.0}, "`exit_threshold` must be above 0, got -1.0: it is a relative change of a state."),
        ({"draft_tokens": 0}, "`draft_tokens` must be at least 1, got 0: 4 is usual."),
        ({"draft_tokens": 2, "num_steps": 1}, "`draft_tokens` needs a fixed number of steps above 1 and"),
        (
            {"draft_tokens": 2, "exit_threshold": 0.1},
            "`draft_tokens` needs a fixed number of steps above 1 and",
        ),
        ({"draft_tokens": 2, "compiled": True}, "`draft_tokens` does not go with `compile`, got 2: leave one out."),
        ({"exit_threshold": 0.1, "compiled": True}, "`compile` needs a fixed number of steps, got exit_threshold 0.1"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(recurrent_model, arguments, message):  # noqa: F811
    with pytest.raises(ConfigError) as error:
        load_text_model(recurrent_model, "cpu", **arguments)
    assert str(error.value).startswith(message)


def test_drafts_of_drawn_text_are_refused(recurrent_model):  # noqa: F811
    model = load_text_model(recurrent_model, "cpu", draft_tokens=2)
    with pytest.raises(ConfigError, match=r"`draft_tokens` needs greedy decoding, got temperature 0.7: set it to 0."):
        list(model.complete(["the cat"], GenerationSettings(max_length=3)))


@pytest.mark.parametrize("words", ["", "1,,2", "1,x", "2,2", "1.5"])
def test_a_list_of_steps_that_is_none_is_refused(words):
    with pytest.raises(ConfigError, match="`--num-steps` must name each number once, got"):
        parse_steps(words)


def test_every_number_of_a_list_is_checked_before_the_first_is_measured(deep):
    assert parse_steps("1,2, 8") == [1, 2, 8]
    assert parse_steps(None) == [None]
    with pytest.raises(ConfigError, match="got 9"):
        check_steps(deep.model, [1, 9], None)
    assert deep.model.model.depth.num_steps == 4
