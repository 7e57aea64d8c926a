"""Drive train, `data prepare` and quantize through random sequences of kills and mishaps, and say what was violated.

    python benchmarks/proofs/lifecycle.py [--seconds 1800] [--only train prepare quantize] [--write]

The state machines are tests (tests/training/test_train_lifecycle.py and the like), whose short form runs with all
others; this runs their long form and keeps the result. Training gets half of the time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fanformer.comparison.ledger import EXACT, Figure, measured_today, write_entry

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
MACHINES = {
    "train": ("tests/training/test_train_lifecycle.py", 0.5),
    "prepare": ("tests/data/test_prepare_lifecycle.py", 0.25),
    "quantize": ("tests/gguf/test_export_lifecycle.py", 0.25),
}
"""File and share of the time by the name of what is driven."""


def drive(file: str, seconds: float) -> dict[str, Any]:
    """Run a machine's long form and return how many sequences it did and whether one violated an invariant."""
    with tempfile.TemporaryDirectory() as place:
        count = Path(place) / "count.json"
        variables = {"FANFORMER_LIFECYCLE_SECONDS": str(seconds), "FANFORMER_LIFECYCLE_COUNT": str(count)}
        words = [sys.executable, "-m", "pytest", file, "-q", "--timeout", str(seconds * 2 + 600)]
        done = subprocess.run(words, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True)
        if not count.is_file():
            raise SystemExit(f"{file} did not run: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        if done.returncode:
            print(done.stdout)
        return json.loads(count.read_text()) | {"violations": int(done.returncode != 0)}


def main() -> int:
    """Drive them all; return 1 where an invariant was violated."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1800.0, help="of all machines together")
    parser.add_argument("--only", nargs="*", choices=list(MACHINES), default=list(MACHINES))
    parser.add_argument("--write", action="store_true", help="write an entry of the ledger")
    arguments = parser.parse_args()
    shares = {name: MACHINES[name][1] for name in arguments.only}
    found = {}
    for name, share in shares.items():
        found[name] = drive(MACHINES[name][0], arguments.seconds * share / sum(shares.values()))
        print(f"{name}: {found[name]}", flush=True)
    violations = sum(one["violations"] for one in found.values())
    if arguments.write:
        entry = measured_today(
            "lifecycle-{date}",
            what="random sequences of commands, kills, full disks, moved and damaged folders over real processes",
            configuration={"seconds": arguments.seconds, "machines": list(found)},
            result={
                "violations": Figure(violations, "machines that found one", interval=EXACT),
                "sequences": Figure(sum(one["sequences"] for one in found.values()), "sequences", interval=EXACT),
                "rules": Figure(
                    sum(one["sequences"] * one["rules_in_each"] for one in found.values()),
                    "commands and mishaps, at most",
                    interval=EXACT,
                ),
            },
            details={"by_machine": found},
        )
        print(write_entry(RESULTS, entry))
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
