"""The proof of `--prove-resume` under other kernels and numbers of threads: one machine stands for several.

    python benchmarks/proofs/resume_settings.py [--preset nano] [--steps 8] [--only NAME ...] [--write]

Which order a sum has depends on the processor, on what the libraries take it for, and on how many threads share it. A
run that was killed must equal one that was not under all of these.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fanformer.comparison.ledger import EXACT, Figure, measured_today, read_entry, write_entry
from fanformer.machine.threads import spin_briefly
from fanformer.machine.versions import hardware
from fanformer.training.configuration import resolve
from fanformer.training.proof import prove

RESULTS = Path(__file__).parents[1] / "results"
SETTINGS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "as it is": ({}, {}),
    "one thread": ({"OMP_NUM_THREADS": "1"}, {}),
    "two threads": ({"OMP_NUM_THREADS": "2"}, {}),
    "three threads": ({"OMP_NUM_THREADS": "3"}, {}),
    "three threads, as asked": ({}, {"threads": 3}),
    "MKL_DYNAMIC=true": ({"MKL_DYNAMIC": "true"}, {}),
    "MKL_DYNAMIC=false": ({"MKL_DYNAMIC": "false"}, {}),
    "ATEN_CPU_CAPABILITY=default": ({"ATEN_CPU_CAPABILITY": "default"}, {}),
    "ATEN_CPU_CAPABILITY=avx2": ({"ATEN_CPU_CAPABILITY": "avx2"}, {}),
    "ONEDNN_MAX_CPU_ISA=AVX2": ({"ONEDNN_MAX_CPU_ISA": "AVX2"}, {}),
    "float32 products": ({}, {"precision": "float32"}),
    "compiled": ({}, {"compile": "on"}),
}
"""Environment variables and fields of the run by the name of a setting."""


def run_proof(preset: str, steps: int, name: str, folder: Path) -> None:
    """Prove in this process, whose environment is that of the setting; two processes are tried in the first only."""
    flags = SETTINGS[name][1]
    fields = {
        "preset": preset,
        "max_steps": steps,
        "output_dir": str(folder),
        "device": "cpu",
        "eval_tokens": 2048,
        **flags,
    }
    prove(resolve(overrides=fields), print, two_processes=name == "as it is")


def findings(preset: str, steps: int, name: str, folder: Path) -> dict[str, Any]:
    """Return what the proof found under a setting, in a process of its own, and how long it took."""
    variables = {**os.environ, **SETTINGS[name][0]}
    spin_briefly(variables)
    words = [sys.executable, __file__, "--preset", preset, "--steps", str(steps), "--only", name, "--here", str(folder)]
    started = time.monotonic()
    done = subprocess.run(words, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr.strip()}")
    found = json.loads((folder / "proof.json").read_text())
    killed = [finding for finding in found if finding["kills"]]
    return {
        "holds": all(finding["holds"] for finding in found),
        "killed_runs": len(killed),
        "killed_runs_equal": sum(all(finding["equal"].values()) for finding in killed),
        "seconds": round(time.monotonic() - started),
    }


def before(entry_name: str, preset: str, steps: int) -> dict[str, Any]:
    """Return what the ledger's entry of this processor holds of the same proof, by setting."""
    entry = read_entry(RESULTS, entry_name)
    if entry is None or (entry.configuration["preset"], entry.configuration["steps"]) != (preset, steps):
        return {}
    return dict(entry.details["by_setting"])


def main() -> int:
    """Prove under every setting; return 1 where one does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--only", nargs="*", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument(
        "--write", action="store_true", help="write an entry of the ledger; what --only leaves out stays"
    )
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here is not None:
        run_proof(arguments.preset, arguments.steps, arguments.only[0], arguments.here)
        return 0
    found = {}
    for name in arguments.only:
        with tempfile.TemporaryDirectory() as place:
            found[name] = findings(arguments.preset, arguments.steps, name, Path(place) / "proof")
        print(f"{name}: {found[name]}", flush=True)
    holding = sum(one["holds"] for one in found.values())
    if arguments.write:
        word = "".join(letter if letter.isalnum() else "-" for letter in str(hardware()["cpu"]).split("@")[0].lower())
        unit = "settings of kernels and threads"
        entry_name = f"resume-settings-{word.strip('-')}"
        found = before(entry_name, arguments.preset, arguments.steps) | found
        holding = sum(one["holds"] for one in found.values())
        entry = measured_today(
            entry_name,
            what="trainings that were killed and resumed beside one that was not, under other kernels and threads",
            seeds=[0],
            configuration={"preset": arguments.preset, "steps": arguments.steps, "settings": list(found)},
            result={
                "settings": Figure(len(found), unit, interval=EXACT),
                "settings_that_hold": Figure(holding, unit, interval=EXACT),
                "settings_that_do_not": Figure(len(found) - holding, unit, interval=EXACT),
            },
            details={"by_setting": found},
        )
        print(write_entry(RESULTS, entry))
    print(f"{holding} of {len(found)} settings hold")
    return 0 if holding == len(found) else 1


if __name__ == "__main__":
    sys.exit(main())
