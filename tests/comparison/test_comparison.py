import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fanformer.comparison.architectures import architecture, without_embeddings
from fanformer.comparison.compare import RATES, Comparison, Outcome, best_rate, run_comparison
from fanformer.comparison.entries import write_comparison
from fanformer.comparison.ledger import read_ledger
from fanformer.comparison.pages.report import write_comparison_page
from fanformer.comparison.summary import arms, pairs, parameters_ratio, to_record, tokens_ratio
from fanformer.comparison.trial import MADE, RESULT_FILE, Result, Trial, language_config, run_trial
from fanformer.errors import ConfigError
from fanformer.model import FANformerConfig
from fanformer.model.configuration_fanformer import RANKS
from fanformer.training.events import silent
from tests.pages import Reader

NEEDED = {"vocab_size": 320, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def small(corpus, **fields):
    run = {"vocab_size": 320, "sequence_length": 32, "batch_size": 4, "compile": "off", "precision": "float32"}
    given = {"architectures": ["fanformer@60k", "llama@60k"], "data": str(corpus), "tokens": 1280, "run": run}
    return Comparison.from_fields({**given, "learning_rates": [0.01], "evaluations": 2, "eval_tokens": 256, **fields})


def outcome(spec, budget, seed, loss):
    """A training that ended at this loss."""
    points = ((budget // 2, 9.0), (budget, loss))
    curve = [{"tokens": tokens, "val_loss": value, "val_bits_per_byte": value} for tokens, value in points]
    sizes = ("parameters", "parameters_without_embeddings", "training_operations_per_token", "tokens_per_second")
    figures = {"loss": loss, "bits_per_byte": loss, **dict.fromkeys(sizes, 1.0)}
    return Outcome(Trial(spec, 0.01, seed, {}), budget, Result("finished", "", figures, curve, {}))


SCALED = ["fanformer@300k", "fanformer-tuned@300k", "llama@300k", "llama-qk-norm@300k", "cola-llama@300k"]


@pytest.mark.parametrize("spec", SCALED)
def test_a_size_is_met_within_a_hundredth(spec):
    assert abs(without_embeddings(architecture(spec).config()) / 300_000 - 1) <= 0.01


def test_a_size_can_be_that_of_another_architecture():
    nano = without_embeddings(architecture("nano").config())
    assert abs(without_embeddings(architecture("llama@nano").config()) / nano - 1) <= 0.01


def test_a_name_without_size_is_the_published_shape():
    assert architecture("llama").count().total == 134_515_008
    assert architecture("fanformer").count().total == 92_230_144
    assert architecture("fanformer-tuned").count().total == 92_158_804


@pytest.mark.parametrize("size", ["200k", "1m", "4m", "fanformer"])
def test_the_definition_at_any_size_has_its_ffn_and_low_ranks_in_all_layers(size):
    config = architecture(f"fanformer@{size}").config()
    width = config.hidden_size
    assert config.intermediate_size == 4 * width
    ranks = {name: getattr(config, name) for name in RANKS}
    step = 32 if width >= 256 else 8
    assert all(rank % step == 0 for rank in ranks.values()), ranks
    usual = sum(getattr(FANformerConfig(), name) for name in RANKS) / 512
    assert 0.5 < sum(ranks.values()) / width / usual < 1.5
    assert abs(without_embeddings(config) / without_embeddings(architecture(f"llama@{size}").config()) - 1) < 0.02


def test_ranks_make_up_for_what_a_part_costs_and_the_ffn_where_there_are_none():
    whole = architecture("fanformer@1m").config()
    plain = architecture("fanformer@1m:o_rank=null,down_rank=null").config()
    assert (plain.o_rank, plain.down_rank, plain.intermediate_size) == (None, None, whole.intermediate_size)
    assert plain.qkv_rank < whole.qkv_rank
    full = architecture("fanformer@1m:qkv_rank=null,o_rank=null,gate_up_rank=null,down_rank=null").config()
    assert full.intermediate_size < whole.intermediate_size


def test_scaled_initialisation_is_the_one_of_the_experiments():
    model = architecture("llama@300k").build(NEEDED)
    assert model.get_input_embeddings().weight.std().item() == pytest.approx(1.0, rel=0.05)
    layer = model.model.layers[0]
    assert layer.mlp.up_proj.weight.std().item() == pytest.approx(model.config.hidden_size**-0.5, rel=0.05)
    assert not layer.mlp.down_proj.weight.any()
    assert not layer.self_attn.o_proj.weight.any()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lama", "no architecture 'lama': did you mean `llama`?"),
        ("llama:hidden=2", "`hidden` is not a field of llama"),
        ("nano@2m", "preset nano has its size"),
        ("llama@3", "must be at least 20k parameters"),
        ("llama@foo", "must be a count such as 2m, or the name of an architecture"),
        ("llama:x", "must be NAME=VALUE"),
        ("fanformer:initialisation=scaled", "FANformer classes have their own"),
        ("llama@2m:hidden_size=32", "no shape of llama has 2,000,000 parameters"),
    ],
)
def test_a_wrong_architecture_is_refused_with_a_remedy(spec, message):
    with pytest.raises(ConfigError) as caught:
        architecture(spec)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"token": 3}, "`token` is not a field of a comparison: did you mean `tokens`?"),
        ({"tokens": 4}, "`tokens` must be at least one step of 128"),
        ({"seeds": [0, 0]}, "`seeds` must hold at least one value, each once"),
        ({"learning_rates": []}, "`learning_rates` must hold at least one value"),
        ({"learning_rates": "fast"}, "`learning_rates` of a comparison cannot be 'fast'"),
        ({"ablation": 1}, "`ablation` of a comparison must be true or false, got 1"),
        ({"evaluations": "many"}, "`evaluations` of a comparison must be a whole number"),
        ({"run": {"seed": 3}}, "`seed` is set by the comparison itself"),
        ({"run": {"optimiser": "muon"}}, "did you mean `optimizer`?"),
        ({"run": {"model.hidden_size": 64}}, "`model.hidden_size` is no setting of all trainings, got 64: write"),
        ({"run": {"init_from": "runs/base"}}, "`init_from` does not apply to a comparison, got 'runs/base'"),
        ({"run": {"lora_rank": 4}}, "`lora_rank` does not apply to a comparison, got 4: every architecture learns"),
        ({"run": {"objective": "answers"}}, "`objective` does not apply to a comparison, got 'answers'"),
        ({"run": {"tokenizer": "here", "vocab_size": 320}}, "`vocab_size` does not apply beside `tokenizer`, got 320"),
        ({"candidate_tokens": ["640", 1280]}, "`tokens` and `candidate_tokens` must hold each value once"),
        ({"candidate_tokens": [64]}, "`tokens` must be at least one step of 128, got 64"),
        ({"hole_sides": [5]}, "`hole_sides` is for a rule that has a hole"),
        ({"rates_on": {"hole_side": 5}}, "`rates_on` is for a rule"),
        ({"rule": "modular-addition"}, "does not apply to the rule modular-addition"),
    ],
)
def test_a_wrong_comparison_is_refused_with_a_remedy(corpus, fields, message):
    with pytest.raises(ConfigError) as caught:
        small(corpus, **fields)
    assert message in str(caught.value)


def test_rates_are_not_chosen_on_what_is_reported():
    fields = {"architectures": ["nano"], "rule": "modular-addition", "hole_sides": [11]}
    with pytest.raises(ConfigError, match="`rates_on` must be a variant of modular-addition that is not reported"):
        Comparison.from_fields({**fields, "rates_on": {"hole_side": 11}})


@pytest.mark.slow
def test_two_architectures_are_compared_at_their_best_learning_rate_and_nothing_is_trained_twice(corpus, tmp_path):
    comparison, first = small(corpus, learning_rates=[0.01, 1e-5], seeds=2), []
    outcomes = run_comparison(comparison, tmp_path / "out", first.append)
    assert len(outcomes) == 6, first
    assert all(outcome.result is not None for outcome in outcomes), first
    assert all(set(MADE) <= outcome.result.details.keys() for outcome in outcomes)
    ended = [event.figures for event in first if event.kind == "end"]
    assert ended == [{"done": done, "total": 6} for done in range(1, 7)]
    for spec in comparison.architectures:
        assert best_rate(outcomes, spec, 1280) == 0.01
    found = arms(comparison, outcomes)
    assert [len(arm.outcomes) for arm in found] == [2, 2]
    (pair,) = pairs(comparison, found)
    assert (pair.candidate, pair.baseline) == ("fanformer@60k", "llama@60k")
    difference = found[0].figures["bits_per_byte"].value - found[1].figures["bits_per_byte"].value
    assert pair.figures["bits_per_byte_difference"].value == pytest.approx(difference)
    json.dumps(to_record(comparison, outcomes), allow_nan=False)

    dates = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob(RESULT_FILE)}
    again = run_comparison(comparison, tmp_path / "out", silent)
    assert [outcome.loss for outcome in again] == [outcome.loss for outcome in outcomes]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob(RESULT_FILE)} == dates


@pytest.mark.slow
def test_a_training_that_cannot_be_done_does_not_stop_the_others(corpus, tmp_path):
    # a dropout of 2 is accepted by Llama's configuration and refused by the first forward pass
    comparison = small(corpus, architectures=["fanformer@60k", "llama@60k:attention_dropout=2.0"])
    told = []
    outcomes = run_comparison(comparison, tmp_path / "out", told.append)
    assert outcomes[0].result is not None, told
    assert outcomes[1].result is None
    assert arms(comparison, outcomes)[1].troubles[0].startswith(outcomes[1].trial.name)


def test_a_diverged_training_is_a_result(corpus, tmp_path):
    run = {"vocab_size": 320, "sequence_length": 32, "batch_size": 4, "compile": "off", "precision": "float32"}
    run |= {"max_skipped_steps": 1, "optimizer": "adamw", "max_grad_norm": 0.0, "warmup_fraction": 0.0}
    comparison = small(corpus, architectures=["llama@60k"], learning_rates=[1e30], run=run)
    outcomes = run_comparison(comparison, tmp_path / "out", silent)
    assert [outcome.result.status for outcome in outcomes] == ["diverged"]
    assert "not finite" in outcomes[0].result.message


def trial_processes(folder):
    """Return the command lines of the trainings that run below `folder`."""
    lines = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            lines.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue  # it ended while we looked
    return [line for line in lines if "fanformer.comparison.trial" in line and str(folder) in line]


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_stopped_and_leaves_no_process(corpus, tmp_path):
    out = tmp_path / "out"
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from test_comparison import *\n"
        "run_comparison(small(sys.argv[2], tokens=25600), Path(sys.argv[3]), silent)"
    )
    here = str(Path(__file__).parent)
    process = subprocess.Popen([sys.executable, "-c", code, here, str(corpus), str(out)])
    deadline = time.monotonic() + 120
    while len(list(out.rglob("metrics.jsonl"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    (first,) = out.rglob(RESULT_FILE)
    kept = first.read_bytes(), first.stat().st_mtime_ns
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while trial_processes(out) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert trial_processes(out) == []
    told = []
    outcomes = run_comparison(small(corpus, tokens=25600), out, told.append)  # not refused: no lock is left behind
    assert [outcome.result.status for outcome in outcomes] == ["finished", "finished"], told
    assert (first.read_bytes(), first.stat().st_mtime_ns) == kept


@pytest.mark.slow
def test_trainings_side_by_side_come_to_the_same_in_the_same_order(corpus, tmp_path):
    comparison = small(corpus, learning_rates=[0.01, 0.005], seeds=2)
    alone = run_comparison(comparison, tmp_path / "alone", silent)
    together = run_comparison(comparison, tmp_path / "together", silent, jobs=3)
    assert [outcome.trial.name for outcome in together] == [outcome.trial.name for outcome in alone]
    assert [outcome.loss for outcome in together] == [outcome.loss for outcome in alone]


def end_everything(event):
    """End everything when the first training has ended."""
    if event.kind == "end":
        raise KeyboardInterrupt


@pytest.mark.slow
def test_what_ends_a_sweep_ends_all_trainings_side_by_side_and_it_goes_on_from_there(corpus, tmp_path):
    comparison = small(corpus, architectures=["fanformer@60k"], tokens=[128, 64000])
    with pytest.raises(KeyboardInterrupt):
        run_comparison(comparison, tmp_path / "out", end_everything, jobs=2)
    assert trial_processes(tmp_path / "out") == []
    (first,) = (tmp_path / "out").rglob(RESULT_FILE)
    date = first.stat().st_mtime_ns
    outcomes = run_comparison(comparison, tmp_path / "out", silent, jobs=2)
    assert [outcome.result.status for outcome in outcomes] == ["finished", "finished"]
    assert first.stat().st_mtime_ns == date


@pytest.mark.slow
def test_a_rule_is_compared_like_a_language(tmp_path):
    fields = {"rule": "modular-addition", "hole_sides": [5, 21], "learning_rates": [0.01], "run": {"max_steps": 3}}
    comparison = Comparison.from_fields({"architectures": ["fanformer@60k", "llama@60k"], **fields})
    outcomes = run_comparison(comparison, tmp_path / "out", silent)
    assert [outcome.variant for outcome in outcomes] == [5, 5, 21, 21]
    assert [pair.variant for pair in pairs(comparison, arms(comparison, outcomes))] == [5, 21]


@pytest.mark.slow
def test_rates_of_a_rule_are_chosen_on_a_hole_that_is_not_reported(tmp_path):
    fields = {"rule": "modular-addition", "hole_sides": [5, 7], "rates_on": {"hole_side": 3}, "seeds": 2}
    fields |= {"architectures": ["fanformer@60k"], "learning_rates": [0.01, 0.02], "run": {"max_steps": 3}}
    comparison = Comparison.from_fields(fields)
    outcomes = run_comparison(comparison, tmp_path / "out", silent)
    assert [outcome.trial.rule["hole_side"] for outcome in outcomes] == [3, 3, 5, 7, 5, 7]
    found = arms(comparison, outcomes)
    assert [(arm.variant, list(arm.swept), len(arm.outcomes)) for arm in found] == [
        (5, [0.01, 0.02], 2),
        (7, [0.01, 0.02], 2),
    ]
    write_comparison(tmp_path / "ledger", "rule", "fanformer compare", comparison, outcomes, None)
    assert [entry.details["rates_on"] for entry in read_ledger(tmp_path / "ledger")] == [{"hole_side": 3}] * 2


def test_a_rule_that_time_cut_short_is_no_result(tmp_path):
    rule = {"task": "modular-addition", "modulus": 7, "hole_side": 1}
    trial = Trial("fanformer@60k", 0.01, 0, {"max_steps": 10**6, "max_time": 0.1, "batch_size": 16}, rule=rule)
    with pytest.raises(SystemExit, match="`max_time` ended this training before its steps were done"):
        run_trial(trial, tmp_path, lambda event: None)
    assert list((tmp_path / "run").glob("checkpoint-*"))  # from which it goes on


def test_the_rate_of_a_rule_s_recipe_is_no_part_of_what_its_trainings_are():
    comparison = Comparison.from_fields({"rule": "modular-addition", "architectures": ["fanformer@60k"]})
    assert comparison.rule_settings()["optimizer"] == "muon"
    assert "learning_rate" not in comparison.rule_settings()


def test_the_rate_chosen_on_a_task_of_its_own_is_the_one_that_fills_it_best():
    def of_rule(variant, rate, seed, loss, greedy, sampled):
        figures = {"loss": loss, "hole_accuracy": greedy, "hole_sampled_accuracy": sampled}
        return Outcome(Trial("nano", rate, seed, {}), variant, Result("finished", "", figures, [], {}))

    chosen = [of_rule(RATES, 0.1, 0, 0.3, 1.0, 0.9), of_rule(RATES, 0.2, 0, 0.2, 1.0, 0.95)]
    chosen += [of_rule(RATES, 0.3, 0, 0.1, 0.5, 0.99)]
    shown = [of_rule(5, 0.3, 0, 0.01, 1.0, 1.0), of_rule(5, 0.2, 0, 0.2, 0.0, 0.0)]
    assert best_rate([*chosen, *shown], "nano", 5) == 0.2
    assert best_rate(shown, "nano", 5) == 0.3
    fields = {"architectures": ["nano"], "rule": "modular-addition", "rates_on": {"hole_side": 3}, "hole_sides": [5]}
    (arm,) = arms(Comparison.from_fields(fields), [*chosen, *shown])
    assert (arm.learning_rate, arm.at_edge, arm.figures["hole_accuracy"].value) == (0.2, False, 0.0)


def test_a_series_is_judged_by_its_error_beyond_the_window_where_less_is_better():
    def of_series(spec, variant, rate, within, beyond):
        figures = {"loss": 1.0, "hole_accuracy": rate, "hole_sampled_accuracy": rate, "train_accuracy": 1.0}
        figures |= {"error_within_window": within, "error_beyond_window": beyond}
        return Outcome(Trial(spec, rate, 0, {}), variant, Result("finished", "", figures, [], {}))

    fields = {"architectures": ["nano", "llama@nano"], "rule": "series", "rates_on": {"skipped": 252}}
    outcomes = [
        of_series(spec, RATES, *figures)
        for spec in fields["architectures"]
        for figures in ((0.1, 0.5, 0.5), (0.2, 0.75, 0.25), (0.3, 0.25, 0.75))
    ]
    outcomes += [of_series("nano", 0, 0.2, 0.5, 0.5), of_series("llama@nano", 0, 0.2, 0.25, 1.0)]
    comparison = Comparison.from_fields(fields)
    found = arms(comparison, outcomes)
    assert [(arm.learning_rate, arm.figures["error_beyond_window"].value) for arm in found] == [(0.2, 0.5), (0.2, 1.0)]
    (pair,) = pairs(comparison, found)
    assert {name: figure.value for name, figure in pair.figures.items()} == {
        "error_beyond_window_difference": -0.5,
        "error_within_window_difference": 0.25,
    }


def test_more_budgets_for_the_candidate_give_the_tokens_to_equal_loss(corpus):
    comparison = small(corpus, tokens=4096, candidate_tokens=[1024, 2048], seeds=2)
    fanformer, llama = comparison.architectures
    assert comparison.cells == [(fanformer, 1024), (fanformer, 2048), (fanformer, 4096), (llama, 4096)]

    ends = [(fanformer, 1024, 4.0), (fanformer, 2048, 3.0), (fanformer, 4096, 2.0), (llama, 4096, 3.0)]
    outcomes = [outcome(spec, budget, seed, loss) for seed in (0, 1) for spec, budget, loss in ends]
    (pair,) = pairs(comparison, arms(comparison, outcomes))
    assert pair.figures["tokens_ratio"].value == pytest.approx(0.5)


def test_several_budgets_pair_architectures_whose_sizes_are_named_differently(corpus):
    comparison = small(corpus, architectures=["nano", "llama@nano"], tokens=[65536, 131072])
    outcomes = [
        outcome(spec, budget, 0, loss)
        for spec, budget, loss in [("nano", 65536, 3.0), ("nano", 131072, 2.0), ("llama@nano", 65536, 4.0)]
    ]
    outcomes.append(outcome("llama@nano", 131072, 0, 3.0))
    found = pairs(comparison, arms(comparison, outcomes))
    assert [(one.candidate, one.baseline, one.variant) for one in found] == [
        ("nano", "llama@nano", 65536),
        ("nano", "llama@nano", 131072),
    ]


@pytest.mark.parametrize(("loss", "expected"), [(2.5, 1.0), (1.0, 2.0), (4.0, 0.5)])
def test_a_baseline_off_the_ladder_is_set_beside_its_nearest_rung(corpus, loss, expected):
    comparison = small(corpus, architectures=["fanformer@50k", "fanformer@200k", "llama@100k"])
    outcomes = [
        outcome(spec, 4096, seed, value)
        for seed in (0, 1)
        for spec, value in (("fanformer@50k", 3.0), ("fanformer@200k", 2.0), ("llama@100k", loss))
    ]
    for one in outcomes:
        one.result.figures["parameters"] = {"5": 50, "2": 200, "1": 100}[one.trial.architecture.split("@")[1][0]]
    comparison = replace(comparison, tokens=(4096,))
    [(name, (ratio, seeds))] = parameters_ratio(arms(comparison, outcomes), comparison).items()
    assert (name, seeds, ratio.value) == ("llama@100k", [0, 1], pytest.approx(expected))


def test_speeds_of_different_machines_are_not_divided(corpus):
    comparison = small(corpus, tokens=4096)
    outcomes = [outcome(spec, 4096, 0, 2.0) for spec in comparison.architectures]
    (pair,) = pairs(comparison, arms(comparison, outcomes))
    assert "train_tokens_per_second_ratio" in pair.figures
    outcomes[1].result.details["hardware"] = {"cpu": "another"}
    (pair,) = pairs(comparison, arms(comparison, outcomes))
    assert "train_tokens_per_second_ratio" not in pair.figures


@pytest.mark.ci
def test_a_budget_of_the_candidate_above_the_baselines_stands_beside_their_largest(corpus, tmp_path):
    comparison = small(corpus, tokens=2048, candidate_tokens=4096, seeds=2)
    fanformer, llama = comparison.architectures
    ends = [(fanformer, 2048, (3.0, 3.5)), (fanformer, 4096, (2.0, 2.25)), (llama, 2048, (2.5, 2.5))]
    outcomes = [outcome(spec, budget, seed, loss) for spec, budget, of in ends for seed, loss in enumerate(of)]
    for one in outcomes:  # operations of a token, and how many of them a second has
        one.result.figures["training_operations_per_token"] = 1.0 if one.trial.architecture == fanformer else 2.0
        one.result.figures["tokens_per_second"] = 100.0 if one.trial.architecture == fanformer else 40.0
    found = arms(comparison, outcomes)
    equal, longer = pairs(comparison, found)
    assert (equal.variant, equal.baseline_variant) == (2048, 2048)
    assert equal.figures["bits_per_byte_difference"].value == pytest.approx(0.75)
    assert "whole_training_operations_ratio" not in equal.figures
    assert (longer.variant, longer.baseline_variant) == (4096, 2048)
    assert longer.figures["bits_per_byte_difference"].value == pytest.approx(-0.375)
    assert longer.figures["whole_training_operations_ratio"].value == 1.0
    assert longer.figures["whole_training_seconds_ratio"].value == pytest.approx(0.8)
    assert 1 < longer.figures["tokens_ratio"].value < 2  # between the ends of the candidate's two trainings
    write_comparison(tmp_path, "equal", "fanformer compare", comparison, outcomes, None)
    entries = {entry.name: entry for entry in read_ledger(tmp_path)}
    entry = entries["equal-fanformer-60k-4096"]
    assert entry.what == "fanformer@60k beside llama@60k at 4,096 tokens, of which llama@60k had 2,048"
    assert entry.result["bits_per_byte_difference"].value == pytest.approx(-0.375)
    assert entry.result["bits_per_byte_of_llama-60k"].value == 2.5
    page = tmp_path / "page.html"
    write_comparison_page(json.loads(json.dumps(to_record(comparison, outcomes))), page)
    told = Reader(page.read_text()).text
    assert "A fanformer@60k 4,096 B llama@60k 2,048 -0.3750" in told
    assert "A fanformer@60k against B llama@60k" in told  # at equal tokens, above


def test_what_a_name_builds_is_not_taken_for_what_it_built_before(monkeypatch):
    default = Trial("fanformer@1m", 0.01, 0, {})
    from fanformer.comparison.architectures import FAMILIES

    for name, family in list(FAMILIES.items()):
        monkeypatch.setitem(FAMILIES, name, replace(family, block=7 if name == "fanformer" else 6))
    specs = ["fanformer@1m", "nano", "llama@1m", "cola-llama@1m", "1b", "llama@1m:initialisation=library"]
    assert [architecture(spec).block for spec in specs] == [7, 7, 6, 6, 7, 1]
    assert len({replace(default, block=block).name for block in (1, 2, 7)}) == 3


def test_the_rate_of_factors_is_the_defaults_own_and_in_its_name_alone(corpus, tmp_path):
    """What the preset sets for its own block reaches no other; names of trainings from before hold."""
    comparison, rates, named = small(corpus), {}, {}
    for spec in ("fanformer@60k", "fanformer-tuned@60k", "cola-llama@60k", "llama@60k"):
        trial = Trial(spec, 0.01, 0, comparison.settings(spec, 1280), block=architecture(spec).block)
        rates[spec] = language_config(trial, tmp_path).optimizer.muon_factor_scale
        named[spec] = "muon_factor_scale" in trial.settings
    assert rates == dict.fromkeys(rates, 1.0) | {"fanformer@60k": 0.55}
    assert named == dict.fromkeys(named, False) | {"fanformer@60k": True}
    asked = small(corpus, run={**comparison.run, "muon_factor_scale": 0.7})
    assert asked.settings("fanformer@60k", 1280)["muon_factor_scale"] == 0.7


@pytest.mark.parametrize(
    ("spec", "number", "expected"),
    [
        ("fanformer@300k", 6, [-0.0575, 0.1230, -0.0408, 0.0366]),
        ("fanformer-tuned@300k", 3, [-0.1225, -0.0402, 0.0800, -0.1081]),
        ("llama@300k", 2, [-0.1266, 0.0523, 0.0624, 0.0022]),
        ("cola-llama@300k", 2, [-0.0389, -0.0718, 0.0479, 0.1970]),
    ],
)
def test_the_number_of_what_names_build_is_that_of_their_logits(spec, number, expected):
    torch.manual_seed(0)
    model = architecture(spec).build(NEEDED).eval()
    with torch.no_grad():
        logits = model(torch.arange(32)[None]).logits[0, -1, :4].tolist()
    assert (architecture(spec).block, logits) == (number, pytest.approx(expected, abs=1e-4)), (
        f"{spec} has changed: raise the `block` of its family"
    )


def test_tokens_ratio_reads_the_worse_curves_final_loss():
    slow = [{"tokens": t, "val_loss": loss} for t, loss in ((100, 4.0), (200, 3.0), (400, 2.0))]
    fast = [{"tokens": t, "val_loss": loss} for t, loss in ((100, 3.0), (200, 2.0), (400, 1.0))]
    assert tokens_ratio(fast, slow) == pytest.approx(0.5)
    assert tokens_ratio(slow, fast) == pytest.approx(2.0)
    assert tokens_ratio(slow, slow) == pytest.approx(1.0)
