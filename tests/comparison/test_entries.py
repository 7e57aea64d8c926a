"""What a comparison writes into the ledger: differences, lost seeds, the day and the machine of a training."""

from dataclasses import replace

from fanformer.comparison.compare import Outcome
from fanformer.comparison.entries import read_training, write_comparison, write_training
from fanformer.comparison.ledger import read_ledger, write_entry
from fanformer.comparison.trial import Result, Trial
from tests.comparison.test_comparison import outcome, small


def test_an_ablation_is_one_entry_of_differences_to_the_default(corpus, tmp_path):
    changed = ["fanformer@60k:fan_ratio=0.3", "fanformer@60k:cola_activation=gelu", "fanformer@60k:qkv_norm=none"]
    comparison = small(corpus, architectures=["fanformer@60k", *changed], ablation=True, seeds=2)
    losses = {"fanformer@60k": (2.0, 2.25), changed[0]: (1.5, 1.75), changed[1]: (2.5, 2.25), changed[2]: (3.0,)}
    outcomes = [outcome(spec, 1280, seed, loss) for spec, of in losses.items() for seed, loss in enumerate(of)]
    write_comparison(tmp_path, "parts", "fanformer compare", comparison, outcomes, None)
    (entry,) = read_ledger(tmp_path)
    assert (entry.kind, entry.seeds, entry.details["default"]) == ("ablation", [0, 1], "fanformer-60k")
    assert set(entry.details["arms"].values()) == {"fanformer@60k", *changed[:2]}  # the last lacks a seed
    better = entry.result["difference_of_fanformer-60k-fan-ratio-0.3"]
    assert (better.value, better.low, better.high) == (-0.5, -0.5, -0.5)
    mixed = entry.result["difference_of_fanformer-60k-cola-activation-gelu"]
    assert mixed.value == 0.25
    assert mixed.low < 0 < mixed.high


def test_an_entry_names_the_seeds_that_were_lost_at_the_chosen_rates(corpus, tmp_path):
    comparison = small(corpus, tokens=4096, seeds=3)
    outcomes = [outcome(spec, 4096, seed, 2.0) for spec in comparison.architectures for seed in range(3)]
    write_comparison(tmp_path, "whole", "fanformer compare", comparison, outcomes, None)
    for one in outcomes[4:]:
        one.result.figures.clear()
    write_comparison(tmp_path, "lost", "fanformer compare", comparison, outcomes, None)
    found = {entry.name: entry for entry in read_ledger(tmp_path)}
    assert "lost_seeds" not in found["whole"].details
    assert found["lost"].details["lost_seeds"] == ["llama@60k, seed 1", "llama@60k, seed 2"]


def test_a_training_keeps_its_day_and_machine_in_whatever_ledger_it_comes_to(corpus, tmp_path):
    comparison, command = small(corpus, tokens=4096, seeds=2), "fanformer compare"
    outcomes = [outcome(spec, 4096, seed, 2.0) for spec in comparison.architectures for seed in range(2)]
    for number, one in enumerate(outcomes):
        made = {"date": f"2025-01-0{number + 1}", "hardware": {"cpu": f"number {number}"}, "versions": {"torch": "1"}}
        one.result.details.update(made)
        write_training(tmp_path / "one", command, one, None, "")
        again = replace(one, result=read_training(tmp_path / "one", one.trial))
        write_training(tmp_path / "other", command, again, None, "")
        for folder in ("one", "other"):
            [entry] = [each for each in read_ledger(tmp_path / folder) if each.name == one.trial.name]
            assert {name: getattr(entry, name) for name in made} == made
    write_comparison(tmp_path / "whole", "whole", command, comparison, outcomes, None)
    [entry] = read_ledger(tmp_path / "whole")
    assert (entry.date, entry.hardware["cpu"]) == ("2025-01-04", "number 3")  # of the latest


def test_the_ledger_keeps_the_counts_of_a_training_and_leaves_entries_that_lack_them_as_they_are(tmp_path):
    counts = {"trained_tokens": 1280, "tokens": 250, "bytes": 1000}
    figures = {"loss": 2.0, "bits_per_byte": 0.7, "parameters": 60_000, **counts}
    trial, curve = Trial("fanformer@60k", 0.01, 0, {}), [{"tokens": 1280, "val_loss": 2.0}]
    outcome = Outcome(trial, 1280, Result("finished", "", figures, curve, {}))
    write_training(tmp_path, "fanformer compare", outcome, None, "")
    assert read_training(tmp_path, trial).figures == figures
    (entry,) = read_ledger(tmp_path)
    old = {name: figure for name, figure in entry.result.items() if name not in counts}
    write_entry(tmp_path, replace(entry, result=old, date="2026-01-01"))
    assert read_training(tmp_path, trial).figures == {name: value for name, value in figures.items() if name in old}
    write_training(tmp_path, "fanformer compare", outcome, None, "")  # its folder is there still
    assert [(entry.date, entry.result) for entry in read_ledger(tmp_path)] == [("2026-01-01", old)]
