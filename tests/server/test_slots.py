"""Slots of both engines: what one holds is its own, wherever it lies and whoever shares its step."""

import subprocess
import sys

import numpy as np
import pytest

from fanformer.errors import ConfigError
from fanformer.gguf.engine import _block
from tests.server.conftest import ENGINES

IDS = [[0, 40, 77, 5, 9], [0, 3, 3], [0, 250, 251, 252, 253, 254, 255], [0]]
# float32 sums in another order
TOLERANCE = {"atol": 2e-4, "rtol": 1e-4}


@pytest.fixture(params=ENGINES)
def slots(request, loaded, saved_model):
    """Four slots of 40 positions."""
    if request.param == "torch":
        from fanformer.server.torch_slots import TorchSlots

        made = TorchSlots(loaded.model, 300, 4, 40)
    else:
        from fanformer.gguf.engine import Engine
        from fanformer.server.ggml_slots import GgmlSlots
        from tests.gguf_models import export

        made = GgmlSlots(Engine.open(export(saved_model), threads=1), 300, 4, 40)
    yield made
    made.close()


def expected(loaded, ids):
    import torch

    with torch.inference_mode():
        return loaded.model(torch.tensor([ids])).logits[0].numpy()


def test_every_slot_has_the_logits_of_its_own_text(slots, loaded):
    texts = [list(ids) for ids in IDS]
    for slot, ids in enumerate(texts):
        found = slots.forward({slot: ids}, every=True)[slot]
        np.testing.assert_allclose(found, expected(loaded, ids), **TOLERANCE)
    for chosen in ([0, 1, 2, 3], [2], [1, 3], [0, 2]):  # slots between them stay as they are
        found = slots.forward({slot: [7 + slot] for slot in chosen})
        for slot in chosen:
            texts[slot].append(7 + slot)
            np.testing.assert_allclose(found[slot], expected(loaded, texts[slot])[-1:], **TOLERANCE)
            assert slots.length(slot) == len(texts[slot])


def test_a_slot_that_was_cut_goes_on_from_there(slots, loaded):
    slots.forward({0: IDS[0], 1: IDS[2][:5]})
    slots.cut(0, 2)
    found = slots.forward({0: [11, 12]}, every=True)[0]
    np.testing.assert_allclose(found, expected(loaded, [*IDS[0][:2], 11, 12])[2:], **TOLERANCE)
    found = slots.forward({1: [7]})[1]
    np.testing.assert_allclose(found, expected(loaded, [*IDS[2][:5], 7])[-1:], **TOLERANCE)


def spoil(slots):
    """Put what is no number into all keys and values."""
    if hasattr(slots, "_layers"):
        import torch

        with torch.inference_mode():
            for layer in slots._layers:
                layer.keys.fill_(torch.nan)
                layer.values.fill_(torch.nan)
    else:
        cache = slots._engine._state._cache
        for name in cache.nodes:
            cache.raw(name)[:] = 0xFF


def test_a_slot_that_was_wiped_holds_nothing_and_the_others_what_they_held(slots, loaded):
    for slot, ids in enumerate(IDS):
        slots.forward({slot: ids})
    slots.wipe(1)
    assert [slots.length(slot) for slot in range(4)] == [5, 0, 7, 1]
    found = slots.forward({0: [7], 1: [7], 2: [7]})
    for slot, ids in ((0, IDS[0]), (1, []), (2, IDS[2])):
        np.testing.assert_allclose(found[slot], expected(loaded, [*ids, 7])[-1:], **TOLERANCE)
    spoil(slots)
    for slot in range(4):
        slots.cut(slot, 0)
    slots.wipe(3)
    slots.forward({3: IDS[2]})
    assert np.isnan(slots.forward({2: [0], 3: [7]})[2]).any()  # beside a longer text it reads places of its own
    slots.wipe(2)
    slots.cut(3, len(IDS[2]))
    found = slots.forward({2: [0], 3: [7]})
    np.testing.assert_allclose(found[2], expected(loaded, [0]), **TOLERANCE)
    np.testing.assert_allclose(found[3], expected(loaded, [*IDS[2], 7])[-1:], **TOLERANCE)


def test_the_memory_is_taken_at_the_start_and_stays(slots):
    before = slots.cache_bytes
    # keys and values of 2 layers, 2 heads of 16 channels, float32, for each of 4 times 40 positions at least
    assert before >= 2 * 2 * 2 * 16 * 4 * 4 * 40
    slots.forward({3: [5] * 30})
    assert slots.cache_bytes == before
    assert slots.weight_bytes > 0


@pytest.mark.parametrize("kind", ENGINES)
def test_what_slots_will_take_is_known_before_they_are_taken(saved_model, kind):
    from fanformer.server.models import ServedModel, SlotSettings
    from tests.gguf_models import export

    told = []
    path, threads = (saved_model, None) if kind == "torch" else (export(saved_model), 1)
    settings = SlotSettings(8, 40)
    model = ServedModel.open(path, "tiny", settings, device="cpu", threads=threads, check_memory=told.append)
    assert told == [pytest.approx(model.memory_bytes, rel=0.01)]
    model.close()


def test_a_seed_repeats_its_noise_and_another_has_its_own(slots):
    first, again, other = slots.noise(1), slots.noise(1), slots.noise(2)
    drawn = [first(), first()]
    np.testing.assert_array_equal(drawn, [again(), again()])
    assert len(drawn[0]) == 300
    assert not np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], other())


def test_a_model_that_forgets_the_beginning_of_a_text_is_refused():
    from transformers import MistralConfig, MistralForCausalLM

    from fanformer.server.torch_slots import TorchSlots

    config = MistralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, sliding_window=8,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="must attend to its whole text in every layer, got DynamicSlidingWindow"):
        TorchSlots(MistralForCausalLM(config), 64, 1, 16)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_models_of_transformers_are_served_too(attention):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from fanformer.server.torch_slots import TorchSlots

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, attn_implementation=attention,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    made = TorchSlots(model, 64, 2, 16)
    made.forward({0: [3, 4, 5]})
    made.forward({1: [6]})
    found = made.forward({0: [7], 1: [8]})
    with torch.inference_mode():
        for slot, ids in enumerate(([3, 4, 5, 7], [6, 8])):
            logits = model(torch.tensor([ids])).logits[0, -1:].numpy()
            np.testing.assert_allclose(found[slot], logits, **TOLERANCE)


def test_a_block_of_streams_is_a_power_of_two_that_starts_at_a_multiple():
    for streams in range(1, 20):
        for low in range(streams):
            for high in range(low, streams):
                first, count = _block(low, high, streams)
                assert first <= low
                assert high < first + count <= streams
                size = 1 << (count - 1).bit_length()
                assert first % size == 0
                assert count == 1 or low < first + size // 2 <= high


@pytest.mark.ci
@pytest.mark.skipif("ggml" not in ENGINES, reason="needs the extra `gguf` (ggml-python)")
def test_a_file_is_served_without_torch(saved_model, tmp_path):
    from tests.gguf_models import export

    code = f"""
import sys
from fanformer.server.app import build
from fanformer.server.models import ServedModel, SlotSettings
from fanformer.server.scheduler import Request

model = ServedModel.open({str(export(saved_model))!r}, "tiny", SlotSettings(2, 64))
build({{"tiny": model}})
events = []
model.scheduler.submit([Request(model.encode("the cat"), 4)], [events.append])
while not events or not hasattr(events[-1], "completion_tokens"):
    pass
model.close()
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif("ggml" not in ENGINES, reason="needs the extra `gguf` (ggml-python)")
def test_a_step_of_ggml_computes_few_streams(saved_model):
    from fanformer.gguf.engine import Engine
    from tests.gguf_models import export

    engine = Engine.open(export(saved_model), threads=1)
    engine.begin(8, 40)
    before = set(engine._state._graphs)
    engine.forward([(), (), (), [0, 5, 6], (), (), (), ()])
    engine.forward([(), (), (), (), [1], (), [2], ()])
    made = {key[:3] for key in set(engine._state._graphs) - before}
    assert made == {(3, 1, 4), (4, 4, 1)}  # first stream, streams, tokens of each
