"""Log-likelihoods of continuations, the same bits whatever is asked with them, and kept as soon as they are known.

Which rows are computed together is a function of a task's requests alone: they are sorted, cut into passes of
ROWS_PER_PASS rows, and every pass is filled up to that number and to a multiple of WIDTH tokens. So nothing depends on
a batch size, on where a killed evaluation stopped, or on which other tasks are measured.
"""

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from transformers import PreTrainedModel

from fanformer.data.durable import hash_file
from fanformer.errors import DataError

ROWS_PER_PASS = 8
WIDTH = 16
_FORMAT = 1
"""Raised when the numbers in the files of finished passes come to mean something else."""


class Score(NamedTuple):
    """What a model makes of a continuation: its log-likelihood in nats, and whether greedy decoding writes it."""

    log_likelihood: float
    is_greedy: bool


class _Row(NamedTuple):
    """Input ids, and the continuations (ids of each) that end where they end, one token later."""

    inputs: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]


def model_fingerprint(folder: Path, model: PreTrainedModel) -> str:
    """Return a hash of what scores depend on: the folder's weights, configuration and tokenizer, and how they run."""
    digest = hashlib.sha256()
    names = ("config.json", "tokenizer.json", "tokenizer_config.json")
    for path in sorted(
        [*folder.glob("*.safetensors"), *(folder / name for name in names if (folder / name).is_file())]
    ):
        digest.update(f"{path.name} {hash_file(path)}\n".encode())
    threads = torch.get_num_threads()  # products are cut for them
    digest.update(
        f"{_FORMAT} {model.dtype} {model.device.type} {threads} {torch.__version__} {transformers.__version__}".encode()
    )
    return digest.hexdigest()


class FinishedPasses:
    """A file with the scores of every pass that was computed, a line each; what a kill cuts short is computed again."""

    def __init__(self, path: Path) -> None:
        """Read what an earlier evaluation left; the folder is made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.scores: dict[int, list[Score]] = {}
        content = path.read_bytes() if path.exists() else b""
        complete = content[: content.rfind(b"\n") + 1]
        for line in complete.decode().splitlines():
            number, values = json.loads(line)
            self.scores[number] = [Score(*value) for value in values]
        if len(complete) < len(content):
            os.truncate(path, len(complete))
        self._file = path.open("ab", buffering=0)  # unbuffered: SIGKILL loses nothing that was written

    def add(self, number: int, scores: list[Score]) -> None:
        """Keep the scores of a pass."""
        self.scores[number] = scores
        self._file.write(json.dumps([number, scores]).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Scorer:
    """Scores continuations with a causal language model."""

    def __init__(
        self,
        model: PreTrainedModel,
        cache_folder: Path | None = None,
    ) -> None:
        """Prepare for scoring.

        Args:
            model: a causal language model in evaluation mode.
            cache_folder: where finished passes of this model are kept; None keeps none.
        """
        self.model, self.cache_folder = model, cache_folder
        self.longest = int(getattr(model.config, "max_position_embeddings", 2048))
        self.truncated: dict[str, int] = {}
        """Requests of each task whose context was cut on its left, as upstream does, to fit the model."""
        self.passes_computed = 0
        self._keeps_some = "logits_to_keep" in inspect.signature(model.forward).parameters

    def score(
        self,
        task: str,
        requests: Sequence[tuple[list[int], list[int]]],
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Score]:
        """Score all requests of a task.

        Args:
            task: its name.
            requests: token ids of contexts and of their continuations.
            on_progress: called after every pass with how many different requests are done.

        Returns:
            A score for each, in their order.

        Raises:
            DataError: if a continuation is empty or longer than the model's context.
        """
        keys = [self._key(task, context, continuation) for context, continuation in requests]
        together: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
        for inputs, continuation in keys:
            together.setdefault(inputs, set()).add(continuation)
        # the longest first: what does not fit into memory shows at once, and the time left is not underestimated
        rows = [_Row(inputs, tuple(sorted(found))) for inputs, found in together.items()]
        rows.sort(key=lambda row: (-len(row.inputs), row))
        passes = [rows[start : start + ROWS_PER_PASS] for start in range(0, len(rows), ROWS_PER_PASS)]
        finished = self._finished(task, rows)
        known: dict[tuple[tuple[int, ...], tuple[int, ...]], Score] = {}
        for number, members in enumerate(passes):
            scores = finished.scores.get(number) if finished else None
            if scores is None:
                scores = self._pass(members)
                self.passes_computed += 1
                if finished is not None:
                    finished.add(number, scores)
            asked = [(row.inputs, continuation) for row in members for continuation in row.continuations]
            known.update(zip(asked, scores, strict=True))
            if on_progress is not None:
                on_progress(len(known))
        if finished is not None:
            finished.close()
        return [known[key] for key in keys]

    def _key(self, task: str, context: list[int], continuation: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return input ids and continuation of a request, cut on the left to what the model takes."""
        if not continuation or len(continuation) > self.longest:
            raise DataError(
                f"`{task}` asks for a continuation of {len(continuation)} tokens: expected 1 to {self.longest}, "
                "the model's longest context."
            )
        tokens = tuple(context + continuation)
        if len(tokens) > self.longest + 1:
            self.truncated[task] = self.truncated.get(task, 0) + 1
        return tokens[-(self.longest + 1) :][:-1], tuple(continuation)

    def _finished(self, task: str, rows: list[_Row]) -> FinishedPasses | None:
        if self.cache_folder is None:
            return None
        digest = hashlib.sha256(f"{ROWS_PER_PASS} {WIDTH}\n{json.dumps(rows)}".encode()).hexdigest()
        return FinishedPasses(self.cache_folder / f"{task}-{digest[:16]}.jsonl")

    @torch.no_grad()
    def _pass(self, rows: list[_Row]) -> list[Score]:
        """Compute one pass: the scores of all continuations of its rows, in order."""
        longest = len(rows[0].inputs)
        width = min(-(-longest // WIDTH) * WIDTH, max(self.longest, longest))
        ids = torch.zeros(ROWS_PER_PASS, width, dtype=torch.long)
        for index in range(ROWS_PER_PASS):
            row = rows[index] if index < len(rows) else rows[0]
            ids[index, : len(row.inputs)] = torch.tensor(row.inputs)
        first = min(len(row.inputs) - len(continuation) for row in rows for continuation in row.continuations)
        # what is right of a row's end is hidden from it by the causal mask
        wanted = torch.arange(first, longest, device=self.model.device)
        kept = {"logits_to_keep": wanted} if self._keeps_some else {}
        logits = self.model(input_ids=ids.to(self.model.device), use_cache=False, **kept).logits  # (B, T, V)
        logits = logits if self._keeps_some else logits[:, wanted]
        scores = []
        for index, row in enumerate(rows):
            for continuation in row.continuations:
                stop = len(row.inputs) - first
                found = logits[index, stop - len(continuation) : stop].float().log_softmax(-1)  # (T, V)
                target = torch.tensor(continuation, device=found.device)
                nats = found.gather(1, target[:, None]).double().sum()
                scores.append(Score(float(nats), bool((found.argmax(-1) == target).all())))
        return scores
