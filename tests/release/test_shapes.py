"""Shapes of the model in the box: nano's proportions at every size, and no more bytes than the box may have."""

import pytest

from fanformer.comparison.architectures import architecture
from fanformer.errors import ConfigError
from fanformer.training.configuration import load_preset


def test_three_layers_of_192_are_preset_nano():
    from shapes import model_fields

    nano = load_preset("nano").model
    fields = model_fields(3, 192)
    assert fields == {name: nano[name] for name in fields}
    assert nano.keys() - fields.keys() == {"vocab_size", "max_position_embeddings", "dropout"}


def test_a_comparison_trains_the_same_shape():
    from make_model import box_bytes
    from shapes import architecture_spec, model_fields

    config = architecture(architecture_spec(5, 256)).config()
    assert {name: getattr(config, name) for name in model_fields(5, 256)} == model_fields(5, 256)
    assert config.dropout == 0
    # what weights need in bfloat16, and 100 bytes for each token of the tokenizer's files
    assert box_bytes(4096, 3, 192) == 2 * 2_663_808 + 4096 * 100 + 30_000


@pytest.mark.parametrize(("layers", "width"), [(0, 192), (3, 32), (3, 200), (3, 96)])
def test_a_width_that_heads_do_not_fill_is_refused(layers, width):
    from shapes import model_fields

    with pytest.raises(ValueError, match=f"a multiple of 64, got {layers} x {width}"):
        model_fields(layers, width)


def test_the_recipes_and_all_candidates_fit_the_box(repository):
    from make_model import read_recipe
    from trials import read_plan

    for name in ("recipe", "dry-run"):
        assert read_recipe(repository / f"release/{name}.yaml")["box"]["most_bytes"] == 12_000_000
    assert len(read_plan(repository / "release/trials.yaml")["candidates"]) > 3


def test_a_recipe_that_does_not_fit_is_refused_before_anything_is_trained(repository, tmp_path):
    from make_model import read_recipe

    text = (repository / "release/recipe.yaml").read_text(encoding="utf-8")
    file = tmp_path / "recipe.yaml"
    file.write_text(text.replace("layers: 6", "layers: 60"))
    with pytest.raises(ConfigError, match=r"the box must have at most 12,000,000 bytes, got .*fewer layers"):
        read_recipe(file)
    file.write_text(text.replace("tuned:", "tunde:"))
    with pytest.raises(ConfigError, match="`tunde` is not a part of the recipe: did you mean `tuned`"):
        read_recipe(file)
    for seeds in ("1", "[3]"):
        file.write_text(text.replace("seeds: 3", f"seeds: {seeds}"))
        with pytest.raises(
            ConfigError, match=r"`beside\.seeds` must be at least 2, got 1: a single seed has no interval"
        ):
            read_recipe(file)


def test_the_llama_has_as_many_parameters(repository):
    from make_model import beside_llama, read_recipe

    recipe = read_recipe(repository / "release/recipe.yaml")
    comparison = beside_llama(recipe, repository, repository / "valid.txt")
    counts = [
        architecture(spec).count({"vocab_size": recipe["tokens"]["vocab_size"]}) for spec in comparison.architectures
    ]
    assert counts[1].total == pytest.approx(counts[0].total, rel=0.01)
    assert (comparison.tokens, comparison.seeds) == ((3_400_000,), (0, 1, 2))
