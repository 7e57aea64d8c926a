"""Choose vocabulary, shape, rate and tokens of the model in the box by short trials.

    python release/trials.py [--plan release/trials.yaml] [--data ../shared/data] [--work runs/release-trials]
        [--minutes M] [--scale X]

Measures how many tokens each candidate trains on in a second of processor time, trains all of them for the same
processor time at two lengths, and says what that promises for the base's hours, by `scaling.py`. The same command goes
on after any end, and ends by printing the choice once all trials are there; `fanformer compare --status --output-dir
WORK/queue` says how far they are. `--scale 0.01` does a hundredth of it, uncompiled, to see that it runs: its choice
means nothing, and the ledger gets none of it.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from make_model import CHAT_TOKENS, HELD_OUT_TOKENS, box_bytes
from scaling import best_at, choose
from shapes import architecture_spec, model_fields
from stages import Chain
from texts import base_records, write_rows

import fanformer
from fanformer.cli.failure import quiet_libraries, run_program
from fanformer.cli.options import echo_table
from fanformer.cli.terminal import SweepReporter
from fanformer.comparison.queue import LOCK_FILE, RECORD_FILE, read_queue, run_queue
from fanformer.comparison.sweep import OutOfTimeError
from fanformer.data.preparation.prepare import prepare
from fanformer.data.sources.documents import open_source
from fanformer.errors import ConfigError
from fanformer.files.durable import replace_json, replace_text
from fanformer.files.locking import hold
from fanformer.machine.versions import command_line
from fanformer.training.events import Event

CHOICE_FILE = "choice.json"
TIMED_STEPS, FIRST_STEPS = 6, 2
"""Steps whose processor time is measured, and those before them, which compile and warm up."""
LEAST_STEPS = (2, 4)
"""Of a short and of a long trial."""


@dataclass(frozen=True)
class Candidate:
    """What may become the model in the box.

    Attributes:
        vocab_size: rows of the embedding.
        layers: how many blocks.
        width: hidden_size.
    """

    vocab_size: int
    layers: int
    width: int

    @property
    def name(self) -> str:
        """Names its trials."""
        return f"v{self.vocab_size}-{self.layers}x{self.width}"

    @property
    def spec(self) -> str:
        """What `fanformer compare` calls its shape."""
        return architecture_spec(self.layers, self.width)


class Trials:
    """The trials of one plan.

    Attributes:
        data: the folder of real data.
        work: where results lie.
        plan: the fields of trials.yaml.
        scale: of texts and times; below 1 nothing is compiled or recorded.
        candidates: by their names.
        chain: what is measured.
    """

    def __init__(self, data: Path, work: Path, plan: Mapping[str, Any], scale: float) -> None:
        self.data, self.work, self.plan, self.scale = data, work, plan, scale
        found = [Candidate(**fields) for fields in plan["candidates"]]
        self.candidates = {candidate.name: candidate for candidate in found}
        self.run = {**plan["run"], **({} if scale == 1 else {"compile": "off"})}
        self.text_fields = {**plan["text"], "share": plan["text"]["share"] * scale}
        settings: dict[str, dict[str, Any]] = {"text": self.text_fields}
        for candidate in found:
            settings[f"tokens-{candidate.vocab_size}"] = self.text_fields
            settings[f"speed-{candidate.name}"] = self.run
        self.chain = Chain(work, settings)

    @property
    def step_tokens(self) -> int:
        """Tokens of an optimizer step."""
        return int(self.run["sequence_length"] * self.run["batch_size"])

    def tokens_folder(self, candidate: Candidate) -> Path:
        """Return where the text is in a candidate's vocabulary."""
        return self.work / f"tokens-{candidate.vocab_size}"

    def prepare(self) -> None:
        """Write the text, and its tokens in every vocabulary."""
        if self.chain.result("text") is None:
            self.chain.begin("text")
            documents, size = write_rows(self.work / "text.jsonl", base_records(self.data, {}, **self.text_fields))
            self.chain.finish("text", {"documents": documents, "bytes": size})
            print(f"text: {documents:,} documents, {size / 1e6:.1f} MB", flush=True)
        for candidate in self.candidates.values():
            name, out = f"tokens-{candidate.vocab_size}", self.tokens_folder(candidate)
            if self.chain.result(name) is None:
                self.chain.begin(name)
                if not out.is_dir():
                    source, size = open_source(str(self.work / "text.jsonl")), candidate.vocab_size - CHAT_TOKENS
                    prepare(source, out, tokenizer=None, vocab_size=size, held_out_fraction=0.0)
                self.chain.finish(name, {})
                print(f"{name}: prepared", flush=True)

    def speed(self, name: str) -> float:
        """Return a candidate's tokens per second of processor time, measured in a process of its own, once.

        The base's steps may have more rows, which changes it little: 0.6% for 3 x 192 and 8 rows in place of 4.
        """
        stage = f"speed-{name}"
        if (known := self.chain.result(stage)) is None:
            subprocess.run([sys.executable, *sys.argv, "--measure-speed", name], check=True)
            known = self.chain.result(stage)
            assert known is not None, "the process has written it"
            print(f"{name}: {known['tokens_per_processor_second']:,.0f} tokens per processor second", flush=True)
        return float(known["tokens_per_processor_second"])

    def measure_speed(self, name: str) -> None:
        """Train a candidate for a few steps and keep the median processor time of a step."""
        candidate, times, stage = self.candidates[name], [], f"speed-{name}"

        def hear(event: Event) -> None:
            if event.kind == "step":
                times.append(time.process_time())

        self.chain.begin(stage)
        fanformer.train(
            str(self.tokens_folder(candidate)),
            preset="nano",
            model=model_fields(candidate.layers, candidate.width),
            output_dir=self.work / stage,
            overwrite=True,
            max_steps=FIRST_STEPS + TIMED_STEPS,
            eval_data=str(self.data / "text-small/valid.jsonl.xz"),
            final_eval_tokens=2048,
            eval_tokens=2048,
            eval_steps=1000,
            save_steps=1000,
            listener=hear,
            learning_rate=self.plan["learning_rate"],
            **self.run,
        )
        timed = times[FIRST_STEPS - 1 :]
        seconds = statistics.median(later - earlier for earlier, later in itertools.pairwise(timed))
        shutil.rmtree(self.work / stage)
        self.chain.finish(stage, {"tokens_per_processor_second": self.step_tokens / seconds})

    def lengths(self, name: str) -> list[int]:
        """Return the tokens of a candidate's short and long trial: whole steps."""
        minutes = [value * self.scale for value in self.plan["processor_minutes"]]
        steps = [round(60 * value * self.speed(name) / self.step_tokens) for value in minutes]
        return [max(least, count) * self.step_tokens for least, count in zip(LEAST_STEPS, steps, strict=True)]

    def entries(self) -> list[dict[str, Any]]:
        """Return the entries of the queue: each candidate at both lengths, and one at other rates."""
        entries = []
        for name, candidate in self.candidates.items():
            fields = {"architectures": candidate.spec, "data": str(self.tokens_folder(candidate))}
            rate = self.plan["learning_rate"]
            entries.append({"name": name, "tokens": self.lengths(name), "learning_rates": [rate], **fields})
            if candidate == Candidate(**self.plan["rates_of"]):
                rates = [rate, *self.plan["other_rates"]]
                entries.append({"name": "rates", "tokens": self.lengths(name)[1:], "learning_rates": rates, **fields})
        return entries

    def train(self, deadline: float | None) -> None:
        """Train what is not trained yet.

        Raises:
            ConfigError: if a candidate has no result.
            OutOfTimeError: at the deadline.
        """
        valid = str(self.data / "text-small/valid.jsonl.xz")
        content = {
            "output_dir": str(self.work / "queue"),
            "record_dir": self.plan["record_dir"] if self.scale == 1 else None,
            "defaults": {
                "evaluations": 1,
                "eval_tokens": HELD_OUT_TOKENS if self.scale == 1 else 4096,
                "run": {**self.run, "eval_data": valid},
            },
            "entries": self.entries(),
        }
        file = self.work / "queue.yaml"
        replace_text(file, yaml.safe_dump(content, sort_keys=False))
        with SweepReporter() as reporter:
            outcomes = run_queue(read_queue(file), reporter, command_line(["python", *sys.argv]), deadline)
        if failed := [outcome for outcome in outcomes if outcome.error is not None]:
            raise ConfigError(f"trial {failed[0].name} has no result: {failed[0].error}")

    def trainings(self, entry: str) -> list[dict[str, Any]]:
        """Return the trainings of an entry of the queue that finished."""
        record = json.loads((self.work / "queue" / entry / RECORD_FILE).read_text(encoding="utf-8"))
        return [one for one in record["trainings"] if one["result"] and one["result"]["status"] == "finished"]


def report(trials: Trials) -> dict[str, Any]:
    """Print what was measured and what it promises, and return the choice as plain values."""
    found, rates = {name: trials.trainings(name) for name in trials.candidates}, trials.trainings("rates")
    if lost := [name for name, trainings in found.items() if len(trainings) < len(LEAST_STEPS)]:
        raise ConfigError(
            f"candidate {lost[0]} must have trainings of both lengths, got one that diverged: leave it out."
        )
    speeds = {name: trials.speed(name) for name in found}
    seconds = 3600 * trials.plan["hours"] * trials.plan["cores"] * trials.plan["training_share"]
    choice = choose(found, rates, speeds, seconds)
    header = ["candidate", "parameters", "tokens/s", "short", "long", "tokens then", "MB then"]
    lines = [[*header, *(f"b {value.exponent:g}" for value in choice.fits.values()), "own slope"]]
    for name, trainings in found.items():
        figures = [one["result"]["figures"] for one in sorted(trainings, key=lambda one: one["variant"])]
        measured = [f"{figures[0]['parameters']:,}", f"{speeds[name]:,.0f}"]
        measured += [f"{one['bits_per_byte']:.4f}" for one in figures]
        measured += [f"{choice.tokens[name] / 1e6:.1f}M", f"{choice.text_bytes[name] / 1e6:,.0f}"]
        promised = [f"{one.bits_per_byte(name, choice.text_bytes[name]):.4f}" for one in choice.fits.values()]
        lines.append([name, *measured, *promised, f"{choice.alone[name]:.4f}"])
    print("tokens/s: of processor time; then: in the base's hours; b: bits per byte, by exponent")
    echo_table(lines)
    for source, fitted in choice.fits.items():
        best = best_at(fitted, choice.text_bytes)
        print(
            f"{source}: L = F + {fitted.slope:.3f} MB^-{fitted.exponent:g}, residual {fitted.residual:.4f}; best {best}"
        )
    told = ", ".join(f"{one['learning_rate']:g} {one['result']['figures']['bits_per_byte']:.4f}" for one in rates)
    print(f"rates after the longer trial: {told}")
    whole = trials.chain.result("text") or {}
    repeated = choice.text_bytes[choice.candidate] / (whole["bytes"] / trials.text_fields["share"])
    best, tokens = trials.candidates[choice.candidate], round(choice.tokens[choice.candidate] / 1e6)
    print(f"choice: vocab_size {best.vocab_size}, layers {best.layers}, width {best.width}, tokens {tokens}M, "
          f"learning_rate {choice.learning_rate:g}; it reads the text {repeated:.2f} times")  # fmt: skip
    chosen = {"vocab_size": best.vocab_size, "layers": best.layers, "width": best.width}
    promised = {
        source: one.bits_per_byte(best.name, choice.text_bytes[best.name]) for source, one in choice.fits.items()
    }
    return {**chosen, "tokens": f"{tokens}M", "learning_rate": choice.learning_rate, "promised": promised}


def read_plan(path: Path) -> dict[str, Any]:
    """Return a plan whose candidates fit the box.

    Raises:
        ConfigError: if one does not.
    """
    plan = yaml.safe_load(path.read_text(encoding="utf-8"))
    most = yaml.safe_load(Path(__file__).with_name("recipe.yaml").read_text(encoding="utf-8"))["box"]["most_bytes"]
    for fields in plan["candidates"]:
        if (size := box_bytes(**fields)) > most:
            raise ConfigError(
                f"{path}: candidate {fields} must have at most {most:,} bytes, got {size:,}: make it smaller."
            )
    if plan["rates_of"] not in plan["candidates"]:
        raise ConfigError(f"{path}: `rates_of` must be one of the candidates, got {plan['rates_of']}.")
    return dict(plan)


def main() -> int:
    """Do the trials that are left and print the choice; the status is 75 where the time was over first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, default=Path(__file__).with_name("trials.yaml"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of real data")
    parser.add_argument("--work", type=Path, default=Path("runs/release-trials"))
    parser.add_argument("--minutes", type=float, help="stop after so long; the same command goes on")
    parser.add_argument("--scale", type=float, default=1.0, help="share of texts and times, to see that it runs")
    parser.add_argument("--measure-speed", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    quiet_libraries()
    asked.work.mkdir(parents=True, exist_ok=True)
    trials = Trials(asked.data, asked.work, read_plan(asked.plan), asked.scale)
    if asked.measure_speed is not None:
        trials.measure_speed(asked.measure_speed)
        return 0
    deadline = None if asked.minutes is None else time.monotonic() + 60 * asked.minutes
    with hold(asked.work / LOCK_FILE, f"the work folder {asked.work}", ConfigError):
        trials.prepare()
        try:
            trials.train(deadline)
        except OutOfTimeError:
            print("the time is over: the same command goes on")
            return os.EX_TEMPFAIL
        replace_json(asked.work / CHOICE_FILE, report(trials))
    return 0


if __name__ == "__main__":
    run_program(main)
