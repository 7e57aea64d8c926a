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
from fanformer.evaluation import scoring  # noqa: E402  # needs the path above
from fanformer.evaluation.scoring import Score, Scorer  # noqa: E402

TOKENS_PER_PASS = 16384
"""On an accelerator, which the passes of a CPU would leave idle."""

Requests = dict[str, list[tuple[list[int], list[int]]]]
"""Of each task, token ids of contexts and of their continuations."""


class Recorder:
    """Stands where a Scorer does, keeps what is asked and answers nothing."""

    def __init__(self) -> None:
        self.requests: Requests = {}
        self.truncated: dict[str, int] = {}

    def score(
        self,
        task: str,
        requests: Sequence[tuple[list[int], list[int]]],
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Score]:
        """Keep the requests."""
        self.requests[task] = list(requests)
        return [Score(0.0, False)] * len(requests)


class Replayer:
    """Stands where a Scorer does, and answers with what another machine computed."""

    def __init__(self, scores: dict[str, Any]) -> None:
        self.scores: dict[str, list[list[Any]]] = scores["scores"]
        self.truncated: dict[str, int] = scores["truncated"]

    def score(
        self,
        task: str,
        requests: Sequence[tuple[list[int], list[int]]],
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Score]:
        """Return the scores of a task.

        Raises:
            SystemExit: if there are not as many as requests.
        """
        found = self.scores.get(task, [])
        if len(found) != len(requests):
            raise SystemExit(f"{task}: {len(requests)} requests, {len(found)} scores: make both from the same files")
        return [Score(*score) for score in found]


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, compressed or not."""
    content = path.read_bytes()
    return json.loads(lzma.decompress(content) if path.suffix == ".xz" else content)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, compressed where its name ends in .xz."""
    text = json.dumps(content, separators=(",", ":")).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.compress(text) if path.suffix == ".xz" else text)


def run_upstream(scorer: Any, tokenizer: Path, tasks: str, data_dir: Path) -> dict[str, dict[str, Any]]:
    """Let upstream ask for everything, and return its figures."""
    from fanformer.data.tokenizer import load_tokenizer
    from fanformer.evaluation.harness import CausalAdapter, run_tasks
    from fanformer.evaluation.tasks import TASKS, parse_tasks

    names = parse_tasks(tasks)
    figures = run_tasks(
        CausalAdapter(scorer, load_tokenizer(str(tokenizer))), [TASKS[name] for name in names], data_dir, None, None
    )
    ours = {theirs: name for name, theirs in TASKS.items()}
    return {ours.get(name, name): entry for name, entry in figures.items()}


def score(model_folder: Path, requests: Requests, device: str, seconds: float) -> dict[str, Any]:
    """Return the scores of every task that is done before the time is over, the smallest tasks first."""
    import torch
    from transformers import AutoModelForCausalLM

    start = time.monotonic()
    if device == "cuda":
        scoring.TOKENS_PER_PASS = TOKENS_PER_PASS
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype).to(device).eval()
    scorer = Scorer(model)
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
    ask, compute, finish = (verbs.add_parser(verb) for verb in ("requests", "score", "figures"))
    compute.add_argument("model", type=Path)
    compute.add_argument("requests", type=Path)
    compute.add_argument("out", type=Path)
    compute.add_argument("--device", default="cuda")
    compute.add_argument("--seconds", type=float, default=float("inf"), help="start no task later than this")
    for verb in (ask, finish):
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
        recorder = Recorder()
        run_upstream(recorder, given.tokenizer, given.tasks, given.data_dir)
        write_json(given.out, recorder.requests)
        return 0
    scores = read_json(given.scores)
    figures = run_upstream(Replayer(scores), given.tokenizer, given.tasks, given.data_dir)
    about = {name: scores[name] for name in ("model", "dtype", "device", "seconds")}
    write_json(given.out, {**about, "tasks": figures})
    return 0


if __name__ == "__main__":
    sys.exit(main())
