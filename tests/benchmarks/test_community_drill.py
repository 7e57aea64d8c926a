"""The drill's arithmetic: its estimate of a round is that of docs/community.md, its checks find what they are for."""

import contextlib
import json
import re
import sys
from types import SimpleNamespace

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


class Measured:
    """Stands where a camp behind a slow link is; what its member says is given."""

    output, model = "", {}

    def __init__(self, folder, spaces, **plan):
        self.run, self.members = folder, {"ada": self}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def make_key(self, name):
        pass

    def start_host(self):
        (self.run / "status.json").write_text(json.dumps({"parameters": 1_000_000, "update_bytes": 1_031_250}))

    def join(self, name, program):
        assert program[1:] == ("--tell-moving",)

    def wait_for_end(self, seconds):
        pass


@pytest.mark.parametrize(
    ("shaped", "up"), [("20mbit, 100ms, 1% loss", 1.22 * 1448 * 8 / 0.01), ("20mbit alone", 20e6)], ids=["loss", "rate"]
)
def test_what_moving_took_stands_beside_the_estimate_for_it(drill, tmp_path, monkeypatch, shaped, up):
    monkeypatch.setattr(drill, "Camp", Measured)
    monkeypatch.setattr(drill, "can_have_namespaces", lambda: True)
    monkeypatch.setattr(drill, "namespaces", lambda names: contextlib.nullcontext({"ada": "space"}))
    monkeypatch.setattr(drill, "shape_link", lambda *words: shaped)
    with pytest.raises(RuntimeError, match="the member must tell what moving took, got no time of it"):
        drill.links(tmp_path)
    monkeypatch.setattr(Measured, "output", "64 tokens in 30.0 s\nmoved in 9.00 s\nround 1\nmoved in 4.25 s\n")
    found = drill.links(tmp_path)["measured"]
    assert found["moving_seconds"] == [9.0, 4.25]
    assert found["estimate_seconds"] == pytest.approx(sum(drill.estimate(10**6, 1, 1e9, up, 1e9).values()))


def test_the_page_says_what_loss_leaves_of_the_link(drill, repository):
    text = " ".join((repository / "docs" / "community.md").read_text(encoding="utf-8").split())
    assert f"one TCP stream gets {drill.bits_per_second('1% loss') / 1e6:.1f} Mbit/s" in text


def test_moving_is_fetching_an_offer_and_sending_its_update(drill, monkeypatch, capsys):
    import community_member

    from fanformer.community.flower.node import Node

    clock = iter([10.0, 11.5, 20.0, 30.0, 32.0])
    monkeypatch.setattr(Node, "_fetch", lambda self, head, tree: "a message")
    monkeypatch.setattr(Node, "_send", lambda self, message, content: None)
    monkeypatch.setattr(community_member, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    community_member.tell_moving()
    node = Node.__new__(Node)
    assert node._fetch("head", "tree") == "a message"
    node._send("an older message", {"refusal": "overtaken"})
    node._send("a message", {"update": "numbers"})
    assert capsys.readouterr().out == "moved in 3.50 s\n"


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


FOUND = {
    "faults": {"faults": {"kill host": 2, "cut link": 3}, "wrong": [], "seconds": 600, "spaces": True},
    "attacks": {"clean": 6.0, "attacks": {"nan": {"loss": 6.024, "over_clean": 0.004, "reasons": ["not finite"]}}},
    "refusals": {"an unregistered key": True},
    "links": {
        "of_1b_and_100_members": {"base_seconds": 1600.0, "update_seconds": 825.0,
                                  "of_4_bits": {"base_seconds": 1600.0, "update_seconds": 425.0}},
        "measured": {"shaped": "20mbit alone", "parameters": 3_000_000, "update_bytes": 3_100_000,
                     "estimate_seconds": 1.3, "moving_seconds": [9.0, 4.0, 5.0]},
    },
}  # fmt: skip


def test_what_was_violated_is_told(drill):
    assert [drill.violated(part, found) for part, found in FOUND.items()] == [[]] * 4
    bad = json.loads(json.dumps(FOUND))
    bad["faults"]["wrong"] = ["an update counted twice"]
    bad["attacks"]["attacks"]["nan"]["over_clean"] = 0.02
    bad["refusals"]["an unregistered key"] = False
    assert [drill.violated(part, found) for part, found in bad.items()] == [
        ["an update counted twice"],
        ["with nan the loss is +2.00% of the clean one"],
        ["an unregistered key was not refused"],
        [],
    ]
    assert drill.violated("links", {"failed": "x"}) == ["links did not come to its end: x"]


def test_a_part_that_fails_is_told_and_the_others_go_on(drill, tmp_path, monkeypatch):
    def never(folder):
        raise TimeoutError("waited 240 s for 1 rounds")

    monkeypatch.setattr(drill, "attacks", never)
    found = drill.do_part("attacks", tmp_path, 2, 0)
    assert found == {"failed": "TimeoutError: waited 240 s for 1 rounds"}


def test_every_part_has_a_table_and_its_place_in_the_page(drill, repository, tmp_path):
    tables = {part: drill.table_of(part, FOUND[part], 50) for part in drill.PARTS}
    assert "| 50 | 3 | 2 | 10 | 0 |" in tables["faults"]
    assert "| nan | 6.0240 | +0.40% | not finite |" in tables["attacks"]
    assert "| an unregistered key | yes |" in tables["refusals"]
    assert "| 1B parameters, 100 members, 8 bits | 1,031 MB | 40 min |  |" in tables["links"]
    assert "| 3,000,000 parameters, one member, 20mbit alone | 3.1 MB | 1.3 s | 5.0 s |" in tables["links"]
    page = tmp_path / "page.md"
    page.write_text((repository / "docs" / "community.md").read_text(encoding="utf-8"), encoding="utf-8")
    for part, table in tables.items():
        drill.insert_table(page, f"drill-{part}", table)
    assert all(table in page.read_text(encoding="utf-8") for table in tables.values())


def test_every_part_has_an_entry_of_its_own(drill, tmp_path):
    asked = SimpleNamespace(seed=0, rounds=50)
    entries = [drill.entry_of(part, FOUND[part], [], asked) for part in drill.PARTS]
    drill.write_entry(tmp_path, *entries)
    assert len({entry.name for entry in entries}) == 4
    assert entries[-1].result["rounds"].value == 50


def test_members_that_end_by_themselves_are_started_again_and_told(drill, tmp_path):
    commands = sys.modules["community_commands"]
    joined = []

    class Watched(commands.Camp):
        """Says who is joined."""

        def join(self, name, *words, **options):
            joined.append(name)

    with Watched(tmp_path) as camp:
        for name, code in (("ada", 0), ("ben", 2)):
            camp.members[name] = commands.Command(["-c", f"print('bye'); raise SystemExit({code})"], tmp_path / name)
            camp.members[name].wait()
        assert camp.revive() == ["ben ended with 2: bye\n"]
    assert joined == ["ben"]


def test_who_is_started_again_is_started_by_the_same_program(drill, tmp_path, monkeypatch):
    """A member whose clock is wrong has it wrong after a kill too."""
    commands, started = sys.modules["community_commands"], []

    class Ended:
        """Stands where a process was that ended by itself, and not well."""

        output, process = "bye", SimpleNamespace(poll=lambda: 2, wait=lambda: 2, returncode=2)

        def __init__(self, words, log, namespace=""):
            started.append(words)

        def kill(self):
            pass

    monkeypatch.setattr(commands, "Command", Ended)
    monkeypatch.setattr(commands.Camp, "invitation", lambda self, name: "https://host")
    camp = commands.Camp(tmp_path)
    camp.join("cyd", program=(commands.MEMBER_PROGRAM, "--clock-seconds", 2))
    camp.revive()
    monkey = drill.Monkey(camp, ["cyd"], 0)
    monkey._random = SimpleNamespace(choice=lambda choices: choices[0], uniform=lambda low, high: low)
    monkey.strike()
    assert monkey.done == {"kill member": 1}
    assert started == [started[0]] * 3
    assert "--clock-seconds" in started[0]
    camp.join("cyd")
    assert "--clock-seconds" not in started[3]


def test_a_record_that_is_being_written_is_left_for_later(drill, tmp_path):
    camp = sys.modules["community_commands"].Camp(tmp_path)
    assert camp.records() == []
    camp.run.mkdir()
    (camp.run / "rounds.jsonl").write_text('{"round": 0, "accepted": true}\n{"round": 1, "acc')
    assert camp.records() == [{"round": 0, "accepted": True}]
