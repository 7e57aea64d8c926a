"""Make the model in the box, from text to the folder that ships: `make release-model`.

    python release/make_model.py [--data ../shared/data] [--work runs/release] [--recipe release/recipe.yaml]
        [--only STAGE] [--minutes M] [--output-dir src/fanformer/box] [--status]

Stages, in their order:

    text          what the base reads, without the stories that questions are asked about later
    tokens        the same with a tokenizer of its own
    base          the base
    rows-mid      what teaches it to find in its context
    mid           the base, after that mid-training
    rows          what it is tuned on
    tuned         the tuned model
    box           the folder that ships, with its card
    rows-blind    the same rows, questions without their passages
    blind         a twin of `tuned` on these: what passages are worth
    beside        a Llama of equal parameters beside the base, over seeds

Each leaves its result under WORK. The same command goes on after any end, kill -9 too: what is done is not done again,
trainings go on from their last checkpoint, bit for bit; `beside`, whose trainings the ledger keeps, may be done on
another day or machine than the base. `fanformer compare --status --output-dir WORK` says where it stands, as `--status`
does. `check.py` measures what came out.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from card import write_card
from rows import tuning_rows
from safetensors.torch import load_file, save_file
from shapes import architecture_spec, model_fields
from stages import Chain
from texts import base_records, write_rows

import fanformer
from fanformer.cli.failure import quiet_libraries, run_program
from fanformer.cli.terminal import SweepReporter, TerminalReporter
from fanformer.comparison.architectures import architecture, without_embeddings
from fanformer.comparison.compare import Comparison
from fanformer.comparison.queue import LOCK_FILE, RECORD_FILE, Queue, QueueEntry, run_queue
from fanformer.comparison.sweep import OutOfTimeError
from fanformer.data.preparation.prepare import open_prepared, prepare
from fanformer.data.sources.documents import open_source
from fanformer.errors import ConfigError, refuse_unknown
from fanformer.files.durable import replace_json
from fanformer.files.locking import hold
from fanformer.files.staging import staged_folder
from fanformer.machine.versions import command_line
from fanformer.training.configuration import parse_count
from fanformer.training.events import data_to
from fanformer.training.folder import read_records

STAGES = ("text", "tokens", "base", "rows-mid", "mid", "rows", "tuned", "box", "rows-blind", "blind", "beside")
_BASE = ("text", "tokens", "base")
_MID = (*_BASE, "rows_mid", "mid")
NEEDS = {
    "text": ("text",),
    "tokens": ("text", "tokens"),
    "base": _BASE,
    "rows-mid": ("text", "rows_mid"),
    "mid": _MID,
    "rows": ("text", "rows"),
    "tuned": (*_MID, "rows", "tuned"),
    "box": (*_MID, "rows", "tuned", "box"),
    "rows-blind": ("text", "rows"),
    "blind": (*_MID, "rows", "tuned"),
    "beside": (*_BASE, "beside"),
}
"""Parts of the recipe that decide the result of each stage."""
BEHIND = {"tokens": "text", "base": "tokens", "rows-mid": "text", "mid": "base rows-mid", "rows": "text"}
BEHIND |= {"tuned": "mid rows", "box": "tuned", "rows-blind": "text", "blind": "mid rows-blind", "beside": "tokens"}
"""The stages whose results a stage takes; those that are not here take none."""
SHIPPED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
CHAT_TOKENS = 2
"""Rows of the embedding that the tokenizer leaves to the tokens of conversations."""
HELD_OUT_TOKENS = 400_000
"""More than text-small's held-out part has in any vocabulary: all of it is measured."""
BYTES_OF_A_TOKEN, BYTES_OF_CARD = 100, 30_000
"""At most, in the folder that ships: of the tokenizer's files a token, and of all that is neither these nor weights."""
SEED = 0


def main() -> int:
    """Do the stages that are left; the status is 75 where the time was over first, 2 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of real data")
    parser.add_argument("--work", type=Path, default=Path("runs/release"))
    parser.add_argument("--recipe", type=Path, default=Path(__file__).with_name("recipe.yaml"))
    parser.add_argument("--only", choices=STAGES, metavar="STAGE", help="this stage, and what it takes; default: all")
    parser.add_argument("--minutes", type=float, help="stop after so long; the same command goes on")
    parser.add_argument("--output-dir", type=Path, default=Path("src/fanformer/box"))
    parser.add_argument("--status", action="store_true", help="say how far it is, and change nothing")
    asked = parser.parse_args()
    quiet_libraries()
    making = Making(asked.data, asked.work, read_recipe(asked.recipe), asked.output_dir, asked.minutes)
    if asked.status:
        print(*making.chain.lines(STAGES, is_running=is_held(asked.work / LOCK_FILE)), sep="\n")
        return 0
    asked.work.mkdir(parents=True, exist_ok=True)
    with hold(asked.work / LOCK_FILE, f"the work folder {asked.work}", ConfigError):
        for stage in STAGES if asked.only is None else chosen(asked.only):
            if not making.do(stage):
                print(*making.chain.tell(STAGES), f"{making.why}: the same command goes on", sep="\n")
                return os.EX_TEMPFAIL
        print(*making.chain.tell(STAGES), sep="\n")
    return 0


def chosen(stage: str) -> list[str]:
    """Return a stage and all that it takes, in their order."""
    wanted = {stage}
    for name in reversed(STAGES):
        if name in wanted:
            wanted.update(BEHIND.get(name, "").split())
    return [name for name in STAGES if name in wanted]


def is_held(lock: Path) -> bool:
    """Return whether a process holds a lock file."""
    try:
        with hold(lock, "the work folder", ConfigError):
            return False
    except ConfigError:
        return lock.is_file()


def read_recipe(path: Path) -> dict[str, Any]:
    """Return a recipe, whose model fits the folder that ships.

    Raises:
        ConfigError: if a part is missing or unknown, the weights are too many bytes, or the Llama has too few seeds.
    """
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    parts = sorted({part for needed in NEEDS.values() for part in needed})
    refuse_unknown(recipe, parts, "a part of the recipe", f"{path}: ")
    if missing := [part for part in parts if part not in recipe]:
        raise ConfigError(f"{path}: the part `{missing[0]}` is missing: expected {', '.join(parts)}.")
    base, most = recipe["base"], recipe["box"]["most_bytes"]
    size = box_bytes(recipe["tokens"]["vocab_size"], base["layers"], base["width"])
    if size > most:
        raise ConfigError(
            f"{path}: the box must have at most {most:,} bytes, got {size:,} of weights in bfloat16 and what is beside "
            "them: take fewer layers, a smaller width or a smaller vocabulary."
        )
    seeds = recipe["beside"].get("seeds", 1)
    if (count := seeds if isinstance(seeds, int) else len(seeds)) < 2:
        raise ConfigError(f"{path}: `beside.seeds` must be at least 2, got {count}: a single seed has no interval.")
    return dict(recipe)


def box_bytes(vocab_size: int, layers: int, width: int) -> int:
    """Return how many bytes the folder that ships has, at most, with a model of this shape."""
    parameters = architecture(architecture_spec(layers, width)).count({"vocab_size": vocab_size}).total
    return 2 * parameters + BYTES_OF_A_TOKEN * vocab_size + BYTES_OF_CARD


class Making:
    """The stages; each method that does one returns its result, None where the time was over first.

    Attributes:
        data: the folder of real data.
        work: where results lie.
        recipe: the parts of recipe.yaml.
        output_dir: the folder that ships.
        chain: what is done.
        deadline: on the clock of `time.monotonic`, None for never.
        why: what ended the work.
    """

    def __init__(
        self, data: Path, work: Path, recipe: Mapping[str, Any], output_dir: Path, minutes: float | None
    ) -> None:
        self.data, self.work, self.recipe, self.output_dir = data, work, recipe, output_dir
        self.chain = Chain(work, {stage: {part: recipe[part] for part in NEEDS[stage]} for stage in STAGES})
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.why = "the time is over"

    def do(self, stage: str) -> bool:
        """Do a stage unless it is done, and return whether it is now."""
        if self.chain.result(stage) is not None and (stage != "box" or (self.output_dir / "config.json").is_file()):
            return True
        if self.deadline is not None and time.monotonic() >= self.deadline:
            return False
        self.chain.begin(stage)
        before = self.chain.state(stage)[1]
        self.chain.tell(STAGES, running=stage)
        told = f"going on at {before}" if before else "begins"
        print(f"== {stage}, {STAGES.index(stage) + 1} of {len(STAGES)}: {told}", flush=True)
        started = time.monotonic()
        result = getattr(self, stage.replace("-", "_"))()
        if result is None:
            return False
        self.chain.finish(stage, result)
        print(f"   {self.chain.state(stage)[1]} ({(time.monotonic() - started) / 60:.1f} min here)", flush=True)
        return True

    def text(self) -> dict[str, Any]:
        """Write the base's text, and which stories were left out of it where."""
        left_out: dict[str, list[str]] = {}
        records = base_records(self.data, left_out, **self.recipe["text"])
        documents, size = write_rows(self.work / "text.jsonl", records)
        replace_json(self.work / "left-out.json", left_out)
        different = {one for found in left_out.values() for one in found}
        return {"documents": documents, "bytes": size, "left_out": len(different)}

    def tokens(self) -> dict[str, Any]:
        """Prepare the text: its tokenizer and its tokens."""
        out = self.work / "tokens"
        if not out.is_dir():  # it is whole once it is there
            with TerminalReporter() as reporter:
                prepare(
                    open_source(str(self.work / "text.jsonl")),
                    out,
                    tokenizer=None,
                    vocab_size=self.recipe["tokens"]["vocab_size"] - CHAT_TOKENS,
                    held_out_fraction=0.0,
                    progress=data_to(reporter),
                    workers=2,
                )
        made = open_prepared(out)
        return {"tokens": made.metadata["splits"]["train"]["tokens"], "fingerprint": made.fingerprint}

    def base(self) -> dict[str, Any] | None:
        """Train the base."""
        asked, valid = self.recipe["base"], self.data / "text-small/valid.jsonl.xz"
        shape = model_fields(asked["layers"], asked["width"])
        files = {"data": str(self.work / "tokens"), "eval_data": str(valid)}
        return self._train("base", fanformer.train, preset="nano", model=shape, **files, **asked["run"])

    def rows_mid(self) -> dict[str, Any]:
        """Write what it is mid-trained on."""
        return self._rows("rows-mid", SEED, self.recipe["rows_mid"])

    def mid(self) -> dict[str, Any] | None:
        """Teach the base to find in its context."""
        return self._tune("mid", "base", "rows-mid", self.recipe["mid"]["run"])

    def rows(self) -> dict[str, Any]:
        """Write what it is tuned on."""
        return self._rows("rows", SEED + 1, self.recipe["rows"])

    def rows_blind(self) -> dict[str, Any]:
        """Write what the twin is tuned on."""
        return self._rows("rows-blind", SEED + 1, self.recipe["rows"], blind=True)

    def tuned(self) -> dict[str, Any] | None:
        """Tune it."""
        return self._tune("tuned", "mid", "rows", self.recipe["tuned"]["run"])

    def blind(self) -> dict[str, Any] | None:
        """Tune the twin that never sees a passage.

        Raises:
            ConfigError: if what it is a twin of was begun by another recipe.
        """
        for stage in ("rows", "tuned"):
            self.chain.result(stage)
        return self._tune("blind", "mid", "rows-blind", self.recipe["tuned"]["run"])

    def box(self) -> dict[str, Any]:
        """Write the folder that ships: bfloat16 weights that are computed with in float32, no code of its own, a card.

        The weights are those of `mixed`, and its generation settings ask to be drawn as the recipe says.

        Raises:
            ConfigError: if it has too many bytes; the folder that was there before stays.
        """
        asked, tuned, new = self.recipe["box"], self.work / "tuned", self.work / "box"
        most = asked["most_bytes"]
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        for name in SHIPPED:
            shutil.copy(tuned / name, new / name)
        config = json.loads((new / "config.json").read_text(encoding="utf-8"))
        config.pop("auto_map", None)  # the package that it ships in has the classes
        replace_json(new / "config.json", config | {"dtype": "float32"})
        drawn = new / "generation_config.json"
        replace_json(drawn, json.loads(drawn.read_text(encoding="utf-8")) | asked["sampling"])
        shipped = mixed(tuned, {self.work / stage: share for stage, share in asked["shares"].items()})
        shipped = {name: value.to(torch.bfloat16) for name, value in shipped.items()}
        save_file(shipped, new / "model.safetensors", {"format": "pt"})
        (new / "model.safetensors").chmod(0o644)
        results = {stage: self.chain.result(stage) or {} for stage in chosen("box")[:-1]}
        write_card(new, self.work, results, asked["shares"])
        size = sum(path.stat().st_size for path in new.iterdir())
        if size > most:
            raise ConfigError(
                f"the box must have at most {most:,} bytes, got {size:,} in {new}: see the recipe's shape."
            )
        with staged_folder(self.output_dir) as beside:
            shutil.copytree(new, beside)
        return {"bytes": size}

    def beside(self) -> dict[str, Any] | None:
        """Train the base's shape and a Llama of equal parameters on a share of its tokens, over seeds.

        Raises:
            ConfigError: if an architecture has no result.
        """
        asked, folder = self.recipe["beside"], self.work / "beside"
        comparison = beside_llama(self.recipe, self.work / "tokens", self.data / "text-small/valid.jsonl.xz")
        ledger = None if asked["record_dir"] is None else Path(asked["record_dir"])
        queue = Queue((QueueEntry("box-beside-llama", folder / "box-beside-llama", comparison),), folder, ledger)
        command = command_line(["python", *sys.argv])
        try:
            with SweepReporter() as reporter:
                (outcome,) = run_queue(queue, reporter, command, self.deadline, jobs=asked["jobs"])
        except OutOfTimeError:
            return None
        if outcome.error is not None:
            raise ConfigError(f"no comparison with a Llama: {outcome.error}")
        record = json.loads((folder / "box-beside-llama" / RECORD_FILE).read_text(encoding="utf-8"))
        (pair,) = record["pairs"]
        return {name: pair["figures"]["bits_per_byte_difference"][name] for name in ("value", "low", "high")}

    def _rows(self, name: str, seed: int, asked: Mapping[str, Any], *, blind: bool = False) -> dict[str, Any]:
        """Write the rows of a name."""
        rows = tuning_rows(self.data, self.work / "text.jsonl", seed, blind=blind, **asked)
        count, size = write_rows(self.work / f"{name}.jsonl", rows)
        return {"rows": count, "bytes": size}

    def _tune(self, name: str, base: str, rows: str, run: Mapping[str, Any]) -> dict[str, Any] | None:
        """Tune the model of a stage on the rows of another."""
        return self._train(name, fanformer.finetune, base=self.work / base, data=self.work / f"{rows}.jsonl", **run)

    def _train(self, name: str, run: Any, **fields: Any) -> dict[str, Any] | None:
        """Train in a folder of this name, going on where an earlier process stopped."""
        left = None if self.deadline is None else max(1.0, self.deadline - time.monotonic())
        with TerminalReporter() as reporter:
            result = run(
                output_dir=self.work / name, seed=SEED, resume=True, max_time=left, listener=reporter, **fields
            )
        if not result.reached_end:
            if result.stopped_by is not None:
                self.why = f"stopped by {result.stopped_by}"
            return None
        records = read_records(self.work / name)
        hours = max(record.get("elapsed_seconds", 0.0) for record in records) / 3600
        figures = {"steps": result.step, "tokens": int(records[-1]["tokens"]), "hours": hours}
        return {**figures, "bits_per_byte": result.held_out.bits_per_byte}


def mixed(tuned: Path, shares: Mapping[Path, float]) -> dict[str, torch.Tensor]:
    """Return the weights of a tuned model with shares of earlier ones in them, which gives back some of what it forgot.

    Source: Wortsman et al. 2022, "Robust fine-tuning of zero-shot models".

    Args:
        tuned: a model folder.
        shares: of the weights of each folder that it was tuned from, of the same shape; at most 1 in all.
    """
    weights = load_file(tuned / "model.safetensors")
    found = {name: (1 - sum(shares.values())) * value for name, value in weights.items()}
    for folder, share in shares.items():
        for name, value in load_file(folder / "model.safetensors").items():
            found[name] += share * value
    return found


def beside_llama(recipe: Mapping[str, Any], data: Path, valid: Path) -> Comparison:
    """Return the comparison of the base's shape with a Llama of as many layers, width and parameters.

    Args:
        recipe: the parts of recipe.yaml.
        data: the base's tokens.
        valid: the held-out text.

    Raises:
        ConfigError: if no Llama of that width has so many parameters, or a field of the trainings is wrong.
    """
    base, asked = recipe["base"], recipe["beside"]
    ours = architecture_spec(base["layers"], base["width"])
    size = without_embeddings(architecture(ours).config({"vocab_size": recipe["tokens"]["vocab_size"]}))
    run = {name: value for name, value in base["run"].items() if name not in ("tokens", "learning_rate", "eval_steps")}
    return Comparison.from_fields(
        {
            "architectures": [
                ours, f"llama@{size}:num_hidden_layers={base['layers']},hidden_size={base['width']}"
            ],
            "data": str(data),
            "tokens": round(asked["share"] * parse_count(str(base["run"]["tokens"]))),
            "learning_rates": asked["learning_rates"],
            "seeds": asked["seeds"],
            "extend": asked.get("extend", 0),
            "evaluations": 1,
            "eval_tokens": HELD_OUT_TOKENS,
            "run": {**run, **asked["run"], "eval_data": str(valid)},
        }
    )  # fmt: skip


if __name__ == "__main__":
    run_program(main)
