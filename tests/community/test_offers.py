"""Offers of a host: a member takes what the host signed, and nothing that no host may ask."""

import dataclasses

import pytest

from fanformer.errors import DataError
from fanformer.training.configuration import resolve

pytest.importorskip("cryptography", reason="needs the extra `community` (cryptography)")

from fanformer.community.identity import ensure_host_identity, read_signing_key
from fanformer.community.invitation import Invitation, key_fingerprint
from fanformer.community.offers import Offer, open_offer, seal, shared_configuration
from fanformer.community.plan import Plan, Task

PLAN = Plan(rounds=3, round_steps=2, batch_size=2, sequence_length=16)
TASK = Task(round=1, base="ab" * 32, first_step=2, steps=2, place=8, fragment=0, seconds=30.0)


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("host")
    ensure_host_identity(folder / "keys", folder, ["127.0.0.1"])
    return read_signing_key(folder / "keys")


@pytest.fixture(scope="module")
def invitation(keys):
    return Invitation("127.0.0.1", 1, "0" * 32, key_fingerprint(keys.public_text()))


def an_offer(**changes):
    configuration = shared_configuration(resolve("nano"))
    fields = {"run": "cafe", "member": "alice", "task": TASK, "plan": PLAN, "configuration": configuration,
              "files": {"tokenizer.json": b"{}"}}  # fmt: skip
    return Offer(**{**fields, **changes})


def test_an_offer_comes_back_as_it_was_signed(keys, invitation):
    offer = an_offer()
    assert open_offer(seal(offer, keys), invitation) == offer
    final = an_offer(task=None, final=True)
    assert open_offer(seal(final, keys), invitation) == final


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text": lambda text: text.replace('"place":8', '"place":9')}, "the round is forged"),
        ({"signature": lambda text: "00" * 64}, "the round is forged"),
        ({"files": lambda files: {"tokenizer.json": b"[]"}}, "is not the one that was signed"),
        ({"files": lambda files: {}}, "the offer's files must be of"),
    ],
)
def test_a_forged_offer_is_refused(keys, invitation, changes, words):
    sealed = seal(an_offer(), keys)
    forged = dataclasses.replace(sealed, **{name: make(getattr(sealed, name)) for name, make in changes.items()})
    with pytest.raises(DataError, match=words) as caught:
        open_offer(forged, invitation)
    assert "\n" not in str(caught.value)


def test_an_offer_of_another_key_is_refused(keys, invitation, tmp_path):
    ensure_host_identity(tmp_path / "keys", tmp_path, ["127.0.0.1"])
    other = seal(an_offer(), read_signing_key(tmp_path / "keys"))
    with pytest.raises(DataError, match="the offer's key must be that of the invitation"):
        open_offer(other, invitation)


@pytest.mark.parametrize(
    "field",
    [
        "output_dir",
        "push_to_hub",
        "overwrite",
        "device",
        "threads",
        "tokenizer",
        "init_from",
        "eval_data",
        "unknown",
        "objective",
        "vision_tower",
    ],
)
def test_no_host_decides_about_a_members_machine(keys, invitation, field):
    assert field not in shared_configuration(resolve("nano"))
    sealed = seal(an_offer(configuration={field: "anything"}), keys)
    with pytest.raises(DataError, match=f"the offer sets `{field}`, which a host does not decide"):
        open_offer(sealed, invitation)


def test_files_that_are_no_tokenizers_are_refused(keys, invitation):
    sealed = seal(an_offer(files={"modeling_evil.py": b"import os"}), keys)
    with pytest.raises(DataError, match=r"got modeling_evil\.py"):
        open_offer(sealed, invitation)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text.replace('"format_version":1', '"format_version":2'),
        lambda text: text.replace('"rounds":3', '"rounds":"three"'),
        lambda text: "[]",
        lambda text: text[:-1],
    ],
)
def test_a_host_of_another_release_is_told_apart_from_a_forged_one(keys, invitation, spoil):
    text = spoil(seal(an_offer(), keys).text)
    sealed = dataclasses.replace(seal(an_offer(), keys), text=text, signature=keys.sign(text.encode()))
    with pytest.raises(DataError, match="need the same release"):
        open_offer(sealed, invitation)
