"""The evidence page is what the ledger gives, judges by whole intervals, and its rows lack nothing."""

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest

from fanformer.comparison.ledger import EXACT, LOST_SEEDS, Entry, Figure, read_ledger, write_entry
from fanformer.errors import ConfigError, DataError


@pytest.fixture
def claims(repository, monkeypatch):
    monkeypatch.syspath_prepend(str(repository / "benchmarks" / "evidence"))
    import claims

    return claims


@pytest.fixture
def evidence(claims):
    import evidence

    return evidence


@pytest.fixture
def copy(repository, tmp_path):
    """A copy of what the page is made from."""
    shutil.copytree(repository / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    for name in ("claims.yaml", "performance.yaml"):
        shutil.copy(repository / "benchmarks" / name, tmp_path / "benchmarks")
    return tmp_path


def entry(name="compare-1", figure=None, **fields):
    values = {
        "what": "a comparison",
        "kind": "comparison",
        "command": "fanformer compare a b",
        "date": "2026-11-25",
        "seeds": [1, 2, 3],
        "configuration": {"scale": "92m"},
        "data": None,
        "hardware": {"cpu": "a processor", "cores": 2},
        "versions": {"torch": "2.13.0"},
        "result": {"ratio": figure or Figure(0.5, "times", 0.4, 0.6, "95% t-interval over 3 seeds")},
    }
    return Entry(name=name, **{**values, **fields})


def claim(claims, **fields):
    values = {"id": "c", "claim": "smaller", "command": "x", "entry": "compare-*", "figure": "ratio", "scale": "92m"}
    return claims.Claim(**{**values, **(fields or {"at_most": 0.69})})


def test_committed_page_is_what_the_ledger_gives(evidence, repository):
    assert evidence.difference(repository) == []


def test_page_comes_out_the_same_to_the_byte_in_another_process(repository, copy):
    code = "import sys; sys.path[:0] = ['benchmarks/evidence']; import pathlib, evidence;" + (
        "evidence.build(*map(pathlib.Path, sys.argv[1:]))"
    )
    for name in ("one", "two"):
        command = [sys.executable, "-c", code, str(copy), str(copy / name)]
        subprocess.run(command, check=True, cwd=repository)
    files = sorted(path.relative_to(copy / "one") for path in (copy / "one").rglob("*") if path.is_file())
    assert [path.suffix for path in files].count(".svg") >= 1
    for name in files:
        assert (copy / "one" / name).read_bytes() == (copy / "two" / name).read_bytes() != b""


def test_every_row_of_the_page_has_command_seeds_interval_and_hardware(claims, evidence, repository):
    entries = read_ledger(repository / evidence.LEDGER)
    rows = claims.judge(claims.load_claims(repository / evidence.CLAIMS), entries)
    assert claims.problems(rows, entries) == []
    lines = evidence.claims_table(rows).splitlines()
    assert len(lines) == len({row.claim.id for row in rows}) + 2
    table = evidence.how_table([row.entry for row in rows if row.entry is not None]).splitlines()
    how = [[cell.strip().split("<br>") for cell in line.strip("|").split(" | ")] for line in table[2:]]
    assert all(date and hardware for (date,), (hardware,), *_ in how)
    made = {line[0]: line[1:] for _, _, *cells in how for line in zip(*cells, strict=True)}
    shown = 0
    for line in lines[2:]:
        _, threshold, verdicts, measured, names = (cell.strip() for cell in line.strip("|").split(" | "))
        assert threshold
        for verdict, figure, name in zip(*(cell.split("<br>") for cell in (verdicts, measured, names)), strict=True):
            shown += 1
            if verdict != claims.NOT_MEASURED:
                assert "(" in figure
                assert all(made[name])
    assert shown == len(rows)
    kept = evidence.of_nearest_scale(rows)
    assert {row.claim.id for row in kept} == {row.claim.id for row in rows}
    for row in kept:
        scales = {one.verdict for one in kept if one.claim.id == row.claim.id}
        assert claims.OTHER_SCALE not in scales or scales == {claims.OTHER_SCALE}


def test_pages_are_short_enough_to_read(repository):
    for name, most in (("evidence.md", 205), ("performance.md", 125)):
        page = (repository / "docs" / name).read_text()
        assert len(page.splitlines()) <= most
        for paragraph in page.split("\n\n"):
            assert paragraph.startswith("|") or len(paragraph.split()) <= 80
    assert len(list((repository / "docs" / "evidence").iterdir())) <= 6  # a picture for each question at most


def test_claim_of_an_unknown_group_is_named(evidence, copy):
    path = copy / evidence.CLAIMS
    path.write_text(path.read_text().replace("group: size", "group: sise", 1))
    with pytest.raises(ConfigError, match=r"`group` of claim size must be one of size, quality, .*, got 'sise'"):
        evidence.build(copy, copy / "out")


@pytest.mark.parametrize(
    ("low", "high", "limits", "expected"),
    [
        (0.4, 0.6, {"at_most": 0.69}, "holds"),
        (0.4, 0.7, {"at_most": 0.69}, "undecided"),
        (0.7, 0.8, {"at_most": 0.69}, "does not hold"),
        (1.0, 1.2, {"at_least": 1.0}, "holds"),
        (0.9, 1.2, {"at_least": 1.0}, "undecided"),
        (0.8, 0.9, {"at_least": 1.0}, "does not hold"),
        (0.0, 0.0, {"more_than": 0.0}, "does not hold"),
        (0.0, 0.1, {"more_than": 0.0}, "undecided"),
        (0.01, 0.1, {"more_than": 0.0}, "holds"),
        (-0.2, -0.1, {"less_than": 0.0}, "holds"),
        (0.0, 0.1, {"less_than": 0.0}, "does not hold"),
        (3, 4, {"at_least": 2, "at_most": 5}, "holds"),
        (5, 6, {"at_least": 2, "at_most": 5}, "undecided"),
        (6, 7, {"at_least": 2, "at_most": 5}, "does not hold"),
    ],
)
def test_whole_interval_decides(claims, low, high, limits, expected):
    figure = Figure((low + high) / 2, "times", low, high, "range of 2 repetitions")
    assert claims.verdict(claim(claims, **limits), figure, entry()) == expected


def test_one_measurement_decides_nothing_and_an_exact_one_does(claims):
    assert claims.verdict(claim(claims), Figure(0.1, "times"), entry()) == "undecided"
    assert claims.verdict(claim(claims), Figure(0.1, "times", interval=EXACT), entry()) == "holds"
    assert claims.verdict(claim(claims), Figure(0.7, "times", interval=EXACT), entry()) == "does not hold"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "holds"),
        ({"seeds": [1, 2]}, "undecided"),
        ({"seeds": [1, 2], "kind": "benchmark"}, "holds"),  # whose seeds are of the prompts, say
        ({"details": {LOST_SEEDS: ["nano, seed 4"]}}, "undecided"),
    ],
)
def test_trainings_decide_by_three_seeds_of_which_none_was_lost(claims, fields, expected):
    assert claims.verdict(claim(claims), entry().result["ratio"], entry(**fields)) == expected
    exact = Figure(0.1, "times", interval=EXACT)
    assert claims.verdict(claim(claims), exact, entry(**fields)) == "holds"


def test_the_difference_of_two_entries_has_the_fewer_seeds_and_the_lost_ones_of_both(claims):
    both = claim(claims, candidate="fan", baseline="llama", less_than=1.0, entry="rule-*")
    one, other = entry(name="rule-fan", kind="rule"), entry(name="rule-llama", kind="rule")
    assert claims.judge([both], [one, other])[0].verdict == "holds"
    for fields in ({"seeds": [1, 2]}, {"details": {LOST_SEEDS: ["llama, seed 4"]}}):
        assert claims.judge([both], [one, dataclasses.replace(other, **fields)])[0].verdict == "undecided"


def test_other_scale_is_shown_and_not_judged_and_an_unknown_one_is_an_error(claims):
    small = entry(configuration={"preset": "nano"})
    (row,) = claims.judge([claim(claims)], [small])
    assert (row.verdict, row.figure.value) == ("not measured at this scale", 0.5)
    with pytest.raises(DataError, match=r"entry compare-1 measures claim c, which is about scale 92m: `conf"):
        claims.judge([claim(claims)], [entry(configuration={})])


def test_claim_without_an_entry_is_not_measured(claims):
    assert [row.verdict for row in claims.judge([claim(claims)], [])] == ["not measured"]
    assert [row.verdict for row in claims.judge([claim(claims)], [entry(name="other")])] == ["not measured"]


def test_rule_is_the_difference_of_two_entries_that_both_learned(claims):
    def rule(name, value, train):
        result = {"hole": Figure(value, "share", value - 0.1, value + 0.1, "interval"), "train": Figure(train, "share")}
        return entry(name=name, kind="rule", result=result)

    better = claims.Claim(
        "r",
        "better",
        "x",
        "rule-*",
        "hole",
        more_than=0,
        candidate="fan",
        baseline="llama",
        counts_from={"train": 0.99},
    )
    (row,) = claims.judge([better], [rule("rule-fan", 0.8, 1), rule("rule-llama", 0.5, 0.995)])
    assert (row.figure.low, row.figure.high) == (pytest.approx(0.1), pytest.approx(0.5))
    assert row.verdict == "holds"
    (row,) = claims.judge([better], [rule("rule-fan", 0.8, 1), rule("rule-llama", 0.5, 0.9)])
    assert row.verdict == "does not count"
    assert claims.judge([better], [rule("rule-fan", 0.8, 1)])[0].verdict == "not measured"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"command": " "}, "entry compare-1 lacks its command"),
        ({"seeds": []}, "entry compare-1 lacks its seeds: only benchmarks may have nothing random"),
        ({"hardware": {"cpu": "", "cores": 2}}, "entry compare-1 lacks its hardware: `cpu` and `cores` are needed"),
        ({"result": {"ratio": Figure(1, "times")}}, "entry compare-1 lacks the interval of `ratio` over its 3 seeds"),
    ],
)
def test_row_that_lacks_something_is_named(claims, fields, message):
    assert claims.problems([], [dataclasses.replace(entry(), **fields)]) == [message]
    judged = claims.Row(claim(claims), "holds", Figure(1, "times"), entry())
    assert claims.problems([judged], []) == ["claim c is judged without an interval"]


def test_corrupted_ledger_makes_no_page(evidence, copy):
    path = write_entry(copy / evidence.LEDGER, entry(seeds=[]))
    with pytest.raises(DataError, match=r"the evidence page cannot be made: entry compare-1 lacks its seeds"):
        evidence.build(copy, copy / "out")
    path.write_text(path.read_text().replace('"hardware":', '"hardwares":', 1))
    with pytest.raises(DataError, match=r"measurements\.jsonl, line 1: `hardware` is missing"):
        evidence.build(copy, copy / "out")
    assert not (copy / "out").exists()


def test_an_ablation_is_a_table_of_differences_the_best_first(evidence):
    seeds = "95% t-interval over 2 seeds"
    result = {
        "bits_per_byte_of_a": Figure(2.0, "bits per byte", 1.9, 2.1, seeds),
        "bits_per_byte_of_b": Figure(1.75, "bits per byte", 1.5, 2.0, seeds),
        "difference_of_b": Figure(-0.25, "bits per byte", -0.5, 0.0, seeds),
    }
    arms, sizes = {"a": "fanformer@1m", "b": "fanformer@1m:x=1"}, {"a": 1_000_000, "b": 1_000_100}
    details = {"default": "a", "arms": arms, "parameters_without_embeddings": sizes, "troubles": ["c: diverged"]}
    (row,) = evidence.ablations_table([entry(kind="ablation", result=result, details=details)]).splitlines()[2:]
    assert [cell.strip().split("<br>") for cell in row.strip("|").split(" | ")] == [
        ["`compare-1`, 92m"],
        ["`fanformer@1m:x=1`", "`fanformer@1m`", "without result: c: diverged"],
        ["1,000,100", "1,000,000", "-"],
        ["1.7500", "2.0000", "-"],
        ["-0.2500 [-0.5000, +0.0000]", "the default", "-"],
    ]


def test_continuations_of_a_series_share_a_picture_with_naive_forecasts(evidence, copy):
    told = {"trained_steps": 1, "baselines": {"persistence": [1.0, 2.0], "a day ago": [0.5, 0.5], "week": [0.2, 0.3]}}
    curve = [{"step": step, "error": 0.5, "low": 0.25, "high": 0.75} for step in (1, 2)]
    for spec, own in (("fanformer", ""), ("llama", ",a=2")):
        about = {"kind": "rule", "configuration": {"architecture": f"{spec}@1:b=3{own}"}, "curve": curve}
        details = {"part_of": "hours", "horizon": told}
        made = entry(name=f"periodic-{spec}-new", **about, details=details)
        result = {name: Figure(1.0, "share", 1.0, 1.0, "95%") for name in ("hole_accuracy", "train_accuracy")}
        write_entry(copy / "benchmarks" / "results", dataclasses.replace(made, result=result))
    evidence.build(copy, copy)
    text = (copy / "docs" / "evidence" / "hours.svg").read_text()
    assert [word in text for word in (">fanformer@1<", ">llama@1:a=2<", ">a day ago<", ">week<")] == [True] * 4
    assert "persistence" not in text  # above all that is drawn


def test_arms_of_a_comparison_share_a_picture(evidence, tmp_path):
    curve = [{"tokens": tokens, "loss": 2.0 / tokens, "arm": arm} for arm in ("a", "b") for tokens in (1, 2)]
    evidence.draw_curves(entry(name="both", curve=curve), tmp_path / "both.svg")
    text = (tmp_path / "both.svg").read_text()
    assert ">a</text>" in text
    assert ">b</text>" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"at_mots": 1}, "claim c: `at_mots` is not a field: did you mean `at_most`?"),
        ({"figure": ""}, "claim c: `figure` must be a text, got ''"),
        ({}, "claim c needs one of at_least, at_most, more_than, less_than: nothing is claimed without"),
    ],
)
def test_malformed_claim_is_named(claims, tmp_path, change, message):
    path = tmp_path / "claims.yaml"
    path.write_text(json.dumps([{"id": "c", "claim": "x", "command": "x", "entry": "*", "figure": "f", **change}]))
    with pytest.raises(ConfigError) as caught:
        claims.load_claims(path)
    assert str(caught.value).startswith(f"claims.yaml: {message}")
