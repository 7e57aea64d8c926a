"""Make the model in the box, from text to the folder that ships: `make release-model`.

    python release/make_model.py [--data ../shared/data] [--work runs/release] [--recipe release/recipe.yaml]
        [--until STAGE] [--minutes M] [--output-dir FOLDER] [--blind]

The stages, in their order: text, tokens, base, rows, tune, ship. Each leaves its result under WORK, and the same
command goes on after any end, bit for bit. `--blind` tunes the same base as a twin that never sees a passage, and
ships nothing: `check.py` sets the two side by side.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from rows import tuning_rows
from safetensors.torch import load_file, save_file
from texts import base_records

import fanformer
from fanformer.cli.failure import quiet_libraries
from fanformer.cli.terminal import TerminalReporter
from fanformer.data.preparation.prepare import prepare
from fanformer.data.sources.documents import open_source
from fanformer.errors import FANformerError
from fanformer.files.durable import replace_json
from fanformer.files.staging import replace_folder
from fanformer.training.events import data_to

STAGES = ("text", "tokens", "base", "rows", "tune", "ship")
SHIPPED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
SEED = 0


def main() -> int:
    """Do the stages that are left; the status is 75 where the time was over first."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("runs/release"))
    parser.add_argument("--recipe", type=Path, default=Path(__file__).with_name("recipe.yaml"))
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1])
    parser.add_argument("--minutes", type=float, help="stop after so long; the same command goes on")
    parser.add_argument("--output-dir", type=Path, default=Path("src/fanformer/box"))
    parser.add_argument("--blind", action="store_true", help="tune a twin without passages, in WORK/blind")
    asked = parser.parse_args()
    quiet_libraries()
    asked.work.mkdir(parents=True, exist_ok=True)
    recipe = yaml.safe_load(asked.recipe.read_text(encoding="utf-8"))
    making = Making(asked.data, asked.work, recipe, asked.minutes, asked.blind)
    for stage in STAGES[: STAGES.index("tune" if asked.blind else asked.until) + 1]:
        print(f"== {stage} ==", flush=True)
        if not (making.ship(asked.output_dir) if stage == "ship" else getattr(making, stage)()):
            print("the time is over: the same command goes on")
            return 75
    return 0


class Making:
    """The stages; each returns whether it is done.

    Attributes:
        data: the folder of real data.
        work: where results lie.
        recipe: the parts of recipe.yaml.
        blind: whether it is the twin that is tuned.
        deadline: on the clock of `time.monotonic`, None for never.
    """

    def __init__(self, data: Path, work: Path, recipe: Mapping[str, Any], minutes: float | None, blind: bool) -> None:
        self.data, self.work, self.recipe, self.blind = data, work, recipe, blind
        self._rows = work / ("rows-blind.jsonl" if blind else "rows.jsonl")
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes

    def text(self) -> bool:
        """Write the base's text, and which stories were left out of it where."""
        out = self.work / "text.jsonl"
        if not out.is_file():
            asked = self.recipe["text"]
            left_out: dict[str, list[str]] = {}
            write_rows(out, base_records(self.data, asked["shards"], asked["repeats"], left_out))
            replace_json(self.work / "left-out.json", left_out)
        return True

    def tokens(self) -> bool:
        """Prepare the text: its tokenizer and its tokens."""
        out = self.work / "tokens"
        if not out.is_dir():
            with TerminalReporter() as reporter:
                prepare(
                    open_source(str(self.work / "text.jsonl")),
                    out,
                    tokenizer=None,
                    vocab_size=self.recipe["text"]["vocab_size"],
                    held_out_fraction=0.0,
                    progress=data_to(reporter),
                    workers=2,
                )
        return True

    def base(self) -> bool:
        """Train the base."""
        asked, valid = self.recipe["base"], self.data / "text-small/valid.jsonl.xz"
        data = {"data": str(self.work / "tokens"), "eval_data": str(valid)}
        return self._train("base", **data, model=asked["model"], **asked["run"])

    def rows(self) -> bool:
        """Write what it is tuned on."""
        if not self._rows.is_file():
            write_rows(self._rows, tuning_rows(self.data, SEED, blind=self.blind))
        return True

    def tune(self) -> bool:
        """Tune the base."""
        fields = {"base": self.work / "base", "data": self._rows}
        return self._train("blind" if self.blind else "tuned", **fields, **self.recipe["tune"]["run"])

    def ship(self, folder: Path) -> bool:
        """Write the folder that ships: bfloat16 weights, configuration without code of its own, tokenizer, template."""
        tuned, new = self.work / "tuned", folder.with_name(f"{folder.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        for name in SHIPPED:
            shutil.copy(tuned / name, new / name)
        config = json.loads((new / "config.json").read_text(encoding="utf-8"))
        config.pop("auto_map", None)  # the package that it ships in has the classes
        replace_json(new / "config.json", config | {"dtype": "bfloat16"})
        weights = {name: value.to(torch.bfloat16) for name, value in load_file(tuned / "model.safetensors").items()}
        save_file(weights, new / "model.safetensors", {"format": "pt"})
        (new / "model.safetensors").chmod(0o644)
        replace_folder(new, folder)
        return True

    def _train(self, name: str, **fields: Any) -> bool:
        """Train or tune in a folder of this name, going on where an earlier process stopped."""
        done = self.work / f"{name}.json"
        if done.is_file():
            return True
        run = fanformer.finetune if "base" in fields else fanformer.train
        left = {} if self.deadline is None else {"max_time": max(1.0, self.deadline - time.monotonic())}
        with TerminalReporter() as reporter:
            result = run(output_dir=self.work / name, seed=SEED, resume=True, listener=reporter, **left, **fields)
        if result.reached_end:
            replace_json(done, {"step": result.step, "bits_per_byte": result.held_out.bits_per_byte})
        return result.reached_end


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as jsonl; the file is there when it is whole."""
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    partial.replace(path)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FANformerError as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
