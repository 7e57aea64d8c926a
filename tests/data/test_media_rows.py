"""Rows of messages with media: which files they may name, how they become tokens, and what shares a row."""

import base64
import copy
import json
import random

import numpy as np
import pytest

from fanformer.data.conversations.chat_tokens import add_chat_tokens
from fanformer.data.multimodal import PLACEHOLDERS, media_rows, placeholder_ids
from fanformer.data.multimodal.media_rows import MediaRows, MediaStore
from fanformer.data.multimodal.messages import Media, MediaMessage, media_example, read_media_examples
from fanformer.data.multimodal.placeholders import add_placeholders
from fanformer.data.multimodal.wording import CHATML_TEMPLATE, PLAIN_TEMPLATE, wording_of
from fanformer.data.packing import IGNORED_LABEL
from fanformer.errors import ConfigError, DataError
from fanformer.generation.media_model import load_processor
from tests.multimodal_files import save_with_towers, write_picture, write_rows
from tests.saved_models import saved_model, tiny_tokenizer  # noqa: F401

ANSWER = {"role": "assistant", "content": "red"}


def row(*parts, **fields):
    content = [*parts, {"type": "text", "text": "which?"}]
    return {"messages": [{"role": "user", "content": content}, ANSWER], **fields}


@pytest.fixture(scope="module")
def store(saved_model, tmp_path_factory):  # noqa: F811
    folder = save_with_towers(saved_model, tmp_path_factory.mktemp("rows") / "model")
    return MediaStore(load_processor(folder))


def wording(store):
    return wording_of(store.processor.tokenizer, {"image": 300, "audio": 301})


def test_paths_base64_bytes_and_lists_name_the_same_picture(tmp_path):
    path = write_picture(tmp_path / "a.png", "red")
    content = path.read_bytes()
    text = base64.b64encode(content).decode()
    found = [
        media_example(row({"type": "image", "path": "a.png"}), tmp_path),
        media_example(row({"type": "image", "base64": text}), tmp_path),
        media_example(row({"type": "image", "url": f"data:image/png;base64,{text}"}), tmp_path),
        media_example(row({"type": "image", "bytes": content}), tmp_path),
        media_example(row({"type": "image"}, images=["a.png"]), tmp_path),
        media_example(row({"type": "image"}, images=[{"bytes": content, "path": None}]), tmp_path),
    ]
    sources = [one.media[0].source for one in found]
    assert [source if isinstance(source, bytes) else source.read_bytes() for source in sources] == [content] * 6
    assert found[0].answer == "red"


def test_wrong_rows_say_what_is_wrong(tmp_path):
    write_picture(tmp_path / "a.png", "red")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "a.png")
    place = tmp_path / "data"

    def wrong(message, value):
        with pytest.raises(DataError, match=message) as caught:
            media_example(value, place)
        assert "\n" not in str(caught.value)

    image = {"type": "image"}
    for path in ("../a.png", str(tmp_path / "a.png"), "link.png", "x/../../a.png"):
        wrong("must lie in .*, which leaves it", row({**image, "path": path}))
    wrong("must be a path in .*: fetch it first", row({**image, "url": "https://somewhere/a.png"}))
    wrong("must be a path in .*: fetch it first", row({**image, "path": "file:///etc/passwd"}))
    wrong("must have a path or base64, got neither, and `images` has no more", row(image))
    wrong("`images` must have one for each place in the messages, got more", row(images=["a.png"]))
    wrong(r"`messages\[0\].content\[0\]` must have a path or base64, got dict", row({**image, "path": 3}))
    wrong("base64 must be whole", row({**image, "base64": "###"}))
    wrong(
        r"`messages\[0\].content\[0\].type` must be text, image or audio, got 'video'",
        row({"type": "video", "path": "a"}),
    )
    wrong(
        "only the user shows something",
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": [{**image, "path": "b.png"}]},
            ]
        },
    )
    wrong("`messages` must end with an answer", {"messages": [{"role": "user", "content": "a"}]})
    wrong("message 2 must be of the assistant, got user", {"messages": [{"role": "user", "content": "a"}] * 2})
    wrong("must say something", {"messages": [{"role": "user", "content": " "}, ANSWER]})
    wrong("role` must be system, user or assistant, got 'tool'", {"messages": [{"role": "tool", "content": "a"}]})
    wrong("`messages` must be a list of messages, got NoneType", {})


JUNK = (
    *(None, True, 3, 1e300, "", " ", "\ud800", "\0", "a" * 5000, "../a.png", "loop.png", "file:///a", "data:,", b"a"),
    *([], {}, [[]], {"type": ["text"]}, [{"type": "image"}], {"bytes": b"a"}, {"path": {}}),
)


def test_whatever_a_row_holds_it_is_a_conversation_or_one_clear_line(tmp_path):
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    numbers, messages, read = random.Random(0), [], 0
    whole = {**row({"type": "image", "path": "a.png"}, {"type": "audio"}), "audio": ["b.wav"], "images": []}
    for _ in range(3000):
        spoilt = copy.deepcopy(whole)
        for _ in range(numbers.randint(1, 3)):
            place, key = spoilt, numbers.choice(list(spoilt))
            while numbers.random() < 0.8 and isinstance(place[key], dict | list) and place[key]:
                place = place[key]
                key = numbers.choice(list(place) if isinstance(place, dict) else range(len(place)))
            place[key] = copy.deepcopy(numbers.choice(JUNK))
        try:
            media_example(spoilt, tmp_path)
            read += 1
        except DataError as error:
            messages.append(str(error))
    assert read
    assert len(set(messages)) > 50
    assert not [text for text in messages if "\n" in text or len(text) > 400 or not text.isascii()]


def test_a_file_is_read_whole_or_refused_with_its_line(tmp_path):
    file = write_rows(tmp_path / "rows", 3, 2)
    assert len(read_media_examples(file)) == 5
    with file.open("a") as stream:
        stream.write(json.dumps(row({"type": "image", "path": "../a.png"})) + "\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:6: .*which leaves it"):
        read_media_examples(file)
    with pytest.raises(DataError, match=r"no such file: expected \.jsonl or .parquet"):
        read_media_examples(tmp_path / "none.jsonl")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match=r"expected a \.jsonl or .parquet file with rows of messages, got a.txt"):
        read_media_examples(tmp_path / "a.txt")


def test_parquet_with_bytes_gives_the_rows_of_jsonl(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    content = write_picture(tmp_path / "a.png", "red").read_bytes()
    rows = [row({"type": "image"}, images=[{"bytes": content}])]
    rows[0]["messages"][1] = {**ANSWER, "content": [{"type": "text", "text": "red"}]}  # a column has one kind
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (example,) = read_media_examples(tmp_path / "rows.parquet")
    assert example.media == [Media("image", content)]
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "rows.parquet").read_bytes()[:-9])
    with pytest.raises(DataError, match="not a complete parquet file"):
        read_media_examples(tmp_path / "cut.parquet")


def test_placeholders_take_padded_rows_then_reserved_tokens_then_ids_beyond(tiny_tokenizer):  # noqa: F811
    padded = add_placeholders(tiny_tokenizer, 320, ["image", "audio"])
    assert padded.ids == {"image": 300, "audio": 301}
    beyond = add_placeholders(tiny_tokenizer, 300, ["audio"])
    assert beyond.ids == {"audio": 300}
    assert beyond.notes == ("<|audio|> lie beyond the 300 rows of the vocabulary, which is full",)
    reserved = copy.deepcopy(tiny_tokenizer)
    reserved.add_tokens(["<|reserved_0|>"], special_tokens=True)
    taken = add_placeholders(reserved, 301, ["image"])
    assert taken.ids == {"image": 300}
    assert taken.notes == ("<|image|> takes the reserved token <|reserved_0|>",)
    for found in (padded, beyond, taken):
        assert placeholder_ids(found.tokenizer) == list(found.ids.values())
        assert found.tokenizer.padding_side == "left"
    assert placeholder_ids(tiny_tokenizer) == []
    assert tiny_tokenizer.backend_tokenizer.token_to_id(PLACEHOLDERS["image"]) is None


def test_a_base_without_a_template_gets_no_new_token(store):
    said = [
        MediaMessage("user", (Media("image", b"a"), "the cat")),
        MediaMessage("assistant", ("sat",)),
        MediaMessage("user", ("and", Media("audio", b"b"))),
    ]
    found = wording(store)
    assert found.template == PLAIN_TEMPLATE
    encoded = found.encode(said, [2, 3], prompt=True)
    plain = found.encode_plain
    answer = [*plain("sat"), 0]
    asked = [0, 300, 300, *plain("the cat\n")]
    assert encoded.ids == [*asked, *answer, *plain("and"), 301, 301, 301, *plain("\n")]
    assert encoded.trained[len(asked) : len(asked) + len(answer)] == [True] * len(answer)
    assert sum(encoded.trained) == len(answer)
    assert {300, 301}.isdisjoint(plain(PLACEHOLDERS["image"] + PLACEHOLDERS["audio"]))


def test_the_template_writes_the_same_ids_as_training(store, tiny_tokenizer, tiny_model):  # noqa: F811
    chat = add_chat_tokens(tiny_model(vocab_size=320), tiny_tokenizer).tokenizer
    for tokenizer in (store.processor.tokenizer, add_placeholders(chat, 320, ["image", "audio"]).tokenizer):
        ids = dict(zip(("image", "audio"), placeholder_ids(tokenizer), strict=True))
        found = wording_of(tokenizer, ids)
        assert found.template == (PLAIN_TEMPLATE if tokenizer is store.processor.tokenizer else CHATML_TEMPLATE)
        said = [
            MediaMessage("system", ("speak",)),
            MediaMessage("user", (Media("image", b"a"), "the cat", Media("audio", b"b"))),
            MediaMessage("assistant", ("sat",)),
            MediaMessage("user", ("and?",)),
        ]
        rows = [
            {"role": one.role, "content": [_part(part) for part in one.parts] if one.role == "user" else one.parts[0]}
            for one in said
        ]
        written = tokenizer.apply_chat_template(
            rows, chat_template=found.template, add_generation_prompt=True, return_dict=False
        )
        assert written == found.encode(said, [1, 1], prompt=True).ids
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(ConfigError, match="must have a ChatML template or none"):
        wording_of(tokenizer, ids)


def _part(part):
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": part.kind}


def test_rows_keep_kinds_apart_and_learn_no_placeholder(store, tmp_path):
    examples = read_media_examples(write_rows(tmp_path / "rows", 6, 6, 3))
    rows = MediaRows(examples, wording(store), store, 64)
    batch = rows.batch(list(range(len(rows))))
    ids, labels = batch["input_ids"], batch["labels"]
    learnt = labels[labels != IGNORED_LABEL]
    assert not [number for number in learnt.tolist() if number >= 300]
    assert int((ids == 300).sum()) == 4 * len(batch["pixel_values"]) == 4 * 9
    assert int((ids == 301).sum()) == int(batch["input_features_mask"].sum()) // 4
    assert len(batch["input_features"]) == 9
    kinds = {(bool((one == 300).any()), bool((one == 301).any())) for one in ids}
    assert kinds == {(True, False), (False, True), (True, True)}
    for index in range(len(rows)):
        kinds = {tuple(sorted({one.kind for one in examples[number].media})) for number in rows.examples_of(index)}
        assert len(kinds) == 1


def test_a_batch_holds_the_media_of_its_rows_in_their_order(store, tmp_path):
    examples = read_media_examples(write_rows(tmp_path / "rows", 6, 0))
    rows = MediaRows(examples, wording(store), store, 32)
    chosen = [len(rows) - 1, 0]
    expected = [store.prepared(examples[number].media[0]) for index in chosen for number in rows.examples_of(index)]
    assert np.array_equal(rows.batch(chosen)["pixel_values"].numpy(), np.stack(expected))


def test_other_pixels_are_other_rows(store, tmp_path):
    file = write_rows(tmp_path / "rows", 3, 0)
    before = MediaRows(read_media_examples(file), wording(store), store, 64).fingerprint
    assert MediaRows(read_media_examples(file), wording(store), MediaStore(store.processor), 64).fingerprint == before
    write_picture(tmp_path / "rows" / "p1.png", "red", seed=99)
    assert MediaRows(read_media_examples(file), wording(store), MediaStore(store.processor), 64).fingerprint != before


def test_a_file_that_changes_while_it_is_learnt_is_told(store, tmp_path, monkeypatch):
    monkeypatch.setattr(media_rows, "_KEPT_BYTES", 0)
    own, media = MediaStore(store.processor), Media("image", write_picture(tmp_path / "a.png", "red"))
    before = own.prepared(media)
    assert np.array_equal(own.prepared(media), before)
    write_picture(tmp_path / "a.png", "blue")
    with pytest.raises(DataError, match=r"the picture .*a.png is another one than when it was read before"):
        own.prepared(media)
    own.forget([media])
    assert not np.array_equal(own.prepared(media), before)


def test_a_model_without_a_tower_says_so(store, tmp_path):
    for kind, what in (("image", "sees"), ("audio", "hears")):
        processor = copy.copy(store.processor)
        setattr(processor, f"{kind}_token", None)
        with pytest.raises(DataError, match=f"a.png must not be there: the model {what} nothing, it has no tower"):
            MediaStore(processor).tokens(Media(kind, write_picture(tmp_path / "a.png", "red")))


def test_media_are_never_cut_and_bad_ones_name_their_row(store, tmp_path):
    file = write_rows(tmp_path / "rows", 2, 2)
    with pytest.raises(DataError, match=r"rows.jsonl:1: it must have at most 8 tokens, got \d+, 4 of them pictures"):
        MediaRows(read_media_examples(file), wording(store), store, 8)
    (tmp_path / "rows" / "p1.png").write_bytes(b"<svg/>")
    with pytest.raises(DataError, match=r"rows.jsonl:3: .*p1.png must be a whole picture .*, got an SVG drawing"):
        MediaRows(read_media_examples(file), wording(store), MediaStore(store.processor), 64)
