"""What training together costs and withstands, simulated in one process with real updates, over seeds.

    python benchmarks/quality/community.py [--work runs/community] [--parts loss,attacks,coding,uneven,bytes]
        [--seeds 3] [--jobs 1] [--steps 3000] [--data stdlib] [--method multi-krum] [--dry-run] [--write]

Parts: `loss` (rounds of 30, 100 and 500 steps beside synchronous training on as many tokens), `attacks` (nine, by one
of five members, beside the run without one), `coding` (8 and 4 bits, without error feedback, fragments), `uneven` (a
member ten times slower, members coming and going), `bytes` (of an update and of DDP). What is done is kept in the work
folder, and the same command goes on; all parts take some three hours of two quiet cores, `--steps 1500` half of that.
`--dry-run` does all of it in little and proves nothing. `--write` puts an entry for each part into the ledger and its
table into docs/community.md.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cells import Work
from community_attacks import ATTACKS
from community_run import Setting, simulate
from community_tables import figures, insert_table, table

from fanformer.comparison.ledger import measured_today, write_entry
from fanformer.training.configuration import parse_count, resolve

if TYPE_CHECKING:
    from fanformer.training.fields import RunConfig

ROOT = Path(__file__).parents[2]
PARTS = ("loss", "attacks", "coding", "uneven", "bytes")
MODEL = {
    "vocab_size": 1024, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 32, "intermediate_size": 256, "max_position_embeddings": 128, "qkv_rank": 48, "o_rank": 32,
    "gate_up_rank": 48, "down_rank": 48,
}  # fmt: skip
LITTLE = {**MODEL, "vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "head_dim": 16}


class Cell(NamedTuple):
    """A run with its measurement."""

    part: str
    arm: str
    seed: int
    setting: Setting

    @property
    def name(self) -> str:
        """Names its file."""
        return f"{self.part}-{self.arm}-{self.seed}"


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Return what is asked for, with the sizes of a dry run where that is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/community"), help="folder of what is done")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--arms", help="only these of the parts, by name")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, with a thread each")
    parser.add_argument("--steps", type=int, default=3000, help="inner steps of a run; other parts have a part of them")
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--data-bytes", type=parse_count, default=12_000_000, metavar="N")
    parser.add_argument("--method", default=Setting(1, 1, 1, 1).method, help="how updates are joined from five on")
    parser.add_argument("--outer-learning-rate", type=float, default=Setting(1, 1, 1, 1).outer_learning_rate)
    parser.add_argument("--outer-momentum", type=float, default=Setting(1, 1, 1, 1).outer_momentum)
    parser.add_argument("--learning-rate", type=float, help="of the inner optimizer; default: the preset's")
    parser.add_argument("--dry-run", action="store_true", help="all of it in little")
    parser.add_argument("--write", action="store_true", help="write entries and tables")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    asked = parser.parse_args(words)
    if unknown := [part for part in asked.parts.split(",") if part not in PARTS]:
        parser.error(f"--parts must be of {', '.join(PARTS)}, got {unknown[0]!r}")
    if asked.write and asked.arms is not None:
        parser.error("--write needs all arms of a part, whose table it replaces: leave --arms out")
    asked.rows, asked.length, asked.gate_tokens = 16, 128, 8192
    if asked.dry_run:
        if asked.write:
            parser.error("--write has no effect with --dry-run, whose figures mean nothing: leave it out")
        asked.seeds, asked.steps, asked.data_bytes, asked.rows, asked.length = 1, 12, 150_000, 8, 32
        asked.gate_tokens = 256
    return asked


def cells(asked: argparse.Namespace) -> list[Cell]:
    """Return all runs that are asked for."""
    base = Setting(
        4, asked.rows, asked.steps, 30, method=asked.method,
        outer_learning_rate=asked.outer_learning_rate, outer_momentum=asked.outer_momentum,
    )  # fmt: skip
    arms = {part: make(base) for part, make in ARMS.items()}
    if asked.dry_run:
        little = {part: {arm: _little(one) for arm, one in found.items()} for part, found in arms.items()}
        arms = {part: {arm: one for arm, one in found.items() if arm[:4] != "100x"} for part, found in little.items()}
    chosen = None if asked.arms is None else asked.arms.split(",")
    return [
        Cell(part, arm, seed, setting)
        for seed in range(asked.seeds)
        for part in asked.parts.split(",")
        for arm, setting in arms.get(part, {}).items()
        if chosen is None or arm in chosen
    ]


def _little(setting: Setting) -> Setting:
    """Return a setting with rounds of two steps, or of six in the place of 500."""
    steps = 2 if setting.round_steps < 500 else 6
    return dataclasses.replace(setting, round_steps=steps, steps=8 if setting.steps < 12 else 12)


def _of_loss(base: Setting) -> dict[str, Setting]:
    found = {"sync": dataclasses.replace(base, members=0)}
    for steps in (30, 100):
        for members in (2, 4, 8):
            found[f"{steps}x{members}"] = dataclasses.replace(base, members=members, round_steps=steps)
    return found | {"500x4": dataclasses.replace(base, round_steps=500)}


def _of_attacks(base: Setting) -> dict[str, Setting]:
    rows = base.rows // 4
    five = dataclasses.replace(base, members=5, rows=5 * rows, steps=base.steps // 3)
    found = {"clean": five, "four": dataclasses.replace(five, members=4, rows=4 * rows)}
    return found | {attack: dataclasses.replace(five, attack=attack) for attack in ATTACKS}


def _of_coding(base: Setting) -> dict[str, Setting]:
    half = dataclasses.replace(base, steps=base.steps // 2)
    return {
        "8bit": half,
        "4bit": dataclasses.replace(half, bits=4),
        "4bit-forgetful": dataclasses.replace(half, bits=4, feedback=False),
        "fragments": dataclasses.replace(half, round_steps=10, fragments=3),
    }


def _of_uneven(base: Setting) -> dict[str, Setting]:
    half = dataclasses.replace(base, steps=base.steps // 2)
    rows = base.rows // 4
    return {
        "even": half,
        "slow": dataclasses.replace(half, slow=0.1),
        "three": dataclasses.replace(half, members=3, rows=3 * rows),
        "coming-and-going": dataclasses.replace(half, members=8, rows=8 * rows, presence=0.5, dying=0.1),
    }


ARMS: dict[str, Callable[[Setting], dict[str, Setting]]] = {
    "loss": _of_loss, "attacks": _of_attacks, "coding": _of_coding, "uneven": _of_uneven,
}  # fmt: skip


def recipe(asked: argparse.Namespace, seed: int) -> "RunConfig":
    """Return the run that all members follow."""
    fields = {
        "data": str(asked.work / "data"), "sequence_length": asked.length, "seed": seed, "device": "cpu",
        "precision": "float32", "compile": "off", "threads": 1, "sample_prompt": None, "max_steps": asked.steps,
        "save_steps": 10**9, "eval_steps": 10**9, "log_steps": 10**9, "keep_last": 1, "tokenizer": None,
    }  # fmt: skip
    if asked.learning_rate is not None:
        fields["learning_rate"] = asked.learning_rate
    model = LITTLE if asked.dry_run else MODEL
    return resolve("nano", overrides={**fields, **{f"model.{name}": value for name, value in model.items()}})


def settings(asked: argparse.Namespace) -> dict[str, Any]:
    """Return what decides the results of all cells."""
    names = ("steps", "data", "data_bytes", "rows", "length", "method", "outer_learning_rate", "outer_momentum")
    own = {name: getattr(asked, name) for name in (*names, "learning_rate", "gate_tokens")}
    return {**own, "model": LITTLE if asked.dry_run else MODEL}


def prepare(asked: argparse.Namespace) -> None:
    """Write the data, or go on with those of the same settings; others are refused."""
    from fanformer.data.preparation.prepare import prepare as prepare_data
    from fanformer.data.sources.documents import is_prepared_folder, open_source

    now = settings(asked)
    Work(asked.work).begin(now)
    if not is_prepared_folder(str(asked.work / "data")):
        size = now["model"]["vocab_size"]
        prepare_data(
            open_source(asked.data), asked.work / "data", tokenizer=None, vocab_size=size, max_bytes=asked.data_bytes
        )


def do_cell(asked: argparse.Namespace, cell: Cell) -> None:
    """Run and measure a cell where that is not done; its result is a file."""
    work = Work(asked.work)
    if work.has(cell.name):
        return
    started = time.monotonic()
    found = simulate(cell.setting, recipe(asked, cell.seed), asked.work / f"at-{cell.name}", asked.gate_tokens)
    found |= {"seconds": round(time.monotonic() - started, 1), "setting": dataclasses.asdict(cell.setting)}
    work.keep(cell.name, found)
    print(f"{cell.name}: loss {found['loss']:.4f} in {found['seconds']:.0f} s", flush=True)


def do_bytes(asked: argparse.Namespace) -> None:
    """Count the bytes of real payloads of this model, and of the presets that are asked about."""
    work = Work(asked.work)
    if work.has("bytes"):
        return
    from community_tables import payload_sizes

    models = {"simulated": recipe(asked, 0).model}
    if not asked.dry_run:
        models["92m"] = resolve("92m").model
    work.keep("bytes", {name: payload_sizes(dict(model)) for name, model in models.items()})


def main() -> None:
    """Do what is not done, print the tables, and write them where that is asked for."""
    asked = parse()
    prepare(asked)
    todo = cells(asked)
    if asked.cell is not None:
        do_cell(asked, next(cell for cell in todo if cell.name == asked.cell))
        return
    work = Work(asked.work)
    longest_first = sorted(todo, key=lambda cell: -cell.setting.members * cell.setting.steps)
    work.do(longest_first, lambda cell: do_cell(asked, cell), asked.jobs, threads=1)
    if "bytes" in asked.parts.split(","):
        do_bytes(asked)
    for part in asked.parts.split(","):
        found: dict[str, Any] = {}
        if part == "bytes":
            found = work.read("bytes")
        for cell in todo:
            if cell.part == part:
                found.setdefault(cell.arm, []).append(work.read(cell.name))
        if not found:
            continue
        text = table(part, found)
        print(f"\n{part}\n{text}")
        if asked.write:
            write(asked, part, found, text)


def write(asked: argparse.Namespace, part: str, found: dict[str, Any], text: str) -> None:
    """Write a part's entry into the ledger, and its table into the page."""
    metadata = json.loads((asked.work / "data" / "data.json").read_text())
    entry = measured_today(
        f"community-{part}-{{date}}",
        what=f"training together in rounds, simulated in one process: {part}",
        seeds=[] if part == "bytes" else list(range(asked.seeds)),
        configuration={**settings(asked), "part": part},
        data=None if part == "bytes" else {"source": asked.data, "fingerprint": metadata["fingerprint"]},
        result=figures(part, found),
        details={"results": found},
    )
    print(write_entry(ROOT / "benchmarks" / "results", entry))
    insert_table(ROOT / "docs" / "community.md", part, text)


if __name__ == "__main__":
    main()
