"""Measure benchmark tasks of a model on a machine that has neither lm-evaluation-harness nor the tasks' files.

    python benchmarks/accelerator_tasks.py requests TOKENIZER OUT --tasks A,B --data-dir DIR   where the files are
    python benchmarks/accelerator_tasks.py score MODEL REQUESTS SCORES [--device cuda]         where the accelerator is
    python benchmarks/accelerator_tasks.py figures TOKENIZER SCORES OUT --tasks A,B --data-dir DIR   where the files are

The first writes what the tasks ask for as token ids, the second what a model makes of it, and the third the figures
that `fanformer eval --tasks` would have given. TOKENIZER is any folder with the model's tokenizer.
"""

import argparse
import json
import lzma
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
try:
    import fanformer.model  # noqa: F401
except ModuleNotFoundError:
    sys.path.insert(0, str(REPOSITORY / "src"))
from fanformer.data.tokenizer import load_tokenizer  # noqa: E402  # needs the path above
from fanformer.evaluation.scoring import Score, Scorer  # noqa: E402
from fanformer.evaluation.tasks import evaluate_scored, parse_tasks  # noqa: E402

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
        "seconds": time.monotonic() - start,
        "left_out": sorted(set(requests) - set(scores)),
        "truncated": scorer.truncated,
        "scores": scores,
    }


def main() -> int:
    """Run the command; the status is 1 where there was no time for every task."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    request, compute, finish = (verbs.add_parser(verb) for verb in ("requests", "score", "figures"))
    compute.add_argument("model", type=Path)
    compute.add_argument("requests", type=Path)
    compute.add_argument("out", type=Path)
    compute.add_argument("--device", default="cuda")
    compute.add_argument("--seconds", type=float, default=float("inf"), help="start no task later than this")
    for verb in (request, finish):
        verb.add_argument("tokenizer", type=Path)
        if verb is finish:
            verb.add_argument("scores", type=Path)
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
    scores = read_json(given.scores)
    about = {name: scores[name] for name in ("model", "dtype", "device", "seconds")}
    write_json(given.out, {**about, "tasks": figures(given.tokenizer, scores, given.tasks, given.data_dir)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
