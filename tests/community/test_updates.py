"""Updates: what coding loses, what travels, and that nothing but a proper update gets through."""

import math
import struct
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from fanformer.community.container import LARGEST_WORDS
from fanformer.community.updates import (
    ErrorFeedback,
    Limits,
    Source,
    Update,
    decode_update,
    decode_weights,
    encode_update,
    encode_weights,
    fragments,
    largest_payload,
    read_label,
    rounded,
    shapes_of,
    weights_checksum,
)
from fanformer.errors import ConfigError, DataError

SHAPES = {"model.layers.0.w": (20, 30), "model.layers.1.b": (7,), "scalar": (), "nothing": (0, 3)}
LIMITS = Limits(max_tokens=100)


def an_update(seed=0, **fields):
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    sources = (Source("text", "CC-BY-4.0", 60), Source("more text", "unknown", 40))
    return Update(tensors, **{"round": 2, "base": "0a" * 32, "member": "anna", "tokens": 100, "inner_loss": 3.5,
                              "sources": sources, **fields})  # fmt: skip


@pytest.mark.parametrize("bits", [8, 4])
def test_an_update_comes_back_to_within_half_a_step_of_its_block(bits):
    sent = an_update()
    sent.tensors["model.layers.0.w"][3:9] *= 1e-6  # small numbers are lost in blocks with large ones only
    got = decode_update(encode_update(sent, bits), SHAPES, LIMITS)
    assert replace(got, tensors={}, digest="") == replace(sent, tensors={})
    assert shapes_of(got.tensors) == SHAPES
    for name, tensor in sent.tensors.items():
        padded = torch.nn.functional.pad(tensor.flatten(), (0, -tensor.numel() % 128)).view(-1, 128)
        steps = padded.abs().amax(1, keepdim=True) / (127 if bits == 8 else 7)
        lost = torch.nn.functional.pad((got.tensors[name] - tensor).flatten(), (0, -tensor.numel() % 128)).view(-1, 128)
        assert bool((lost.abs() <= steps / 2 * (1 + 1e-5)).all()), name  # the division rounds, too


@pytest.mark.parametrize("bits", [8, 4])
def test_zeros_and_huge_and_tiny_numbers_come_back(bits):
    tensors = {"a": torch.zeros(200), "b": torch.tensor([3e38, -3e38]), "c": torch.full((3,), 1e-44)}
    got = decode_update(encode_update(replace(an_update(), tensors=tensors), bits), shapes_of(tensors), LIMITS)
    assert torch.equal(got.tensors["a"], tensors["a"])
    assert torch.allclose(got.tensors["b"], tensors["b"])
    assert bool(torch.isfinite(got.tensors["c"]).all())


def test_a_payload_is_a_safetensors_file_of_about_a_byte_or_half_a_byte_a_number():
    tensors = {"w": torch.randn(512, 512)}
    update = replace(an_update(), tensors=tensors)
    for bits, most in ((8, 1.035), (4, 0.535)):  # codes, and four bytes of scale for every 128
        payload = encode_update(update, bits)
        assert len(payload) / tensors["w"].numel() < most
        assert sorted(safetensors.torch.load(payload)) == ["w", "w|scales"]
        assert len(payload) <= largest_payload(shapes_of(tensors))


def test_coding_is_the_same_every_time_and_the_digest_is_of_the_numbers_alone():
    one, two = encode_update(an_update()), encode_update(an_update(round=9, member="bert"))
    assert one == encode_update(an_update())
    assert one != two
    labels = [read_label(payload, SHAPES) for payload in (one, two)]
    assert labels[0].digest == labels[1].digest == decode_update(one, SHAPES, LIMITS).digest
    assert [(label.round, label.member) for label in labels] == [(2, "anna"), (9, "bert")]
    assert read_label(encode_update(an_update(seed=1)), SHAPES).digest != labels[0].digest


def relabelled(payload, change):
    """Return a payload whose header was changed by a function of it as text."""
    (length,) = struct.unpack_from("<Q", payload)
    header = change(payload[8 : 8 + length].decode()).encode()
    return struct.pack("<Q", len(header)) + header + payload[8 + length :]


def scales_begin(payload):
    return 8 + struct.unpack_from("<Q", payload)[0]


def with_number(payload, value):
    changed = bytearray(payload)
    struct.pack_into("<f", changed, scales_begin(payload), value)
    return bytes(changed)


REFUSED = {
    "empty": (lambda p: b"", r"must be a safetensors file, got 0 bytes"),
    "cut": (lambda p: p[:-1], r"must have [\d,]+ bytes, got [\d,]+"),
    "longer": (lambda p: p + b"\0", r"must have [\d,]+ bytes, got [\d,]+"),
    "oversized": (lambda p: p + bytes(10**6), r"at most [\d,]+ bytes, got 1,[\d,]+: it is left out"),
    "header too long": (lambda p: struct.pack("<Q", 1 << 60) + p[8:], r"header of a payload must have at most"),
    "no json": (lambda p: relabelled(p, lambda text: text[:-9]), r"must be JSON with our words \(JSONDecodeError\)"),
    "nested": (lambda p: relabelled(p, lambda text: "[" * 30000), r"must be JSON with our words \(RecursionError\)"),
    "no words": (lambda p: relabelled(p, lambda text: text.replace("fanformer", "others")), r"our words \(KeyError\)"),
    "nan": (lambda p: with_number(p, math.nan), r"`model.layers.0.w` .*finite numbers, got a scale that is not"),
    "infinite": (lambda p: with_number(p, 3e38), r"finite numbers, got a scale that is not"),
    "negative": (lambda p: with_number(p, -1.0), r"must have scales from 0 on, got a negative one"),
    "code": (lambda p: p[:-1] + b"\x80", r"`scalar` of an update must hold codes of 8 bits, got one that is none"),
    "tensor missing": (lambda p: relabelled(p, lambda text: text.replace('"scalar":', '"vector":')),
                       r"the 8 tensors that were asked for: `scalar` is missing"),
    "type": (lambda p: relabelled(p, lambda text: text.replace("I8", "U8", 1)), r"must be .*I8.*, got .*U8"),
    "shape": (lambda p: relabelled(p, lambda text: text.replace("[600]", "[601]")), r"\[600\].*, got .*\[601\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_exactly_an_update_is_refused_in_one_line(case):
    spoil, words = REFUSED[case]
    with pytest.raises(DataError, match=words) as caught:
        decode_update(spoil(encode_update(an_update())), SHAPES, LIMITS)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tokens": 101}, "`tokens` of an update must be at most 100, its share, got 101"),
        ({"tokens": 0}, "`tokens` of an update must be a whole number from 1 on, got 0"),
        ({"round": -1}, "`round` of an update must be a whole number from 0 on, got -1"),
        ({"round": True}, "`round` of an update"),
        ({"base": "0A" * 32}, "`base` of an update must be a SHA-256 in hexadecimal"),
        ({"member": "a\nb"}, r"`member` of an update must be a name .* got 'a\\nb'"),
        ({"member": "a" * 201}, "`member` of an update"),
        ({"inner_loss": math.nan}, "`inner_loss` of an update must be a finite number, got nan"),
        ({"sources": (Source("a", "b", 1),) * 65}, "`sources` of an update must be at most 64 lists"),
        ({"sources": (Source("a\x1b[2J", "b", 1),)}, "`sources` of an update"),
        ({"sources": (Source("a", "b", 60), Source("c", "d", 41))}, "must have its 100 tokens at most, got 101"),
    ],
)
def test_words_of_the_wrong_type_or_range_are_refused(fields, words):
    update = an_update(**fields)
    with pytest.raises(DataError, match=words):
        decode_update(encode_update(update), SHAPES, LIMITS)


def test_a_proper_header_of_other_tensors_is_not_read_for_long():
    many = {f"t{number}": torch.zeros(1) for number in range(2000)}
    with pytest.raises(DataError, match="at most"):
        decode_update(encode_update(replace(an_update(), tensors=many)), {"w": (2,)}, LIMITS)
    assert largest_payload({"w": (2,)}) < LARGEST_WORDS + 1000


def test_what_is_not_finite_is_not_handed_in():
    update = an_update()
    update.tensors["scalar"].fill_(math.inf)
    with pytest.raises(DataError, match="`scalar` of an update must hold finite numbers"):
        encode_update(update)
    with pytest.raises(ConfigError, match="`bits` must be 8 or 4, got 3"):
        encode_update(an_update(), 3)


@pytest.mark.parametrize("bits", [8, 4])
def test_with_error_feedback_nothing_is_lost_over_rounds(bits):
    feedback, sent, received = ErrorFeedback(), torch.zeros(20, 30), torch.zeros(20, 30)
    for number in range(12):
        update = an_update(seed=number)
        tensors = update.tensors["model.layers.0.w"]
        tensors[:, 1:] *= 1e-3  # far below a step of its block
        sent += tensors
        payload = feedback.encode(update, bits)
        received += decode_update(payload, SHAPES, LIMITS).tensors["model.layers.0.w"]
    kept = feedback.state()["model.layers.0.w"]
    assert torch.allclose(received + kept, sent, atol=1e-5)  # float32 sums of 12
    alone = sum(decode_update(encode_update(an_update(seed=number), bits), SHAPES, LIMITS).tensors["model.layers.0.w"]
                for number in range(12))  # fmt: skip
    assert not torch.allclose(alone, sent, atol=1e-5)


def test_error_feedback_is_saved_and_keeps_what_fragments_lost_before():
    feedback, again = ErrorFeedback(), ErrorFeedback()
    parts = [{name: an_update().tensors[name] for name in names} for names in fragments(SHAPES, 2)]
    for tensors in parts:
        feedback.encode(replace(an_update(), tensors=tensors), 4)
    assert feedback.state().keys() == SHAPES.keys()
    again.restore(feedback.state())
    later = replace(an_update(seed=5), tensors=parts[0])
    assert again.encode(later, 4) == feedback.encode(later, 4)
    assert again.encode(later, 4) != ErrorFeedback().encode(later, 4)


def test_an_update_that_cannot_be_coded_leaves_the_feedback_as_it_is():
    feedback = ErrorFeedback()
    feedback.encode(an_update(), 4)
    before = feedback.state()
    spoilt = an_update()
    spoilt.tensors["scalar"].fill_(math.nan)
    with pytest.raises(DataError):
        feedback.encode(spoilt, 4)
    after = feedback.state()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_fragments_hold_every_tensor_once_and_blocks_in_turn():
    like = {f"model.layers.{number}.{name}": (10, 10) for number in range(8) for name in ("a", "b")}
    like |= {"model.embed.weight": (50, 10), "lm_head.weight": (50, 10), "model.norm.weight": (10,)}
    found = fragments(like, 3)
    assert sorted(name for names in found for name in names) == sorted(like)
    numbers = [sorted({int(name.split(".")[2]) for name in names if ".layers." in name}) for names in found]
    assert numbers == [[0, 3, 6], [1, 4, 7], [2, 5]]
    sizes = [sum(math.prod(like[name]) for name in names) for names in found]
    assert max(sizes) < 2 * min(sizes)  # an embedding is not divided
    assert [sorted(names) for names in fragments(like, 1)] == [sorted(like)]
    with pytest.raises(ConfigError, match="at most the blocks of the model, got 20"):
        fragments(like, 20)


def test_a_base_travels_in_float32_to_the_bit_and_in_float16_rounded():
    weights = an_update().tensors
    for dtype, size in (("float32", 4), ("float16", 2)):
        sent = rounded(weights, dtype)
        payload = encode_weights(weights, dtype)
        got = decode_weights(payload, SHAPES, weights_checksum(sent))
        assert all(torch.equal(got[name], sent[name]) for name in SHAPES)
        assert len(payload) < size * 608 + 1000
    assert torch.equal(rounded(weights, "float32")["scalar"], weights["scalar"])
    with pytest.raises(DataError, match=r"must have the checksum 0{16}, got [0-9a-f]{16}: fetch it again"):
        decode_weights(payload, SHAPES, "0" * 64)
    with pytest.raises(DataError, match="`a` of a base must hold finite numbers of float16"):
        encode_weights({"a": torch.tensor([1e6])}, "float16")


def test_of_a_base_only_what_moved_need_travel():
    weights = an_update().tensors
    moved = {**weights, "scalar": weights["scalar"] + 1}
    payload, checksum = encode_weights({"scalar": moved["scalar"]}), weights_checksum(moved)
    got = decode_weights(payload, SHAPES, checksum, weights)
    assert weights_checksum(got) == checksum
    assert weights_checksum(decode_weights(encode_weights({}), SHAPES, checksum, moved)) == checksum
    assert weights_checksum(decode_weights(encode_weights(moved), SHAPES, checksum, weights)) == checksum
    older = {**weights, "model.layers.0.w": weights["model.layers.0.w"] + 1}
    with pytest.raises(DataError, match=r"must have the checksum .*: fetch it again"):
        decode_weights(payload, SHAPES, checksum, older)
    with pytest.raises(DataError, match=r"`model.layers.0.w` is missing"):
        decode_weights(payload, SHAPES, checksum)


def test_the_checksum_knows_names_shapes_and_every_bit():
    weights = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(2)}
    whole = weights_checksum(weights)
    assert whole == weights_checksum(dict(reversed(weights.items())))
    nudged = weights["a"].clone()
    nudged[1, 2] = torch.nextafter(nudged[1, 2], torch.tensor(9.0))
    others = [
        {**weights, "a": weights["a"].view(3, 2)},
        {**weights, "a": nudged},
        {"a": weights["a"], "c": weights["b"]},
    ]
    assert whole not in [weights_checksum(one) for one in others]


def test_decoders_stand_some_hundred_spoilt_payloads(repository, monkeypatch):
    monkeypatch.syspath_prepend(str(repository / "benchmarks" / "proofs"))
    import community_fuzz

    found = community_fuzz.fuzz(400, seed=1)
    assert found["failures"] == []
    assert found["taken"] > 5  # some flips of bits give another proper update
    assert found["refused"] > 200
