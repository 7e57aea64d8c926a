"""A member's rounds: its own rows, the run's schedule, a state that outlives a kill, updates that say what was done."""

import hashlib
import json
import math
from dataclasses import replace

import pytest
import torch

from fanformer.community.hosting import first_state, last_state, measure_of, publisher
from fanformer.community.member import member_config
from fanformer.community.plan import Task
from fanformer.community.rounds import Host
from fanformer.community.updates import Limits, decode_update, fragments, weights_checksum
from fanformer.data.packing import rows_of_run
from fanformer.errors import ConfigError, DataError, DivergenceError
from fanformer.training.checkpoint import checkpoints
from fanformer.training.schedule import learning_rate_factor
from tests.community.conftest import ROUND_STEPS, ROUNDS
from tests.training.conftest import Notebook

LIMITS = Limits(10**6)


def weights_of(member):
    return {name: tensor.detach().clone() for name, tensor in member._tensors.items()}


def task_for(base, number=0, place=0, **fields):
    known = {"fragment": 0, "seconds": None, "steps": ROUND_STEPS, "first_step": number * ROUND_STEPS}
    return Task(round=number, base=weights_checksum(base), place=place, **{**known, **fields})


def taken_rows(member):
    """Let a member remember the rows that it trains on."""
    seen, real = [], member.trainer.rows.batch

    class Remembering(type(member.trainer.rows)):
        """Rows that say which were asked for."""

        def batch(self, indices):
            seen.extend(indices)
            return real(indices)

    member.trainer.rows.__class__ = Remembering
    return seen


@pytest.mark.ci
def test_an_update_is_the_base_minus_what_training_made_of_it_and_says_what_was_done(member):
    anna = member()
    base = weights_of(anna)
    update = decode_update(anna.take_part(task_for(base), base), anna.shapes, LIMITS)
    trained = weights_of(anna)
    for name, tensor in base.items():
        step = (tensor - trained[name]).abs().max() / 127
        torch.testing.assert_close(update.tensors[name], tensor - trained[name], rtol=0, atol=float(step) + 1e-9)
    assert any(not torch.equal(base[name], trained[name]) for name in base)
    tokens = ROUND_STEPS * 2 * 32
    assert (update.member, update.round, update.tokens, update.base) == ("anna", 0, tokens, weights_checksum(base))
    assert math.log(320) * 0.5 < update.inner_loss < math.log(320) * 1.5
    [source] = update.sources
    assert (source.name, source.licence, source.tokens) == ("data", "unknown", tokens)  # without the machine's folders


@pytest.mark.ci
def test_members_read_the_rows_of_their_shares_and_together_those_of_one_run(member):
    anna, bert = member("anna"), member("bert")
    base, rows = weights_of(anna), len(anna.run.corpus.rows)
    seen = [taken_rows(one) for one in (anna, bert)]
    for number in range(2):
        for place, one in enumerate((anna, bert)):
            one.take_part(task_for(base, number, place=6 * (2 * number + place)), base)
    assert not set(seen[0]) & set(seen[1])
    expected = rows_of_run(anna.run.config.seed, torch.arange(24).numpy(), rows)
    assert sorted(seen[0] + seen[1]) == sorted(expected.tolist())


@pytest.mark.ci
def test_the_schedule_spans_the_run_whatever_a_member_missed(member):
    anna = member()
    base = weights_of(anna)
    for number in (0, 3):
        anna.take_part(task_for(base, number), base)
        progress = (number * ROUND_STEPS + ROUND_STEPS - 0.5) / (ROUNDS * ROUND_STEPS)
        factor = learning_rate_factor(progress, anna.run.config.schedule)
        assert anna.trainer.learning_rate == pytest.approx(anna.run.config.optimizer.learning_rate * factor)


@pytest.mark.ci
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_member_that_was_killed_goes_on_as_if_it_had_not_been(member, tmp_path, optimizer):
    asked = {"optimizer": optimizer}
    straight, killed = member("anna", **asked), member("anna", folder=tmp_path / "killed", **asked)
    base = weights_of(straight)
    first = [one.take_part(task_for(base), base) for one in (straight, killed)]
    assert first[0] == first[1]
    killed.save()
    moved = {name: tensor + 0.01 for name, tensor in base.items()}
    expected = straight.take_part(task_for(moved, 1, place=6), moved)
    assert expected != killed.take_part(task_for(moved, 1, place=12), moved)  # of which nothing is kept
    member.leave()
    again = member("anna", folder=tmp_path / "killed", **asked)
    assert again.take_part(task_for(moved, 1, place=6), moved) == expected


@pytest.mark.ci
def test_a_member_goes_on_from_what_it_saved_last_though_that_is_of_an_earlier_step(member, tmp_path):
    """A host that did a round again, or went back, asks for steps that were done before."""
    anna = member(keep_last=1)
    base = weights_of(anna)
    for number in (2, 0):
        anna.take_part(task_for(base, number), base)
        saved = anna.save()
    assert saved.name == f"checkpoint-{ROUND_STEPS}"
    assert checkpoints(tmp_path / "anna") == [saved]
    member.leave()
    assert member(keep_last=1).run.checkpoint.name == saved.name


@pytest.mark.ci
def test_the_inner_optimizer_s_state_is_kept_over_rounds(member, tmp_path):
    warm, cold = member("anna"), member("anna", folder=tmp_path / "cold")
    base = weights_of(warm)
    warm.take_part(task_for(base), base)
    second = task_for(base, 1, place=6)
    updates = [decode_update(one.take_part(second, base), one.shapes, LIMITS) for one in (warm, cold)]
    assert updates[0].digest != updates[1].digest


@pytest.mark.ci
def test_a_share_ends_by_time_or_when_asked_and_is_told_as_far_as_it_was_done(member):
    anna = member()
    base = weights_of(anna)
    asked = []
    payload = anna.take_part(task_for(base), base, lambda steps: asked.append(steps) or steps >= 2)
    assert decode_update(payload, anna.shapes, LIMITS).tokens == 2 * 2 * 32
    assert asked == [0, 1, 2]
    with pytest.raises(DataError, match="a share of round 1 must have a step at least, got none"):
        anna.take_part(task_for(base, 1, seconds=0.0), base)
    slow = anna.take_part(task_for(base, 2, steps=10**6, seconds=0.5), base)
    assert 0 < decode_update(slow, anna.shapes, LIMITS).tokens < 10**6


@pytest.mark.ci
def test_with_fragments_what_was_not_sent_stays_and_what_the_host_moved_is_taken_over(member, plan):
    anna = member(the_plan=plan(fragments=2))
    parts = fragments(anna.shapes, 2)
    base = weights_of(anna)
    payload = anna.take_part(task_for(base), base)
    like = {name: anna.shapes[name] for name in parts[0]}
    assert sorted(decode_update(payload, like, LIMITS).tensors) == sorted(parts[0])
    trained = weights_of(anna)
    base = {name: tensor + 1 if name in parts[0] else tensor for name, tensor in base.items()}
    anna._take_over(base)
    now = weights_of(anna)
    assert all(torch.equal(now[name], base[name]) for name in parts[0])
    assert all(torch.equal(now[name], trained[name]) for name in parts[1])
    missed = {name: tensor + 1 for name, tensor in base.items()}  # rounds went on without it
    anna._take_over(missed)
    now = weights_of(anna)
    assert all(torch.equal(now[name], missed[name]) for name in missed)


@pytest.mark.ci
def test_a_member_with_other_data_goes_through_them_by_itself(member, plan):
    notebook = Notebook()
    anna = member(the_plan=plan(data_fingerprint="another"), listener=notebook)
    assert any("are not those that the run shares out" in note for note in notebook.notes)
    seen, base = taken_rows(anna), weights_of(anna)
    for number in range(2):
        anna.take_part(task_for(base, number, place=1000 * number), base)
    rows = len(anna.run.corpus.rows)
    begin = int.from_bytes(hashlib.sha256(b"anna").digest()[:8], "big") % rows
    expected = rows_of_run(anna.run.config.seed, torch.arange(begin, begin + 12).numpy(), rows)
    assert seen == expected.tolist()


@pytest.mark.ci
def test_two_members_with_the_same_data_of_their_own_send_different_updates(member, plan):
    """A host refuses the second of two with the same numbers as replayed."""
    the_plan, updates = plan(data_fingerprint="another"), []
    for name in ("anna", "carl"):
        one = member(name, the_plan=the_plan)
        base = weights_of(one)
        updates.append(decode_update(one.take_part(task_for(base), base), one.shapes, LIMITS))
    assert updates[0].base == updates[1].base
    assert updates[0].digest != updates[1].digest


@pytest.mark.ci
def test_a_share_without_a_finite_loss_is_left_out_and_the_next_one_begins_from_its_base(member):
    anna = member(max_skipped_steps=2)
    base = weights_of(anna)
    broken = {name: torch.full_like(tensor, math.inf) for name, tensor in base.items()}
    with pytest.raises(DivergenceError, match="this share is left out; the next one begins from its base"):
        anna.take_part(task_for(broken), broken)
    update = decode_update(anna.take_part(task_for(base, 1), base), anna.shapes, LIMITS)
    assert update.tokens == ROUND_STEPS * 2 * 32


@pytest.mark.ci
def test_with_fragments_a_share_that_diverged_leaves_nothing_behind_in_what_was_not_sent(member, plan, monkeypatch):
    anna = member(the_plan=plan(fragments=2))
    base = weights_of(anna)
    anna.take_part(task_for(base), base)

    def diverge(*asked):
        for tensor in anna._tensors.values():
            tensor.detach().fill_(1e9)
        raise DivergenceError("the loss is not finite", "")

    with monkeypatch.context() as patched:
        patched.setattr(anna.trainer, "train_round", diverge)
        with pytest.raises(DivergenceError, match="the next one begins from its base"):
            anna.take_part(task_for(base, 1), base)
    anna._take_over(base)
    now = weights_of(anna)
    assert all(torch.equal(now[name], tensor) for name, tensor in base.items())


@pytest.mark.ci
def test_a_base_that_is_another_than_the_task_s_is_refused(member):
    anna = member()
    base = weights_of(anna)
    with pytest.raises(DataError, match=r"the base of round 0 must be 0{16}, got another: fetch it again"):
        anna.take_part(replace(task_for(base), base="0" * 64), base)
    with pytest.raises(DataError, match="must have the model's tensors, got others"):
        anna.take_part(task_for(base), {"a": torch.zeros(1)})


def test_a_recipe_that_cannot_be_followed_in_rounds_is_refused(recipe, plan):
    config = member_config(recipe(), plan(), output_dir="elsewhere")
    assert (config.length.max_steps, config.batch.batch_size, config.output.resume) == (12, 2, True)
    with pytest.raises(ConfigError, match=r"`spike_rollback` goes back to a checkpoint, got 4.0"):
        member_config(recipe(spike_rollback=4.0), plan())
    with pytest.raises(ConfigError, match="`lora_rank` has no place in a community run, got 4"):
        member_config(recipe(lora_rank=4, init_from="model"), plan())


@pytest.mark.ci
def test_two_members_and_a_host_train_and_every_round_is_a_folder_that_loads(member, plan, recipe, tmp_path):
    from fanformer.loading import load
    from fanformer.training.run import opened

    the_plan = plan(rounds=3)
    config = member_config(recipe(), the_plan, output_dir=str(tmp_path / "host"))
    with opened(config) as keeper:
        state = first_state(keeper)
        before = measure_of(keeper)(state.weights("float32"))
        publish = publisher(keeper, tmp_path / "host", the_plan, keep_last=2)
        host = Host(tmp_path / "host" / "community", the_plan, state, 0.0)
        members = {name: member(name, the_plan=the_plan) for name in ("anna", "bert")}
        while not host.finished:
            tasks = {name: host.join(name, 0.0) for name in members}
            for name, one in members.items():
                assert host.receive(name, one.take_part(tasks[name], host.weights), 0.0) == ""
            host.close(1.0, measure_of(keeper), publish)
    assert host.records[-1].held_out_loss < before
    folders = sorted(path.name for path in (tmp_path / "host").glob("checkpoint-*"))
    assert folders == ["checkpoint-2", "checkpoint-3"]
    model, _ = load(tmp_path / "host" / "checkpoint-3", "cpu", "float32")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in host.weights.items())
    again = last_state(tmp_path / "host", print)
    assert again.number == 3
    assert Host(tmp_path / "host" / "community", the_plan, again, 0.0).checksum == host.checksum
    lines = (tmp_path / "anna" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [0, 1, 2]
