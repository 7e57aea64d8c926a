"""A model that sees and hears: its language part to the bit, adapters by row, and what a saved folder loads as."""

import base64
import copy
import functools
import http.server
import io
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from fanformer.generation.fast_decoding import FewRowsLinear, fast_decoding
from fanformer.generation.media_model import load_media_model
from fanformer.loading import load_model
from tests.multimodal_files import save_with_towers, write_picture, write_tone
from tests.saved_models import saved_model, tiny_tokenizer  # noqa: F401

WORDS = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def folder(saved_model, tmp_path_factory):  # noqa: F811
    return save_with_towers(saved_model, tmp_path_factory.mktemp("towers") / "model")


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    place = tmp_path_factory.mktemp("shown")
    write_tone(place / "high.wav", "high", 0.5)
    return place, write_picture(place / "red.png", "red"), write_tone(place / "low.wav", "low")


@pytest.fixture(scope="module")
def loaded(folder):
    return load_media_model(folder, "cpu")


def asked(processor, *parts):
    said = [{"role": "user", "content": [*parts, {"type": "text", "text": "what?"}]}]
    return processor.apply_chat_template(said, tokenize=True, return_dict=True, return_tensors="pt")


def padded(batches, token):
    """Return prompts as one batch, the shorter ones padded on the left."""
    width = max(one["input_ids"].shape[1] for one in batches)
    ids = [
        torch.nn.functional.pad(one["input_ids"], (width - one["input_ids"].shape[1], 0), value=token)
        for one in batches
    ]
    mask = [torch.nn.functional.pad(one["attention_mask"], (width - one["input_ids"].shape[1], 0)) for one in batches]
    found = {"input_ids": torch.cat(ids), "attention_mask": torch.cat(mask)}
    if any("pixel_values" in one for one in batches):
        found["pixel_values"] = torch.cat([one["pixel_values"] for one in batches if "pixel_values" in one])
    heard = [one for one in batches if "input_features" in one]
    if heard:
        frames = max(one["input_features"].shape[2] for one in heard)
        for name in ("input_features", "input_features_mask"):
            parts = [torch.nn.functional.pad(one[name], (0, frames - one[name].shape[-1])) for one in heard]
            found[name] = torch.cat(parts)
    return found


def prompts(processor, shown):
    place, picture, sound = shown
    image, audio = {"type": "image", "path": str(picture)}, {"type": "audio", "path": str(sound)}
    longer = {"type": "audio", "path": str(place / "high.wav")}
    return [asked(processor, image, audio), asked(processor), asked(processor, longer), asked(processor, image, image)]


def test_text_rows_of_a_mixed_batch_equal_the_base_bit_for_bit(loaded, saved_model, shown):  # noqa: F811
    batch = padded(prompts(loaded.store.processor, shown), loaded.tokenizer.pad_token_id)
    base = load_model(saved_model, "cpu")
    text = {name: batch[name].clone() for name in ("input_ids", "attention_mask")}
    text["input_ids"][text["input_ids"] >= 300] = 5
    with torch.no_grad():
        ours, theirs = loaded.model(**batch).logits, base(**text).logits
    assert torch.equal(ours[1], theirs[1])
    assert (ours - theirs).abs().amax((1, 2))[[0, 2, 3]].min() > 1e-3


def test_each_row_has_the_adapters_of_what_it_holds(loaded):
    ids = torch.randint(1, 299, (4, 12), generator=torch.Generator().manual_seed(0))
    rows = torch.arange(4)
    with torch.no_grad():
        routed = loaded.model(ids, modality_ids=rows).logits
        for modality in range(4):
            alone = loaded.model(ids, modality_ids=torch.full((4,), modality)).logits
            torch.testing.assert_close(routed[modality], alone[modality], rtol=1e-4, atol=1e-4)  # other products' sizes
            for other in set(range(4)) - {modality}:
                assert (routed[other] - alone[other]).abs().max() > 1e-3
        assert torch.equal(loaded.model(ids).logits, loaded.model(ids, modality_ids=torch.zeros(4, dtype=int)).logits)


def test_outside_a_forward_pass_no_row_is_routed(loaded, shown):
    batch = prompts(loaded.store.processor, shown)[0]
    embeddings = loaded.model.get_input_embeddings()(torch.arange(9)[None])
    with torch.no_grad():
        before = loaded.model.model.language_model(inputs_embeds=embeddings).last_hidden_state
        loaded.model(**batch)
        with pytest.raises(ValueError, match="as many vision placeholders"):
            loaded.model(**{**batch, "pixel_values": None})
        after = loaded.model.model.language_model(inputs_embeds=embeddings).last_hidden_state
    assert torch.equal(before, after)


def test_threads_that_share_a_model_route_their_own_rows(loaded, shown):
    batch = prompts(loaded.store.processor, shown)[0]
    text = torch.arange(1, 9)[None]
    with torch.no_grad():
        expected = loaded.model(text).logits, loaded.model(**batch).logits
        meanwhile = []

        def compute(module, given, output):
            if threading.get_ident() == mine:
                other = threading.Thread(target=lambda: meanwhile.append(loaded.model(text).logits.detach()))
                other.start()
                other.join()

        mine = threading.get_ident()
        handle = loaded.model.model.language_model.layers[0].register_forward_hook(compute)
        found = loaded.model(**batch).logits
        handle.remove()
    assert torch.equal(meanwhile[0], expected[0])
    assert torch.equal(found, expected[1])


def test_decoding_the_fast_way_keeps_the_adapters(loaded):
    routed = [module for module in loaded.model.modules() if hasattr(module, "lora_scale")]
    batch = {"input_ids": torch.arange(1, 9)[None], "modality_ids": torch.tensor([3])}
    with torch.inference_mode():
        plain = loaded.model(**batch).logits
        with fast_decoding(loaded.model), fast_decoding(loaded.model):
            assert routed
            assert all(isinstance(module, FewRowsLinear) for module in routed)
            torch.testing.assert_close(loaded.model(**batch).logits, plain, rtol=1e-4, atol=1e-4)  # another order
        assert torch.equal(loaded.model(**batch).logits, plain)


def test_a_mixed_batch_is_written_as_each_row_alone_with_and_without_a_cache(loaded, shown):
    model, rows = loaded.model, prompts(loaded.store.processor, shown)
    batch = padded(rows, loaded.tokenizer.pad_token_id)
    together = model.generate(**batch, **WORDS)[:, batch["input_ids"].shape[1] :]
    uncached = model.generate(**batch, **WORDS, use_cache=False)[:, batch["input_ids"].shape[1] :]
    assert torch.equal(together, uncached)
    for row, expected in zip(rows, together, strict=True):
        alone = model.generate(**row, **WORDS)[0, row["input_ids"].shape[1] :]
        assert alone.tolist() == expected[: len(alone)].tolist()


def test_logits_with_a_cache_equal_those_without(loaded, shown):
    batch = prompts(loaded.store.processor, shown)[0]
    more = torch.tensor([[7, 8, 9]])
    with torch.no_grad():
        cache = loaded.model(**batch, use_cache=True).past_key_values
        stepwise = [
            loaded.model(more[:, [step]], past_key_values=cache, use_cache=True).logits[:, -1] for step in range(3)
        ]
        whole = {**batch, "input_ids": torch.cat((batch["input_ids"], more), 1)}
        whole["attention_mask"] = torch.ones_like(whole["input_ids"])
        expected = loaded.model(**whole, use_cache=False).logits[:, -3:]
    torch.testing.assert_close(torch.stack(stepwise, 1), expected, rtol=1e-4, atol=1e-4)  # sums in another order


def test_beams_keep_the_pictures_of_their_row(loaded, shown):
    rows = [prompts(loaded.store.processor, shown)[index] for index in (3, 0)]  # two pictures, and one with sound
    batch = padded(rows, loaded.tokenizer.pad_token_id)
    width = batch["input_ids"].shape[1]
    together = loaded.model.generate(**batch, **WORDS, num_beams=3)[:, width:].tolist()
    for row, expected in zip(rows, together, strict=True):
        alone = loaded.model.generate(**row, **WORDS, num_beams=3)[0, row["input_ids"].shape[1] :].tolist()
        assert alone == expected[: len(alone)]


def test_a_twin_that_is_blind_says_the_same_of_every_picture(loaded, tmp_path):
    processor = loaded.store.processor
    batches = [
        asked(processor, {"type": "image", "path": str(write_picture(tmp_path / f"{c}.png", c))})
        for c in ("red", "blue")
    ]
    model = copy.deepcopy(loaded.model)
    with torch.no_grad():
        seen = [model(**one).logits for one in batches]
        model.model.config.blind = True
        blind = [model(**one).logits for one in batches]
    assert (seen[0] - seen[1]).abs().max() > 1e-3
    assert torch.equal(*blind)


def test_features_have_the_norm_of_embeddings(loaded, shown):
    batch = prompts(loaded.store.processor, shown)[0]
    table = loaded.model.get_input_embeddings().weight[:300]
    with torch.no_grad():
        features = loaded.model.get_image_features(batch["pixel_values"])
    ratio = features.norm(dim=-1).mean() / table.norm(dim=-1).mean()
    assert 0.95 < ratio < 1.05  # the norm's epsilon, and the difference between mean norm and root mean square


def test_adapters_exported_for_peft_give_the_same_logits(loaded, saved_model, tmp_path):  # noqa: F811
    peft = pytest.importorskip("peft")
    from fanformer.generation.media_model import export_adapter

    export_adapter(loaded.model, "image", saved_model, tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(load_model(saved_model, "cpu"), str(tmp_path / "adapter")).eval()
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        expected = loaded.model(ids, modality_ids=torch.tensor([1])).logits
        torch.testing.assert_close(adapted(ids).logits, expected, rtol=1e-4, atol=1e-4)  # sums in another order


def test_media_must_match_their_placeholders(loaded, shown):
    batch = dict(prompts(loaded.store.processor, shown)[0])
    for name, kind in (("pixel_values", "vision"), ("input_features", "audio")):
        with pytest.raises(ValueError, match=f"as many {kind} placeholders as there are {kind} tokens"):
            loaded.model(**{**batch, name: torch.cat((batch[name], batch[name])), **_mask(batch, name)})
    embeddings = loaded.model.get_input_embeddings()(torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match="`pixel_values` and `input_features` need `input_ids`"):
        loaded.model(inputs_embeds=embeddings, pixel_values=batch["pixel_values"])
    with pytest.raises(ValueError, match="multiple of 4 frames, got 3"):
        loaded.model(
            batch["input_ids"], input_features=torch.zeros(1, 80, 3), input_features_mask=torch.ones(1, 3).long()
        )


def _mask(batch, name):
    mask = batch["input_features_mask"]
    return {"input_features_mask": torch.cat((mask, mask))} if name == "input_features" else {}


def test_recordings_of_a_batch_are_heard_without_their_padding(loaded, shown):
    place, _, sound = shown
    processor = loaded.store.processor
    texts = [processor.audio_token] * 2
    both = processor(text=texts, audio=[str(sound), str(place / "high.wav")], return_tensors="pt", padding=True)
    alone = processor(text=texts[0], audio=[str(sound)], return_tensors="pt")
    with torch.no_grad():
        ours = loaded.model.get_audio_features(both["input_features"], both["input_features_mask"])
        theirs = loaded.model.get_audio_features(alone["input_features"], alone["input_features_mask"])
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-5)
    assert [len(one) for one in ours] == [(both["input_ids"][row] == processor.audio_token_id).sum() for row in (0, 1)]


def test_a_whisper_tower_hears_too(loaded):
    from transformers import WhisperConfig

    from fanformer.model.multimodal import FANformerForConditionalGeneration, FANformerMultimodalConfig

    whisper = WhisperConfig(
        d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16, max_source_positions=50
    )
    text = loaded.model.config.text_config
    config = FANformerMultimodalConfig(text_config=text, audio_config=whisper, audio_token_id=301, audio_stack=4)
    model = FANformerForConditionalGeneration(config).eval()
    features = torch.randn(1, 80, 16, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 301, 301, 2]])
    with torch.no_grad():
        logits = model(ids, input_features=features, input_features_mask=torch.ones(1, 16).long()).logits
        other = model(ids, input_features=-features, input_features_mask=torch.ones(1, 16).long()).logits
        with pytest.raises(ValueError, match="at most 100 frames"):
            model.get_audio_features(torch.zeros(1, 80, 104), torch.ones(1, 104).long())
    assert logits.isfinite().all()
    assert (logits - other).abs().max() > 1e-4


FOREIGN = """
import json, sys
sys.modules["fanformer"] = None
folder, picture, sound, out = sys.argv[1:]
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM
from transformers import AutoProcessor, pipeline
trust = {"trust_remote_code": True}
processor = AutoProcessor.from_pretrained(folder, **trust)
parts = [{"type": "image", "path": picture}, {"type": "audio", "path": sound}, {"type": "text", "text": "what?"}]
said = [{"role": "user", "content": parts}]
inputs = processor.apply_chat_template(said, tokenize=True, return_dict=True, return_tensors="pt")
words = {"max_new_tokens": 6, "do_sample": False}
found = {"ids": inputs["input_ids"][0].tolist()}
for kind in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
    model = kind.from_pretrained(folder, **trust)
    for cached in (True, False):
        written = model.generate(**inputs, **words, use_cache=cached)[0, inputs["input_ids"].shape[1]:]
        found[f"{kind.__name__} {cached}"] = processor.decode(written, skip_special_tokens=True)
look = pipeline("image-text-to-text", model=folder, **trust)
found["pipeline"] = look(text=said, return_full_text=False, generate_kwargs=words)[0]["generated_text"]
text = AutoModelForCausalLM.from_pretrained(folder, **trust)
found["text"] = [sorted(name for name, _ in text.named_children()), text.num_parameters()]
write = pipeline("text-generation", model=folder, **trust)
found["continued"] = write("the cat", **words)[0]["generated_text"]
model.save_pretrained(out), processor.save_pretrained(out)
text.save_pretrained(out + "-text"), processor.tokenizer.save_pretrained(out + "-text")
json.dump(found, open(out + ".json", "w"))
"""


@pytest.mark.ci
def test_every_door_of_a_foreign_process_gives_our_answer(loaded, folder, saved_model, shown, tmp_path):  # noqa: F811
    _, picture, sound = shown
    code = [sys.executable, "-c", FOREIGN, str(folder), str(picture), str(sound), str(tmp_path / "again")]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(code, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "again.json").read_text())
    ours = loaded.generate("what?", images=[picture], audio=[sound], max_length=6, temperature=0.0)
    from fanformer.generation.media_model import shown_media

    media = shown_media([picture], [sound])
    assert loaded.encode_messages([{"role": "user", "content": [*media, "what?"]}]) == found["ids"]
    for name, text in found.items():
        if name not in ("ids", "text", "continued"):
            assert text == ours, name
    base = load_model(saved_model, "cpu")
    assert found["text"] == [["lm_head", "model"], base.num_parameters()]
    again = load_media_model(tmp_path / "again", "cpu")
    assert again.generate("what?", images=[picture], audio=[sound], max_length=6, temperature=0.0) == ours
    plain = load_model(tmp_path / "again-text", "cpu").state_dict()
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in plain.items())


def test_text_alone_loads_no_tower(folder, saved_model):  # noqa: F811
    ours, base = load_model(folder, "cpu"), load_model(saved_model, "cpu")
    assert type(ours) is type(base)
    assert list(ours.state_dict()) == list(base.state_dict())
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in base.state_dict().items())


def test_a_configuration_says_what_is_wrong_with_it(loaded):
    from fanformer.model.multimodal import FANformerMultimodalConfig

    good = loaded.model.config.to_dict()

    def changed(message, **fields):
        with pytest.raises(Exception, match=message):
            FANformerMultimodalConfig(**{**{k: v for k, v in good.items() if k != "model_type"}, **fields})

    changed("got neither: a FANformer needs no more", vision_config=None, audio_config=None)
    changed("`image_token_id` must be given where there is such a tower only", image_token_id=None)
    changed("must differ, got 301 for both", image_token_id=301, audio_token_id=301)
    changed("`image_downsample` must divide the 4 patches", image_downsample=3)
    changed("`adapter_rank` must be at least 0, got -1", adapter_rank=-1)
    changed("`vision_config` must be of a type among", vision_config={"model_type": "clip_vision_model"})


@pytest.fixture
def address(tmp_path, monkeypatch):
    """Where this machine serves the test's folder."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_every_form_of_a_message_is_read_by_the_same_reader(loaded, tmp_path, address, shown):
    clear = Image.new("RGBA", (16, 16), (0, 0, 0, 0))  # the library's own reader makes it black
    content = io.BytesIO()
    clear.save(content, "PNG")
    (tmp_path / "a.png").write_bytes(content.getvalue())
    url = "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
    forms = [
        {"type": "image", "path": str(tmp_path / "a.png")},
        {"type": "image", "base64": url},
        {"type": "image", "url": url},
        {"type": "image", "url": f"{address}/a.png"},
        {"type": "image", "image": clear},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": url},
    ]
    found = [asked(loaded.store.processor, form) for form in forms]
    assert (found[0]["pixel_values"] == 1).all()
    assert all(torch.equal(one["pixel_values"], found[0]["pixel_values"]) for one in found)
    assert all(torch.equal(one["input_ids"], found[0]["input_ids"]) for one in found)
    (tmp_path / "a.wav").write_bytes(shown[2].read_bytes())
    heard = [
        asked(loaded.store.processor, {"type": "audio", key: source})
        for key, source in (("url", f"{address}/a.wav"), ("path", str(shown[2])))
    ]
    assert torch.equal(heard[0]["input_features"], heard[1]["input_features"])
    with pytest.raises(ValueError, match=r"cannot fetch http://.*none.png: HTTP Error 404"):
        asked(loaded.store.processor, {"type": "image", "url": f"{address}/none.png"})


def test_processor_refuses_what_the_text_has_no_place_for(loaded, shown):
    processor = loaded.store.processor
    with pytest.raises(ValueError, match=r"Found total 1 .* tokens and 2 images"):
        processor(text=processor.image_token, images=[str(shown[1])] * 2)
    with pytest.raises(ValueError, match="but no images were passed"):
        processor(text=processor.image_token)
    with pytest.raises(ValueError, match="`videos` must not be given"):
        processor(text="a", videos=[np.zeros((2, 8, 8, 3))])
    with pytest.raises(ValueError, match="Mismatch in `image` token count"):
        processor(text=processor.image_token, images=[str(shown[1])], truncation=True, max_length=2)
