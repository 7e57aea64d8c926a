"""A community run in one process: a host, members on the package's trainer, and payloads that are really coded.

Only the network is left out, and the time: a member that is slow does fewer steps, as it would until a round's end.
"""

import contextlib
import random
import shutil
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from community_attacks import Attacker

from fanformer.community.aggregation import Defence, Method
from fanformer.community.hosting import first_state, measure_of
from fanformer.community.member import Member, joined, member_config
from fanformer.community.outer import OuterSettings
from fanformer.community.plan import Plan
from fanformer.community.records import RoundRecord
from fanformer.community.rounds import Host
from fanformer.community.updates import ErrorFeedback
from fanformer.training.fields import RunConfig
from fanformer.training.run import opened, train


@dataclass(frozen=True)
class Setting:
    """One simulated run.

    Attributes:
        members: of the run; 0 is synchronous training on as many tokens.
        rows: of a step, over all members together.
        steps: inner steps of a member that does all of them.
        round_steps: of these in a round.
        bits: of an update's numbers.
        feedback: whether what coding lost is kept.
        fragments: of which a round sends one.
        method: how updates are joined from five on.
        attack: of the last member, one of ATTACKS, or None.
        slow: share of the steps that the last member does.
        presence: chance that a member takes part in a round.
        dying: chance that one that takes part never reports.
        outer_learning_rate: of the outer step.
        outer_momentum: of the outer step.
    """

    members: int
    rows: int
    steps: int
    round_steps: int
    bits: int = 8
    feedback: bool = True
    fragments: int = 1
    method: Method = Defence().method
    attack: str | None = None
    slow: float = 1.0
    presence: float = 1.0
    dying: float = 0.0
    outer_learning_rate: float = OuterSettings().learning_rate
    outer_momentum: float = OuterSettings().momentum


def plan_of(setting: Setting, config: RunConfig, fingerprint: str) -> Plan:
    """Return the plan of a setting."""
    return Plan(
        rounds=setting.steps // setting.round_steps,
        round_steps=setting.round_steps,
        batch_size=setting.rows // setting.members,
        sequence_length=config.batch.sequence_length,
        fragments=setting.fragments,
        bits=setting.bits,
        outer=OuterSettings(setting.outer_learning_rate, setting.outer_momentum),
        defence=Defence(method=setting.method),
        data_fingerprint=fingerprint,
    )


def simulate(setting: Setting, config: RunConfig, folder: Path, gate_tokens: int) -> dict[str, Any]:
    """Train as a setting says, in a folder that is deleted afterwards, and return what came of it.

    Args:
        setting: of the run.
        config: the recipe; its data are prepared.
        folder: to work in.
        gate_tokens: held-out tokens that a round is judged by; the end is measured on all.
    """
    shutil.rmtree(folder, ignore_errors=True)
    try:
        if setting.members == 0:
            asked = config.replace(output_dir=str(folder), batch_size=setting.rows, max_steps=setting.steps)
            result = train(asked)
            _end_where_asked(result.stopped_by)
            assert result.held_out is not None, "a run that ends is measured"
            return {"loss": result.held_out.loss, "tokens": setting.steps * asked.batch.tokens_per_step}
        return _together(setting, config, folder, gate_tokens)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _together(setting: Setting, config: RunConfig, folder: Path, gate_tokens: int) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        rows = setting.rows // setting.members
        keeper = stack.enter_context(opened(config.replace(output_dir=str(folder / "keeper"), batch_size=rows)))
        plan = plan_of(setting, config, keeper.corpus.fingerprint)
        members = {
            name: stack.enter_context(joined(member_config(config, plan, output_dir=str(folder / name)), plan, name))
            for name in (f"member-{number}" for number in range(setting.members))
        }
        host = Host(folder / "host", plan, first_state(keeper), 0.0)
        attacker = None if setting.attack is None else Attacker(setting.attack, setting.bits, config.seed)
        sizes = _rounds(setting, host, members, attacker, measure_of(keeper, gate_tokens), config.seed)
        loss = measure_of(keeper)(host.weights)
        return {"loss": loss, "update_bytes": statistics.fmean(sizes), **_told(host.records, attacker is not None)}


def _rounds(
    setting: Setting, host: Host, members: Mapping[str, Member], attacker: Attacker | None, measure: Any, seed: int
) -> list[int]:
    """Do the rounds and return the bytes of all honest updates.

    A run whose rounds are rejected again and again ends after half as many again as it was to have.
    """
    chances, sizes = random.Random(seed), []
    last = list(members)[-1]
    while not host.finished and len(host.records) < 1.5 * host.plan.rounds + 5:
        present = [name for name in members if chances.random() < setting.presence] or [chances.choice(list(members))]
        dying = {name for name in present[1:] if chances.random() < setting.dying}
        tasks = {name: host.join(name, 0.0) for name in present}
        like, base = host.like, host.weights
        for name, task in tasks.items():
            assert task is not None, "a round that nobody has reported in has shares for all"
            if name in dying:
                host.leave(name)
                continue
            most = max(1, round(task.steps * (setting.slow if name == last else 1.0)))
            if not setting.feedback:
                members[name].feedback = ErrorFeedback()
            payload = members[name].take_part(task, base, most.__le__)
            _end_where_asked(members[name].stopped_by)
            sizes.append(len(payload))
            if attacker is not None and name == last:
                payload = attacker.send(task, payload, like)
            host.receive(name, payload, 0.0)
        for name in present:  # the round's time is over
            host.leave(name)
        assert host.is_due(0.0), "an honest member has reported"
        host.close(1.0, measure, lambda state, record: None)
    return sizes


def _end_where_asked(signal: str | None) -> None:
    """End the program after a signal, which ends a training early and well: what came of it is no result."""
    if signal is not None:
        sys.exit(f"stopped by {signal}: the same command goes on")


def _told(records: tuple[RoundRecord, ...] | Any, attacked: bool) -> dict[str, Any]:
    """Return the figures of the rounds; of the false member what became of its reports."""
    names = {verdict.member for record in records for verdict in record.verdicts}
    last = max(names, key=lambda name: int(name.rpartition("-")[2]))
    honest = [one for record in records for one in record.verdicts if not (attacked and one.member == last)]
    false = [one for record in records for one in record.verdicts if attacked and one.member == last]
    return {
        "rounds": len(records),
        "rejected_rounds": sum(not record.accepted for record in records),
        "tokens": sum(record.tokens for record in records if record.accepted),
        "honest_dropped": sum(not one.counted for one in honest) / max(1, len(honest)),
        "honest_clipped": sum(one.scale < 1 for one in honest) / max(1, len(honest)),
        "false_dropped": sum(not one.counted for one in false) / max(1, len(false)),
        "false_clipped": sum(one.scale < 1 for one in false) / max(1, len(false)),
        "reasons": sorted({one.reason.partition(":")[0][:60] for one in false if one.reason}),
    }
