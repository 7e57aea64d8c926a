"""Recurrent depth on ggml: the logits of torch for every number of steps, from any cut of the text, in any batch."""

import pytest
import torch

from fanformer.errors import ConfigError
from fanformer.gguf.engine import Engine
from fanformer.loading import load, load_model
from tests.gguf.test_engine import error, ids
from tests.gguf_models import VARIANTS, export, save

pytest.importorskip("ggml", reason="needs the extra `gguf` (ggml-python)")


@pytest.fixture(scope="module")
def file(tmp_path_factory, tiny_model, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("recurrent") / "model"
    return export(save(folder, tiny_model(vocab_size=320, **VARIANTS["recurrent"]), tiny_tokenizer))


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_every_number_of_steps_gives_the_logits_of_torch(file, steps):
    model, rows = load(file, device="cpu").model, [ids(40, seed=1), ids(40, seed=2)]
    engine = Engine.open(file, threads=1, num_steps=steps)
    engine.begin(2, 64)
    first = engine.forward([row[:17] for row in rows], every=True)
    rest = engine.forward([row[17:] for row in rows], every=True)
    for index, row in enumerate(rows):
        with torch.no_grad():
            expected = model(torch.tensor([row]), num_steps=steps).logits[0].numpy()
        # measured: 2e-6 to 4e-5
        assert error(first[index], expected[:17]) < 2e-4
        assert error(rest[index], expected[17:]) < 2e-4


def test_keys_and_values_grow_with_the_steps(file):
    sizes = []
    for steps in (1, 2, 8):
        engine = Engine.open(file, threads=1, num_steps=steps)
        engine.begin(1, 32)
        sizes.append(engine.cache_bytes)
    assert sizes[1] - sizes[0] == sizes[0] // 3
    assert sizes[2] - sizes[0] == 7 * (sizes[1] - sizes[0])


def test_the_dequantized_file_is_the_model_with_its_depth(file):
    model = load_model(file, device="cpu")
    assert model.config.recurrence.mean_steps == 4
    assert model.model.depth.num_steps == 4
    assert Engine.open(file, threads=1).num_steps == 4


def test_a_wrong_number_of_steps_is_refused(file, tmp_path, tiny_model, tiny_tokenizer):
    with pytest.raises(ConfigError, match=r"`num_steps` must be in \[1, 8\], got 0: the file says how large it may"):
        Engine.open(file, num_steps=0)
    plain = export(save(tmp_path / "plain", tiny_model(vocab_size=320), tiny_tokenizer))
    with pytest.raises(ConfigError, match="`num_steps` needs a model with recurrent depth, got 2 for one whose blocks"):
        Engine.open(plain, num_steps=2)


def test_statistics_are_summed_over_the_steps(tmp_path, tiny_model, tiny_tokenizer):
    from fanformer.gguf.importance import importance

    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. a small model speaks of small things. " * 60)
    model, name = tiny_model(vocab_size=320, **VARIANTS["recurrent"]), "model.layers.1.self_attn.qkv_input.factor"
    found = importance(model, tiny_tokenizer, str(text), 1024)[f"{name}.weight"]
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, x: seen.append(x[0].double().square()))
    from fanformer.gguf.importance import _pieces

    with torch.inference_mode():
        for piece in _pieces(tiny_tokenizer, str(text), 128, 1024):
            model(torch.tensor([piece]))
    handle.remove()
    total = sum(square.flatten(0, -2).sum(0) for square in seen) / 1024
    assert len(seen) == 4 * 8  # four steps of eight rows
    torch.testing.assert_close(torch.from_numpy(found).double(), total, rtol=1e-5, atol=1e-7)
