"""The drill's arithmetic: its estimate of a round is that of docs/community.md, its checks find what they are for."""

import json
import re

import pytest


@pytest.fixture
def drill(repository, monkeypatch):
    monkeypatch.syspath_prepend(str(repository / "benchmarks" / "proofs"))
    import community_drill

    return community_drill


def test_the_table_of_costs_is_the_estimate(drill, repository):
    text = (repository / "docs" / "community.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (92M|1B), (\d+), (\d) bit \| ([\d.]+) ([MG])B \| ([\d.]+) ([MG])B \| ([\d.]+) (s|min)",
                      text, re.MULTILINE)  # fmt: skip
    assert len(rows) == 4
    units = {"M": 1e6, "G": 1e9, "s": 1, "min": 60}
    for model, members, bits, base, base_unit, update, update_unit, time, time_unit in rows:
        parameters = {"92M": 92_230_144, "1B": 10**9}[model]
        found = drill.estimate(parameters, int(members), 100e6, 20e6, 1e9, int(bits))
        assert float(base) * units[base_unit] == pytest.approx(2 * parameters, rel=0.01)
        update_bytes = (int(bits) + 32 / 128) / 8 * parameters
        assert float(update) * units[update_unit] == pytest.approx(update_bytes, rel=0.01)
        assert float(time) * units[time_unit] == pytest.approx(sum(found.values()), rel=0.02)


def a_record(number, base, result, digest):
    verdict = {"member": "ada", "counted": True, "digest": digest, "reason": ""}
    return {"round": number, "accepted": True, "number": number, "base": base, "result": result, "verdicts": [verdict]}


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([a_record(1, "a", "b", "x"), a_record(3, "b", "c", "y")], "accepted rounds are numbered"),
        ([a_record(1, "a", "b", "x"), a_record(2, "a", "c", "y")], "round 2 does not begin with what round 1 came to"),
        ([a_record(1, "a", "b", "x"), a_record(2, "b", "c", "x")], "an update counted twice"),
        ([a_record(1, "a", "b", "x"), a_record(2, "b", "c", "y")], "is not the last round's result"),
    ],
)
def test_a_lost_or_repeated_round_is_found(drill, tmp_path, records, words):
    import torch
    from safetensors.torch import save_file

    class Records:
        """The folder of a run, as the drill reads it."""

        run = tmp_path

        def records(self):
            return records

    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    found = drill.check_rounds(Records())
    assert any(words in one for one in found), found
    assert any("verify says" in one for one in found)


def test_what_was_violated_is_told(drill):
    fine = {"faults": {"wrong": []}, "attacks": {"attacks": {"nan": {"over_clean": 0.004}}}, "refusals": {"a": True}}
    assert drill.violated(fine) == []
    bad = json.loads(json.dumps(fine))
    bad["attacks"]["attacks"]["nan"]["over_clean"] = 0.02
    bad["refusals"]["a"] = False
    assert drill.violated(bad) == ["with nan the loss is +2.00% of the clean one", "a was not refused"]
