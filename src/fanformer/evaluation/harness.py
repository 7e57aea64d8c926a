"""lm-evaluation-harness at work: our adapter for its tasks; importing this needs the extra `eval`."""

import io
import logging
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval.tasks
import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerBase

from fanformer.data.tokenizer import end_token_id, start_token_id
from fanformer.errors import ConfigError, DataError
from fanformer.evaluation.scoring import Scorer
from fanformer.evaluation.statistics import ratio
from fanformer.evaluation.task_files import GROUP_FOLDERS, LOCAL_TASKS, write_local_tasks


class CausalAdapter(TemplateLM):
    """A causal language model as upstream's tasks want it; tokens are made as upstream's own HFLM makes them."""

    def __init__(
        self,
        scorer: Scorer,
        tokenizer: PreTrainedTokenizerBase,
        on_progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        """Wrap a model.

        Args:
            scorer: computes log-likelihoods.
            tokenizer: of the model.
            on_progress: called with a task, and how many of how many requests of all tasks are done.
        """
        super().__init__()
        self._on_progress = on_progress or (lambda task, done, total: None)
        self.scorer, self.tokenizer = scorer, tokenizer
        self.answers: dict[str, list[tuple[Instance, float]]] = {}
        """Every request of each task with its log-likelihood."""

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return end_token_id(self.tokenizer)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context."""
        return start_token_id(self.tokenizer)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the token ids of a text, with the special tokens that the tokenizer adds by itself."""
        if add_special_tokens is None and not string.startswith(self.tokenizer.decode([self.prefix_token_id])):
            return self.tokenizer.encode(string)
        return self.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score requests of any number of tasks, each task by itself."""
        by_task: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            by_task.setdefault(str(request.task_name), []).append(index)
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        done = 0
        for task, indices in by_task.items():
            pairs = [self._encode(*requests[index].args) for index in indices]
            tell = partial(self._tell, task, done, len(requests))
            scores = self.scorer.score(task, pairs, tell)
            done += len(indices)
            tell(len(indices))
            for index, score in zip(indices, scores, strict=True):
                results[index] = (score.log_likelihood, score.is_greedy)
            nats = [score.log_likelihood for score in scores]
            self.answers[task] = list(zip([requests[index] for index in indices], nats, strict=True))
        return results

    def _tell(self, task: str, before: int, total: int, done: int) -> None:
        self._on_progress(task, before + done, total)

    def _encode(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context:
            return self._encode_pair(context, continuation)
        ids = self.tok_encode(continuation, add_special_tokens=False)
        prefix = self.prefix_token_id
        return ([prefix], ids) if ids[:1] != [prefix] else (ids[:1], ids[1:])

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        scores = self.scorer.score("requests", [request[1:] for request in requests])
        return [(score.log_likelihood, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Refuse whole texts: `--text` measures them."""
        raise ConfigError("tasks of whole texts are not measured here: give the text as `--text FILE`.")

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Refuse generation, which no task of ours asks for."""
        raise ConfigError("tasks that generate are not measured here: expected those of `--tasks`.")


class _KeepingManager(TaskManager):
    """A task manager that keeps what it loaded, since upstream returns figures only."""

    def load(self, task_list: Any) -> Any:
        self.loaded = super().load(task_list)
        return self.loaded


class _HubManager(_KeepingManager):
    """A task manager whose tasks read the hub."""

    def load(self, task_list: Any) -> Any:
        from datasets.exceptions import DatasetsError

        try:
            return super().load(task_list)
        except (DatasetsError, OSError) as error:  # what the hub's client raises is one of these
            reason = " ".join(str(error).split())
            raise DataError(
                f"task data cannot be had from the hub ({reason}): try again, or give local files as `--data-dir DIR`."
            ) from error


def definitions_folder() -> Path:
    """Return upstream's folder of tasks."""
    return Path(lm_eval.tasks.__file__).parent


def local_task_manager(names: Sequence[str], data_dir: Path, folder: Path, with_examples: bool) -> TaskManager:
    """Return a task manager that knows the named tasks only, with upstream's definitions and local files.

    Args:
        names: tasks and groups by upstream's names.
        data_dir: the local files.
        folder: an empty folder for what is written, which must outlive the manager.
        with_examples: whether few-shot examples are taken.
    """
    write_local_tasks(names, data_dir, definitions_folder(), folder, with_examples)
    return _KeepingManager(include_path=str(folder), include_defaults=False)


def run_tasks(
    adapter: CausalAdapter,
    names: Sequence[str],
    data_dir: Path | None,
    limit: int | None,
    num_fewshot: int | None,
) -> dict[str, dict[str, Any]]:
    """Measure tasks by upstream's definitions.

    Args:
        adapter: the model.
        names: tasks and groups by upstream's names.
        data_dir: local files; None reads the hub.
        limit: documents of each task; None is all.
        num_fewshot: examples in front of each question; None is upstream's default.

    Returns:
        For every task and group its figures by name.
    """
    with tempfile.TemporaryDirectory(prefix="fanformer-tasks-") as folder, _quiet_and_same_random_numbers():
        if data_dir is not None:
            manager = local_task_manager(names, data_dir, Path(folder), bool(num_fewshot))
        else:
            homes = {GROUP_FOLDERS.get(name) or LOCAL_TASKS[name].definition.split("/")[0] for name in names}
            paths = [str(definitions_folder() / home) for home in sorted(homes)]
            manager = _HubManager(include_path=paths, include_defaults=False)
        results = simple_evaluate(
            adapter,
            tasks=list(names),
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            log_samples=False,
        )
        return _figures(results, manager.loaded, adapter)


def _figures(results: dict[str, Any], loaded: dict[str, Any], adapter: CausalAdapter) -> dict[str, dict[str, Any]]:
    """Return upstream's figures under plain names, with the bits per byte of the gold answers."""
    answers = {name: _gold_answers(task, adapter.answers[name]) for name, task in loaded["tasks"].items()}
    children = loaded.get("group_map", {})

    def leaves(name: str) -> list[str]:
        return [name] if name in answers else [leaf for child in children.get(name, ()) for leaf in leaves(child)]

    figures: dict[str, dict[str, Any]] = {}
    for name, values in {**results["results"], **results.get("groups", {})}.items():
        tasks = leaves(name)
        entry: dict[str, Any] = {
            key.partition(",")[0]: float(value) if isinstance(value, int | float) and math.isfinite(value) else None
            for key, value in values.items()
            if key.endswith(",none")
        }
        pairs = [pair for task in tasks for pair in answers[task]]
        entry["answer_bits_per_byte"], entry["answer_bits_per_byte_stderr"] = ratio(pairs)
        entry["documents"] = len(pairs)
        entry["num_fewshot"] = max(results["n-shot"][task] for task in tasks)
        entry["truncated_requests"] = sum(adapter.scorer.truncated.get(task, 0) for task in tasks)
        entry["version"] = str(results["versions"].get(name))
        figures[name] = entry
    return figures


def _gold_answers(task: Any, answers: list[tuple[Instance, float]]) -> list[tuple[float, int]]:
    """Return bits and bytes of each document's right answer, from the request that upstream made for it."""
    pairs = []
    for request, nats in answers:
        if task.OUTPUT_TYPE == "multiple_choice":
            gold = task.doc_to_text(request.doc) if task.multiple_input else task.doc_to_target(request.doc)
            if isinstance(gold, str):
                gold = int(gold) if gold.isdigit() else task.doc_to_choice(request.doc).index(gold)
            if request.idx != gold:
                continue
        pairs.append((-nats / math.log(2), len(request.args[1].encode("utf-8", "surrogatepass"))))
    return pairs


@contextmanager
def _quiet_and_same_random_numbers() -> Iterator[None]:
    """Keep upstream's notes and its data sets' bars off the terminal, and our random numbers as they were."""
    import datasets

    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.utils.logging.is_progress_bar_enabled()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    logger.setLevel(logging.ERROR)
    datasets.utils.logging.disable_progress_bar()
    try:
        with redirect_stdout(io.StringIO()):  # upstream prints what it bootstraps
            yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.utils.logging.enable_progress_bar()
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
