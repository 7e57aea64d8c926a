"""Measure benchmark tasks of a model on a machine that has neither lm-evaluation-harness nor the tasks' files.

    python benchmarks/accelerator/tasks.py requests TOKENIZER OUT --tasks A,B --data-dir DIR   where the files are
    python benchmarks/accelerator/tasks.py score MODEL REQUESTS SCORES [--device cuda]         where the accelerator is
    python benchmarks/accelerator/tasks.py figures TOKENIZER SCORES OUT --tasks A,B --data-dir DIR   where the files are
    python benchmarks/accelerator/tasks.py compare TOKENIZER SCORES BASELINE OUT --tasks A,B --data-dir DIR   likewise

The first writes what the tasks ask for as token ids, the second what a model makes of it, and the third the figures
that `fanformer eval --tasks` would have given; the fourth makes an entry of the ledger of the differences between two
models' scores, in the folder OUT. TOKENIZER is any folder with the models' tokenizer.
"""

import argparse
import datetime
import json
import lzma
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
try:
    import fanformer.model  # noqa: F401
except ModuleNotFoundError:
    sys.path.insert(0, str(REPOSITORY / "src"))
from fanformer.comparison.ledger import Entry, Figure, write_entry  # noqa: E402
from fanformer.data.tokenizer import load_tokenizer  # noqa: E402  # needs the path above
from fanformer.evaluation.scoring import Score, Scorer  # noqa: E402
from fanformer.evaluation.tasks import evaluate_scored, parse_tasks  # noqa: E402
from fanformer.machine.versions import command_line, hardware, versions  # noqa: E402

ON_ACCELERATOR = 16384
"""Tokens computed together where the passes of a CPU would leave most of it idle."""

Pairs = Sequence[tuple[list[int], list[int]]]
"""Token ids of contexts and of their continuations."""


class InPlaceOfScorer:
    """Stands where a Scorer does, and answers without a model."""

    def __init__(self, answer: Callable[[str, Pairs], list[Score]], truncated: dict[str, int]) -> None:
        self.answer, self.truncated = answer, truncated

    def score(self, task: str, requests: Pairs, on_progress: object = None) -> list[Score]:
        """Return the scores of a task."""
        return self.answer(task, requests)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, compressed or not."""
    content = path.read_bytes()
    return json.loads(lzma.decompress(content) if path.suffix == ".xz" else content)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, compressed where its name ends in .xz."""
    text = json.dumps(content, separators=(",", ":")).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.compress(text) if path.suffix == ".xz" else text)


def ask(tokenizer: Path, tasks: str, data_dir: Path) -> dict[str, Pairs]:
    """Return what tasks ask for."""
    requests: dict[str, Pairs] = {}

    def keep(task: str, pairs: Pairs) -> list[Score]:
        requests[task] = pairs
        return [Score(0.0, False)] * len(pairs)

    evaluate_scored(InPlaceOfScorer(keep, {}), load_tokenizer(str(tokenizer)), parse_tasks(tasks), data_dir)
    return requests


def figures(tokenizer: Path, scores: dict[str, Any], tasks: str, data_dir: Path) -> dict[str, dict[str, Any]]:
    """Return the tasks' figures from the scores of another machine.

    Raises:
        SystemExit: if there are not as many scores as requests.
    """

    def replay(task: str, pairs: Pairs) -> list[Score]:
        found = scores["scores"].get(task, [])
        if len(found) != len(pairs):
            raise SystemExit(f"{task}: {len(pairs)} requests, {len(found)} scores: make both from the same files")
        return [Score(*values) for values in found]

    scorer = InPlaceOfScorer(replay, scores["truncated"])
    return evaluate_scored(scorer, load_tokenizer(str(tokenizer)), parse_tasks(tasks), data_dir)


def score(model_folder: Path, requests: dict[str, Pairs], device: str, seconds: float) -> dict[str, Any]:
    """Return the scores of every task that is done before the time is over, the smallest tasks first."""
    import torch
    from transformers import AutoModelForCausalLM

    import fanformer.model  # noqa: F401  # registers the architecture

    start = time.monotonic()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype).to(device).eval()
    scorer = Scorer(model, tokens_per_pass=ON_ACCELERATOR if device == "cuda" else None)
    scores: dict[str, list[Score]] = {}
    for task in sorted(requests, key=lambda name: (name.startswith("blimp"), len(requests[name]))):
        if time.monotonic() - start > seconds:
            break
        scores[task] = scorer.score(task, [tuple(pair) for pair in requests[task]])
    return {
        "model": model_folder.name,
        "dtype": str(dtype),
        "device": torch.cuda.get_device_name(0) if device == "cuda" else device,
        "hardware": hardware(),
        "versions": versions(),
        "seconds": time.monotonic() - start,
        "left_out": sorted(set(requests) - set(scores)),
        "truncated": scorer.truncated,
        "scores": scores,
    }


METRICS = {"acc": "accuracy", "answer_bits_per_byte": "answer_bits_per_byte"}
"""Metrics of a task -> what they are called in the ledger."""
CONFIDENT = 1.96
"""Standard errors to each side of a difference that make an interval of 95%."""


def differences(mine: Mapping[str, dict[str, Any]], theirs: Mapping[str, dict[str, Any]]) -> dict[str, Figure]:
    """Return both models' figures of every task and the differences, the two of ARC also as one task.

    The interval takes the two models' errors as independent, though they answer the same questions: it is too wide
    rather than too narrow.
    """
    found: dict[str, Figure] = {}
    groups = {name: [name] for name in mine}
    if {"arc_easy", "arc_challenge"} <= set(mine):
        groups["arc"] = ["arc_easy", "arc_challenge"]
    for name, tasks in groups.items():
        documents = sum(mine[task]["documents"] for task in tasks)
        for metric, word in METRICS.items():
            unit = "share right" if metric == "acc" else "bits per byte"
            values, errors = [], []
            for figures in (mine, theirs):
                shares = [(figures[task]["documents"] / documents, figures[task]) for task in tasks]
                values.append(sum(share * one[metric] for share, one in shares))
                errors.append(math.hypot(*(share * one[f"{metric}_stderr"] for share, one in shares)))
            between, reach = values[0] - values[1], CONFIDENT * math.hypot(*errors)
            interval = f"95% interval over {documents:,} questions"
            found[f"{name}_{word}_difference"] = Figure(between, unit, between - reach, between + reach, interval)
            for whose, value, error in zip(("candidate", "baseline"), values, errors, strict=True):
                low, high = value - CONFIDENT * error, value + CONFIDENT * error
                found[f"{name}_{word}_of_{whose}"] = Figure(value, unit, low, high, interval)
    return found


def sentences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Figure]:
    """Return BLiMP's figures over those of its paradigms that both models were asked: good sentence against bad one.

    The interval of the difference is over pairs of sentences, on which both models are right, one or none.
    """
    tasks = sorted(name for name in mine if name.startswith("blimp") and name in theirs)
    right = [
        [good[0] > bad[0] for task in tasks for good, bad in zip(of[task][::2], of[task][1::2], strict=True)]
        for of in (mine, theirs)
    ]
    if not tasks:
        return {}
    number = len(right[0])
    interval = f"95% interval over {number:,} pairs of {len(tasks)} paradigms"
    found = {}
    each = [float(a) - float(b) for a, b in zip(*right, strict=True)]
    for word, values in (("difference", each), ("of_candidate", right[0]), ("of_baseline", right[1])):
        value = statistics.fmean(values)
        reach = CONFIDENT * statistics.pstdev(values) / math.sqrt(number)
        found[f"blimp_accuracy_{word}"] = Figure(value, "share right", value - reach, value + reach, interval)
    return found


def compare(tokenizer: Path, paths: Sequence[Path], tasks: str, data_dir: Path, about: Mapping[str, Any]) -> Entry:
    """Return the ledger's entry of two models' scores."""
    mine, theirs = (read_json(path) for path in paths)
    if mine["device"] != theirs["device"] or mine["dtype"] != theirs["dtype"]:
        raise SystemExit("the two models were scored in another dtype or on another device: score both alike")
    result = differences(*(figures(tokenizer, scores, tasks, data_dir) for scores in (mine, theirs)))
    result |= sentences(mine["scores"], theirs["scores"])
    return Entry(
        kind="evaluation",
        command=command_line(["python", *sys.argv]),
        date=datetime.date.today().isoformat(),
        hardware=mine["hardware"],
        versions=mine["versions"],
        data=None,
        result=result,
        **about,
    )


def main() -> int:
    """Run the command; the status is 1 where there was no time for every task."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    request, compute, finish, both = (verbs.add_parser(verb) for verb in ("requests", "score", "figures", "compare"))
    compute.add_argument("model", type=Path)
    compute.add_argument("requests", type=Path)
    compute.add_argument("out", type=Path)
    compute.add_argument("--device", default="cuda")
    compute.add_argument("--seconds", type=float, default=float("inf"), help="start no task later than this")
    both.add_argument("--name", required=True, help="of the entry")
    both.add_argument("--what", required=True, help="one sentence: which model beside which")
    both.add_argument("--scale", default="92m")
    both.add_argument("--seed", type=int, default=0, help="of the two trainings")
    for verb in (request, finish, both):
        verb.add_argument("tokenizer", type=Path)
        if verb in (finish, both):
            verb.add_argument("scores", type=Path)
        if verb is both:
            verb.add_argument("baseline", type=Path)
        verb.add_argument("out", type=Path)
        verb.add_argument("--tasks", required=True)
        verb.add_argument("--data-dir", type=Path, required=True)
    given = parser.parse_args()
    if given.verb == "score":
        content = score(given.model, read_json(given.requests), given.device, given.seconds)
        write_json(given.out, content)
        return 1 if content["left_out"] else 0
    if given.verb == "requests":
        write_json(given.out, ask(given.tokenizer, given.tasks, given.data_dir))
        return 0
    if given.verb == "compare":
        about = {"name": given.name, "what": given.what, "seeds": [given.seed]}
        about["configuration"] = {"scale": given.scale, "tasks": given.tasks, "num_fewshot": 0}
        paths = (given.scores, given.baseline)
        write_entry(given.out, compare(given.tokenizer, paths, given.tasks, given.data_dir, about))
        return 0
    scores = read_json(given.scores)
    about = {name: scores[name] for name in ("model", "dtype", "device", "seconds")}
    write_json(given.out, {**about, "tasks": figures(given.tokenizer, scores, given.tasks, given.data_dir)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
