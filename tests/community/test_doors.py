"""A host and its volunteers without a transport: offers, updates, signed folders, kills; all else is the real part."""

import contextlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from fanformer.cli.main import main
from fanformer.errors import CheckpointError, ConfigError
from fanformer.training.events import silent

pytest.importorskip("cryptography", reason="needs the extra `community` (cryptography)")

from fanformer.community.hosted_run import begun, gone_on_with
from fanformer.community.identity import read_public_key
from fanformer.community.invitation import Invitation, key_fingerprint
from fanformer.community.plan import Plan
from fanformer.community.reception import Reception
from fanformer.community.release import verify_run
from fanformer.community.updates import weights_checksum
from fanformer.community.volunteering import Own, Volunteer
from tests.training.conftest import corpus, tiny_run  # noqa: F401

pytestmark = pytest.mark.ci

ROUNDS = 3
PLAN = Plan(rounds=ROUNDS, round_steps=2, batch_size=2, sequence_length=32)


class Clock:
    """A clock that stands still until it is moved."""

    now = 0.0

    def __call__(self):
        return self.now


class Meeting:
    """A host, open in its folder, and volunteers, all in this process."""

    def __init__(self, folder, data, names=("alice", "bob"), **changes):
        self.folder, self.data, self.names, self.changes = folder, str(data), names, changes
        self.clock, self.notes = Clock(), []
        self.stack = contextlib.ExitStack()

    def config(self, **fields):
        known = {"compile": "off", "threads": 1, "precision": "float32", "sample_prompt": None, "eval_tokens": 512}
        return tiny_run(self.data, self.folder / "run", **{**known, "keep_last": 9, **fields})

    def open(self):
        run = self.stack.enter_context(begun(self.config(), PLAN, ["127.0.0.1"], silent))
        self.hosted, self.host = run, run.open_host(self.clock(), silent)
        self.reception = Reception(run, self.host, self.clock, self.names)
        public = read_public_key(run.folder).text
        self.invitation = Invitation("127.0.0.1", 1, "0" * 32, key_fingerprint(public))
        return self

    def note(self, event):
        if event.kind == "note":
            self.notes.append(event.text)

    def volunteer(self, name, data=None, **own):
        settings = Own(data or self.data, device="cpu", precision="float32", compile="off", **own)
        return self.stack.enter_context(Volunteer(self.invitation, self.folder / name, settings, self.note))

    def offer(self, *names):
        """Offer everyone a share before anyone reports, as the loop of a door does."""
        return {name: self.reception.offer(name) for name in names}

    def give(self, name, volunteer, sealed=None):
        """Let a volunteer do its share of the open round, and return why its report was refused."""
        sealed = sealed or self.reception.offer(name)
        answer = volunteer.answer(sealed, self.reception.base())
        assert answer.payload is not None, answer.reason
        return self.reception.take(name, answer.payload)

    def close(self):
        self.stack.close()


@pytest.fixture
def meeting(tmp_path, corpus):  # noqa: F811
    met = Meeting(tmp_path, corpus).open()
    yield met
    met.close()


def accepted(folder):
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    return [record for record in lines if record["accepted"]]


def test_a_run_ends_in_signed_folders_that_generate_and_say_who_made_them(meeting, capsys):
    alice, bob = meeting.volunteer("alice", licence="CC0-1.0"), meeting.volunteer("bob")
    while not meeting.reception.finished:
        offers = meeting.offer("alice", "bob")
        assert meeting.give("alice", alice, offers["alice"]) == ""
        assert meeting.give("bob", bob, offers["bob"]) == ""
        record = meeting.reception.close_if_due()
        assert record is not None
        assert record.accepted, record.reason
    run = meeting.folder / "run"
    assert not [note for note in meeting.notes if "not those that the run shares out" in note]
    assert alice.answer(meeting.reception.farewell("alice"), None).final
    meeting.close()
    records = accepted(run)
    assert [record["number"] for record in records] == [1, 2, 3]
    assert [one["base"] for one in records[1:]] == [one["result"] for one in records[:-1]]
    for record in records:
        weights = load_file(run / f"checkpoint-{record['number']}" / "model.safetensors")
        assert weights_checksum(weights) == record["result"]
    assert [one.problem for one in verify_run(run)] == [""] * ROUNDS
    card = (run / "README.md").read_text()
    assert "| alice | 384 | 3 | 0 |" in card
    assert "(CC0-1.0)" in card
    assert main(["generate", str(run), "a line", "--max-length", "3", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("a line")
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [one["tokens"] for one in metrics] == [256, 512, 768]
    assert all(one["val_loss"] > 0 and one["loss"] > 0 for one in metrics)
    assert (run / "loss.png").exists()


def test_a_host_that_is_killed_goes_on_from_its_last_round_and_loses_no_report(meeting):
    """The folder is copied in the middle of a round, as a kill would leave it, and the copy goes on."""
    alice, bob = meeting.volunteer("alice"), meeting.volunteer("bob")
    offers = meeting.offer("alice", "bob")
    meeting.give("alice", alice, offers["alice"])
    meeting.give("bob", bob, offers["bob"])
    assert meeting.reception.close_if_due().accepted
    offers = meeting.offer("alice", "bob")
    meeting.give("alice", alice, offers["alice"])
    killed = meeting.folder / "killed"
    shutil.copytree(meeting.folder / "run", killed, ignore=shutil.ignore_patterns(".lock"))
    with gone_on_with(killed, silent) as hosted:
        host = hosted.open_host(0.0, silent)
        reception = Reception(hosted, host, meeting.clock, ["alice", "bob"])
        assert host.state.number == 1
        assert host.reported == ("alice",)
        again = reception.offer("bob")
        assert json.loads(again.text)["task"] == json.loads(offers["bob"].text)["task"]
        answer = bob.answer(again, reception.base())
        assert reception.take("bob", answer.payload) == ""
        assert reception.close_if_due().accepted
    assert [record["number"] for record in accepted(killed)] == [1, 2]
    assert verify_run(killed)[-1].problem == ""


def test_a_volunteer_answers_the_same_offer_with_the_same_update_also_after_a_kill(meeting):
    alice = meeting.volunteer("alice")
    sealed = meeting.reception.offer("alice")
    first = alice.answer(sealed, meeting.reception.base())
    assert alice.answer(sealed, meeting.reception.base()).payload == first.payload
    alice.__exit__(None, None, None)
    other = meeting.volunteer("alice")
    assert other.answer(sealed, meeting.reception.base()).payload == first.payload
    assert meeting.reception.take("alice", first.payload) == ""


def test_replayed_and_forged_offers_are_not_trained(meeting):
    alice, bob = meeting.volunteer("alice"), meeting.volunteer("bob")
    offers, old_base = meeting.offer("alice", "bob"), meeting.reception.base()
    old = offers["alice"]
    meeting.give("alice", alice, old)
    meeting.give("bob", bob, offers["bob"])
    assert meeting.reception.close_if_due().accepted
    offers = meeting.offer("alice", "bob")
    meeting.give("alice", alice, offers["alice"])
    replayed = alice.answer(old, old_base)
    assert replayed.payload is None
    assert "replayed" in replayed.reason
    offer = offers["bob"]
    spoilt = bytearray(meeting.reception.base())
    spoilt[-1] ^= 1
    answer = bob.answer(offer, bytes(spoilt))
    assert "a base must have the checksum" in answer.reason
    assert meeting.reception.take("bob", bob.answer(offer, meeting.reception.base()).payload) == ""


def test_a_host_cannot_name_a_file_of_a_members_machine(meeting):
    """The run's data are a path of the host's: a member without data of its own is told, and reads nothing."""
    alice = meeting.volunteer("alice")
    alice._own = Own(None, device="cpu")
    with pytest.raises(Exception, match="are files that only the host has: bring your own with --data"):
        alice.answer(meeting.reception.offer("alice"), meeting.reception.base())


def test_a_member_with_its_own_text_is_counted_under_its_name_and_licence(meeting, tmp_path):
    own = tmp_path / "letters.txt"
    own.write_text("words of somebody else, number one and two and three.\n" * 400)
    alice = meeting.volunteer("alice", str(own), licence="CC-BY-4.0")
    meeting.give("alice", alice)
    meeting.reception.connected(["alice"])
    meeting.reception.close_if_due()
    [member] = [one for one in meeting.reception.status("training")["members"] if one["name"] == "alice"]
    assert member["sources"] == {"letters.txt (CC-BY-4.0)": 128}


def test_refused_updates_are_recorded_and_change_nothing(meeting):
    alice, bob = meeting.volunteer("alice"), meeting.volunteer("bob")
    offers = meeting.offer("alice", "bob")
    honest = bob.answer(offers["bob"], meeting.reception.base()).payload
    assert "at most" in meeting.reception.take("bob", honest + bytes(len(honest) * 9))
    meeting.give("alice", alice, offers["alice"])
    record = meeting.reception.close_if_due()
    assert [one.counted for one in record.verdicts] == [True, False]
    status = meeting.reception.status("training")
    assert status["refusals"][0]["member"] == "bob"
    assert status["refusals"][0]["reason"]


def test_another_plan_or_recipe_is_refused_and_the_same_goes_on(meeting):
    meeting.close()
    for words, config, plan in (
        ("`round_steps` of a community run cannot change: it was 2, got 4", meeting.config(),
         Plan(rounds=ROUNDS, round_steps=4, batch_size=2, sequence_length=32)),
        ("`learning_rate` of a community run cannot change", meeting.config(learning_rate=0.5), PLAN),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=words), begun(config, plan, ["127.0.0.1"], silent):
            pass
    with begun(meeting.config(), PLAN, ["127.0.0.1"], silent) as hosted:
        assert hosted.identifier == meeting.hosted.identifier
    refused = pytest.raises(ConfigError, match="got the address elsewhere")
    with refused, begun(meeting.config(), PLAN, ["elsewhere"], silent):
        pass


def test_a_full_disk_ends_the_rounds_and_keeps_what_was_accepted(prepared, tmp_path, mount_disk):
    """The run lies on a small file system that fills up: one line, and with room the round is accepted after all."""
    disk = mount_disk("size=6m")
    met = Meeting(disk, prepared).open()
    try:
        alice = Volunteer(met.invitation, tmp_path / "far", Own(met.data, device="cpu", compile="off"), silent)
        with alice:
            met.reception.connected(["alice"])
            met.give("alice", alice)
            filler = disk / "filler"
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(1 << 14))
            with pytest.raises(CheckpointError, match="the disk has no room for"):
                met.reception.close_if_due()
            filler.unlink()
            assert met.reception.close_if_due().accepted
        assert [one.problem for one in verify_run(disk / "run")] == [""]
    finally:
        met.close()


def test_float16_bases_are_the_folders_weights(tmp_path, corpus):  # noqa: F811
    met = Meeting(tmp_path, corpus, names=("alice",))
    with begun(met.config(), Plan(1, 2, 2, 32, base_dtype="float16"), ["127.0.0.1"], silent) as hosted:
        host = hosted.open_host(0.0, silent)
        for tensor in host.weights.values():
            torch.testing.assert_close(tensor.half().float(), tensor, rtol=0, atol=0)
