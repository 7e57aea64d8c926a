"""Training, tuning and evaluation as functions: what `fanformer train`, `finetune` and `eval` do, for programs."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fanformer.errors import ConfigError, refuse_single

if TYPE_CHECKING:
    from fanformer.training.events import Listener
    from fanformer.training.run import RunResult

_PathLike = str | os.PathLike[str]


def train(
    data: _PathLike | None = None,
    *,
    multimodal: _PathLike | None = None,
    listener: "Listener | None" = None,
    **fields: Any,
) -> "RunResult":
    """Train a model and leave a complete `transformers` folder behind, as `fanformer train` does.

    Args:
        data: what `--data` takes: a file or glob, `stdlib`, `hf:NAME`, or a folder of prepared data. None is the
            preset's, or what the run that `resume` goes on with has.
        multimodal: in its place, a file of conversations with pictures and recordings, for the model of `init_from`.
        listener: a function that hears every `Event` of the run; None is silence.
        **fields: of the run, such as `preset="nano"`, `output_dir="runs/mine"`, `max_steps=200`, `tokens="2M"`,
            `max_time="5m"`, `resume=True`, or `model={"fan_ratio": 0.25}`. What `fanformer train --help` lists, and
            every field of `--set`.

    Returns:
        Where the folder is, the last step, and the held-out loss.

    Raises:
        ConfigError, DataError, CheckpointError: on bad input, before anything is written that would stay.
        DivergenceError: if the loss or the gradients do not stay finite.
    """
    from fanformer.training.configuration import resolve_multimodal, resolve_run
    from fanformer.training.events import silent
    from fanformer.training.run import train as run

    given = _as_text({} if data is None else {"data": data}) | _as_text(fields)
    for name, value in dict(given.pop("model", {})).items():
        given[f"model.{name}"] = value
    if multimodal is None:
        return run(resolve_run(None, given), listener or silent)
    if data is not None:
        raise ConfigError(f"`data` does not go with `multimodal`, got {data!r}: keep one of them.")
    from fanformer.loading import longest_text

    given["data"] = os.fspath(multimodal)
    return run(resolve_multimodal(lambda: longest_text(given["init_from"]), given), listener or silent)


def finetune(
    base: _PathLike,
    data: _PathLike | None = None,
    *,
    preferences: _PathLike | None = None,
    listener: "Listener | None" = None,
    **fields: Any,
) -> "RunResult":
    """Teach a base model to answer and leave a complete `transformers` folder behind, as `fanformer finetune` does.

    Args:
        base: folder of the model.
        data: a jsonl file of conversations, or a pattern of such.
        preferences: in its place, a jsonl file of pairs of answers of which one is better: DPO.
        listener: a function that hears every `Event` of the run; None is silence.
        **fields: of the run, such as `output_dir="runs/assistant"`, `epochs=3`, `lora_rank=16` or `resume=True`.

    Returns:
        Where the folder is, the last step, and the held-out loss on answers or pairs.

    Raises:
        ConfigError, DataError, CheckpointError, DependencyError: on bad input, before anything is written that would
            stay.
        DivergenceError: if the loss or the gradients do not stay finite.
    """
    from fanformer.loading import longest_text
    from fanformer.training.configuration import resolve_tuning, tuning_rows
    from fanformer.training.events import silent
    from fanformer.training.run import train as run

    files = (None if path is None else os.fspath(path) for path in (data, preferences))
    folder, given = os.fspath(base), tuning_rows(*files) | _as_text(fields)
    return run(resolve_tuning(folder, lambda: longest_text(folder), given), listener or silent)


def _as_text(fields: dict[str, Any]) -> dict[str, Any]:
    """Return fields of a run with its paths as text."""
    return {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in fields.items()}


def evaluate(
    path: _PathLike,
    texts: Sequence[_PathLike] = (),
    tasks: Sequence[str] = (),
    *,
    by: str | None = None,
    sequence_length: int | None = None,
    batch_size: int = 8,
    data_dir: _PathLike | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    num_steps: int | Sequence[int] | None = None,
    exit_threshold: float | None = None,
) -> dict[str, Any]:
    """Measure how well a model predicts text files, or does benchmark tasks, as `fanformer eval` does.

    Args:
        path: a model folder or a GGUF file.
        texts: text, jsonl or parquet files to predict.
        tasks: benchmarks such as `arc_easy`, with the extra `eval`.
        by: field of jsonl and parquet files to give figures by.
        sequence_length: longest context in tokens; None is the model's longest, at most 2,048.
        batch_size: rows of text computed together.
        data_dir: folder of the tasks' files; None takes them from the hub.
        limit: documents of each task; None is all.
        num_fewshot: examples in front of each question; None is the task's own.
        device: auto, cpu, cuda, cuda:N or mps.
        dtype: auto (as saved), float32, bfloat16 or float16.
        num_steps: how often a recurrent depth runs its core, or several such numbers; None is the mean of training.
        exit_threshold: relative change of its state from which on a token takes no further step.

    Returns:
        Figures of all files (`loss` in nats per token, `perplexity`, `bits_per_byte`, standard errors), `files` with
        those of each, and `tasks` with those of each task. Of a model with recurrent depth they are those of the first
        number of steps, and `by_num_steps` has them for each.

    Raises:
        ConfigError, DataError, CheckpointError, DependencyError: on bad input, before anything is measured.
    """
    from fanformer.evaluation.files import MeasuredFiles, check_files, check_sizes
    from fanformer.generation.depth import check_steps, chosen_depth
    from fanformer.loading import load

    for name, given in (("texts", texts), ("tasks", tasks), ("num_steps", num_steps)):
        refuse_single(name, given)
    paths = [os.fspath(text) for text in texts]
    if not paths and not tasks:
        raise ConfigError("`texts` or `tasks` is needed to evaluate, got neither: give files to predict, or tasks.")
    check_sizes(sequence_length, batch_size)
    field = check_files(paths, by)
    if tasks:
        from fanformer.evaluation.tasks import evaluate_tasks, what_to_measure

        wanted = what_to_measure(",".join(tasks), data_dir, limit, num_fewshot)
    model, tokenizer = load(os.fspath(path), device, dtype)
    chosen: Sequence[int | None] = [num_steps] if num_steps is None or isinstance(num_steps, int) else list(num_steps)
    if not chosen:
        raise ConfigError("`num_steps` must hold at least one number, got none: leave it out for the mean of training.")
    check_steps(model, chosen, exit_threshold)
    found: dict[int | None, dict[str, Any]] = {}
    for number in chosen:
        with chosen_depth(model, number, exit_threshold) as depth:
            result: dict[str, Any] = {}
            if paths:
                measured = MeasuredFiles(model, tokenizer, field, sequence_length, batch_size)
                for text in paths:
                    measured.measure(text)
                result = measured.result()
            if tasks:
                result["tasks"] = evaluate_tasks(model, tokenizer, **wanted)
        found[depth.get("num_steps")] = result | depth
    first = next(iter(found.values()))
    return first if None in found else {**first, "by_num_steps": found}
