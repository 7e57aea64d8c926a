"""Decoders of a community run before whatever comes in: an update that is one, or a refusal in one line.

    python benchmarks/proofs/community_fuzz.py [--cases 20000] [--seed 0] [--write]

Proper payloads of 8 and 4 bits and of a base are cut, lengthened, spliced, have bits flipped, lengths and numbers of
their headers replaced and words changed for others of every JSON type; some cases are bytes at random. Exit code 1 if
a decoder raises anything but DataError, says more than one line, or returns what is not finite or of another shape.
"""

import argparse
import json
import random
import struct
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from fanformer.community.updates import (
    Limits,
    Source,
    Update,
    decode_update,
    decode_weights,
    encode_update,
    encode_weights,
    read_label,
    shapes_of,
    weights_checksum,
)
from fanformer.comparison.ledger import EXACT, Figure, measured_today, write_entry
from fanformer.errors import DataError

RESULTS = Path(__file__).parents[1] / "results"
VALUES: list[Any] = [
    None, True, -1, 0, 1, 7, 8.0, 1 << 60, 10**400, -0.5, 1e308, float("nan"), float("inf"), "", "8", "a" * 300, "\n",
    "\ud800", [], [[]], [["a", "b", 1]], [["a", "b", -1]], [["a", "b"]], [["a"] * 3] * 100, {}, {"a": {}}, "0" * 64,
    json.loads("[" * 900 + "]" * 900),
]  # fmt: skip
TENSORS = {"a.weight": (7, 5), "b.bias": (131,), "model.layers.0.w": (3, 4, 2), "scalar": ()}
LIMITS = Limits(max_tokens=1000)


def payloads(seed: int) -> list[bytes]:
    """Return proper payloads: an update in 8 bits, one in 4 bits, and a base in each type."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in TENSORS.items()}
    update = Update(tensors, 3, "ab" * 32, "member", 100, 2.5, (Source("text", "CC0", 100),))
    return [
        encode_update(update, 8),
        encode_update(update, 4),
        encode_weights(tensors),
        encode_weights(tensors, "float16"),
    ]


def spoil(payload: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """Return a payload changed in one of many ways, or in two of them."""
    for _ in range(chance.choice((1, 1, 2))):
        payload = chance.choice(WAYS)(payload, others, chance)
    return payload


def _cut(payload: bytes, others: list[bytes], chance: random.Random) -> bytes:
    return payload[: chance.randrange(len(payload) + 1)]


def _lengthen(payload: bytes, others: list[bytes], chance: random.Random) -> bytes:
    return payload + chance.randbytes(chance.choice((1, 8, 1000, 200_000)))


def _splice(payload: bytes, others: list[bytes], chance: random.Random) -> bytes:
    place = chance.randrange(len(payload) + 1)
    return payload[:place] + chance.choice(others)[place:]


def _flip(payload: bytes, others: list[bytes], chance: random.Random) -> bytes:
    changed = bytearray(payload or b"\0")
    for _ in range(chance.choice((1, 2, 16))):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _length(payload: bytes, others: list[bytes], chance: random.Random) -> bytes:
    length = chance.choice((0, 1, 8, len(payload), len(payload) - 8, 1 << 40, (1 << 64) - 1, chance.randrange(4096)))
    return struct.pack("<Q", max(0, length)) + payload[8:]


def _number(payload: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """Put a float that hurts somewhere into the tensors."""
    if len(payload) < 16:
        return payload
    changed = bytearray(payload)
    value = chance.choice((float("nan"), float("inf"), -float("inf"), -1.0, 3.4e38, 1e-45))
    struct.pack_into("<f", changed, 4 * chance.randrange((len(changed) - 4) // 4), value)
    return bytes(changed)


def _header(payload: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """Change something in the header, or in its words, that stays JSON."""
    try:
        (length,) = struct.unpack_from("<Q", payload)
        header = json.loads(payload[8 : 8 + length])
        words = json.loads(header["__metadata__"]["fanformer"])
    except (ValueError, KeyError, TypeError, RecursionError, struct.error):
        return payload
    place = chance.choice((header, words, words, chance.choice(list(header.values()))))
    if isinstance(place, dict) and place:
        name = chance.choice(list(place))
        if chance.random() < 0.2:
            del place[name]
        else:
            place[name if chance.random() < 0.8 else f"{name}x"] = chance.choice(VALUES)
    if isinstance(header.get("__metadata__"), dict):
        header["__metadata__"]["fanformer"] = json.dumps(words)
    text = json.dumps(header).encode()
    if chance.random() < 0.05:
        depth = chance.choice((100, 900, 1000, 4000))
        text = chance.choice((b"[" * depth, b'{"__metadata__":' * depth, b'{"a.weight":' + b"[" * depth + b"]" * depth))
    return struct.pack("<Q", len(text)) + text + payload[8 + length :]


def _random(payload: bytes, others: list[bytes], chance: random.Random) -> bytes:
    return chance.randbytes(chance.randrange(600))


WAYS = [_cut, _lengthen, _splice, _flip, _flip, _length, _number, _header, _header, _header, _random]


def decode_all(payload: bytes, base: str) -> str:
    """Give a payload to every decoder and return how the one of updates found it: "taken" or "refused".

    Raises:
        AssertionError: if a decoder returns what it must not.
    """
    found = "refused"
    try:
        update = decode_update(payload, TENSORS, LIMITS)
        assert shapes_of(update.tensors) == TENSORS, "an update has the shapes that were asked for"
        assert all(bool(torch.isfinite(update.tensors[name]).all()) for name in TENSORS), "an update is finite"
        assert 0 < update.tokens <= LIMITS.max_tokens, "an update is of no more than its share"
        assert update.member.isprintable(), "a name can be shown"
        found = "taken"
    except DataError as error:
        _check_words(error)
    try:
        read_label(payload, TENSORS)
    except DataError as error:
        _check_words(error)
    try:
        weights = decode_weights(payload, TENSORS, base)
        assert weights_checksum(weights) == base, "a base is the one that was asked for"
    except DataError as error:
        _check_words(error)
    return found


def _check_words(error: DataError) -> None:
    text = str(error)
    assert text.isprintable(), f"a refusal is one line: {text!r}"
    assert len(text) < 1000, f"a refusal is short: {text!r}"


def fuzz(cases: int, seed: int) -> dict[str, Any]:
    """Decode so many spoilt payloads and return counts, and the slowest case in seconds."""
    chance, proper = random.Random(seed), payloads(seed)
    base = weights_checksum(decode_weights(proper[2], TENSORS, _checksum(seed)))
    counts: Counter[str] = Counter()
    slowest, failures = 0.0, []
    for number in range(cases):
        spoilt = spoil(chance.choice(proper), proper, chance)
        began = time.perf_counter()
        try:
            counts[decode_all(spoilt, base)] += 1
        except Exception as error:
            counts["failed"] += 1
            failures.append(f"case {number}: {type(error).__name__}: {error}"[:300])
        slowest = max(slowest, time.perf_counter() - began)
    return {**{name: counts[name] for name in ("taken", "refused", "failed")}, "slowest": slowest, "failures": failures}


def _checksum(seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return weights_checksum({name: torch.randn(shape, generator=generator) for name, shape in TENSORS.items()})


def main() -> int:
    """Fuzz, print the counts, and with --write put them into the ledger."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="write the entry to benchmarks/results")
    asked = parser.parse_args()
    found = fuzz(asked.cases, asked.seed)
    for name in ("taken", "refused", "failed"):
        print(f"| {name} | {found[name]:,} |")
    print(f"| slowest case | {1000 * found['slowest']:.1f} ms |", *found["failures"], sep="\n")
    if asked.write:
        result = {name: Figure(found[name], "payloads", interval=EXACT) for name in ("taken", "refused", "failed")}
        entry = measured_today(
            "community-fuzz-{date}",
            what="decoders of a community run before spoilt payloads",
            seeds=[asked.seed],
            configuration={"cases": asked.cases},
            result=result,
        )
        write_entry(RESULTS, entry)
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
