"""What the demos of pictures and of sound have in common: rows of data, a model, its blind twin, and their accuracy."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo import GO_ON

from fanformer.cli.failure import quiet_libraries
from fanformer.cli.terminal import TerminalReporter
from fanformer.errors import CheckpointError, ConfigError
from fanformer.training.checkpoint import WEIGHTS_FILE, checkpoints
from fanformer.training.configuration import resolve_multimodal, resolve_run
from fanformer.training.fields import OutputConfig, RunConfig
from fanformer.training.folder import RUN_FILE, read_records, read_run_file
from fanformer.training.schedule import is_finished

Example = tuple[str, str]
"""A media file's name and the answer about it."""
SOURCE_FILE, OWN_DATA = "source.txt", "the demo's own data"
TUNING = {"max_steps": 150, "optimizer": "adamw", "learning_rate": 2e-3, "eval_steps": 150}
"""Fields of the stage in which adapters learn. A base that has read little is not steered by a tower alone."""


@dataclass(frozen=True)
class Recipe:
    """How both twins learn.

    Attributes:
        question: about every picture or recording.
        fields: of their runs in the stage in which towers learn.
        bar: share of right answers that is asked for; None asks for more than the blind twin's alone.
    """

    question: str
    fields: Mapping[str, Any]
    bar: float | None = None


def write_rows(file: Path, examples: Sequence[Example], kind: str, question: str) -> None:
    """Write a conversation about each media file, which lies beside `file`."""
    lines = []
    for name, answer in examples:
        parts = [{"type": kind, "path": name}, {"type": "text", "text": question}]
        lines.append({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def base_model(folder: Path, seconds: float) -> Path:
    """Return the folder of a language model, trained as `make demo` does where it is not there.

    Raises:
        CheckpointError: if its training is stopped.
        ConfigError: if the folder holds another run that was stopped, which is not this demo's to go on with.
    """
    is_there = (folder / WEIGHTS_FILE).is_file()
    if is_finished(folder) or (is_there and not checkpoints(folder)):  # a model of another making
        print(f"{folder}: a language model is there, using it")
        return folder
    resume, fields = (folder / RUN_FILE).is_file(), {"preset": "nano", "max_time": seconds}
    wanted, free = resolve_run(None, fields).to_dict(), {"max_time", *OutputConfig.__dataclass_fields__}
    before = read_run_file(folder)["configuration"] if resume else wanted
    if any(before.get(name) != value for name, value in wanted.items() if name not in free):
        raise ConfigError(
            f"`--base` must be a model that was trained to its end, got the run {folder}, which was stopped: finish it "
            f"with `fanformer train --config {folder / RUN_FILE} --resume`, or give another."
        )
    train_to_end(resolve_run(None, {**fields, "output_dir": str(folder), "resume": resume}))
    return folder


def train_to_end(config: RunConfig) -> None:
    """Train and draw the progress.

    Raises:
        CheckpointError: if it is stopped.
    """
    from fanformer.training.run import train

    with TerminalReporter() as reporter:
        result = train(config, reporter)
    if not result.reached_end:
        raise CheckpointError(f"{config.folder} was stopped after step {result.step}: {GO_ON}.")


def train_twin(folder: Path, base: Path, rows: Path, held_out: Path, fields: Mapping[str, Any], blind: bool) -> float:
    """Align a tower, then tune adapters; return the share of held-out answers that are right to the letter.

    Raises:
        CheckpointError: if a run was stopped.
    """
    aligned = folder.with_name(f"{folder.name}-aligned")
    data = {"data": str(rows), "eval_data": str(held_out), "blind": blind}
    train_stage(aligned, {**fields, **data, "init_from": str(base), "stage": "align"})
    tuning = {**TUNING, "max_steps": min(TUNING["max_steps"], fields["max_steps"])}
    return train_stage(folder, {**fields, **tuning, **data, "init_from": str(aligned), "stage": "tune"})


def train_stage(folder: Path, fields: Mapping[str, Any]) -> float:
    """Train unless that is done; return as `train_twin` does.

    Raises:
        CheckpointError: if it was stopped.
    """
    from fanformer.loading import longest_text

    done = read_records(folder)
    if not is_finished(folder) or not done or done[-1]["step"] < fields["max_steps"]:
        given = {**fields, "output_dir": str(folder), "resume": (folder / RUN_FILE).is_file()}
        train_to_end(resolve_multimodal(lambda: longest_text(fields["init_from"]), given))
    return next(record["val_exact"] for record in reversed(read_records(folder)) if "val_exact" in record)


def run_demo(
    kind: str,
    own: Recipe,
    other: Recipe,
    make_data: Callable[[Path, str | None], tuple[list[Example], list[Example]]],
) -> int:
    """Make the data, train a model and its blind twin, ask one question, print the verdict, return the exit code.

    Args:
        kind: "image" or "audio".
        own: recipe for the demo's data.
        other: recipe for what `--data` names.
        make_data: writes media into a folder, from what `--data` names; returns what is learnt and what is held out.
    """
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--output-dir", type=Path, default=Path(f"runs/demo-{kind}"))
    parser.add_argument("--base", type=Path, default=Path("runs/demo"), help="folder of a language model")
    parser.add_argument("--base-time", type=float, default=300.0, help="seconds to train it where it is not there")
    parser.add_argument("--data", default=None, help="folder of other data, or hf:NAME")
    parser.add_argument("--max-steps", type=int, help="of the stage in which towers learn")
    arguments = parser.parse_args()
    quiet_libraries()
    folder, data = arguments.output_dir, arguments.output_dir / "media"
    recipe = own if arguments.data is None else other
    check_source(data, arguments.data)
    base = base_model(arguments.base, arguments.base_time)
    rows, held_out = data / "train.jsonl", data / "held-out.jsonl"
    if not held_out.is_file():
        data.mkdir(parents=True, exist_ok=True)
        (data / SOURCE_FILE).write_text(f"{arguments.data or OWN_DATA}\n", encoding="utf-8")
        learnt, measured = make_data(data, arguments.data)
        write_rows(rows, learnt, kind, recipe.question)
        write_rows(held_out, measured, kind, recipe.question)
    print(f"{data}: {count_lines(rows)} examples to learn from, {count_lines(held_out)} held out")
    fields = {**recipe.fields, "max_steps": arguments.max_steps or recipe.fields["max_steps"]}
    ours = train_twin(folder / "model", base, rows, held_out, fields, blind=False)
    blind = train_twin(folder / "blind", base, rows, held_out, fields, blind=True)
    ask(folder / "model", held_out, kind)
    asked_for = "" if recipe.bar is None else f"; asked for: {recipe.bar:.0%}"
    print(f"held-out answers that are right: {ours:.2%}; the blind twin's: {blind:.2%}{asked_for}")
    return 0 if ours > blind and (recipe.bar is None or ours >= recipe.bar > blind) else 1


def check_source(folder: Path, asked: str | None) -> None:
    """Raise if a folder of media was made of other data than is asked for.

    Raises:
        ConfigError: if so.
    """
    file = folder / SOURCE_FILE
    made_of, wanted = file.read_text(encoding="utf-8").strip() if file.is_file() else None, asked or OWN_DATA
    if made_of not in (None, wanted):
        raise ConfigError(f"`--data` must be {made_of} for {folder}, got {wanted}: give another `--output-dir`.")


def count_lines(file: Path) -> int:
    """Return how many lines a file has."""
    return file.read_text(encoding="utf-8").count("\n")


def ask(folder: Path, held_out: Path, kind: str) -> None:
    """Ask the model about the first things that were held out."""
    from fanformer.generation.media_model import load_media_model

    model = load_media_model(folder)
    for line in held_out.read_text(encoding="utf-8").splitlines()[:3]:
        asked, answer = json.loads(line)["messages"]
        shown, question = asked["content"]
        path = held_out.parent / shown["path"]
        media = {"images": [path]} if kind == "image" else {"audio": [path]}
        said = model.generate(question["text"], **media, max_length=8, temperature=0.0)
        print(f"{path.name}  {question['text']}  {said}  ({answer['content']} is right)")
