"""Slots of a model with recurrent depth: each step of the core has keys and values of its own in every slot."""

import numpy as np
import pytest
import torch

from fanformer.generation.sampling import Sampling
from fanformer.generation.settings import GenerationSettings
from fanformer.loading import load, load_text_model
from fanformer.server.models import ServedModel, SlotSettings
from fanformer.server.scheduler import Request
from tests.gguf_models import export
from tests.saved_models import recurrent_model  # noqa: F401
from tests.server.conftest import ENGINES, run


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
        has_dial = kind == "torch" and folder == recurrent_model  # a file is opened for one depth
        assert model.capabilities["num_steps"] == ({"least": 1, "usual": 4, "most": 8} if has_dial else None)
        model.close()


def test_requests_of_several_depths_share_steps_and_get_what_they_get_alone(recurrent_model):  # noqa: F811
    served = ServedModel.open(recurrent_model, "tiny", SlotSettings(3, 60, 8), "cpu")
    ids = [0, 40, 77, 5, 9, 3, 3, 8, 60, 11, 12]
    greedy = Sampling(temperature=0)
    together = run(served, *(Request(ids, 10, greedy, num_steps=steps) for steps in (1, 8, None)))
    again = run(served, Request(ids, 10, greedy, num_steps=8))
    texts = []
    for heard, steps in zip([*together, *again], (1, 8, 4, 8), strict=True):
        model = load_text_model(recurrent_model, device="cpu", num_steps=steps)
        settings = GenerationSettings(max_length=10, min_length=0, temperature=0.0)
        texts.append(model.complete_ids(ids, "", settings).text)
        assert heard.text == texts[-1]
    assert len(set(texts)) > 1  # depth changes what is written
    served.close()


def test_what_a_slot_has_read_at_one_depth_is_read_anew_at_another(recurrent_model):  # noqa: F811
    served = ServedModel.open(recurrent_model, "tiny", SlotSettings(1, 60, 8), "cpu")
    ids = [0, 40, 77, 5, 9, 3, 3, 8, 60, 11, 12]
    cached = [run(served, Request(ids, 2, num_steps=steps))[0].all[-1].cached_tokens for steps in (2, 2, 5, None, 4)]
    assert cached == [0, len(ids) - 1, 0, 0, len(ids) - 1]
    served.close()
