"""A community run under fire: real commands and processes, killed, frozen, cut off and attacked; and what it costs.

    python benchmarks/proofs/community_drill.py [--only refusals links attacks faults] [--rounds 50] [--write]

Parts: `faults` (kill -9 of random members and of the host, frozen members, cut links, clocks that differ a little),
`attacks` (one of five members sends NaN, its update times 100, or its sign; the loss beside the run without it),
`refusals` (an unregistered key, another certificate, a changed round, a clock an hour off, Flower's commands on the
public port), `links` (moving a round's bytes over a link of 20 Mbit/s, 100 ms and 1% loss, beside the estimate for it,
and the estimate for 1B parameters and 100 members). Links are cut and shaped where this machine may make network
namespaces. A part that fails is told and the others go on; with `--write` each writes its entry of the ledger and its
table of docs/community.md as soon as it is done. It needs the extra `community`. The short form is
tests/community/test_flower.py.
"""

import argparse
import itertools
import json
import random
import re
import signal
import ssl
import statistics
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "quality"))
sys.path.insert(0, str(Path(__file__).parent))

from community_commands import (
    MEMBER_PROGRAM,
    Camp,
    can_have_namespaces,
    fanformer,
    namespaces,
    set_link,
    shape_link,
)
from community_tables import insert_table
from safetensors.torch import load_file

from fanformer.comparison.ledger import EXACT, Figure, measured_today, write_entry

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PARTS = ("refusals", "links", "attacks", "faults")
ATTACKS = ("nan", "scaled", "flipped")
LINK = {"rate": "20mbit", "delay": "100ms", "loss": "1%"}
BITS_PER_SECOND, DELAY_SECONDS, LOSS = 20e6, 0.1, 0.01
_LONGEST_ROUND_SECONDS = 240.0
"""On average over the run under faults; where it takes longer, the run stalls."""


def check_rounds(camp: Camp) -> list[str]:
    """Return what is wrong with the accepted rounds of a run: lost, applied twice, or not what was signed."""
    from fanformer.community.updates import weights_checksum

    accepted = [record for record in camp.records() if record["accepted"]]
    wrong = []
    if [record["number"] for record in accepted] != list(range(1, len(accepted) + 1)):
        wrong.append(f"accepted rounds are numbered {[record['number'] for record in accepted]}")
    for before, after in itertools.pairwise(accepted):
        if before["result"] != after["base"]:
            wrong.append(f"round {after['round']} does not begin with what round {before['round']} came to")
    digests = [verdict["digest"] for record in accepted for verdict in record["verdicts"] if verdict["counted"]]
    if len(digests) != len(set(digests)):
        wrong.append("an update counted twice")
    if accepted and weights_checksum(load_file(camp.run / "model.safetensors")) != accepted[-1]["result"]:
        wrong.append("the model in the run's folder is not the last round's result")
    verified = fanformer("community", "verify", camp.run)
    if verified.returncode:
        wrong.append(f"verify says {verified.stdout}{verified.stderr}")
    return wrong


class Monkey:
    """Does something bad to a run at random times."""

    def __init__(self, camp: Camp, names: list[str], seed: int) -> None:
        """Set up.

        Args:
            camp: whose host and members run.
            names: of the members.
            seed: of what happens when.
        """
        self._camp, self._names, self._random = camp, names, random.Random(seed)
        self.done: dict[str, int] = {}

    def strike(self) -> None:
        """Do one bad thing, and mend it where it does not mend itself."""
        kinds = ["kill member"] * 3 + ["freeze member"] * 2 + ["kill host"] + ["cut link"] * 2 * bool(self._camp.spaces)
        kind, name = self._random.choice(kinds), self._random.choice(self._names)
        self.done[kind] = self.done.get(kind, 0) + 1
        seconds = self._random.uniform(1, 20)
        if kind == "kill host":
            assert self._camp.host is not None, "it was started"
            self._camp.host.kill()
            self._camp.host.process.wait()
            self._camp.start_host()
        elif kind == "kill member":
            self._camp.members[name].kill()
            self._camp.members[name].process.wait()
            self._camp.join_again(name)
        elif kind == "freeze member":
            self._camp.members[name].kill(signal.SIGSTOP)
            time.sleep(seconds)
            self._camp.members[name].kill(signal.SIGCONT)
        else:
            number = self._names.index(name)
            set_link(self._camp.spaces[name], number, "down")
            time.sleep(seconds)
            set_link(self._camp.spaces[name], number, "up")


def faults(folder: Path, rounds: int, seed: int) -> dict[str, Any]:
    """Train under faults and return how many of each there were, and what was violated."""
    names = ["ada", "ben", "cyd"]
    with (
        namespaces(names if can_have_namespaces() else []) as spaces,
        Camp(folder, spaces, rounds=rounds, round_time="90s", keep_last=3) as camp,
    ):
        for name in names:
            camp.make_key(name)
        camp.start_host()
        for name in names[:2]:
            camp.join(name)
        camp.join(names[2], program=(MEMBER_PROGRAM, "--clock-seconds", 2))
        monkey = Monkey(camp, names, seed)
        started, calm = time.monotonic(), random.Random(seed + 1)
        camp.wait_for(1)
        wrong: list[str] = []
        while camp.accepted() < rounds - 1:
            if time.monotonic() - started > _LONGEST_ROUND_SECONDS * rounds:
                raise TimeoutError(f"{camp.accepted()} of {rounds} rounds after {time.monotonic() - started:.0f} s")
            time.sleep(calm.uniform(5, 30))
            wrong += camp.revive()
            if camp.accepted() < rounds - 1:
                monkey.strike()
        camp.wait_for_end(600)
        seconds = round(time.monotonic() - started)
        wrong += check_rounds(camp)
        return {"faults": monkey.done, "wrong": wrong, "seconds": seconds, "spaces": bool(spaces)}


def run_of_five(folder: Path, attack: str) -> tuple[float, list[str]]:
    """Train with five members, the last attacking where that is asked for.

    Returns:
        The last held-out loss, and what was said of the last member's updates.
    """
    names = ["ada", "ben", "cyd", "dot", "eve"]
    with Camp(folder, rounds=8, round_steps=8, min_reports=4, round_time="10m") as camp:
        for name in names:
            camp.make_key(name)
        camp.start_host()
        for name in names[:4]:
            camp.join(name)
        camp.attack("eve", attack) if attack else camp.join("eve")
        camp.wait_for_end(1200)
        records = [record for record in camp.records() if record["accepted"]]
        reasons = {one["reason"] for record in records for one in record["verdicts"] if one["member"] == "eve"}
        return float(records[-1]["held_out_loss"]), sorted(reasons)


def attacks(folder: Path) -> dict[str, Any]:
    """Return the loss of a clean run, and beside it that of each attack."""
    clean, _ = run_of_five(folder / "clean", "")
    found = {}
    for attack in ATTACKS:
        loss, reasons = run_of_five(folder / attack, attack)
        found[attack] = {"loss": loss, "over_clean": loss / clean - 1, "reasons": reasons}
    return {"clean": clean, "attacks": found}


def refusals(folder: Path) -> dict[str, bool]:
    """Return what was refused of that which is to be."""
    found = {}
    with Camp(folder, rounds=2) as camp:
        camp.make_key("ada")
        camp.make_key("spy", registered=False)
        camp.start_host()
        invitation = camp.invitation("ada")
        done = camp.join("spy")
        found["an unregistered key"] = done.wait() == 2 and "does not know `--key`" in done.output
        certificate = invitation.partition("#")[2].partition("-")[0]
        other = invitation.replace(certificate, certificate[::-1])
        done = camp.join("spy", invitation=other)
        found["another certificate"] = done.wait() == 2 and "must begin with" in done.output
        done = camp.join("ada", program=(MEMBER_PROGRAM, "--clock-seconds", 3600))
        found["a clock an hour off"] = done.wait() == 2 and "clock" in done.output
        found["Flower's commands"] = _is_closed(camp.port)
        camp.join("ada")
        camp.wait_for_end()
        weights = camp.run / "checkpoint-2" / "model.safetensors"
        content = weights.read_bytes()
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        verified = fanformer("community", "verify", camp.run)
        found["a changed round"] = verified.returncode == 1 and "model.safetensors" in verified.stdout
    return found


def _is_closed(port: int) -> bool:
    """Whether the public port serves none of Flower's commands."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    for path in ("/v1/control/start-run", "/control/start-run", "/v1/fleet/get-fab", "/v1/fleet/register-node", "/docs",
                 "/v1/runtime/pull-pending-tasks", "/openapi.json"):  # fmt: skip
        try:
            urllib.request.urlopen(f"https://127.0.0.1:{port}{path}", data=b"", context=context, timeout=10)
        except urllib.error.HTTPError as error:
            if error.code == 404:
                continue
        return False
    return True


def update_bytes(parameters: int, bits: int) -> float:
    """Return the bytes of an update: so many bits for a number, and a scale of 32 for every 128 of them."""
    return (bits + 32 / 128) / 8 * parameters


def estimate(parameters: int, members: int, down: float, up: float, host: float, bits: int = 8) -> dict[str, float]:
    """Return the seconds of a round that moving bytes takes.

    Args:
        parameters: of the model.
        members: of a round.
        down: bits per second of a member's link, inwards.
        up: outwards.
        host: of the host's link, each way; all members share it.
        bits: of an update's numbers.
    """
    base, update = 16.0 * parameters, 8 * update_bytes(parameters, bits)
    return {
        "base_seconds": max(base / down, members * base / host),
        "update_seconds": max(update / up, members * update / host),
    }


def bits_per_second(shaped: str) -> float:
    """Return what one TCP stream gets out of a link that is shaped so.

    Source: Mathis et al., The macroscopic behavior of the TCP congestion avoidance algorithm, 1997, for a link with
    loss; a packet has 1448 bytes.
    """
    with_loss = 1.22 * 1448 * 8 / (DELAY_SECONDS * LOSS**0.5)
    return min(BITS_PER_SECOND, with_loss) if "loss" in shaped else BITS_PER_SECOND


def links(folder: Path) -> dict[str, Any]:
    """Measure what a round moves over a slow link, beside its estimate, and estimate a run of 1B parameters."""
    large = estimate(1_000_000_000, 100, 100e6, BITS_PER_SECOND, 1e9)
    found: dict[str, Any] = {"of_1b_and_100_members": large | {"of_4_bits": estimate(10**9, 100, 1e8, 2e7, 1e9, 4)}}
    if not can_have_namespaces():
        return found | {"measured": "this machine may not make network namespaces"}
    plan = {"rounds": 3, "round_steps": 2, "round_time": "10m", "gate": 9}  # every round is to send everything
    with namespaces(["ada"]) as spaces, Camp(folder, spaces, **plan) as camp:
        camp.model = {**camp.model, "hidden_size": 256, "intermediate_size": 1024, "head_dim": 128, "qkv_rank": 192,
                      "o_rank": 128, "gate_up_rank": 192, "down_rank": 192, "num_hidden_layers": 6}  # fmt: skip
        shaped = shape_link(spaces["ada"], 0, LINK["rate"], LINK["delay"], LINK["loss"])
        if not shaped:
            return found | {"measured": "this kernel can shape no link"}
        camp.make_key("ada")
        camp.start_host()
        camp.join("ada", program=(MEMBER_PROGRAM, "--tell-moving"))
        camp.wait_for_end(900)
        status = json.loads((camp.run / "status.json").read_text())
        seconds = [float(one) for one in re.findall(r"moved in ([\d.]+) s", camp.members["ada"].output)]
        if not seconds:
            raise RuntimeError("the member must tell what moving took, got no time of it: see its log.")
        told = estimate(status["parameters"], 1, 1e9, bits_per_second(shaped), 1e9)
        return found | {
            "measured": {
                "shaped": shaped, "parameters": status["parameters"], "update_bytes": status["update_bytes"],
                "moving_seconds": seconds, "estimate_seconds": sum(told.values()),
            }
        }  # fmt: skip


def do_part(part: str, folder: Path, rounds: int, seed: int) -> dict[str, Any]:
    """Do a part and return what came of it; of one that does not end as it is to, why, so that the others go on."""
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "faults": lambda: faults(folder, rounds, seed),
        "attacks": lambda: attacks(folder),
        "refusals": lambda: refusals(folder),
        "links": lambda: links(folder),
    }
    try:
        return parts[part]()
    except Exception as error:  # whatever it is, an hour of the others is worth more
        return {"failed": f"{type(error).__name__}: {error}"[:500]}


def violated(part: str, found: dict[str, Any]) -> list[str]:
    """Return what of a part was not as it is to be."""
    if "failed" in found:
        return [f"{part} did not come to its end: {found['failed']}"]
    if part == "faults":
        return list(found["wrong"])
    if part == "attacks":
        return [
            f"with {attack} the loss is {one['over_clean']:+.2%} of the clean one"
            for attack, one in found["attacks"].items()
            if one["over_clean"] > 0.01
        ]
    return [f"{name} was not refused" for name, holds in found.items() if not holds] if part == "refusals" else []


def table_of(part: str, found: dict[str, Any], rounds: int) -> str:
    """Return a part's table for the page."""
    lines: list[Sequence[str]]
    if part == "faults":
        counts = sorted(found["faults"].items())
        lines = [["accepted rounds", *(f"{kind}s" for kind, _ in counts), "minutes", "violations"]]
        counted = [str(count) for _, count in counts]
        lines.append([str(rounds), *counted, f"{found['seconds'] / 60:.0f}", str(len(found["wrong"]))])
    elif part == "attacks":
        lines = [["", "held-out loss", "over the clean run", "what was said of its updates"]]
        lines.append(["nobody", f"{found['clean']:.4f}", "", ""])
        for attack, one in found["attacks"].items():
            told = "; ".join(sorted({reason.partition(":")[0] for reason in one["reasons"] if reason}))
            lines.append([attack, f"{one['loss']:.4f}", f"{one['over_clean']:+.2%}", told])
    elif part == "refusals":
        lines = [["what", "refused"], *([name, "yes" if holds else "**no**"] for name, holds in found.items())]
    else:
        lines = [["", "bytes of an update", "estimate for moving a round's bytes", "measured, median of rounds"]]
        large, one = found["of_1b_and_100_members"], found["measured"]
        for bits, estimated in ((8, large), (4, large["of_4_bits"])):
            seconds = estimated["base_seconds"] + estimated["update_seconds"]
            name = f"1B parameters, 100 members, {bits} bits"
            lines.append([name, f"{update_bytes(10**9, bits) / 1e6:,.0f} MB", f"{seconds / 60:.0f} min", ""])
        if isinstance(one, str):
            lines.append(["one member behind a slow link", "", "", one])
        else:
            median = statistics.median(one["moving_seconds"])
            name = f"{one['parameters']:,} parameters, one member, {one['shaped']}"
            told = f"{one['update_bytes'] / 1e6:.1f} MB"
            lines.append([name, told, f"{one['estimate_seconds']:.1f} s", f"{median:.1f} s"])
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def entry_of(part: str, found: dict[str, Any], violations: list[str], asked: argparse.Namespace) -> Any:
    """Return the ledger's entry of a part."""
    result = {"violations": Figure(len(violations), "of what is to hold", interval=EXACT)}
    if part == "faults":
        result["faults"] = Figure(sum(found["faults"].values()), "kills, freezes and cuts", interval=EXACT)
        result["rounds"] = Figure(asked.rounds, "accepted rounds", interval=EXACT)
    if part == "attacks":
        for attack, one in found["attacks"].items():
            result[f"{attack}_over_clean"] = Figure(one["over_clean"], "of the clean run's held-out loss")
    if part == "links" and isinstance(found["measured"], dict):
        seconds = found["measured"]["moving_seconds"]
        result["moving_seconds"] = Figure(statistics.median(seconds), "seconds of a round")
    return measured_today(
        f"community-drill-{part}-{{date}}",
        what=f"a community run through Flower in separate processes: {part}",
        seeds=[asked.seed],
        configuration={"part": part, "rounds": asked.rounds},
        result=result,
        details=found,
    )


def main() -> int:
    """Do what is asked for; return 1 where something was violated."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=50, help="of the run under faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="for all files; default: one that goes afterwards")
    parser.add_argument("--write", action="store_true", help="write entries of the ledger, and tables")
    asked = parser.parse_args()
    violations: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        for part in asked.only:
            folder = (asked.folder or Path(place)).resolve() / part
            if folder.exists():
                parser.error(f"{folder} is there already: give another --folder")
            found = do_part(part, folder, asked.rounds, asked.seed)
            wrong = violated(part, found)
            print(f"{part}: {json.dumps(found, indent=1)}", *wrong, sep="\n", flush=True)
            violations += wrong
            if asked.write and "failed" not in found:
                print(write_entry(RESULTS, entry_of(part, found, wrong, asked)))
                insert_table(ROOT / "docs" / "community.md", f"drill-{part}", table_of(part, found, asked.rounds))
    print("\n".join(violations) or "nothing was violated")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
