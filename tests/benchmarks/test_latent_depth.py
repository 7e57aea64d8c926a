"""The benchmark of recurrent depth, all of it in little: what it says is there, and equality is found equal."""

from argparse import Namespace

import pytest

from tests.gguf_models import save
from tests.saved_models import recurrent_model, tiny_tokenizer  # noqa: F401


@pytest.fixture
def depth(repository, monkeypatch):
    """The benchmark."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks" / "quality"))
    import latent_depth

    return latent_depth


@pytest.fixture
def given(recurrent_model, tmp_path):  # noqa: F811
    texts = ["the cat sat on the mat. a small model speaks of small things. " * 4, "def add(a, b):\n    return a\n" * 6]
    return Namespace(run=recurrent_model, texts=texts, dry_run=True, gguf=False, rounds=1, work=tmp_path, tokens="1k")


def test_the_dial_is_eval_at_every_number_of_steps(depth, given):
    figures = depth.dial(given)
    assert list(figures) == [f"bits_per_byte_{steps}" for steps in (1, 2, 4, 8)]
    assert len({figure.value for figure in figures.values()}) == 4


def test_exit_saves_more_the_larger_the_threshold(depth, given):
    figures = depth.exits(given)
    for steps in (4, 8):
        saved = [figure.value for name, figure in figures.items() if name.startswith(f"saved_from_{steps}_")]
        assert saved == sorted(saved)
        assert all(0 <= share < 1 for share in saved)
    assert figures["bits_ratio_from_8_at_0.005"].value == pytest.approx(1, abs=0.05)


def test_a_cache_of_all_steps_gives_the_bits_of_a_full_pass(depth, given):
    import torch

    from fanformer.loading import load

    figures = depth.caches(given)
    model, tokenizer = load(given.run, "cpu", "float32")
    bits = []
    for text in given.texts:
        ids = torch.tensor([[0, *tokenizer.encode(text, add_special_tokens=False)[:23]]])
        with torch.no_grad():
            chances = model(ids).logits[0, :-1].log_softmax(-1)
        bits += (-chances.gather(-1, ids[0, 1:, None])[5:, 0] / torch.log(torch.tensor(2.0))).tolist()
    assert figures["bits_per_token_all_steps_cached"].value == pytest.approx(sum(bits) / len(bits), rel=1e-4)
    assert figures["bits_per_token_last_steps_cached"].value != figures["bits_per_token_all_steps_cached"].value


def test_drafts_are_found_equal_and_rates_are_beside_four_steps(depth, given):
    figures = depth.speeds(given)
    assert figures["rate_torch_4"].value == 1
    assert [figures[f"drafts_equal_{steps}"].value for steps in (4, 8)] == [1, 1]
    assert 0 <= figures["accepted_8"].value <= 1


def test_completions_are_cut_at_their_last_line_before_they_are_parsed(depth, given):
    assert depth.parses("def f(x):\n    return x\n    retu")
    assert not depth.parses("def f(x:\n    return x\n")
    assert depth.completions(given).keys() == {"parse_1", "parse_2", "parse_4", "parse_8"}


@pytest.mark.ci
def test_a_plain_run_goes_on_as_recurrent_and_its_first_step_is_itself(
    depth,
    given,
    tiny_model,
    tiny_tokenizer,  # noqa: F811
    tmp_path,
):
    given.base = save(tmp_path / "base", tiny_model(vocab_size=320, num_hidden_layers=3), tiny_tokenizer)
    given.preset = "nano-recurrent"
    figures = depth.retrofit(given)
    assert figures["first_step_is_plain"].value == 1
    assert figures["bits_per_byte_plain"].value > 0
