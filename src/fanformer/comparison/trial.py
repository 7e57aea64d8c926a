"""One training of a comparison, in a process of its own: `python -m fanformer.comparison.trial FOLDER`.

FOLDER holds trial.json, what to train; it gets result.json when the training ended or diverged, and goes on from its
last checkpoint where an earlier process was stopped. Progress goes to stdout, a JSON object a line.
"""

import contextlib
import ctypes
import hashlib
import json
import math
import os
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fanformer.errors import ConfigError, DivergenceError, FANformerError
from fanformer.files.durable import replace_json
from fanformer.machine.versions import hardware, versions
from fanformer.training.events import Event

if TYPE_CHECKING:
    from fanformer.comparison.rule_learning import RuleResult
    from fanformer.training.fields import RunConfig
    from fanformer.training.run import RunResult

TRIAL_FILE, RESULT_FILE, RUN_FOLDER = "trial.json", "result.json", "run"
MADE = ("date", "hardware", "versions")
"""When and on what a training was done: fields of its result's details, and of the ledger's entries."""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_SECONDS_BETWEEN_LINES = 0.5
_NEEDED = ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
"""What the data decide of a model's configuration."""
_UNLESS_ASKED = {"muon_factor_scale": 1.0}
"""Fields that a preset sets for its own block: a training of another one, whose name does not tell, has none of it."""


@dataclass(frozen=True)
class Trial:
    """What to train.

    Attributes:
        architecture: as `architectures.architecture` reads it.
        learning_rate: peak learning rate.
        seed: of initialisation and data order.
        settings: fields of RunConfig; the same for all trainings that are compared.
        data_folder: prepared data; they may move, so their path is not part of the name.
        data_fingerprint: of these data.
        rule: fields of a rule-learning task instead, with its name under `task`; `settings` are then that training's.
        block: `architectures.Architecture.block` of the architecture.
        architecture_digest: `architectures.Architecture.digest` of it.
        eval_digest: of the text that `eval_data` in `settings` names, empty where it names none.
    """

    architecture: str
    learning_rate: float
    seed: int
    settings: Mapping[str, Any] = field(hash=False)
    data_folder: str = ""
    data_fingerprint: str = ""
    rule: Mapping[str, Any] | None = field(default=None, hash=False)
    block: int = 1
    architecture_digest: str = ""
    eval_digest: str = ""

    @property
    def name(self) -> str:
        """A name for a folder; trainings that differ in anything have different ones."""
        content = {key: value for key, value in asdict(self).items() if key != "data_folder"}
        for key, before in (("block", 1), ("architecture_digest", ""), ("eval_digest", "")):
            if content[key] == before:
                del content[key]  # names are older than these fields
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
        words = "".join(letter if letter.isalnum() or letter in ".-" else "-" for letter in self.architecture)
        told = words[-48:] if os.sep in self.architecture else words[:48]  # of a path the end tells more
        return f"{told.strip('-')}-lr{self.learning_rate:g}-seed{self.seed}-{digest}"


@dataclass(frozen=True)
class Result:
    """How a training ended.

    Attributes:
        status: "finished" or "diverged".
        message: why it diverged, else empty.
        figures: its numbers by name; none where it diverged.
        curve: its held-out figures as it went, or the rule task's.
        details: configuration, counts, data, decisions and versions.
    """

    status: str
    message: str
    figures: dict[str, Any]
    curve: list[dict[str, Any]]
    details: dict[str, Any]

    def in_words(self) -> str:
        """Return how it ended as a line for people."""
        figures = self.figures
        if self.status != "finished":
            return f"{self.status}: {self.message}"
        if "error_beyond_window" in figures:
            within, beyond = (figures[f"error_{place}_window"] for place in ("within", "beyond"))
            return f"error within the window {within:.3f}, beyond {beyond:.3f}"
        if "hole_accuracy" in figures:
            return f"trained {figures['train_accuracy']:.1%} right, left out {figures['hole_accuracy']:.1%}"
        return f"{figures['bits_per_byte']:.4f} bits per byte"


def read_result(folder: Path) -> Result | None:
    """Return the result of the training in `folder`, None where it has not ended."""
    path = folder / RESULT_FILE
    return Result(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


class _Lines:
    """Tells a parent process what a run does, and ends with it."""

    def __init__(self) -> None:
        self._last, self._parent = 0.0, os.getppid()

    def tell(self, **content: Any) -> None:
        """Write one line."""
        print(json.dumps(content), flush=True)  # noqa: T201  # the parent reads it

    def __call__(self, event: Event) -> None:
        """Tell the held-out loss, and now and then how far the run is."""
        if event.kind == "record" and "test_accuracy" in event.figures:
            train, test = (event.figures[f"{part}_accuracy"] for part in ("train", "test"))
            self.tell(progress=event.share, text=f"train {train:.1%}, left out {test:.1%}")
        elif event.kind == "record" and "val_loss" in event.figures:
            self.tell(progress=event.share, text=f"held out {event.figures['val_bits_per_byte']:.4f} bits per byte")
        elif event.kind == "step":
            if os.getppid() != self._parent:
                raise SystemExit("the process that started this training is gone")
            if time.monotonic() - self._last > _SECONDS_BETWEEN_LINES:
                self._last = time.monotonic()
                rate = event.figures["tokens"] / max(event.figures["elapsed_seconds"], 1e-9)
                self.tell(progress=event.share, text=f"{rate:,.0f} tokens/s")


def run_trial(trial: Trial, folder: Path, lines: _Lines) -> Result:
    """Train and return the result.

    Raises:
        ConfigError: if the architecture's file changed since the comparison asked for it.
        FANformerError: on bad input; a run that diverged is a result.
        SystemExit: where a signal or a limit of time stopped the run, which then goes on at the next call.
    """
    from fanformer.comparison.architectures import architecture

    if architecture(trial.architecture).digest != trial.architecture_digest:
        raise ConfigError(f"{trial.architecture} has changed since the comparison began: start the comparison again.")
    return _train_rule(trial, folder, lines) if trial.rule is not None else _train_language(trial, folder, lines)


def language_config(trial: Trial, folder: Path) -> "RunConfig":
    """Return the run that trains a trial of language; its model is the architecture's."""
    from fanformer.training.configuration import resolve

    own = {
        "data": trial.data_folder,
        "output_dir": str(folder / RUN_FOLDER),
        "resume": True,
        "learning_rate": trial.learning_rate,
        "seed": trial.seed,
    }
    return resolve(overrides={**_UNLESS_ASKED, **trial.settings, **own})


def _train_language(trial: Trial, folder: Path, lines: _Lines) -> Result:
    from fanformer.comparison.architectures import architecture
    from fanformer.evaluation.loss import HeldOutLoss
    from fanformer.model.footprint import footprint
    from fanformer.training.folder import read_records, read_run_file
    from fanformer.training.run import train

    chosen = architecture(trial.architecture)
    config = language_config(trial, folder)
    size = {name: value for name, value in config.model.items() if name == "vocab_size"}
    config = config.replace(model={**size, "max_position_embeddings": 1})
    run_folder = config.folder
    try:
        outcome = train(config, lines, lambda fields: chosen.build({name: fields[name] for name in _NEEDED}))
    except DivergenceError as error:
        return Result("diverged", error.reason, {}, [], {"architecture": trial.architecture})
    _leave_unless_ended(outcome)
    assert isinstance(outcome.held_out, HeldOutLoss), "a run on text that reached its end was measured"
    if not math.isfinite(outcome.held_out.loss):
        reason = f"the held-out loss at the end is {outcome.held_out.loss}"
        return Result("diverged", reason, {}, [], {"architecture": trial.architecture})
    described, records = read_run_file(run_folder), read_records(run_folder)
    needed = {name: described["model"][name] for name in _NEEDED if name in described["model"]}
    needed |= {"max_position_embeddings": config.batch.sequence_length}
    counted = chosen.count(needed)
    operations = counted.training_operations
    if (law := described.get("recurrent_depth")) is not None:  # the mean counts from where it is drawn
        once = footprint(chosen.config(needed), num_steps=1).training_operations
        operations = round(once + (1 - law["one_step_fraction"]) * (operations - once))
    measured = [record for record in records if math.isfinite(record.get("val_loss", math.nan))]
    rates = [record["tokens_per_second"] for record in records if "tokens_per_second" in record]
    # a depth that is drawn makes steps of several lengths, which all count; else what was disturbed does not
    # but the first window, in which code is compiled
    rate = statistics.median(rates) if law is None else statistics.harmonic_mean(rates[1:] or rates)
    curve = [{key: record[key] for key in ("tokens", "val_loss", "val_bits_per_byte")} for record in measured]
    figures = {
        **outcome.held_out.to_dict(),
        "trained_tokens": measured[-1]["tokens"],
        "seconds": max(record.get("elapsed_seconds", 0.0) for record in records),
        "tokens_per_second": rate,
        "parameters": counted.total,
        "parameters_without_embeddings": counted.without_embeddings,
        "training_operations_per_token": operations,
    }
    details = {name: described[name] for name in ("configuration", "model", "environment", "resumed")}
    details["data"] = {
        "fingerprint": described["data"]["fingerprint"],
        "source": described["data"]["metadata"]["source"],
    }
    for checkpoint in run_folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)  # the finished model lies in the run's folder
    return Result("finished", "", figures, curve, details)


def _train_rule(trial: Trial, folder: Path, lines: _Lines) -> Result:
    import torch

    from fanformer.comparison.architectures import architecture
    from fanformer.comparison.rule_learning import rule_config, train_rule
    from fanformer.comparison.rules import create_task, model_fields

    assert trial.rule is not None, "the caller looked"
    fields = dict(trial.rule)
    task = create_task(fields.pop("task"), **fields)
    own = {"learning_rate": trial.learning_rate, "seed": trial.seed}
    config = rule_config(task, folder / RUN_FOLDER, resume=True, **{**trial.settings, **own})
    torch.manual_seed(trial.seed)
    model = architecture(trial.architecture).build(model_fields(task))
    try:
        measured = train_rule(task, model, config, lines)
    except DivergenceError as error:
        return Result("diverged", error.reason, {}, [], {"architecture": trial.architecture})
    _leave_unless_ended(measured)
    result = {**measured.to_dict(), "settings": dict(trial.settings) | own}
    curve = result.pop("curve")
    figures = {
        "loss": curve[-1]["loss"],
        **measured.score.figures(),
        "seconds": result["seconds"],
        "parameters": result["parameters"],
        "parameters_without_embeddings": result["block_parameters"],
    }
    details = {"rule": {**result, "curve": curve}, "model": model.config.to_diff_dict()}
    shutil.rmtree(folder / RUN_FOLDER)
    return Result("finished", "", figures, curve, details)


def _leave_unless_ended(outcome: "RunResult | RuleResult") -> None:
    """End the process where a signal or a limit of time ended a training before its end: that is no result of it."""
    if outcome.stopped_by is not None:
        raise SystemExit(128 + signal.Signals[outcome.stopped_by])
    if not outcome.reached_end:
        raise SystemExit("`max_time` ended this training before its steps were done: leave it out, or give it more.")


def _end_with_parent() -> None:
    """Let Linux kill this process when its parent dies; elsewhere `_Lines` looks."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main(folder: Path) -> int:
    """Train what `folder` asks for; the status is 2, with one line on stderr, on bad input."""
    _end_with_parent()
    trial = Trial(**json.loads((folder / TRIAL_FILE).read_text(encoding="utf-8")))
    lines = _Lines()
    try:
        result = run_trial(trial, folder, lines)
    except (FANformerError, OSError, ValueError) as error:
        with contextlib.suppress(OSError):
            lines.tell(error=" ".join(str(error).split()) or type(error).__name__)
        return 2
    made = dict(zip(MADE, (datetime.now(UTC).strftime("%Y-%m-%d"), hardware(), versions()), strict=True))
    replace_json(folder / RESULT_FILE, asdict(replace(result, details={**result.details, **made})))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
