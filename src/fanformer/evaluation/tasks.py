"""Benchmark tasks by upstream's definitions (lm-evaluation-harness), with the likelihood of the right answers."""

import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fanformer.errors import ConfigError, DataError, DependencyError, did_you_mean

if TYPE_CHECKING:
    from fanformer.evaluation.scoring import Scorer

TASKS = {
    **{name: name for name in ("arc_easy", "arc_challenge", "sciq", "piqa", "hellaswag", "winogrande", "openbookqa")},
    "lambada": "lambada_openai",
    **{name: name for name in ("blimp", "mmlu")},
}
"""Names of the tasks and groups -> upstream's."""


def parse_tasks(words: str) -> list[str]:
    """Return the tasks in a list with commas.

    Raises:
        ConfigError: if one is unknown or named twice.
    """
    names = [word.strip() for word in words.split(",") if word.strip()]
    for name in names:
        if name not in TASKS:
            raise ConfigError(f"no task `{name}`: {did_you_mean(name, TASKS)}")
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"`--tasks` must name each task once, got `{words}`: expected such as arc_easy,piqa.")
    return names


def check_tasks(names: Sequence[str], data_dir: Path | None, limit: int | None, num_fewshot: int | None) -> None:
    """Raise what stands in the way of measuring tasks, before a model is loaded.

    Raises:
        ConfigError: if a number is out of range or has no effect.
        DataError: if the folder is missing, or the hub is needed and not to be had.
        DependencyError: if the extra `eval` is not installed.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"`limit` must be at least 1, got {limit}.")
    if num_fewshot is not None and num_fewshot < 0:
        raise ConfigError(f"`num_fewshot` must be at least 0, got {num_fewshot}.")
    if num_fewshot and "blimp" in names:
        raise ConfigError(
            f"`num_fewshot` has no effect on `blimp`, whose definition fixes 0, got {num_fewshot}: measure it alone."
        )
    if num_fewshot and "lambada" in names:
        raise ConfigError(
            f"`num_fewshot` must be 0 for `lambada`, which has no split of examples, got {num_fewshot}: measure it by "
            "itself."
        )
    for package in ("lm_eval", "datasets"):
        if importlib.util.find_spec(package) is None:
            raise DependencyError(
                f"`--tasks` needs the package `{package}`, which is not installed: pip install 'fanformer[eval]'"
            )
    if data_dir is None:
        from fanformer.data.sources.hub import require_hub

        require_hub(f"task `{names[0]}` without `--data-dir`", "give local files as `--data-dir DIR`")
    elif not data_dir.is_dir():
        raise DataError(f"`--data-dir`: no folder {data_dir.absolute()}: expected the layout of docs/evaluation.md.")


def what_to_measure(
    words: str,
    data_dir: str | os.PathLike[str] | None,
    limit: int | None,
    num_fewshot: int | None,
    cache_dir: str | None = None,
) -> dict[str, Any]:
    """Return arguments of `evaluate_tasks`, checked before a model is loaded.

    Args:
        words: as `parse_tasks` takes them.
        data_dir: local files; None reads the hub.
        limit: documents of each task.
        num_fewshot: examples in front of each question.
        cache_dir: where finished requests are kept; None is fanformer/eval in XDG_CACHE_HOME, else in ~/.cache.

    Raises:
        ConfigError, DataError, DependencyError: as `parse_tasks` and `check_tasks`.
    """
    names = parse_tasks(words)
    folder = None if data_dir is None else Path(data_dir).expanduser().absolute()
    check_tasks(names, folder, limit, num_fewshot)
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fanformer" / "eval"
    cache = usual if cache_dir is None else Path(cache_dir).expanduser().absolute()
    return {"names": names, "data_dir": folder, "cache_folder": cache, "limit": limit, "num_fewshot": num_fewshot}


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    *,
    data_dir: Path | None = None,
    cache_folder: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Measure benchmark tasks.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: its tokenizer.
        names: of TASKS.
        data_dir: local files; None reads the hub.
        cache_folder: where finished requests are kept, by a hash of the model, so that a killed evaluation goes on;
            None keeps none.
        limit: documents of each task; None is all.
        num_fewshot: examples in front of each question; None is upstream's default.
        on_progress: called with a task, and how many of how many requests of all tasks are done.

    Returns:
        For every task, group and member of a group: upstream's metrics, `answer_bits_per_byte` (bits of the gold
        answer given the question, over its UTF-8 bytes), each with its `_stderr`, and `documents`, `num_fewshot`,
        `truncated_requests`, `version`.

    Raises:
        ConfigError: as `check_tasks`.
        DataError: as `check_tasks`, or if a file is missing or of another form.
        DependencyError: as `check_tasks`.
    """
    check_tasks(names, data_dir, limit, num_fewshot)
    from fanformer.evaluation.scoring import Scorer, model_fingerprint

    kept = None if cache_folder is None else cache_folder / model_fingerprint(model)[:16]
    return evaluate_scored(Scorer(model, kept), tokenizer, names, data_dir, limit, num_fewshot, on_progress)


def evaluate_scored(
    scorer: "Scorer",
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    data_dir: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Return what `evaluate_tasks` does, of whatever scores; `check_tasks` is the caller's."""
    from fanformer.evaluation.harness import CausalAdapter, run_tasks

    adapter = CausalAdapter(scorer, tokenizer, on_progress)
    figures = run_tasks(adapter, [TASKS[name] for name in names], data_dir, limit, num_fewshot)
    ours = {theirs: name for name, theirs in TASKS.items()}
    return {ours.get(name, name): entry for name, entry in figures.items()}
