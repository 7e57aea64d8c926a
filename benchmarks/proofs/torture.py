"""Kill one training again and again with SIGKILL, at random moments and in the middle of saves; nothing may be lost.

    python benchmarks/proofs/torture.py [--kills 120] [--steps 600] [--write]

The training that was killed must end with the weights, the optimizer's state, the losses and the rows of one that was
not, bit for bit, and after every kill each checkpoint on the disk must be whole. Every life of the training is a
process of its own, forked from one that has imported what it takes, so that a life costs less than a second.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fanformer.cli.failure import quiet_libraries
from fanformer.comparison.ledger import EXACT, Figure, measured_today, write_entry
from fanformer.training.checkpoint import OPTIMIZER_FILE, UNFINISHED, checkpoint_name, checkpoints, problem
from fanformer.training.configuration import resolve
from fanformer.training.events import Event
from fanformer.training.fields import RunConfig
from fanformer.training.folder import read_records
from fanformer.training.run import train

RESULTS = Path(__file__).parents[1] / "results"
WORDS = ("the", "cat", "dog", "river", "runs", "sees", "under", "over", "blue", "old", "tree", "and")
MODEL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 32,
    "dropout": 0.1,
}
LONGEST_LIFE_SECONDS = 300.0


class Diary:
    """A listener that writes the number of every step into a file, which outlives its process."""

    def __init__(self, path: Path) -> None:
        self.handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def __call__(self, event: Event) -> None:
        """Write a step's number."""
        if event.kind == "step":
            os.write(self.handle, f"{event.figures['step']}\n".encode())


def configure(folder: Path, text: Path, steps: int) -> RunConfig:
    """Return the configuration of the tortured training: Muon and AdamW, dropout on, many saves."""
    fields: dict[str, Any] = {
        "data": str(text), "output_dir": str(folder), "sequence_length": 32, "batch_size": 4, "max_steps": steps,
        "save_steps": 4, "eval_steps": max(1, steps // 10), "log_steps": 1, "eval_tokens": 256, "keep_last": 3,
        "device": "cpu", "precision": "float32", "threads": 1, "resume": True, "compile": "off", "optimizer": "muon",
    }  # fmt: skip
    return resolve("nano", overrides=fields | {f"model.{name}": value for name, value in MODEL.items()})


def live(config: RunConfig, diary: Path) -> int:
    """Fork a process that trains to the end unless it is killed, and return its number."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        train(config, Diary(diary))
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    os._exit(status)


def steps_in(diary: Path) -> list[int]:
    """Return the steps that were computed, in all lives."""
    return [int(line) for line in diary.read_text().split()] if diary.exists() else []


def kill_once(config: RunConfig, diary: Path, chooser: random.Random, reach: int) -> bool | None:
    """Let the training live for a while and kill it.

    Args:
        config: of the training.
        diary: where it writes its steps.
        chooser: of the moment.
        reach: most steps that it may do.

    Returns:
        Whether the kill fell into a save; None if the training came to its end first.
    """
    before, wanted = len(steps_in(diary)), chooser.randint(0, reach)
    in_save = chooser.random() < 0.5
    process, deadline = live(config, diary), time.monotonic() + LONGEST_LIFE_SECONDS
    if chooser.random() < 0.1:  # while it is still reading and restoring
        wanted, in_save = 0, False
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            if os.waitstatus_to_exitcode(status) != 0:
                raise RuntimeError("the training failed by itself")
            return None
        if time.monotonic() > deadline:
            raise RuntimeError(f"the training did nothing for {LONGEST_LIFE_SECONDS:g} s")
        saving = (config.folder / UNFINISHED).exists()
        if len(steps_in(diary)) - before >= wanted and (saving or not in_save):
            break
        time.sleep(0.0005)
    time.sleep(chooser.uniform(0, 0.02))
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    return (config.folder / UNFINISHED).exists() if os.waitstatus_to_exitcode(status) < 0 else None


def same_bits(one: Path, other: Path) -> bool:
    """Return whether two files hold the same tensors, bit for bit."""
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def torture(kills: int, steps: int, seed: int, folder: Path) -> dict[str, Any]:
    """Do the straight training and the tortured one, and return the table's figures."""
    chooser, text = random.Random(seed), folder / "text.txt"
    text.write_text("\n".join(" ".join(chooser.choices(WORDS, k=12)) + "." for _ in range(600)))
    straight = configure(folder / "straight", text, steps)
    _, status = os.waitpid(live(straight, folder / "straight.steps"), 0)
    assert status == 0, "the straight training failed"
    tortured = straight.replace(output_dir=str(folder / "tortured"))
    diary, begun = folder / "tortured.steps", time.monotonic()
    done = in_saves = damaged = lives = 0
    reach = max(1, steps // kills)  # half of it on average, so that the end does not come before the last kill
    while done < kills:
        lives += 1
        hit = kill_once(tortured, diary, chooser, reach)
        if hit is None:
            break  # at its end already
        done += 1
        in_saves += hit
        damaged += sum(problem(path) is not None for path in checkpoints(tortured.folder))
    _, status = os.waitpid(live(tortured, diary), 0)
    assert status == 0, "the last life failed"
    last = checkpoint_name(steps)
    one, two = read_records(straight.folder), read_records(tortured.folder)
    keys = ("step", "loss", "grad_norm", "learning_rate", "rows", "val_loss")
    computed = steps_in(diary)
    return {
        "kills": done,
        "kills_during_a_save": in_saves,
        "lives": lives + 1,
        "checkpoints_damaged": damaged,
        "steps": steps,
        "steps_computed_in_all_lives": len(computed),
        "steps_lost": steps - len({record["step"] for record in two}),
        "steps_trained_twice_into_the_result": len(two) - len({record["step"] for record in two}),
        "records_equal": [[line.get(key) for key in keys] for line in one]
        == [[line.get(key) for key in keys] for line in two],
        "weights_equal": same_bits(*(run.folder / last / "model.safetensors" for run in (straight, tortured))),
        "optimizer_equal": same_bits(*(run.folder / last / OPTIMIZER_FILE for run in (straight, tortured))),
        "seconds": round(time.monotonic() - begun, 1),
    }


def to_result(figures: Mapping[str, Any]) -> dict[str, Figure]:
    """Return the table's figures for the ledger: all but the time are counted."""
    return {
        name: Figure(value, "s")
        if name == "seconds"
        else Figure(int(value), "1 if equal, bit for bit" if isinstance(value, bool) else "counted", interval=EXACT)
        for name, value in figures.items()
    }


def main() -> int:
    """Read the arguments, run, print the table; exit code 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=120)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="write the entry to benchmarks/results")
    arguments = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        figures = torture(arguments.kills, arguments.steps, arguments.seed, Path(folder))
    for name, value in figures.items():
        print(f"| {name.replace('_', ' ')} | {value} |")
    if arguments.write:
        entry = measured_today(
            "torture-{date}",
            what="one training killed with SIGKILL again and again beside one that was not",
            seeds=[arguments.seed],
            configuration={"kills": arguments.kills, "steps": arguments.steps, "model": MODEL},
            result=to_result(figures),
        )
        write_entry(RESULTS, entry)
    equal = figures["records_equal"] and figures["weights_equal"] and figures["optimizer_equal"]
    lost = figures["steps_lost"] + figures["steps_trained_twice_into_the_result"] + figures["checkpoints_damaged"]
    return 0 if equal and not lost and figures["kills"] >= arguments.kills else 1


if __name__ == "__main__":
    sys.exit(main())
