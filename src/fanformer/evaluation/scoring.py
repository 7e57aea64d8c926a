"""Log-likelihoods of continuations, the same bits whatever is asked with them, and kept as soon as they are known.

Which rows are computed together is a function of a task's requests alone: they are sorted and cut into passes, each as
wide as a multiple of WIDTH tokens and of as many rows as TOKENS_PER_PASS allows, filled up where there are fewer. So
nothing depends on a batch size, on where a killed evaluation stopped, or on which other tasks are measured.
"""

import hashlib
import inspect
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from transformers import PreTrainedModel

from fanformer.data.packing import STEPS_TAKEN, StepCount, places_of_text
from fanformer.errors import DataError, NotANumberError
from fanformer.files.durable import hash_file

TOKENS_PER_PASS = 1024
"""Of short rows, 64 of 16 tokens: a third faster than 8 on a CPU core, and the logits of 50,000 words take 200 MB."""
WIDTH = 16
_FORMAT = 3
"""Raised when the numbers in the files of finished passes come to mean something else."""


_Asked = tuple[tuple[int, ...], tuple[int, ...]]
"""Input ids, and the ids of a continuation that ends where they end, one token later."""


class Score(NamedTuple):
    """What a model makes of a continuation: its log-likelihood in nats, and whether greedy decoding writes it."""

    log_likelihood: float
    is_greedy: bool


class _Pass(NamedTuple):
    """What came of a pass: scores, how many tokens took steps of their own number, and how many steps these were."""

    scores: list[Score]
    tokens: int
    steps: int


class _Row(NamedTuple):
    """Input ids, and the continuations (ids of each) that end where they end, one token later."""

    inputs: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]


def model_fingerprint(model: PreTrainedModel) -> str:
    """Return a hash of what scores depend on: weights, configuration and code of a model, and how it runs."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    config = {name: value for name, value in model.config.to_dict().items() if not name.startswith("_")}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    digest.update(hash_file(Path(inspect.getfile(type(model)))).encode())
    attention = getattr(model.config, "_attn_implementation", None)
    threads = torch.get_num_threads()  # products are cut for them
    how = (_FORMAT, model.device.type, attention, threads, torch.__version__, transformers.__version__)
    digest.update(repr(how).encode())
    if getattr(model.config, "recurrence", None) is not None:
        decoder = model.get_decoder()
        digest.update(f"{decoder.depth} {hash_file(Path(inspect.getfile(type(decoder.bridge))))}".encode())
    return digest.hexdigest()


class FinishedPasses:
    """A file of passes that were computed, a line each; what a kill cuts short is computed again.

    A line has the number of a pass, its scores, and how many of its tokens took steps of their own, and these steps.
    """

    def __init__(self, path: Path) -> None:
        """Read what an earlier evaluation left; the folder is made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.passes: dict[int, _Pass] = {}
        content = path.read_bytes() if path.exists() else b""
        complete = content[: content.rfind(b"\n") + 1]
        try:
            for line in complete.decode().splitlines():
                number, values, *counted = json.loads(line)
                self.passes[number] = _Pass([Score(*value) for value in values], *counted)
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{path.absolute()} is damaged ({error}): delete it, its requests are computed anew."
            ) from error
        if len(complete) < len(content):
            os.truncate(path, len(complete))
        self._file = path.open("ab", buffering=0)  # unbuffered: SIGKILL loses nothing that was written

    def add(self, number: int, computed: "_Pass") -> None:
        """Keep a pass."""
        self.passes[number] = computed
        self._file.write(json.dumps([number, *computed]).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Scorer:
    """Scores continuations with a causal language model."""

    def __init__(
        self,
        model: PreTrainedModel,
        cache_folder: Path | None = None,
        tokens_per_pass: int | None = None,
    ) -> None:
        """Prepare for scoring.

        Args:
            model: a causal language model in evaluation mode.
            cache_folder: where finished passes of this model are kept; None keeps none.
            tokens_per_pass: computed together, filling included; None is TOKENS_PER_PASS.
        """
        self.model, self.cache_folder = model, cache_folder
        self.tokens_per_pass = tokens_per_pass or TOKENS_PER_PASS
        self.longest = int(getattr(model.config, "max_position_embeddings", 2048))
        self.truncated: dict[str, int] = {}
        """Requests of each task that were cut, on the left as upstream does, to fit the model."""
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
            on_progress: called after every pass with how many requests are done, in proportion.

        Returns:
            A score for each, in their order.

        Raises:
            DataError: if a continuation is empty.
            NotANumberError: if a log-likelihood is none.
        """
        asked = [self._asked(task, context, continuation) for context, continuation in requests]
        together: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
        for inputs, continuation in itertools.chain(*asked):
            together.setdefault(inputs, set()).add(continuation)
        # the longest first: what does not fit into memory shows at once, and the time left is not underestimated
        rows = [_Row(inputs, tuple(sorted(found))) for inputs, found in together.items()]
        rows.sort(key=lambda row: (-len(row.inputs), row))
        finished, count = self._finished(task, rows), STEPS_TAKEN.get()
        known: dict[_Asked, Score] = {}
        number_of_scores = sum(len(row.continuations) for row in rows)
        for number, (members, number_of_rows, width) in enumerate(self._passes(rows)):
            computed = finished.passes.get(number) if finished else None
            if computed is None:
                computed = self._counted_pass(members, number_of_rows, width)
                self.passes_computed += 1
                if finished is not None:
                    finished.add(number, computed)
            elif count is not None:
                count.add(computed.tokens, computed.steps)
            pairs = [(row.inputs, continuation) for row in members for continuation in row.continuations]
            known.update(zip(pairs, computed.scores, strict=True))
            if on_progress is not None:
                on_progress(len(known) * len(requests) // number_of_scores)
        if finished is not None:
            finished.close()
        return [
            Score(sum(known[piece].log_likelihood for piece in pieces), all(known[piece].is_greedy for piece in pieces))
            for pieces in asked
        ]

    def _asked(self, task: str, context: list[int], continuation: list[int]) -> list[_Asked]:
        """Return what a request comes down to, each cut on its left to what the model takes.

        That is one row, but for a continuation that is longer than the model's context: its pieces of half a context,
        each after what stands before it.
        """
        if not continuation:
            raise DataError(f"`{task}` asks for a continuation of 0 tokens: expected 1 or more.")
        tokens = tuple(context + continuation)
        self.truncated[task] = self.truncated.get(task, 0) + (len(tokens) > self.longest + 1)
        size = len(continuation) if len(continuation) <= self.longest else max(1, self.longest // 2)
        stops = [*range(len(context) + size, len(tokens), size), len(tokens)]
        starts = [len(context), *stops[:-1]]
        return [
            (tokens[max(0, stop - self.longest - 1) : stop - 1], tokens[start:stop])
            for start, stop in zip(starts, stops, strict=True)
        ]

    def _finished(self, task: str, rows: list[_Row]) -> FinishedPasses | None:
        if self.cache_folder is None:
            return None
        digest = hashlib.sha256(f"{self.tokens_per_pass} {WIDTH}\n{json.dumps(rows)}".encode()).hexdigest()
        return FinishedPasses(self.cache_folder / f"{task}-{digest[:16]}.jsonl")

    def _passes(self, rows: list[_Row]) -> Iterator[tuple[list[_Row], int, int]]:
        """Cut sorted rows into passes: yield their rows, how many these are filled up to, and how many tokens wide."""
        start = 0
        while start < len(rows):
            width = min(-(-len(rows[start].inputs) // WIDTH) * WIDTH, self.longest)
            number_of_rows = max(1, self.tokens_per_pass // width)
            yield rows[start : start + number_of_rows], number_of_rows, width
            start += number_of_rows

    def _counted_pass(self, rows: list[_Row], number_of_rows: int, width: int) -> _Pass:
        count = STEPS_TAKEN.get() or StepCount()
        tokens, steps = count.tokens, count.steps
        scores = self._pass(rows, number_of_rows, width)
        return _Pass(scores, count.tokens - tokens, count.steps - steps)

    @torch.no_grad()
    def _pass(self, rows: list[_Row], number_of_rows: int, width: int) -> list[Score]:
        """Compute one pass: the scores of all continuations of its rows, in order."""
        longest = len(rows[0].inputs)
        ids = torch.zeros(number_of_rows, width, dtype=torch.long)
        read = torch.zeros(number_of_rows, width, dtype=torch.bool)
        for index in range(number_of_rows):
            row = rows[index] if index < len(rows) else rows[0]
            ids[index, : len(row.inputs)] = torch.tensor(row.inputs)
            read[index, : len(row.inputs)] = index < len(rows)
        first = min(len(row.inputs) - len(continuation) for row in rows for continuation in row.continuations)
        # what is right of a row's end is hidden from it by the causal mask
        wanted = torch.arange(first, longest, device=self.model.device)
        kept = {"logits_to_keep": wanted} if self._keeps_some else {}
        with places_of_text(read.to(self.model.device)):
            logits = self.model(input_ids=ids.to(self.model.device), use_cache=False, **kept).logits  # (B, T, V)
        logits = logits if self._keeps_some else logits[:, wanted]
        scores = []
        for index, row in enumerate(rows):
            for continuation in row.continuations:
                stop = len(row.inputs) - first
                found = logits[index, stop - len(continuation) : stop].float().log_softmax(-1)  # (T, V)
                target = torch.tensor(continuation, device=found.device)
                nats = found.gather(1, target[:, None]).double().sum()
                if nats.isnan():
                    raise NotANumberError
                scores.append(Score(float(nats), bool((found.argmax(-1) == target).all())))
        return scores
