"""A host and its volunteers without a transport: offers, updates, signed folders, kills; all else is the real part."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fanformer.cli.main import main
from fanformer.errors import CheckpointError, ConfigError, DataError
from fanformer.loading import load
from fanformer.training.events import silent
from fanformer.training.folder import read_records
from fanformer.training.run import train

pytest.importorskip("cryptography", reason="needs the extra `community` (cryptography)")

from fanformer.community.aggregation import Verdict
from fanformer.community.hosted_run import _credits, begun, gone_on_with, refuse_without_effect
from fanformer.community.identity import read_public_key
from fanformer.community.invitation import Invitation, key_fingerprint
from fanformer.community.plan import Plan
from fanformer.community.reception import Reception
from fanformer.community.records import RoundRecord
from fanformer.community.release import verify_run
from fanformer.community.updates import Source, weights_checksum
from fanformer.community.volunteering import Own, Volunteer, _builder
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

    def __init__(self, folder, data, names=("alice", "bob"), plan=PLAN, **fields):
        self.folder, self.data, self.names, self.plan, self.fields = folder, str(data), names, plan, fields
        self.clock, self.notes = Clock(), []
        self.stack = contextlib.ExitStack()

    def config(self, **fields):
        known = {"compile": "off", "threads": 1, "precision": "float32", "sample_prompt": None, "eval_tokens": 512}
        return tiny_run(self.data, self.folder / "run", **{**known, "keep_last": 9, **self.fields, **fields})

    def open(self):
        run = self.stack.enter_context(begun(self.config(), self.plan, ["127.0.0.1"], silent))
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
        answer = volunteer.answer(sealed, self.reception.base(name))
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
    assert [one.problem for one in verify_run(run)] == [""] * (ROUNDS + 1)  # and the run's own folder
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
    assert {one.problem for one in verify_run(killed)} == {""}


def test_figures_that_a_kill_kept_from_the_disk_are_written_when_the_host_goes_on(meeting):
    alice = meeting.volunteer("alice")
    for _ in range(2):
        meeting.give("alice", alice)
        assert meeting.reception.close_if_due().accepted
    metrics = meeting.folder / "run" / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    killed = meeting.folder / "killed"
    shutil.copytree(meeting.folder / "run", killed, ignore=shutil.ignore_patterns(".lock"))
    (killed / "metrics.jsonl").write_text(lines[0] + "\n")
    with gone_on_with(killed, silent) as hosted:
        hosted.open_host(0.0, silent)
    assert (killed / "metrics.jsonl").read_text().splitlines() == lines


def test_a_host_without_an_intact_round_does_not_begin_anew_in_silence(meeting):
    alice = meeting.volunteer("alice")
    meeting.give("alice", alice)
    assert meeting.reception.close_if_due().accepted
    damaged = meeting.folder / "damaged"
    shutil.copytree(meeting.folder / "run", damaged, ignore=shutil.ignore_patterns(".lock"))
    (damaged / "checkpoint-1" / "model.safetensors").write_bytes(b"damaged")
    before = (damaged / "rounds.jsonl").read_bytes()
    with gone_on_with(damaged, silent) as hosted, pytest.raises(CheckpointError, match="no intact round any more, 1 w"):
        hosted.open_host(0.0, silent)
    assert (damaged / "rounds.jsonl").read_bytes() == before


def test_a_volunteer_answers_the_same_offer_with_the_same_update_also_after_a_kill(meeting):
    alice = meeting.volunteer("alice")
    sealed = meeting.reception.offer("alice")
    first = alice.answer(sealed, meeting.reception.base())
    assert alice.answer(sealed, meeting.reception.base()).payload == first.payload
    alice.__exit__(None, None, None)
    other = meeting.volunteer("alice")
    assert other.answer(sealed, meeting.reception.base()).payload == first.payload
    assert meeting.reception.take("alice", first.payload) == ""


def test_an_update_of_one_member_is_not_sent_by_another_of_the_same_folder(meeting):
    """A volunteer joins with another key in the middle of a round: the host refuses what bears the first one's name."""
    offers, alice = meeting.offer("alice", "bob"), meeting.volunteer("alice")
    first = alice.answer(offers["alice"], meeting.reception.base())
    alice.__exit__(None, None, None)
    second = meeting.volunteer("alice").answer(offers["bob"], meeting.reception.base())
    assert meeting.reception.take("bob", second.payload) == ""
    assert meeting.reception.take("alice", first.payload) == ""


def test_a_round_does_not_wait_for_whose_key_was_taken_away_while_no_host_was_at_work(meeting):
    offers = meeting.offer("alice", "bob")
    meeting.give("alice", meeting.volunteer("alice"), offers["alice"])
    reception = Reception(meeting.hosted, meeting.host, meeting.clock, ["alice"])
    assert reception.close_if_due() is None
    reception.connected(["alice"])
    assert reception.close_if_due().accepted


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


def test_a_run_goes_on_from_a_saved_model_whatever_is_named_and_from_where(tmp_path, corpus, monkeypatch):  # noqa: F811
    """The model is named from the folder of the command; what keeps the rounds works in another, also after a kill.

    Its vocabulary is larger than its tokenizer needs: members build the run's model all the same.
    """
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    tiny = tiny_run(corpus, "first", max_steps=1, compile="off", threads=1)
    train(tiny)
    model, _ = load("first", "cpu", "float32")
    model.resize_token_embeddings(384)
    model.save_pretrained("first")
    met = Meeting(tmp_path, corpus, names=("alice",), init_from="first").open()
    met.close()
    monkeypatch.chdir(tmp_path / "there")
    with gone_on_with(tmp_path / "run", silent) as hosted:
        host = hosted.open_host(0.0, silent)
        assert torch.equal(host.weights["model.norm.weight"], model.state_dict()["model.norm.weight"].float())
        assert host.weights["model.embed_tokens.weight"].shape[0] == 384
        met.reception = Reception(hosted, host, met.clock, ["alice"])
        assert met.give("alice", met.volunteer("alice")) == ""
        met.close()


def test_a_member_may_come_back_with_other_data(meeting, tmp_path):
    first = meeting.volunteer("alice")
    meeting.give("alice", first)
    assert meeting.reception.close_if_due().accepted
    first.__exit__(None, None, None)
    own = tmp_path / "letters.txt"
    own.write_text("words of somebody else, number one and two and three.\n" * 400)
    meeting.give("alice", meeting.volunteer("alice", str(own), licence="CC-BY-4.0"))
    assert meeting.reception.close_if_due().accepted
    [member] = [one for one in meeting.reception.status("training")["members"] if one["name"] == "alice"]
    assert member["sources"] == {"corpus.txt (unknown)": 128, "letters.txt (CC-BY-4.0)": 128}


def test_a_member_goes_on_from_another_folder_with_the_data_that_it_has(meeting, monkeypatch, tmp_path):
    monkeypatch.chdir(meeting.folder)
    settings = Own(meeting.data, device="cpu", precision="float32", compile="off")
    with Volunteer(meeting.invitation, Path("alice"), settings, meeting.note) as alice:
        meeting.give("alice", alice)
    assert meeting.reception.close_if_due().accepted
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    meeting.give("alice", meeting.volunteer("alice"))
    training = meeting.folder / "alice" / "training"
    assert [path.name for path in training.glob("data*")] == ["data"], "nothing was prepared a second time"


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
    longer = dataclasses.replace(PLAN, round_seconds=900.0, min_reports=2, gate_tolerance=0.2)
    with begun(meeting.config(), longer, ["127.0.0.1"], silent) as hosted:
        assert hosted.identifier == meeting.hosted.identifier
    with gone_on_with(meeting.folder / "run", silent) as hosted:
        assert (hosted.plan.round_seconds, hosted.plan.min_reports, hosted.plan.gate_tolerance) == (900.0, 2, 0.2)
    refused = pytest.raises(ConfigError, match="got the address elsewhere")
    with refused, begun(meeting.config(), PLAN, ["elsewhere"], silent):
        pass
    with begun(meeting.config(), PLAN, ["127.0.0.1"], silent) as hosted:
        assert hosted.identifier == meeting.hosted.identifier, "a refusal leaves a run that is there alone"


def test_a_first_host_that_is_refused_leaves_no_run_behind(tmp_path, corpus):  # noqa: F811
    plan = dataclasses.replace(PLAN, fragments=64)
    with pytest.raises(ConfigError, match="`fragments` must be at most the blocks of the model, got 64"):
        Meeting(tmp_path, corpus, plan=plan).open()
    assert not (tmp_path / "run").exists()
    Meeting(tmp_path, corpus).open().close()


def test_a_member_goes_on_with_a_plan_whose_times_are_others(meeting):
    alice = meeting.volunteer("alice")
    meeting.give("alice", alice)
    assert meeting.reception.close_if_due().accepted
    meeting.hosted.plan = meeting.host.plan = dataclasses.replace(meeting.hosted.plan, round_seconds=900.0)
    assert meeting.give("alice", alice) == ""
    assert alice._member.trainer.snapshot.optimizer == {}, "it was opened again"
    assert [one["round"] for one in read_records(meeting.folder / "alice" / "training")] == [0, 1]
    assert alice._member.run.checkpoint is not None, "and went on from what it had"


def test_with_fragments_a_member_receives_what_moved_alone_and_all_where_it_has_lost_the_rest(tmp_path, corpus):  # noqa: F811
    plan = dataclasses.replace(PLAN, rounds=4, fragments=2)
    met = Meeting(tmp_path, corpus, names=("alice",), plan=plan).open()
    alice, sizes = met.volunteer("alice"), []
    for _ in range(3):
        sizes.append(len(met.reception.base("alice")))
        met.give("alice", alice)
        assert met.reception.close_if_due().accepted
    assert max(sizes[1:]) < 0.8 * sizes[0]
    fresh = met.stack.enter_context(
        Volunteer(met.invitation, tmp_path / "again", Own(met.data, device="cpu", compile="off"), met.note)
    )  # the member's machine was set up anew
    sealed = met.reception.offer("alice")
    answer = fresh.answer(sealed, met.reception.base("alice"))
    assert "is missing" in answer.reason
    assert met.reception.excuse("alice", answer.reason)
    assert met.give("alice", fresh) == ""
    assert not met.reception.excuse("alice", "once is enough")
    met.close()


def test_a_rejected_round_sends_no_weights_again(meeting):
    alice = meeting.volunteer("alice")
    meeting.hosted.measure = lambda weights: float("nan")
    meeting.give("alice", alice)
    assert not meeting.reception.close_if_due().accepted
    assert len(meeting.reception.base("alice")) < 1000
    assert meeting.give("alice", alice) == ""


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
        assert [one.problem for one in verify_run(disk / "run")] == ["", ""]
    finally:
        met.close()


def test_fields_of_a_training_that_say_nothing_of_rounds_are_refused():
    refuse_without_effect(["learning_rate", "eval_tokens", "keep_last", "model.hidden_size"])
    for name, words in (
        ("max_steps", "--rounds and --round-steps are its length"),
        ("max_time", "--rounds and --round-steps are its length"),
        ("save_steps", "every accepted round is a checkpoint"),
        ("eval_steps", "it is measured after every round"),
        ("overwrite", "--output-dir names another"),
        ("push_to_hub", "hf upload"),
    ):
        with pytest.raises(ConfigError, match=f"`{name}` has no effect on a community run: .*{words}"):
            refuse_without_effect(["seed", name])


def test_a_host_cannot_name_code_for_the_model():
    """transformers takes a kernel's name on the hub beside a model's fields, and would run what is there."""
    with pytest.raises(DataError, match="has the field 'attn_implementation', which a FANformer has not"):
        _builder({"hidden_size": 64, "attn_implementation": "somebody/kernel"})
    with pytest.raises(DataError, match="which a FANformer has not"):
        _builder("somebody/model")


def test_what_a_member_says_of_its_data_is_no_markup_of_the_card():
    source = Source("[a](https://b) | 9 | <b>", "CC0", 10)
    verdict = Verdict("alice", True, "", tokens=10, sources=(source,))
    record = RoundRecord(0, True, "", 1, "", "", 10, 3.0, 0, 0.0, (verdict,))
    row = _credits([record]).splitlines()[-1]
    assert row == "| alice | 10 | 1 | 0 | \\[a\\](https://b) \\| 9 \\| \\<b\\> (CC0): 10 |"


def test_float16_bases_are_the_folders_weights(tmp_path, corpus):  # noqa: F811
    met = Meeting(tmp_path, corpus, names=("alice",))
    with begun(met.config(), Plan(1, 2, 2, 32, base_dtype="float16"), ["127.0.0.1"], silent) as hosted:
        host = hosted.open_host(0.0, silent)
        for tensor in host.weights.values():
            torch.testing.assert_close(tensor.half().float(), tensor, rtol=0, atol=0)
