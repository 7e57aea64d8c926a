"""`fanformer finetune`: teach a base model to answer, and draw what happens."""

from typing import Any

import click

from fanformer.cli.options import Verb
from fanformer.cli.train import field_option, log_to_option, parsed_fields, prove_and_report, run_and_report
from fanformer.errors import ConfigError
from fanformer.loading import longest_text
from fanformer.training.configuration import (
    LONGEST_TUNING_ROW,
    PREFERENCES,
    TUNING,
    resolve_tuning,
    tuning_rows,
)
from fanformer.training.fields import RunConfig

# Fields of RunConfig that have a flag of their own, in the order of --help; all others go through --set.
_FLAGS = (
    "epochs", "max_steps", "max_time", "batch_size", "sequence_length", "learning_rate", "optimizer", "schedule",
    "save_steps", "eval_steps", "keep_last", "seed", "compile", "precision", "device", "push_to_hub",
)  # fmt: skip


def _tuning_flags(function: Any) -> Any:
    defaults = {
        **TUNING,
        "sequence_length": f"the base's positions, at most {LONGEST_TUNING_ROW}",
        "learning_rate": f"{TUNING['learning_rate']}, with --preferences {PREFERENCES['learning_rate']}",
    }
    for name in reversed(_FLAGS):
        function = field_option(name, defaults.get(name))(function)
    return function


_LORA_RANK = 16


@click.command(cls=Verb, example="fanformer finetune runs/nano --data questions.jsonl --output-dir runs/assistant")
@click.argument("base", metavar="DIR")
@click.option("--data", metavar="FILE", help="Conversations: a .jsonl file or a pattern of such.")
@click.option("--preferences", metavar="FILE", help="Pairs of answers in place of --data: the better one is preferred.")
@click.option("--eval-data", metavar="FILE", help="Rows to measure on.  [default: a twentieth of the questions]")
@click.option("--output-dir", metavar="OUT", help="Folder of the run.  [default: runs/DIR-tuned]")
@_tuning_flags
@click.option(
    "--dpo-beta",
    type=float,
    metavar="X",
    help=f"With --preferences: how strongly leaving the base counts.  [default: {PREFERENCES['dpo_beta']}]",
)
@click.option("--lora", is_flag=True, help="Train adapters; the folder has them merged, and apart in adapter/.")
@click.option("--lora-rank", type=int, metavar="R", help=f"Rank of the adapters.  [default: {_LORA_RANK}]")
@click.option("--show-rows", type=click.IntRange(min=1), metavar="N", help="Print N rows, what is learnt marked; end.")
@click.option("--resume", is_flag=True, help="Go on from the last good checkpoint of the output folder.")
@click.option("--allow-changed-data", is_flag=True, help="With --resume: go on with other rows than before.")
@click.option("--overwrite", is_flag=True, help="Delete the run that the output folder holds.")
@click.option("--prove-resume", is_flag=True, help="Tune several times, straight and killed, and compare the bits.")
@log_to_option
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any field of the run.")
def finetune(
    base: str,
    data: str | None,
    preferences: str | None,
    lora: bool,
    show_rows: int | None,
    prove_resume: bool,
    log_to: tuple[str, ...],
    settings: tuple[str, ...],
    **flags: Any,
) -> None:
    """Teach the model saved in DIR to answer as the conversations of FILE do, or which answer is better.

    A row has `messages`, `prompt` and `completion`, `prompt`, `chosen` and `rejected`, `conversations`, or
    `instruction` and `output`; a wrong one costs one line. OUT is then a complete `transformers` folder with a chat
    template, which `fanformer chat` talks by.
    """
    fields = tuning_rows(data, preferences) | parsed_fields(flags, settings)
    if not lora and "lora_rank" in fields and not flags["resume"]:
        raise ConfigError(f"`lora_rank` has no effect without `--lora`, got {fields['lora_rank']}: add it.")
    own = {"lora_rank": _LORA_RANK} if lora else {}
    config = resolve_tuning(base, lambda: longest_text(base), fields, own)
    if lora and config.lora_rank is None:
        raise ConfigError(f"`--lora` does not apply to the run in {config.folder}, which has none: drop it.")
    if config.corpus.objective == "text":
        raise ConfigError("`objective` of a tuning must be another than text: use `fanformer train --init-from DIR`.")
    if show_rows is not None:
        _show_rows(config, show_rows)
    elif prove_resume:
        prove_and_report(config, log_to)
    else:
        run_and_report(config, log_to)


def _show_rows(config: RunConfig, count: int) -> None:
    """Print the first rows that the run would train on, in their order."""
    import sys

    import numpy as np

    from fanformer.data.conversations.display import marked_row
    from fanformer.data.packing import rows_of_run
    from fanformer.training.corpus import Opening
    from fanformer.training.run import open_corpus

    corpus = open_corpus(Opening(config, None, {}, lambda text: click.echo(text, err=True), None))
    for place in range(min(count, len(corpus.rows))):
        index = int(rows_of_run(config.seed, np.array([place]), len(corpus.rows))[0])
        row = {name: values[0] for name, values in corpus.rows.batch([index]).items()}
        click.echo(f"== row {index + 1} of {len(corpus.rows)} ==")
        click.echo(marked_row(corpus.tokenizer, row, colour=sys.stdout.isatty()))
