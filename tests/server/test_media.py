"""Pictures and recordings in messages: what is answered about them, beside whom, and what is refused unopened."""

import base64
import io
import json
import struct
import threading
import zlib

import numpy as np
import pytest
import torch

from fanformer.generation.media_model import MediaModel, load_media_model, shown_media
from fanformer.generation.settings import GenerationSettings
from fanformer.server.fields import ContentPart, Message
from fanformer.server.limits import Limits
from fanformer.server.media import MediaReader
from fanformer.server.messages import MAX_MEDIA, MediaPart, read_messages
from fanformer.server.models import ServedModel, SlotSettings
from fanformer.server.refusal import RefusalError
from fanformer.server.torch_slots import MediaSlots
from tests.multimodal_files import save_with_towers, write_picture, write_tone
from tests.server.conftest import PATIENCE_SECONDS, check_error, running
from tests.server.test_faults import sent, wait_for
from tests.server.test_gate import slowed
from tests.server.test_slots import TOLERANCE

PATH = "/v1/chat/completions"
pytest.importorskip("soundfile", reason="needs the extra `multimodal` (soundfile)")


@pytest.fixture(scope="module")
def folder(saved_model, tmp_path_factory):
    return save_with_towers(saved_model, tmp_path_factory.mktemp("towers") / "model")


@pytest.fixture(scope="module")
def offline(folder):
    return load_media_model(folder, "cpu")


@pytest.fixture(scope="module")
def model(folder):
    found = ServedModel.open(folder, "sees", SlotSettings(4, 128, queue_size=8), device="cpu")
    yield found
    found.close()


@pytest.fixture(scope="module")
def client(model):
    with running({"sees": model}) as found:
        yield found


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The bytes of pictures and recordings by their names."""
    place = tmp_path_factory.mktemp("files")
    pictures = {colour: write_picture(place / f"{colour}.png", colour).read_bytes() for colour in ("red", "blue")}
    return pictures | {tone: write_tone(place / f"{tone}.wav", tone).read_bytes() for tone in ("low", "high")}


def image(content, **fields):
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    return {"type": "image_url", "image_url": {"url": url, **fields}}


def audio(content, kind="wav"):
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(content).decode(), "format": kind}}


def body(*parts, question="what?", **fields):
    content = [*parts, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    return {"model": "sees", "messages": messages, "max_tokens": 6, "temperature": 0, **fields}


def answer(client, *parts, **fields):
    status, _, found = client("POST", PATH, body(*parts, **fields))
    assert status == 200, found
    return found


def text(found):
    return found["choices"][0]["message"]["content"]


def refused(client, *parts, **fields):
    status, _, found = client("POST", PATH, body(*parts, **fields))
    return check_error(status, found)


CASES = {"text": ([], []), "red": (["red"], []), "low": ([], ["low"]), "both": (["blue"], ["high"]),
         "two": (["blue", "red"], [])}  # fmt: skip


def shown(files, name):
    pictures, sounds = CASES[name]
    return [*(image(files[one]) for one in pictures), *(audio(files[one]) for one in sounds)]


def test_answers_are_those_of_the_command_line_alone_and_in_a_crowd(client, offline, files):
    expected = {}
    greedy = GenerationSettings(max_length=6, min_length=0, temperature=0.0)
    for name, (pictures, sounds) in CASES.items():
        given = shown_media([files[one] for one in pictures], [files[one] for one in sounds])
        expected[name] = next(offline.ask(["what?"], [given], greedy)).text
        found = answer(client, *shown(files, name))
        ids = offline.encode_messages([{"role": "user", "content": [*given, "what?"]}])
        assert (text(found), found["usage"]["prompt_tokens"]) == (expected[name], len(ids))
    assert len(set(expected.values())) == len(expected)
    found = {}

    def ask(name):
        found[name] = text(answer(client, *shown(files, name)))

    asking = [threading.Thread(target=ask, args=(name,)) for name in CASES]
    for one in asking:
        one.start()
    for one in asking:
        one.join(PATIENCE_SECONDS)
    assert found == expected


def test_streams_and_several_answers_are_about_the_same(client, files):
    whole = text(answer(client, *shown(files, "both")))
    both = answer(client, *shown(files, "both"), n=2)
    assert [choice["message"]["content"] for choice in both["choices"]] == [whole, whole]
    chunks = client.events(PATH, **body(*shown(files, "both")))
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == whole


def test_each_row_of_a_step_has_the_logits_of_its_own_text(offline, files):
    reader, lock = MediaReader(offline, 128), threading.Lock()
    slots = MediaSlots(offline.model, 302, 4, 128)
    rows = {}
    for slot, name in ((0, "both"), (1, "text"), (3, "two")):
        pictures, sounds = CASES[name]
        media = shown_media([files[one] for one in pictures], [files[one] for one in sounds])
        parts = [MediaPart(one.kind, one.source, "") for one in media]
        read = reader.read([{"role": "user", "content": [*parts, "what?"]}], lock)
        slots.show(slot, None if read.look is None else read.look())
        rows[slot] = read.ids, media
        plain = [1 if number in reader.places else number for number in read.ids]
        for start in range(0, len(plain), 3):  # pieces end within pictures too
            found = slots.forward({slot: plain[start : start + 3]})
    for number in (7, 9):
        found = slots.forward({slot: [number] for slot in rows})
        for slot, (ids, media) in rows.items():
            ids.append(number)
            with torch.no_grad():
                expected = offline.model(torch.tensor([ids]), **offline.store.inputs(media)).logits[0, -1:]
            np.testing.assert_allclose(found[slot], expected.numpy(), **TOLERANCE)
    slots.close()


def cached(found):
    return found["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_what_a_slot_holds_is_shared_by_the_same_pictures_only(folder, client, files):
    single = ServedModel.open(folder, "sees", SlotSettings(1, 128, queue_size=4), device="cpu")
    question = "what is to be seen here, and where?"
    with running({"sees": single}) as one:
        red = answer(one, image(files["red"]), question=question)
        tokens = red["usage"]["prompt_tokens"]
        assert [cached(red), cached(answer(one, image(files["red"]), question=question))] == [0, tokens - 1]
        blue = answer(one, image(files["blue"]), question=question)
        assert blue["usage"]["prompt_tokens"] == tokens
        assert cached(blue) == 1  # the token before the picture
        assert text(blue) == text(answer(client, image(files["blue"]), question=question)) != text(red)
        words = answer(one, question=question)  # the base computes it, no adapter
        assert cached(words) == 0
        assert text(words) == text(answer(client, question=question))
        said = [*body(image(files["red"]))["messages"], {"role": "assistant", "content": "a"}]
        longer = {**body(), "messages": [*said, {"role": "user", "content": [audio(files["low"])]}]}
        assert one("POST", PATH, {**longer, "messages": said[:1]})[0] == 200
        follow = {**longer, "messages": [*said, {"role": "user", "content": "and?"}]}
        status, _, second = one("POST", PATH, follow)
        assert (status, cached(second) > 8) == (200, True)
        assert text(second) == text(client("POST", PATH, follow)[2])
        third = one("POST", PATH, longer)[2]
        assert cached(third) == 0  # a recording's adapters work on the whole text
        assert text(third) == text(client("POST", PATH, longer)[2])
    single.close()


def claims(width, height):
    """A PNG whose header claims so many pixels."""
    head = b"IHDR" + struct.pack(">II", width, height) + b"\x08\x02\0\0\0"
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    return start + b"\0\0\0\x04IDAT" + bytes(8)


def silence(seconds):
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(int(8000 * seconds)), 8000, format="FLAC")
    return buffer.getvalue()


def addressed(url, **fields):
    return {"type": "image_url", "image_url": {"url": url, **fields}}


FIRST = "messages[0].content[0]"


@pytest.mark.parametrize(
    ("part", "param", "words"),
    [
        (addressed("http://127.0.0.1/a.png"), f"{FIRST}.image_url.url", "no address is opened"),
        (addressed("https://example.org/a.png"), f"{FIRST}.image_url.url", "no address is opened"),
        (addressed("file:///etc/passwd"), f"{FIRST}.image_url.url", "no address is opened"),
        (addressed("/etc/passwd"), f"{FIRST}.image_url.url", "no address is opened"),
        (addressed("data:text/html;base64,AAAA"), f"{FIRST}.image_url.url", "`data:image/png;base64,...`"),
        (addressed("data:image/png,AAAA"), f"{FIRST}.image_url.url", "`data:image/png;base64,...`"),
        (addressed("data:image/png;base64,A\u00e9=="), f"{FIRST}.image_url.url", "must be whole base64"),
        (addressed("data:image/png;base64,AAA"), f"{FIRST}.image_url.url", "must be whole base64"),
        (addressed("data:image/png;base64,"), FIRST, "must hold something, got 0 bytes"),
        (image(b"<svg/>"), FIRST, "got an SVG drawing"),
        (image(claims(30_000, 30_000)), FIRST, "at most 50,000,000 pixels"),
        (image(claims(3, 3)), FIRST, "damaged or truncated"),
        (image(claims(3, 3), detail="high"), f"{FIRST}.image_url.detail", "must be auto"),
        (image(claims(3, 3), crop="no"), f"{FIRST}.image_url.crop", "cannot be honoured"),
        ({"type": "image_url", "image_url": "data:image/png;base64,AAAA"}, "messages", f"`{FIRST}.image_url` is wrong"),
        ({"type": "image_url"}, FIRST, "has no `image_url`"),
        ({**image(b"a"), "type": "text", "text": "a"}, FIRST, "has `image_url` too"),
        ({"type": "input_audio"}, FIRST, "has no `input_audio`"),
        ({"type": "video_url"}, FIRST, "expected text or image_url or input_audio"),
        (audio(b"RIFF"), FIRST, "must be whole sound in wav, flac, ogg or mp3"),
        (audio(b"RIFF", "aac"), "messages", f"`{FIRST}.input_audio.format` is wrong: input should be 'wav', 'mp3'"),
        (audio(silence(6), "flac"), FIRST, "must last at most 5.12 s, got 6"),
    ],
)
def test_what_is_no_picture_or_recording_is_refused_by_name(client, part, param, words):
    status, error = refused(client, part)
    assert (status, error["param"]) == (400, param), error
    assert words in error["message"]
    assert len(error["message"]) < 300


def test_more_than_a_request_may_show_is_refused_before_it_is_looked_at(client, model, files, monkeypatch):
    def look(*arguments):
        raise AssertionError("looked at")

    monkeypatch.setattr(MediaReader, "_look", look)
    error = refused(client, *[image(files["red"])] * (MAX_MEDIA + 1))[1]
    assert f"may show {MAX_MEDIA} pictures and recordings, got {MAX_MEDIA + 1}" in error["message"]
    assert refused(client, image(files["red"]), question="a " * 120)[1]["code"] == "context_length_exceeded"
    assert refused(client, image(files["red"]), max_tokens=128)[1]["code"] == "context_length_exceeded"


def test_only_the_user_shows_something(client, files):
    for role in ("system", "assistant"):
        messages = [{"role": role, "content": [image(files["red"])]}, {"role": "user", "content": "what?"}]
        error = client.refused(PATH, model="sees", messages=messages)[1]
        assert error["param"] == FIRST
        assert "only the user shows something" in error["message"]


def test_a_model_that_cannot_see_or_hear_says_so():
    for part, kinds in ((image(b"a"), ()), (audio(b"a"), ()), (audio(b"a"), ("image",)), (image(b"a"), ("audio",))):
        message = Message(role="user", content=[ContentPart.model_validate(part)])
        with pytest.raises(RefusalError) as told:
            read_messages([message], kinds)
        assert (told.value.status, told.value.param, told.value.code) == (400, FIRST, "unsupported_content")
        only = "the model takes no other" if kinds else "the model reads text only"
        assert str(told.value).startswith(f"`{FIRST}` is a part of type {part['type']}, expected text")
        assert only in str(told.value)


def test_models_tell_what_they_take_and_texts_hold_no_places(client, model, files):
    [told] = client("GET", "/v1/models")[2]["data"]
    assert told["capabilities"]["inputs"] == ["text", "image", "audio"]
    assert told["capabilities"]["chat"]
    assert model.in_words == "sees: 4 texts of 128 tokens at once, 0.00 GiB, takes image and audio too"
    image_id, audio_id = model.places
    messages = body(*shown(files, "both"))["messages"]
    ids = client("POST", "/tokenize", {"model": "sees", "messages": messages})[2]["tokens"]
    assert (ids.count(image_id), ids.count(audio_id)) == (4, 8)
    spelt = client("POST", "/tokenize", {"model": "sees", "prompt": "<|image|><|audio|>"})[2]["tokens"]
    assert {image_id, audio_id}.isdisjoint(spelt)
    status, error = client.refused(model="sees", prompt=[5, image_id])
    assert (status, error["param"]) == (400, "prompt")
    assert "stands for a picture or recording" in error["message"]
    status, error = client.refused(model="sees", prompt="a", logit_bias={str(audio_id): 100})
    assert (status, error["param"]) == (400, "logit_bias")


@pytest.mark.ci
def test_large_bodies_are_taken_up_to_their_limits(client, model, files):
    padded = image(files["red"])
    padded["image_url"]["url"] += " " * (5 << 20)
    assert text(answer(client, padded)) == text(answer(client, image(files["red"])))
    padded["image_url"]["url"] += " " * (12 << 20)
    status, _, found = client("POST", PATH, body(padded))
    assert check_error(status, found)[0] == 413
    with running({"sees": model}, None, Limits(bodies_bytes=3000)) as narrow:
        assert text(answer(narrow, image(files["red"])))
        status, headers, found = narrow("POST", PATH, body(audio(files["low"])))
        assert check_error(status, found)[1]["message"].startswith("too many large requests are in work")
        assert (status, headers["retry-after"]) == (429, "1")
        assert narrow.service.gate.held_bytes == 0


@pytest.fixture
def held(monkeypatch):
    """Hold back what looks at pictures; returns (begun, go on)."""
    begun, go_on = threading.Event(), threading.Event()
    features = MediaModel.features

    def waiting(*arguments):
        begun.set()
        assert go_on.wait(PATIENCE_SECONDS)
        return features(*arguments)

    monkeypatch.setattr(MediaModel, "features", waiting)
    yield begun, go_on
    go_on.set()


def test_who_hangs_up_before_a_picture_was_looked_at_is_forgotten(client, model, files, held):
    begun, go_on = held
    asked = [sent(client, body(image(files[name])), path=PATH) for name in ("red", "blue")]
    assert begun.wait(PATIENCE_SECONDS)
    assert client("POST", "/v1/completions", {"model": "sees", "prompt": "a", "max_tokens": 1})[0] == 200  # meanwhile
    for one in asked:
        one.close()
    wait_for(lambda: client.service.gate.in_work == 0)
    before = dict(model.scheduler.counters.finished)
    go_on.set()
    assert text(answer(client, image(files["red"])))
    wait_for(lambda: sum(model.scheduler.counters.finished.values()) == sum(before.values()) + 1)


def test_a_chat_that_shows_nothing_waits_for_nobodys_picture(client, files, held):
    begun, go_on = held
    with sent(client, body(image(files["red"])), path=PATH) as asked:
        assert begun.wait(PATIENCE_SECONDS)
        assert answer(client)
        assert client("POST", "/tokenize", {"model": "sees", "messages": body()["messages"]})[0] == 200
        go_on.set()
        assert asked.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_a_full_queue_is_told_before_a_picture_is_looked_at(folder, files, held, monkeypatch):
    single = ServedModel.open(folder, "sees", SlotSettings(1, 128, queue_size=0), device="cpu")
    begun, go_on = held
    go_on.set()
    slowed(single, monkeypatch, 0.02)
    with running({"sees": single}) as one:
        first = sent(one, {"model": "sees", "prompt": "a", "max_tokens": 120, "min_tokens": 120})
        wait_for(lambda: single.scheduler.running == 1)
        status, headers, found = one("POST", PATH, body(image(files["red"])))
        assert (check_error(status, found)[0], int(headers["retry-after"]) >= 1) == (429, True)
        assert not begun.is_set()
        first.close()
        wait_for(lambda: single.scheduler.running == 0)
        assert text(answer(one, image(files["red"])))
    single.close()


def test_a_look_inside_is_at_the_text_alone_while_others_are_answered(client, model, files):
    looked = []

    def look():
        looked.extend(client("POST", "/inside", {"model": "sees", "prompt": "the cat sat"})[2] for _ in range(5))

    alone = client("POST", "/inside", {"model": "sees", "prompt": "the cat sat"})[2]
    expected = text(answer(client, *shown(files, "both"), max_tokens=40))
    looking = threading.Thread(target=look)
    looking.start()
    assert text(answer(client, *shown(files, "both"), max_tokens=40)) == expected
    looking.join(PATIENCE_SECONDS)
    assert [json.dumps(one) for one in looked] == [json.dumps(alone)] * 5
