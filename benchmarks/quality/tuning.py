"""What tuning is worth: answers to real questions, what they cost the base, and what else was tried, over seeds.

    python benchmarks/quality/tuning.py [--work runs/tuning] [--dry-run] [--parts full,lora,...] [--seeds 3]
        [--jobs 1] [--base DIR] [--model nano] [--base-tokens 3M] [--data ../shared/data] [--write]

A base is trained on ../shared/data's text without the stories of the test, and tuned on five sets at once: FairytaleQA,
ARC, OpenBookQA, titles of abstracts, and self-made instructions. Parts: `full` (all weights learn), `lora`, `unmasked`
(questions are learnt too), `blind` (stories without their passages), `llama` (HF Llama of as many parameters in its
blocks, trained and tuned the same way), `preferences` (DPO behind `full`, on ARC's wrong choices). What is done is kept
in the work folder, and the same command goes on; `--dry-run` does all of it in little, and proves nothing.
"""

import argparse
import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from cells import Work
from tuning_data import SETS, write_all
from tuning_tables import aims, figures, tables

from fanformer.comparison.ledger import Entry, write_entry
from fanformer.machine.versions import command_line, hardware, versions
from fanformer.training.configuration import parse_count, resolve, resolve_tuning

if TYPE_CHECKING:
    from fanformer.training.fields import RunConfig
    from fanformer.training.run import RunResult

RESULTS = Path(__file__).parents[1] / "results"
PARTS = ("full", "lora", "unmasked", "blind", "llama", "preferences")
SIZES = {"fairytale": 1200, "arc": 800, "openbookqa": 800, "arxiv": 300, "instructions": 1500, "pairs": 1200}
TEXTS = 40
"""Documents of the base's text, of some 4,000 tokens each, beside 0.56M tokens of conversations."""
LORA_RANK = 16
LLAMA_LEARNING_RATE = 0.005
"""Of Llama's base: preset nano's rate, twice this, costs it 0.03 bits per byte (docs/experiments.md, 2026-11-25)."""


class Cell(NamedTuple):
    """A training with its measurement."""

    part: str
    """One of PARTS, or "base" or "llama-base"."""
    seed: int

    @property
    def name(self) -> str:
        """Names its files."""
        return f"{self.part}-{self.seed}"


def parse() -> argparse.Namespace:
    """Return what is asked for, with the sizes of a dry run where that is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/tuning"), help="folder of what is done")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of real data")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once, which share the cores")
    parser.add_argument("--base", type=Path, help="folder of a base to tune, whatever it has read")
    parser.add_argument("--model", default="nano", help="architecture of the base, as `fanformer compare` names them")
    parser.add_argument("--base-tokens", type=parse_count, default=3_000_000, metavar="N")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--lora-learning-rate", type=float, default=2e-3)
    parser.add_argument("--preference-learning-rate", type=float, default=5e-5)
    parser.add_argument("--rows", type=float, default=1.0, help=f"share of the rows: {SIZES}")
    parser.add_argument("--held-out", type=int, default=200, help="questions of each set that are answered")
    parser.add_argument("--held-out-bytes", type=parse_count, default=200_000, metavar="N")
    parser.add_argument("--dry-run", action="store_true", help="all of it in little")
    parser.add_argument("--write", action="store_true", help="write the entry to benchmarks/results")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if unknown := [part for part in asked.parts.split(",") if part not in PARTS]:
        parser.error(f"--parts must be of {', '.join(PARTS)}, got {unknown[0]!r}")
    if asked.base is not None and "llama" in asked.parts.split(","):
        parser.error("the part `llama` needs a base that was trained like Llama's, got --base: name the other --parts")
    if asked.dry_run:
        if asked.write:
            parser.error("--write has no effect with --dry-run, whose figures mean nothing: leave it out")
        asked.model, asked.base_tokens, asked.sequence_length = "fanformer@60k", 4000, 512
        asked.seeds, asked.epochs, asked.rows, asked.held_out, asked.held_out_bytes = 1, 1.0, 0.005, 4, 5000
    asked.threads = 1 if asked.dry_run else max(1, len(os.sched_getaffinity(0)) // asked.jobs)
    return asked


def sizes(asked: argparse.Namespace) -> dict[str, int]:
    """Return rows by set."""
    rows = {name: max(8, round(count * asked.rows)) for name, count in SIZES.items()}
    return rows | {"texts": max(1, round(TEXTS * asked.rows)), "held_out": asked.held_out}


def settings(asked: argparse.Namespace) -> dict[str, Any]:
    """Return what decides the results of a cell."""
    names = ["sequence_length", "epochs", *(f"{part}learning_rate" for part in ("", "lora_", "preference_"))]
    found: dict[str, Any] = {"rows": sizes(asked), "held_out_bytes": asked.held_out_bytes}
    if asked.base is None:
        names += ["model", "base_tokens"]
        found["llama_learning_rate"] = LLAMA_LEARNING_RATE
    else:
        found["base"] = asked.base.name
    return found | {name: getattr(asked, name) for name in names}


def prepare(asked: argparse.Namespace) -> None:
    """Write the data, or go on with those of the same settings; others are refused."""
    Work(asked.work).begin(settings(asked))
    write_all(asked.data, asked.work / "data", sizes(asked), 5 * asked.base_tokens, asked.held_out_bytes)


def base_folder(asked: argparse.Namespace, part: str) -> Path:
    """Return the folder of the model that a part tunes."""
    if part == "llama":
        return asked.work / "llama-base-0"
    return asked.base or asked.work / "base-0"


def stages(asked: argparse.Namespace) -> list[list[Cell]]:
    """Return the cells in the order of what they need; those of a list need none of each other."""
    parts, seeds = asked.parts.split(","), range(asked.seeds)
    bases = [Cell("base", 0)] if asked.base is None else []
    tuned = [part for part in PARTS[:-1] if part in parts or (part == "full" and "preferences" in parts)]
    last = [Cell("preferences", seed) for seed in seeds] if "preferences" in parts else []
    llama = [Cell("llama-base", 0)] if "llama" in parts else []  # in the tokens of the base
    return [bases, llama, [Cell(part, seed) for seed in seeds for part in tuned], last]


@contextlib.contextmanager
def learning_questions_too() -> Iterator[None]:
    """Let every token of a conversation be learnt while the block runs, which no switch of a run does."""
    from fanformer.data.conversations import rows

    masked = rows.masked_document

    def whole(*arguments: Any) -> rows.MaskedDocument | None:
        document = masked(*arguments)
        return document and dataclasses.replace(document, trained=np.ones_like(document.trained))

    rows.masked_document = whole  # type: ignore[assignment]
    try:
        yield
    finally:
        rows.masked_document = masked


def train_cell(asked: argparse.Namespace, cell: Cell) -> Path:
    """Train a cell, or go on with it, and return its folder."""
    from fanformer.training.run import train

    folder = asked.work / cell.name
    common = {"output_dir": str(folder), "resume": True, "seed": cell.seed, "threads": asked.threads, "device": "cpu"}
    common["precision"] = "float32"  # the same for all, whatever else the machine does when each begins
    common |= {"sequence_length": asked.sequence_length, "keep_last": 1, "eval_tokens": 16384}
    if asked.dry_run:
        common |= {"compile": "off", "batch_size": 2, "eval_steps": 1000}
    if cell.part in ("base", "llama-base"):
        result = train_base(asked, cell, common)
    else:
        with learning_questions_too() if cell.part == "unmasked" else contextlib.nullcontext():
            result = train(tuning(asked, cell, common))
    if not result.reached_end:
        sys.exit(f"{cell.name} was stopped after step {result.step}: the same command goes on")
    return folder


def train_base(asked: argparse.Namespace, cell: Cell, common: dict[str, Any]) -> "RunResult":
    """Train the base of a cell: the model that was asked for, or Llama with as many parameters in its blocks."""
    from fanformer.comparison.architectures import architecture, without_embeddings
    from fanformer.training.run import train

    chosen, fields, data = architecture(asked.model), dict(common), asked.work / "data"
    if cell.part == "llama-base":
        fields |= {"tokenizer": str(base_folder(asked, "full")), "learning_rate": LLAMA_LEARNING_RATE}
        chosen = architecture(f"llama@{without_embeddings(chosen.config())}")
    fields |= {"data": str(data / "base.jsonl"), "eval_data": str(data / "held-out.jsonl"), "tokens": asked.base_tokens}
    if asked.dry_run:
        fields["model.vocab_size"] = 512
    config = resolve(overrides={**chosen.recipe, **fields})
    model = {"vocab_size": config.model["vocab_size"], "max_position_embeddings": 1}  # the rest is the architecture's
    needed = ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    return train(
        config.replace(model=model), build_model=lambda made: chosen.build({name: made[name] for name in needed})
    )


def tuning(asked: argparse.Namespace, cell: Cell, common: dict[str, Any]) -> "RunConfig":
    """Return the run that tunes the model of a cell's part."""
    from fanformer.loading import longest_text

    data, base = asked.work / "data", base_folder(asked, cell.part)
    train, valid = "train.jsonl", "valid.jsonl"
    fields = {**common, "epochs": asked.epochs, "learning_rate": asked.learning_rate}
    if cell.part == "lora":
        fields |= {"lora_rank": LORA_RANK, "learning_rate": asked.lora_learning_rate}
    elif cell.part == "blind":
        train = "train-blind.jsonl"
    elif cell.part == "preferences":
        base, train, valid = asked.work / f"full-{cell.seed}", "pairs-train.jsonl", "pairs-valid.jsonl"
        fields |= {"objective": "preferences", "learning_rate": asked.preference_learning_rate}
    fields |= {"data": str(data / train), "eval_data": str(data / valid)}
    return resolve_tuning(str(base), lambda: longest_text(base), fields)


def do_cell(asked: argparse.Namespace, cell: Cell) -> None:
    """Train and measure a cell where that is not done; its result is a file."""
    work = Work(asked.work)
    if work.has(cell.name):
        return
    from tuning_measures import bits_per_byte, measure, measure_preferences

    started = time.monotonic()
    folder, data = train_cell(asked, cell), asked.work / "data"
    trained = time.monotonic()
    if cell.part in ("base", "llama-base"):
        found: dict[str, Any] = {"bits_per_byte": bits_per_byte(folder, folder, data / "held-out.jsonl")}
    elif cell.part == "preferences":
        found = measure_preferences(folder, base_folder(asked, "full"), data)
    else:
        found = measure(folder, base_folder(asked, cell.part), data, blind=cell.part == "blind")
    found["seconds"] = {"training": round(trained - started), "measuring": round(time.monotonic() - trained)}
    work.keep(cell.name, found)
    print(f"{cell.name}: seconds of {found['seconds']}", flush=True)


def base_result(asked: argparse.Namespace) -> dict[str, float]:
    """Return the bits per byte of the base by the part's name in the results, measured once also where it was given."""
    from tuning_measures import bits_per_byte

    work, own, llama = Work(asked.work), Cell("base", 0).name, Cell("llama-base", 0).name
    if not work.has(own):  # --base
        base = base_folder(asked, "full")
        work.keep(own, {"bits_per_byte": bits_per_byte(base, base, asked.work / "data/held-out.jsonl")})
    names = {"base": own, "llama": llama}
    return {part: work.read(name)["bits_per_byte"] for part, name in names.items() if work.has(name)}


def write(asked: argparse.Namespace, results: dict[str, list[dict[str, Any]]], before: dict[str, float]) -> None:
    """Write the entry, a dry run's into the work folder."""
    content = json.loads((asked.work / "data/data.json").read_text())
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted((asked.work / "data").glob("*.jsonl"))))
    day = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    model = asked.base.name if asked.base else asked.model.replace("@", "-")
    entry = Entry(
        name=f"tuning-{model}-{day}",
        what="answers of a model tuned on real questions, over seeds, beside rules, a blind twin and Llama",
        kind="evaluation",
        command=command_line(["python", *sys.argv]),
        date=day,
        seeds=list(range(asked.seeds)),
        configuration={**settings(asked), "parts": asked.parts, "sets": list(SETS), "threads": asked.threads},
        data={"source": "questions, eval/arc and text-large", "fingerprint": digest.hexdigest()},
        hardware=hardware(),
        versions=versions(),
        result=figures(results, before, content["baselines"]),
        details={"data": content, "results": results, "base_bits_per_byte": before},
    )
    print(write_entry(asked.work / "ledger" if asked.dry_run else RESULTS, entry))


def main() -> None:
    """Do what is not done, print the tables, and write the entry where that is asked for."""
    asked = parse()
    prepare(asked)
    if asked.cell is not None:
        part, _, seed = asked.cell.rpartition("-")
        do_cell(asked, Cell(part, int(seed)))
        return
    work = Work(asked.work)
    for cells in stages(asked):
        work.do(cells, lambda cell: do_cell(asked, cell), asked.jobs, asked.threads)
    results: dict[str, list[dict[str, Any]]] = {}
    for cell in [cell for cells in stages(asked)[2:] for cell in cells]:
        results.setdefault(cell.part, []).append(work.read(cell.name))
    before = base_result(asked)
    data = json.loads((asked.work / "data/data.json").read_text())
    print(tables(results, before, data["baselines"]))
    print(aims(results, before))
    parts = (data[part]["left_out"].values() for part in ("base", "held_out"))
    left_out = sorted({name for part in parts for one in part for name in one})
    print(f"stories of the test: {', '.join(data['stories'])}")
    print(f"{len(left_out)} documents left out: {', '.join(left_out)}")
    if asked.write or asked.dry_run:
        write(asked, results, before)


if __name__ == "__main__":
    main()
