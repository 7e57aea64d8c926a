"""Slots of a model with recurrent depth: each step of the core has keys and values of its own in every slot."""

import numpy as np
import pytest
import torch

from fanformer.loading import load
from fanformer.server.models import ServedModel, SlotSettings
from tests.gguf_models import export
from tests.saved_models import recurrent_model  # noqa: F401
from tests.server.conftest import ENGINES


@pytest.mark.parametrize("kind", ENGINES)
def test_slots_have_the_logits_of_their_texts_at_the_mean_of_training(recurrent_model, kind):  # noqa: F811
    model = load(recurrent_model, device="cpu").model
    if kind == "torch":
        from fanformer.server.torch_slots import TorchSlots

        slots = TorchSlots(load(recurrent_model, device="cpu").model, 300, 3, 40)
    else:
        from fanformer.gguf.engine import Engine
        from fanformer.server.ggml_slots import GgmlSlots

        slots = GgmlSlots(Engine.open(export(recurrent_model), threads=1), 300, 3, 40)
    texts = {0: [0, 40, 77, 5, 9], 2: [0, 3, 3]}
    for slot, ids in texts.items():
        slots.forward({slot: ids[:-1]})
    for slot, ids in texts.items():
        found = slots.forward({slot: ids[-1:]})[slot]
        with torch.inference_mode():
            expected = model(torch.tensor([ids]), num_steps=4).logits[0, -1:].numpy()
        np.testing.assert_allclose(found, expected, atol=2e-4, rtol=1e-4)  # float32 sums in another order
    slots.close()


@pytest.mark.parametrize("kind", ENGINES)
def test_a_served_model_says_how_many_steps_it_takes(recurrent_model, saved_model, kind):  # noqa: F811
    for folder, depth in ((recurrent_model, ", 4 steps of its recurrent depth"), (saved_model, "")):
        path = folder if kind == "torch" else export(folder)
        model = ServedModel.open(path, "tiny", SlotSettings(2, 32, 4), "cpu")
        assert model.in_words == f"tiny: 2 texts of 32 tokens at once, 0.00 GiB{depth}"
        assert model.capabilities["num_steps"] is None  # the depth is fixed
        model.close()
