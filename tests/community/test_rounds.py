"""The rounds of a host: shares, reports, ends; and that no accepted round is lost or applied twice, whatever dies."""

import json
import random
import zlib
from dataclasses import asdict, replace

import pytest
import torch

from fanformer.community.aggregation import Defence
from fanformer.community.folder import OPEN_FILE
from fanformer.community.outer import OuterSettings, outer_begin, outer_step
from fanformer.community.plan import Plan, Task
from fanformer.community.records import RoundLog, contributions
from fanformer.community.rounds import Host, HostState
from fanformer.community.updates import Limits, Source, Update, decode_update, encode_update, weights_checksum
from fanformer.errors import CheckpointError, ConfigError, DataError

SHAPES = {"model.layers.0.w": (4, 3), "model.layers.1.w": (4, 3), "head": (5,)}
PLAN = Plan(rounds=3, round_steps=10, batch_size=2, sequence_length=8, round_seconds=100.0)


def first_state():
    return HostState(0, outer_begin({name: torch.ones(shape) for name, shape in SHAPES.items()}))


@pytest.fixture
def host(tmp_path):
    """Make a host in a folder; states that it publishes are kept in `published`."""

    def make(plan=PLAN, state=None, now=0.0, **fields):
        return Host(tmp_path / "host", replace(plan, **fields), state or first_state(), now)

    return make


def report(host, task, member, seed=None, **fields):
    """A proper payload for a task, all of it done."""
    seed = zlib.crc32(f"{task.round} {member}".encode()) if seed is None else seed
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in host.like.items()}
    known = {"tokens": 160, "inner_loss": 3.0, "sources": (Source("text", "CC0", 160),)}
    return encode_update(Update(tensors, task.round, task.base, member, **{**known, **fields}))


def publish_into(states):
    return lambda state, record: states.append(state)


def do_round(host, members=("anna", "bert"), now=0.0, states=None, measure=None):
    tasks = {member: host.join(member, now) for member in members}
    answers = [host.receive(member, report(host, task, member), now) for member, task in tasks.items()]
    assert answers == [""] * len(members)
    return host.close(now + 1, measure, publish_into([] if states is None else states))


def test_shares_do_not_overlap_and_are_the_same_when_asked_for_again(host):
    one = host()
    anna, bert = one.join("anna", 0.0), one.join("bert", 10.0)
    assert (anna.place, bert.place, anna.steps, anna.first_step) == (0, 20, 10, 0)
    assert (anna.seconds, bert.seconds) == (100.0, 90.0)
    assert one.join("anna", 30.0) == replace(anna, seconds=70.0)
    assert one.join("carl", 96.0) is None  # too late for a share to be worth while
    assert Task(**json.loads(json.dumps(asdict(anna)))) == anna


def test_a_round_ends_when_all_have_reported(host):
    one, states = host(), []
    tasks = {member: one.join(member, 0.0) for member in ("anna", "bert")}
    one.receive("anna", report(one, tasks["anna"], "anna"), 5.0)
    assert not one.is_due(6.0)
    assert one.join("anna", 6.0) is None  # it has reported
    one.receive("bert", report(one, tasks["bert"], "bert"), 7.0)
    assert one.is_due(7.0)
    assert one.join("carl", 7.0) is None  # the round is about to end
    record = one.close(8.0, None, publish_into(states))
    assert (record.accepted, record.number, record.tokens, record.seconds) == (True, 1, 320, 8.0)
    assert [state.number for state in states] == [1]
    assert one.checksum == record.result == weights_checksum(states[0].weights("float32"))
    assert one.join("anna", 9.0).place == 40  # rows that nobody has read


def test_a_round_ends_by_time_without_the_slow_the_frozen_and_the_gone(host):
    one = host()
    tasks = {member: one.join(member, 0.0) for member in ("anna", "bert", "carl")}
    one.receive("anna", report(one, tasks["anna"], "anna"), 5.0)
    one.leave("carl")
    assert not one.is_due(99.0)
    assert one.is_due(100.0)
    record = one.close(100.0, None, publish_into([]))
    assert [verdict.member for verdict in record.verdicts] == ["anna"]
    late = one.receive("bert", report(one, tasks["bert"], "bert"), 101.0)
    assert late == "late: round 0 is not open, round 1 is"
    assert one.join("bert", 102.0).round == 1


def test_a_member_that_left_is_not_waited_for_but_counts_where_it_reports(host):
    one = host()
    tasks = {member: one.join(member, 0.0) for member in ("anna", "bert")}
    one.leave("bert")
    one.receive("anna", report(one, tasks["anna"], "anna"), 1.0)
    assert one.is_due(1.0)
    assert one.receive("bert", report(one, tasks["bert"], "bert"), 1.0) == ""
    assert len(one.close(2.0, None, publish_into([])).verdicts) == 2


def test_a_round_waits_for_as_many_reports_as_it_needs_and_its_time_begins_anew(host):
    one = host(min_reports=2)
    task = one.join("anna", 0.0)
    one.receive("anna", report(one, task, "anna"), 1.0)
    assert not one.is_due(500.0)
    assert (one.is_overtime(99.0), one.is_overtime(500.0)) == (False, True)
    assert one.join("bert", 500.0).seconds == 100.0
    assert not one.is_due(550.0)
    assert not one.is_overtime(550.0)


def test_the_same_report_again_gets_the_same_answer_and_counts_once(host):
    one = host()
    tasks = {member: one.join(member, 0.0) for member in ("anna", "bert")}
    payload = report(one, tasks["anna"], "anna")
    assert [one.receive("anna", payload, 1.0) for _ in range(3)] == [""] * 3
    another = one.receive("anna", report(one, tasks["anna"], "anna", seed=5), 1.0)
    assert another == "it has reported in this round already"
    one.receive("bert", report(one, tasks["bert"], "bert"), 1.0)
    record = one.close(2.0, None, publish_into([]))
    assert sorted(verdict.member for verdict in record.verdicts if verdict.counted) == ["anna", "bert"]
    assert one.receive("anna", payload, 3.0) == ""  # it did not hear the answer
    assert one.reported == ()


def test_reports_that_are_not_for_this_round_this_base_and_this_member_are_refused_with_a_reason(host):
    one = host()
    tasks = {member: one.join(member, 0.0) for member in ("anna", "bert")}
    own = report(one, tasks["anna"], "anna")

    def answer(payload, member="anna"):
        return one.receive(member, payload, 1.0)

    assert answer(own, "carl") == "no share of round 0 was handed out to 'carl': join first."
    assert answer(own, "bert") == "an update of 'bert' must bear its name, got 'anna'."
    assert answer(report(one, replace(tasks["anna"], base="0" * 64), "anna")).endswith(
        "got 0000000000000000: it is stale."
    )
    assert answer(report(one, replace(tasks["anna"], round=7), "anna")) == "late: round 7 is not open, round 0 is"
    assert answer(report(one, tasks["anna"], "anna", tokens=161)).startswith(
        "`tokens` of an update must be at most 160"
    )
    assert answer(own + bytes(10**6)).startswith("a payload must have at most ")
    assert answer(b"").startswith("a payload must be a safetensors file")
    assert answer(own) == ""
    bert = report(one, tasks["bert"], "bert", seed=1)
    copied = encode_update(replace_member(one, own, "bert"))
    assert answer(copied, "bert") == "replayed: an update of these very numbers was sent before"
    assert answer(bert, "bert") == ""
    record = one.close(2.0, None, publish_into([]))
    refused = [(verdict.member, verdict.counted) for verdict in record.verdicts if not verdict.counted]
    assert [member for member, _ in refused].count("anna") == 3  # of five, so that nobody can fill the disk
    assert record.bytes_received > 10**6
    later = one.join("anna", 3.0)
    assert answer(relabelled_report(one, own, later)) == "replayed: an update of these very numbers was sent before"


def replace_member(host, payload, member):
    return replace(decode_update(payload, host.like, Limits(1000)), member=member)


def relabelled_report(host, payload, task):
    update = replace(decode_update(payload, host.like, Limits(1000)), round=task.round, base=task.base)
    fresh, begin = encode_update(update), 8 + int.from_bytes(payload[:8], "little")
    return fresh[: 8 + int.from_bytes(fresh[:8], "little")] + payload[begin:]


def test_who_sends_only_what_is_refused_stalls_nobody(host):
    one = host()
    task = one.join("anna", 0.0)
    one.join("mallory", 0.0)
    one.receive("mallory", b"no update", 1.0)
    one.receive("anna", report(one, task, "anna"), 1.0)
    assert one.is_due(1.0)


def test_a_round_that_makes_the_loss_worse_is_rejected_and_the_base_stays(host):
    one, states, losses = host(), [], iter([9.0, 3.0, 4.0, 3.1])  # the first is that of what the run began with
    records = []
    for number in range(3):
        records.append(do_round(one, now=10.0 * number, states=states, measure=lambda weights: next(losses)))
    assert [record.accepted for record in records] == [True, False, True]
    assert records[1].reason == "the held-out loss 4.0000 is too far above 3.0000, the lowest so far"
    assert records[1].result == records[1].base == records[0].result
    assert [state.number for state in states] == [1, 2]
    assert (one.state.best_loss, one.state.number) == (3.0, 2)
    assert records[2].round == 2
    assert one.join("anna", 90.0).first_step == 20  # the schedule counts accepted rounds


def test_the_first_round_is_judged_by_what_the_run_began_with(host):
    """A run that goes on from a good model is not at the mercy of its first round."""
    one, states, begun = host(), [], weights_checksum(first_state().weights("float32"))

    def measure(weights):
        return 2.0 if weights_checksum(weights) == begun else 6.0

    record = do_round(one, states=states, measure=measure)
    assert (record.accepted, record.reason) == (
        False,
        "the held-out loss 6.0000 is too far above 2.0000, the lowest so far",
    )
    assert (states, one.checksum, one.state.best_loss) == ([], begun, 2.0)


def test_a_loss_that_is_no_number_and_weights_without_room_in_their_type_are_rejected(host):
    one = host(base_dtype="float16", outer=OuterSettings(1.0, 0.0))
    record = do_round(one, measure=lambda weights: float("nan"))
    assert (record.accepted, record.reason, record.held_out_loss is None) == (
        False,
        "the held-out loss is not finite",
        True,
    )
    task = one.join("anna", 0.0)
    huge = Update(
        {name: torch.full(shape, 1e6) for name, shape in SHAPES.items()}, task.round, task.base, "anna", 1, 3.0
    )
    one.receive("anna", encode_update(huge), 1.0)
    record = one.close(2.0, None, publish_into([]))
    assert not record.accepted
    assert "must hold finite numbers of float16" in record.reason


def test_members_get_the_base_as_its_type_holds_it_and_the_master_keeps_all_digits(host):
    one, states = host(base_dtype="float16"), []
    do_round(one, states=states)
    master = states[0].outer.weights["head"]
    assert torch.equal(one.weights["head"], master.half().float())
    assert not torch.equal(one.weights["head"], master)


def test_the_step_is_the_outer_step_on_the_mean_of_the_reports(host):
    one, states = host(), []
    tasks = {member: one.join(member, 0.0) for member in ("anna", "bert")}
    payloads = {member: report(one, task, member) for member, task in tasks.items()}
    tensors = [decode_update(payload, SHAPES, Limits(1000)).tensors for payload in payloads.values()]
    mean = {name: (tensors[0][name] + tensors[1][name]) / 2 for name in SHAPES}
    for member, payload in payloads.items():
        one.receive(member, payload, 1.0)
    one.close(2.0, None, publish_into(states))
    expected = outer_step(first_state().outer, mean, PLAN.outer)
    for name in SHAPES:
        torch.testing.assert_close(states[0].outer.weights[name], expected.weights[name])


def test_with_fragments_every_round_moves_the_next_one(host):
    one, moved = host(fragments=2), []
    for number in range(3):
        before = one.weights
        do_round(one, now=float(number))
        moved.append({name for name in SHAPES if not torch.equal(before[name], one.weights[name])})
    assert moved[0] == moved[2]
    assert moved[0] | moved[1] == set(SHAPES)
    assert not moved[0] & moved[1]
    assert one.finished
    assert one.join("anna", 9.0) is None


def test_a_host_goes_on_with_the_round_its_shares_and_its_reports(host, tmp_path):
    one = host()
    tasks = {member: one.join(member, 0.0) for member in ("anna", "bert", "carl")}
    payload = report(one, tasks["anna"], "anna")
    one.receive("anna", payload, 1.0)
    again = host(now=1000.0)  # another process, another clock
    assert again.reported == ("anna",)
    assert again.join("bert", 1000.0) == replace(tasks["bert"], seconds=100.0)
    assert again.join("dora", 1000.0).place == 60
    assert again.receive("anna", payload, 1001.0) == ""
    assert again.receive("carl", report(again, tasks["carl"], "carl"), 1001.0) == ""


def test_reports_of_a_round_that_is_over_are_not_taken_up(host):
    one, states = host(), []
    do_round(one, states=states)
    again = host(state=states[-1])
    assert (again.reported, again.round, len(again.records)) == ((), 1, 1)
    assert again.join("anna", 0.0).place == 40


@pytest.mark.parametrize("fails", ["before", "after"], ids=["publishing fails", "killed after publishing"])
def test_a_round_is_applied_once_whenever_its_publication_ends(host, fails):
    one, states = host(), []

    def publish(state, record):
        if fails == "after":
            states.append(state)
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        do_round_with(one, publish)
    if fails == "before":
        assert one.state.number == 0
        record = one.close(3.0, None, publish_into(states))  # the same host goes on
        assert (record.number, one.state.number, len(states)) == (1, 1, 1)
        return
    again = host(state=states[-1])
    assert (again.state.number, again.round, again.reported) == (1, 1, ())
    assert [record.number for record in again.records] == [1]


def do_round_with(host, publish):
    task = host.join("anna", 0.0)
    host.receive("anna", report(host, task, "anna"), 1.0)
    return host.close(2.0, None, publish)


def test_a_full_disk_after_publishing_applies_no_round_twice(host, monkeypatch):
    one, states = host(), []

    def no_room(self, record):
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(RoundLog, "append", no_room)
        with pytest.raises(OSError, match="no space left"):
            do_round_with(one, publish_into(states))
    assert (one.state.number, one.round, one.reported) == (1, 1, ())
    assert [record.number for record in host(state=states[-1]).records] == [1]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.ci) for seed in range(1, 6))])
def test_no_accepted_round_is_lost_or_applied_twice_however_often_the_host_is_killed(host, tmp_path, monkeypatch, seed):
    chance, plan = random.Random(seed), replace(PLAN, rounds=12)
    states, one, kills = [first_state()], host(plan, first_state()), 0

    class Killed(BaseException):
        """The process ends here."""

    def publish(state, record):
        if chance.random() < 0.2:
            raise Killed
        state.save(tmp_path)
        states.append(HostState.load(tmp_path))
        if chance.random() < 0.2:
            raise Killed

    append, write_open = RoundLog.append, Host._write_open

    def dies(real):
        def wrapped(self, *arguments):
            if chance.random() < 0.1:
                raise Killed
            real(self, *arguments)
            if chance.random() < 0.1:
                raise Killed

        return wrapped

    monkeypatch.setattr(RoundLog, "append", dies(append))
    monkeypatch.setattr(Host, "_write_open", dies(write_open))
    now = 0.0
    while not one.finished:
        now += 1.0
        try:
            for member in ("anna", "bert"):
                task = one.join(member, now)
                if task is not None:
                    assert one.receive(member, report(one, task, member), now) == ""
            if one.is_due(now):
                loss = chance.choice((3.0, 3.0, 9.0))
                one.close(now, lambda weights, loss=loss: loss, publish)
        except Killed:
            kills += 1
            one = reopened(host, plan, states[-1], now)
    assert kills > 3
    assert [state.number for state in states] == list(range(13))
    accepted = [record for record in one.records if record.accepted]
    assert [record.number for record in accepted] == list(range(1, 13))
    assert [record.base for record in accepted[1:]] == [record.result for record in accepted[:-1]]
    assert accepted[-1].result == weights_checksum(states[-1].weights("float32"))
    rounds = [record.round for record in one.records]
    assert rounds == sorted(set(rounds))


def reopened(host, plan, state, now):
    """A host again, also where it is killed as it begins."""
    while True:
        try:
            return host(plan, state, now)
        except BaseException as error:
            if type(error).__name__ != "Killed":
                raise


def test_a_half_written_line_and_rounds_beyond_the_state_are_dropped(host, tmp_path):
    one, states = host(), []
    for number in range(2):
        do_round(one, now=float(number), states=states)
    path = tmp_path / "host" / "rounds.jsonl"
    path.write_text(path.read_text() + '{"round": 2, "acc')
    again = host(state=states[0])  # the folder of round 1 was damaged
    assert [record.number for record in again.records] == [1]
    assert again.round == 2  # no number is used twice
    assert len(path.read_text().splitlines()) == 1
    do_round(again, now=5.0, states=states)
    assert [record.round for record in RoundLog(tmp_path / "host").records] == [0, 2]
    path.write_text("no record\n")
    with pytest.raises(CheckpointError, match=r"rounds.jsonl:1 must be the record of a round \(JSONDecodeError\)"):
        host(state=states[0])


def test_no_number_is_used_twice_by_a_host_that_went_back_and_was_killed(host):
    """A member takes no round twice: a host that began anew with an old number would wait for it for ever."""
    one, states = host(), []
    for number in range(3):
        do_round(one, now=float(number), states=states)
    again = host(state=states[0])  # the folders of the later rounds were damaged
    assert again.round == 3
    once_more = host(state=states[0])  # killed before a share was handed out: the log forgot those rounds already
    assert once_more.round == 3
    do_round(once_more, now=9.0, states=states)
    assert host(state=states[-1]).round == 4


def test_damage_is_named(host, tmp_path):
    host().join("anna", 0.0)
    (tmp_path / "host" / OPEN_FILE).write_text("{}")
    with pytest.raises(CheckpointError, match=r"open.json is damaged \(KeyError\): delete it"):
        host()
    with pytest.raises(CheckpointError, match=r"cannot read .*host_state.json.*: go back to an earlier round"):
        HostState.load(tmp_path)


def test_contributions_are_counted_by_member_and_source(host):
    one = host()
    do_round(one)
    one.join("mallory", 1.0)
    one.receive("mallory", b"", 1.0)
    do_round(one, members=("anna",), now=2.0)
    found = contributions(one.records)
    assert found["anna"] == {"tokens": 320, "rounds": 2, "refused": 0, "sources": {"text (CC0)": 320}}
    assert found["mallory"] == {"tokens": 0, "rounds": 0, "refused": 1, "sources": {}}


def test_a_plan_is_plain_json_both_ways_and_checked():
    plan = replace(PLAN, defence=Defence(method="trimmed-mean"), outer=OuterSettings(0.5, 0.8))
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    with pytest.raises(ConfigError, match="`round_step` is not a field of a plan: did you mean `round_steps`"):
        Plan.from_dict({**plan.to_dict(), "round_step": 3})
    with pytest.raises(ConfigError, match="a plan must have all of its fields with their types"):
        Plan.from_dict({"rounds": 3})
    for fields, words in (
        ({"rounds": 0}, "`rounds` must be a whole number from 1 on, got 0"),
        ({"bits": 5}, "`bits` must be 8 or 4, got 5"),
        ({"base_dtype": "int8"}, "`base_dtype` must be float32 or float16, got 'int8'"),
        ({"round_seconds": 0.0}, "`round_seconds` must be above 0, got 0.0"),
        ({"gate_tolerance": -1.0}, "`gate_tolerance` must be a share from 0 on, got -1.0"),
    ):
        with pytest.raises(ConfigError, match=words):
            replace(PLAN, **fields)


def test_a_name_that_cannot_be_shown_gets_no_share(host):
    with pytest.raises(DataError, match="a member's name must be printable"):
        host().join("an\nna", 0.0)
