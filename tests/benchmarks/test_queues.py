"""Every queue file that is kept here can be run, and what the ledger holds of it is not trained again."""

import fnmatch
import itertools

import pytest
import yaml

from fanformer.comparison.architectures import FAMILIES, architecture
from fanformer.comparison.compare import RATES
from fanformer.comparison.entries import read_training
from fanformer.comparison.ledger import read_ledger
from fanformer.comparison.queue import read_queue
from fanformer.comparison.trial import Trial

MACHINE = ("device", "precision", "compile", "threads")
"""What a comparison decides about the machine, as a part of what its trainings are."""


def test_every_queue_is_read_without_an_error_and_no_two_comparisons_have_one_name(repository):
    paths = sorted((repository / "benchmarks" / "queues").glob("*.yaml"))
    entries = [entry for path in paths for entry in read_queue(path).entries]
    assert {entry.name: entry.error for entry in entries if entry.error is not None} == {}
    names = [entry.name for entry in entries]
    assert len(set(names)) == len(names) > 5


def test_equal_time_is_judged_at_a_budget_of_its_own_alone(repository):
    """Not at equal tokens, nor at the budget of equal operations; its shorter trainings are those of the latter."""
    queues = repository / "benchmarks" / "queues"
    (timed,) = read_queue(queues / "latent-depth-time.yaml").entries
    counted = {entry.name: entry.comparison for entry in read_queue(queues / "latent-depth.yaml").entries}
    counted = counted["depth-equal-operations"]
    assert not set(counted.candidate_tokens) & set(timed.comparison.candidate_tokens)
    claims = yaml.safe_load((repository / "benchmarks" / "claims.yaml").read_text(encoding="utf-8"))
    (pattern,) = (claim["entry"] for claim in claims if claim["id"] == "depth-equal-time")
    names = [timed.name, *(f"{timed.name}-nano-{tokens}" for tokens in (2_000_000, 2_457_600, 3_112_960))]
    assert [fnmatch.fnmatchcase(name, pattern) for name in names] == [False, False, True, True]
    for spec in timed.comparison.architectures:
        settings = timed.comparison.settings(spec, 2_000_000)
        assert settings == counted.settings(spec, 2_000_000)
        assert settings.keys() >= set(MACHINE)  # so that no machine decides otherwise


@pytest.fixture(scope="module")
def known(repository):
    """The trainings of the ledger."""
    return [entry for entry in read_ledger(repository / "benchmarks" / "results") if entry.kind == "training"]


def trials_of(comparison, machines, fingerprints):
    """Return every training that a comparison may ask for, on any of the machines and data of the ledger."""
    own_task = [(spec, RATES) for spec in comparison.architectures if comparison.rates_on]
    for spec, variant in comparison.cells + own_task:
        block = architecture(spec).block
        of_each = itertools.product(comparison.learning_rates, comparison.seeds)
        if comparison.rule is not None:
            task = comparison.rule_task(variant).to_dict()
            rule, settings = {"task": task.pop("name"), **task}, architecture(spec).applying(comparison.rule_settings())
            # trainings by the loop of rules that was, before rules had the one trainer, have no settings
            kinds = [{"settings": {}, "rule": rule}, {"settings": settings, "rule": rule}]
        else:
            settings = comparison.settings(spec, variant)
            pairs = itertools.product(machines, fingerprints)
            kinds = [{"settings": {**settings, **dict(one)}, "data_fingerprint": data} for one, data in pairs]
        for (rate, seed), kind in itertools.product(of_each, kinds):
            yield Trial(spec, rate, seed, block=block, **kind)


@pytest.mark.parametrize(
    ("queue", "least"),
    [
        ("ablation", 28),
        ("accelerator", 2),
        ("ladder", 59),
        ("ladder-accelerator", 6),
        ("linear-regression", 45),
        ("modular-addition", 45),
        ("periodic", 40),
        ("series", 30),
    ],
)
def test_trainings_of_the_ledger_are_still_those_that_the_queues_ask_for(repository, known, queue, least):
    """A change of what a training's name is made of would train them all again."""
    folder, names = repository / "benchmarks", {entry.name for entry in known}
    of_language = [entry for entry in known if entry.data is not None]
    machines = {tuple((name, entry.configuration[name]) for name in MACHINE) for entry in of_language}
    fingerprints = {entry.data["fingerprint"] for entry in of_language}
    found = {
        trial.name: trial
        for entry in read_queue(folder / "queues" / f"{queue}.yaml").entries
        for trial in trials_of(entry.comparison, machines, fingerprints)
        if trial.name in names
    }
    assert len(found) >= least
    assert read_training(folder / "results", next(iter(found.values()))) is not None


def test_every_training_of_the_ledger_has_the_name_that_its_settings_give(known):
    """A field that a training's name comes to hold, or holds otherwise, would have it trained again."""
    blocks = range(1, max(family.block for family in FAMILIES.values()) + 1)
    renamed = []
    for entry in known:
        settings = dict(entry.configuration)
        spec, rate, rule = settings.pop("architecture"), settings.pop("learning_rate"), settings.pop("rule", None)
        del settings["scale"]
        fingerprint = entry.data["fingerprint"] if entry.data is not None else ""
        digests = {name: value for name, value in entry.details.items() if name.endswith("_digest")}
        given = (spec, rate, entry.seeds[0], settings, "", fingerprint, rule)
        trials = (Trial(*given, block, **digests) for block in blocks)
        if entry.name not in {trial.name for trial in trials}:
            renamed.append(entry.name)
    assert len(known) > 300
    assert renamed == []
