"""Pictures and recordings in the playground: attached, pasted, recorded, answered, kept over a reload."""

import base64
import json
import struct

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect

from fanformer.server.models import ServedModel, SlotSettings
from tests.ci.test_playground import answers, fill
from tests.multimodal_files import save_with_towers, write_picture
from tests.saved_models import saved_model, tiny_tokenizer  # noqa: F401
from tests.server.conftest import running

pytestmark = pytest.mark.ci


@pytest.fixture(scope="module")
def tiny(saved_model):  # noqa: F811
    """A model of text."""
    model = ServedModel.open(saved_model, "tiny", SlotSettings(2, 100, 4), device="cpu")
    yield model
    model.close()


@pytest.fixture(scope="module")
def seeing(tiny_model, tiny_tokenizer, tmp_path_factory):  # noqa: F811
    """A model with towers that has room for a long recording: the machine may be busy."""
    base, folder = (tmp_path_factory.mktemp("seeing") / name for name in ("base", "sees"))
    tiny_model(vocab_size=320, eos_token_id=0, bos_token_id=0, max_position_embeddings=2048).save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    model = ServedModel.open(save_with_towers(base, folder), "sees", SlotSettings(2, None, 4), device="cpu")
    yield model
    model.close()


PASTE = """(coded) => {
  const bytes = Uint8Array.from(atob(coded), (letter) => letter.charCodeAt(0));
  const clipboardData = new DataTransfer();
  clipboardData.items.add(new File([bytes], "pasted.png", { type: "image/png" }));
  document.getElementById("prompt").dispatchEvent(new ClipboardEvent("paste", { clipboardData, bubbles: true }));
}"""


def test_a_picture_a_pasted_one_and_a_recording_are_answered(tiny, seeing, open_tab, tmp_path):
    red, blue = (write_picture(tmp_path / f"{colour}.png", colour) for colour in ("red", "blue"))
    with running({"tiny": tiny, "sees": seeing}) as client:
        tab = open_tab(f"http://127.0.0.1:{client.port}/")
        page = tab.page
        assert page.is_checked("[name=mode][value=chat]")
        page.uncheck("#model-1")
        assert not page.is_visible("#picture-part")
        assert not page.is_visible("#record")
        page.check("#model-1")
        page.uncheck("#model-0")
        page.set_input_files("#picture", {"name": "a.gif", "mimeType": "image/gif", "buffer": b"GIF89a"})
        expect(page.locator("#status")).to_have_text("a.gif is no PNG, JPEG or WebP.")
        page.set_input_files("#picture", red)
        expect(page.locator("#attached li")).to_have_count(1)
        page.evaluate(PASTE, base64.b64encode(blue.read_bytes()).decode())
        expect(page.locator("#attached li")).to_have_count(2)
        page.click("#record")
        expect(page.locator("#record")).to_have_attribute("aria-pressed", "true")
        expect(page.locator("#record")).to_have_text("Stop recording, 1 s")
        page.click("#record")
        expect(page.locator("#attached li")).to_have_count(3)
        assert tab.violations() == []
        fill(page, max_tokens="6")
        page.fill("#prompt", "what is this?")
        page.click("#send")
        expect(page.locator("#status")).to_have_text("Done.")
        expect(page.locator("#attached li")).to_have_count(0)
        sent = next(json.loads(one.post_data) for one in tab.requests if one.url.endswith("/chat/completions"))
        check_content(sent["messages"][-1]["content"], red, blue)
        status, _, found = client("POST", "/v1/chat/completions", {**sent, "stream": False})
        assert status == 200
        assert answers(page).text_content() == found["choices"][0]["message"]["content"]
        pictures = page.locator(".turn.user img")
        assert [one.get_attribute("alt") for one in pictures.all()] == ["red.png", "pasted.png"]
        assert page.locator(".turn.user").text_content() == "[recording] what is this?"
        assert tab.violations() == []
        page.reload()
        page.wait_for_selector("body[data-ready]")
        page.fill("#prompt", "and now?")
        page.click("#send")
        expect(page.locator("#status")).to_have_text("Done.")
        again = [json.loads(one.post_data) for one in tab.requests if one.url.endswith("/chat/completions")][-1]
        assert again["messages"][0] == sent["messages"][-1]
        assert again["messages"][-1] == {"role": "user", "content": "and now?"}


def check_content(content, red, blue):
    """Check the parts of a message: both files as they are, a whole WAV, and the words."""
    *pictures, sound, words = content
    coded = [one["image_url"]["url"].partition("data:image/png;base64,")[2] for one in pictures]
    assert [base64.b64decode(one) for one in coded] == [red.read_bytes(), blue.read_bytes()]
    assert words == {"type": "text", "text": "what is this?"}
    wav = base64.b64decode(sound["input_audio"]["data"])
    assert sound["input_audio"]["format"] == "wav"
    kind, channels, rate = struct.unpack_from("<HHI", wav, 20)
    assert (wav[:4], wav[8:12], kind, channels, rate) == (b"RIFF", b"WAVE", 1, 1, 16000)
    assert len(wav) == 44 + struct.unpack_from("<I", wav, 40)[0] > 1000


def test_a_recording_ends_where_its_button_goes(seeing, open_tab):
    with running({"sees": seeing}) as client:
        page = open_tab(f"http://127.0.0.1:{client.port}/").page
        for end in ("#clear", "[name=mode][value=text]"):
            page.check("[name=mode][value=chat]")
            page.click("#record")
            expect(page.locator("#record")).to_have_text("Stop recording, 1 s")
            page.click(end)
            expect(page.locator("#record")).to_have_text("Record")
            expect(page.locator("#record")).to_have_attribute("aria-pressed", "false")
            expect(page.locator("#attached li")).to_have_count(0)


def test_more_than_a_tab_keeps_is_told_after_a_reload(seeing, open_tab, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (1400, 1400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    with running({"sees": seeing}) as client:
        page = open_tab(f"http://127.0.0.1:{client.port}/").page
        fill(page, max_tokens="3")
        page.set_input_files("#picture", tmp_path / "large.png")
        expect(page.locator("#attached li")).to_have_count(1)
        page.click("#send")
        expect(page.locator("#status")).to_have_text("Done.")
        page.reload()
        page.wait_for_selector("body[data-ready]")
        expect(page.locator("#status")).to_contain_text("What was shown is more than a tab keeps")
        expect(page.locator(".turn")).to_have_count(0)


HOLD = """() => {
  const read = FileReader.prototype.readAsDataURL;
  window.held = [];
  FileReader.prototype.readAsDataURL = function (blob) { window.held.push(() => read.call(this, blob)); };
}"""


def test_what_is_attached_while_a_picture_is_read_stays(seeing, open_tab, tmp_path):
    red, blue = (write_picture(tmp_path / f"{colour}.png", colour) for colour in ("red", "blue"))
    with running({"sees": seeing}) as client:
        page = open_tab(f"http://127.0.0.1:{client.port}/").page
        page.evaluate(HOLD)
        page.set_input_files("#picture", red)
        page.evaluate(PASTE, base64.b64encode(blue.read_bytes()).decode())
        page.wait_for_function("window.held.length === 2")
        page.evaluate("window.held.forEach((go) => go())")
        expect(page.locator("#attached li")).to_have_count(2)
