"""How a model asks to be drawn from: its generation_config.json, a GGUF file of it, and what goes before it."""

import pytest

from fanformer.errors import CheckpointError
from fanformer.generation.settings import GenerationSettings
from fanformer.gguf.file import SAMPLING, GGUFFile
from fanformer.loading import load_text_model
from tests.gguf_models import export

ASKED = {"do_sample": True, "temperature": 1.25, "top_k": 7, "top_p": 0.7}
OWN = {name: value for name, value in ASKED.items() if name != "do_sample"}


def test_a_folder_is_drawn_as_it_asks_and_a_word_of_ones_own_goes_first(asking):
    model = load_text_model(asking(**ASKED), "cpu")
    assert model.own_sampling == OWN
    assert model.settings(seed=1) == GenerationSettings(seed=1, **OWN)
    assert model.settings(top_k=3).top_k == 3
    given = {"max_length": 20, "min_length": 20, "seed": 1}
    asked = model.generate("the cat", **given)
    assert asked == model.generate("the cat", **given, **OWN)
    assert asked == "".join(model.stream("the cat", **given))
    assert asked != model.generate("the cat", **given, temperature=0)


@pytest.mark.parametrize("fields", [{}, {"do_sample": False, "top_k": 3}, {"top_k": 3}])
def test_a_folder_that_does_not_ask_to_be_drawn_from_has_the_defaults(asking, fields):
    assert load_text_model(asking(**fields), "cpu").settings() == GenerationSettings()


@pytest.mark.parametrize(("name", "value"), [("temperature", -0.5), ("top_p", 1.5), ("top_k", -2), ("top_k", True)])
def test_a_folder_that_asks_for_what_is_not_possible_is_named(asking, name, value):
    with pytest.raises(CheckpointError, match=f"generation_config.json of .*: `{name}` must be"):
        load_text_model(asking(do_sample=True, **{name: value}), "cpu")


def test_a_gguf_file_asks_as_the_folder_does_in_llama_cpps_words(asking):
    metadata = GGUFFile(export(asking(**ASKED | {"temperature": 0.7}), "f16")).metadata
    assert metadata["general.sampling.temp"] == pytest.approx(0.7)
    assert (metadata["general.sampling.top_k"], metadata["general.sampling.top_p"]) == (7, pytest.approx(0.7))


def test_a_gguf_file_of_a_folder_that_asks_for_nothing_has_no_such_keys(saved_model):
    assert not set(SAMPLING.values()) & GGUFFile(export(saved_model, "f16")).metadata.keys()
