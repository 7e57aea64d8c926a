"""The benchmark of training together: attacks do what they are called, tables say what was measured, all in little."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from fanformer.community.plan import Task
from fanformer.community.updates import Limits, Update, decode_update, encode_update, shapes_of
from fanformer.errors import DataError

TENSORS = {"a": torch.randn(20, 8, generator=torch.Generator().manual_seed(0)), "b": torch.linspace(-1, 1, 300)}
LIKE = shapes_of(TENSORS)
LIMITS = Limits(1000)


@pytest.fixture
def quality(repository, monkeypatch):
    """The benchmark's modules."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks" / "quality"))
    import community_attacks
    import community_tables

    import community

    return SimpleNamespace(run=community, attacks=community_attacks, tables=community_tables)


def honest(number):
    tensors = {name: tensor + number for name, tensor in TENSORS.items()}
    return encode_update(Update(tensors, number, f"{number:064x}", "eve", 100, 3.0))


def task(number):
    return Task(number, f"{number:064x}", 0, 10, 0, 0, None)


def sent(quality, kind, rounds=1):
    attacker = quality.attacks.Attacker(kind, 8, seed=1)
    return [attacker.send(task(number), honest(number), LIKE) for number in range(rounds)]


def norm(update):
    return sum(float(tensor.square().sum()) for tensor in update.tensors.values()) ** 0.5


@pytest.mark.parametrize("kind", ["nan", "oversized", "shapes"])
def test_what_is_no_update_is_refused(quality, kind):
    assert decode_update(honest(0), LIKE, LIMITS).tokens == 100
    with pytest.raises(DataError):
        decode_update(sent(quality, kind)[0], LIKE, LIMITS)


def test_changed_updates_are_changed_as_they_are_called(quality):
    true = decode_update(honest(0), LIKE, LIMITS)
    found = {
        kind: decode_update(sent(quality, kind)[0], LIKE, LIMITS) for kind in ("scaled", "flipped", "random", "bias")
    }
    assert norm(found["scaled"]) == pytest.approx(100 * norm(true), rel=0.01)
    torch.testing.assert_close(found["flipped"].tensors["a"], -true.tensors["a"])
    assert norm(found["random"]) == pytest.approx(norm(true), rel=0.15)
    product = sum(float((found["random"].tensors[name] * true.tensors[name]).sum()) for name in LIKE)
    assert abs(product) < 0.2 * norm(true) ** 2
    biased = [decode_update(payload, LIKE, LIMITS) for payload in sent(quality, "bias", 2)]
    pushes = [one.tensors["b"] - TENSORS["b"] - number for number, one in enumerate(biased)]
    cosine = torch.nn.functional.cosine_similarity(pushes[0], pushes[1], dim=0)
    assert cosine > 0.95  # the same way each time; what is left is coding
    assert 0.1 < norm(SimpleNamespace(tensors={"b": pushes[0]})) / norm(true) < 0.4


def test_replayed_and_stale_updates_have_old_numbers_under_new_labels(quality):
    decoded = [decode_update(payload, LIKE, LIMITS) for payload in sent(quality, "replayed", 3)]
    assert [one.round for one in decoded] == [0, 1, 2]
    assert len({one.digest for one in decoded}) == 1
    decoded = [decode_update(payload, LIKE, LIMITS) for payload in sent(quality, "stale", 5)]
    assert [one.round for one in decoded] == [0, 0, 0, 3, 4]  # nothing old enough before
    first = [decode_update(honest(number), LIKE, LIMITS).digest for number in range(2)]
    assert [decoded[3].digest, decoded[4].digest] == first


def test_bytes_are_those_of_payloads_and_of_a_ring(quality):
    sizes = {"parameters": 1000, "update_8": 1100, "base_float32": 4100, "update_4": 600, "base_float16": 2100}
    assert quality.tables.ddp_bytes(1000, 4) == 2 * 2 * 3 / 4 * 4000
    assert quality.tables.bytes_ratio(sizes, "8 bits, base in float32", 500, 4) == pytest.approx(12000 * 500 / 5200)
    figures = quality.tables.figures("bytes", {"simulated": sizes})
    assert figures["simulated_500x2_update_4_base_float16"].value == pytest.approx(8000 * 500 / 2700)
    little = quality.tables.payload_sizes(dict(quality.run.LITTLE))
    assert little["parameters"] < little["update_8"] < 2 * little["parameters"]
    assert little["parameters"] / 2 < little["update_4"] < little["update_8"]
    table = quality.tables.table("bytes", {"simulated": sizes})
    assert "| 500 | 769 times | 1,154 times | 1,346 times |" in table


def test_tables_have_ratios_seed_by_seed(quality):
    found = {"sync": [{"loss": 2.0}, {"loss": 4.0}], "30x2": [{"loss": 2.02}, {"loss": 4.04}]}
    lines = quality.tables.table("loss", found).splitlines()
    assert lines[2] == "| synchronous training | 3.0000 |  |  |"
    assert lines[3] == "| 2 members, rounds of 30 steps | 3.0300 | +1.00% (+1.00 to +1.00) | +0.7% |"
    assert quality.tables.figures("loss", found)["ratio_30x2"].value == pytest.approx(1.01)
    attacked = {"loss": 2.2, "false_dropped": 1.0, "false_clipped": 0.0, "honest_dropped": 0.25, "rejected_rounds": 1,
                "rounds": 9}  # fmt: skip
    lines = quality.tables.table("attacks", {"clean": [{**attacked, "loss": 2.0}], "nan": [attacked]}).splitlines()
    told = quality.tables.figures(
        "attacks", {"clean": [{"loss": 2.0}], "nan": [{"loss": 2.1}], "bias": [{"loss": 2.2}]}
    )
    assert told["ratio_worst"].value == pytest.approx(1.1)
    assert lines[3] == "| not a number | 2.2000 | +10.00% | 100% | 0% | 25% | 1 of 9 |"


def test_the_page_has_a_place_for_every_table(quality, repository, tmp_path):
    page = tmp_path / "page.md"
    page.write_text((repository / "docs" / "community.md").read_text(encoding="utf-8"), encoding="utf-8")
    for part in quality.run.PARTS:
        quality.tables.insert_table(page, part, f"| {part} |")
        quality.tables.insert_table(page, part, f"| {part} again |")
    text = page.read_text(encoding="utf-8")
    assert [f"| {part} again |" in text and f"| {part} |" not in text for part in quality.run.PARTS] == [True] * 5
    with pytest.raises(SystemExit, match="must have the marks <!-- table: other -->"):
        quality.tables.insert_table(page, "other", "")


def test_the_cells_are_those_of_the_page(quality, tmp_path):
    names = [cell.name for cell in quality.run.cells(quality.run.parse(["--seeds", "2"]))]
    assert len(names) == len(set(names)) == 2 * (8 + 11 + 4 + 4)
    assert {"loss-sync-0", "loss-500x4-1", "attacks-bias-0", "coding-fragments-1", "uneven-slow-0"} <= set(names)
    for cell in quality.run.cells(quality.run.parse([])):
        assert cell.setting.members == 0 or cell.setting.rows % cell.setting.members == 0
        assert cell.setting.steps % cell.setting.round_steps in (0, 10)
    asked = quality.run.parse(["--work", str(tmp_path), "--dry-run"])
    (tmp_path / "settings.json").write_text(json.dumps({**quality.run.settings(asked), "rows": 5}))
    with pytest.raises(SystemExit, match="was begun with rows 5, got 8: give another --work"):
        quality.run.prepare(asked)


def test_a_table_is_not_replaced_by_part_of_it(quality, capsys):
    with pytest.raises(SystemExit):
        quality.run.parse(["--write", "--arms", "sync"])
    assert "--write needs all arms of a part" in capsys.readouterr().err


def test_what_a_signal_cut_short_is_no_result(quality):
    import community_run

    community_run._end_where_asked(None)
    with pytest.raises(SystemExit, match="stopped by SIGTERM: the same command goes on"):
        community_run._end_where_asked("SIGTERM")


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_of_it_in_little_and_nothing_twice(repository, tmp_path):
    script = repository / "benchmarks" / "quality" / "community.py"
    words = [sys.executable, script, "--dry-run", "--work", tmp_path / "work"]

    def run():
        done = subprocess.run(words, capture_output=True, text=True, timeout=500, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    first = run()
    results = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "work/results").iterdir()}
    assert len(results) == 24 + 1
    dropped = {
        attack: json.loads((tmp_path / f"work/results/attacks-{attack}-0.json").read_text())["false_dropped"]
        for attack in ("nan", "oversized", "shapes", "replayed")
    }
    replayed = dropped.pop("replayed")
    assert dropped == {"nan": 1.0, "oversized": 1.0, "shapes": 1.0}
    assert replayed >= 0.75  # the first of four is no replay yet
    again = run()
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "work/results").iterdir()} == results
    tables = [re.sub(r"^.*: loss .*\n", "", text, flags=re.MULTILINE) for text in (first, again)]
    assert tables[0] == tables[1]
