"""What a model that sees and hears gets right on real data, held out, beside a blind twin that was trained alike.

    python benchmarks/quality/multimodal.py --base DIR --data FOLDER --work DIR [--steps 3000]
        [--task NAME ...] [--dry-run]

FOLDER has mnist-test, emoji-captions and spoken-digits. Every task trains two models, stage align; WORK keeps them, so
that the same command goes on where it was stopped, and result.json. Hours on two cores; `--dry-run` takes few rows and
two steps.
"""

import argparse
import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

from multimodal_data import TASKS, Sources, Task

from fanformer.cli.failure import quiet_libraries
from fanformer.data.multimodal.messages import read_media_examples
from fanformer.evaluation.loss import evaluate_documents
from fanformer.generation.media_model import MediaModel, load_media_model
from fanformer.generation.settings import GenerationSettings
from fanformer.loading import load, longest_text
from fanformer.training.configuration import resolve_multimodal
from fanformer.training.run import train

RECIPE = {"optimizer": "muon", "learning_rate": 3e-3, "batch_size": 8, "tower_width": 128, "tower_layers": 4}
DRY = {"tower_width": 16, "tower_layers": 1, "batch_size": 2}
TEXT = Path(__file__).read_text(encoding="utf-8")


def main() -> None:
    """Measure every task that is asked for and write result.json."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--task", action="append", choices=sorted(TASKS))
    parser.add_argument("--dry-run", action="store_true")
    asked = parser.parse_args()
    quiet_libraries()
    asked.work.mkdir(parents=True, exist_ok=True)
    sources = Sources(asked.data, 6 if asked.dry_run else None)
    fields = {**RECIPE, **(DRY if asked.dry_run else {}), "max_steps": 2 if asked.dry_run else asked.steps}
    found: dict[str, Any] = {"base": asked.base.name, "steps": fields["max_steps"], "tasks": {}}
    for name in asked.task or TASKS:
        made = TASKS[name](sources)
        several = made if isinstance(made, list) else [made]
        measured = [measure(task, asked.work / f"{name}-{n}", asked.base, fields) for n, task in enumerate(several)]
        found["tasks"][name] = summary(measured)
        print(json.dumps({name: found["tasks"][name]}), flush=True)
    found["text_changed"] = text_changed(asked.base, asked.work / f"{next(iter(found['tasks']))}-0" / "model")
    (asked.work / "result.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def summary(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean over runs of one task, and whether it reaches the bar and is above the blind twin's interval."""
    right, blind = (fmean(one[name] for one in measured) for name in ("right", "blind"))
    held_out, bar = sum(one["held_out"] for one in measured), measured[0]["bar"]
    error = math.sqrt(max(right * (1 - right) + blind * (1 - blind), 1e-12) / held_out)
    probe = measured[0].get("probe")
    least = bar if bar is not None else (probe or 0.0)
    met = right >= least and right - blind > 1.96 * error
    extra = {} if probe is None else {"probe": probe}
    return {"right": right, "blind": blind, "held_out": held_out, "bar": bar, "met": met, **extra}


def measure(task: Task, folder: Path, base: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """Train both twins on a task unless that is done, and return what they get right."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, rows in (("train", task.train), ("held-out", task.held_out)):
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found: dict[str, Any] = {"held_out": len(task.held_out), "bar": task.bar}
    for name, blind in (("right", False), ("blind", True)):
        place = folder / ("blind" if blind else "model")
        if not (place / "model.safetensors").is_file():
            given = {"init_from": str(base), "data": str(files["train"]), "eval_data": str(files["held-out"])}
            given |= {"output_dir": str(place), "stage": "align", "blind": blind, "eval_steps": 10**6}
            given["resume"] = (place / "run.yaml").is_file()
            train(resolve_multimodal(lambda: longest_text(base), {**fields, **task.fields, **given}))
        found[name] = answered(load_media_model(place), files["held-out"], task.by_words)
    if task.bar is None:
        found["probe"] = probe(load_media_model(folder / "model"), files)
    return found


def answered(model: MediaModel, file: Path, by_words: bool) -> float:
    """Return the share of questions that greedy decoding answers to the letter, or one less the word error rate."""
    examples = read_media_examples(file)
    questions = [str(example.messages[0].parts[-1]) for example in examples]
    settings = GenerationSettings(max_length=16, temperature=0.0)
    said = [done.text for done in model.ask(questions, [one.media for one in examples], settings, batch_size=32)]
    if not by_words:
        return fmean(text == example.answer for text, example in zip(said, examples, strict=True))
    errors = [word_errors(text.split(), one.answer.split()) for text, one in zip(said, examples, strict=True)]
    return 1 - sum(errors) / sum(len(one.answer.split()) for one in examples)


def word_errors(said: list[str], right: list[str]) -> int:
    """Return the fewest insertions, deletions and substitutions between two lists of words (Levenshtein)."""
    before = list(range(len(right) + 1))
    for number, word in enumerate(said, 1):
        now = [number]
        for place, other in enumerate(right, 1):
            now.append(min(before[place] + 1, now[-1] + 1, before[place - 1] + (word != other)))
        before = now
    return before[-1]


def probe(model: MediaModel, files: dict[str, Path]) -> float:
    """Return what a linear classifier on the means of the tower's states gets right."""
    import torch
    from sklearn.linear_model import LogisticRegression

    sets = []
    for name in ("train", "held-out"):
        examples = read_media_examples(files[name])
        states = []
        for start in range(0, len(examples), 64):
            media = [example.media[0] for example in examples[start : start + 64]]
            with torch.no_grad():
                pixels = model.store.inputs(media)["pixel_values"].to(model.model.device)
                states.append(model.model.model.vision_tower(pixels).last_hidden_state.mean(1).cpu())
        sets.append((torch.cat(states).numpy(), [example.answer for example in examples]))
    if len(set(sets[0][1])) < 2:
        return 0.0
    return float(LogisticRegression(max_iter=2000).fit(*sets[0]).score(*sets[1]))


def text_changed(base: Path, folder: Path) -> float:
    """Return by how much the language model's bits per byte differ from its base's, on this program's text."""
    figures = []
    for place in (base, folder):
        model, tokenizer = load(place)
        figures.append(evaluate_documents(model, tokenizer, [TEXT]).figures().bits_per_byte)
    return abs(figures[0] - figures[1])


if __name__ == "__main__":
    main()
