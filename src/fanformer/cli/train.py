"""`fanformer train`: train a model, and draw what happens."""

import contextlib
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click

from fanformer.cli.options import Verb, echo_table
from fanformer.errors import ConfigError
from fanformer.machine.launch import launched_rank
from fanformer.machine.threads import spin_briefly
from fanformer.training.configuration import PARSERS, parse_setting, preset_names, resolve_multimodal, resolve_run
from fanformer.training.events import Listener
from fanformer.training.fields import FIELDS, RunConfig

# Fields of RunConfig that have a flag of their own, in the order of --help; all others go through --set.
_FLAGS = (
    "data", "eval_data", "output_dir", "init_from", "seed", "max_steps", "tokens", "epochs", "max_time", "batch_size",
    "sequence_length", "learning_rate", "optimizer", "schedule", "save_steps", "eval_steps", "keep_last", "tokenizer",
    "vocab_size", "compile", "precision", "device", "push_to_hub",
)  # fmt: skip


def field_option(name: str, default: Any = None) -> Callable[[Any], Any]:
    """Return the option of a field of the run; its help says `default` in the preset's place where that is given."""
    item = FIELDS[name]
    help_text = item.metadata["help"][:1].upper() + item.metadata["help"][1:]
    if default is not None:
        help_text = f"{help_text.split('; default')[0]}  [default: {default}]"
    elif "default" not in help_text and item.default is not None:
        help_text += f"  [default: {item.default}, or the preset's]"
    hint = item.type
    types = (hint, *get_args(hint))
    choices = f"[{'|'.join(get_args(hint))}]" if get_origin(hint) is Literal else None  # RunConfig checks them
    kind = str if name in PARSERS else int if int in types else float if float in types else str
    flag = f"--{name.replace('_', '-')}"
    return click.option(flag, name, type=kind, metavar=choices, default=None, help=f"{help_text}.")


log_to_option = click.option(
    "--log-to",
    multiple=True,
    type=click.Choice(["trackio", "tensorboard", "wandb"]),
    help="Send the figures there too; each needs the extra of its name.",
)


def _training_flags(function: Any) -> Any:
    for name in reversed(_FLAGS):
        function = field_option(name)(function)
    return function


@click.command(cls=Verb, example="fanformer train --preset nano --data stdlib --max-time 5m --output-dir runs/nano")
@click.option(
    "--preset", default=None, help=f"Model and recipe to start from: {', '.join(preset_names())}  [default: nano]."
)
@click.option(
    "--config", "config_file", type=click.Path(path_type=Path), help="YAML file of run fields, such as a run.yaml."
)
@_training_flags
@click.option(
    "--multimodal",
    metavar="FILE",
    help="Rows of messages with pictures and recordings, .jsonl or .parquet, to teach the model of --init-from.",
)
@field_option("stage")
@field_option("vision_tower")
@field_option("audio_tower")
@click.option("--resume", is_flag=True, help="Go on from the last good checkpoint of the output folder.")
@click.option("--allow-changed-data", is_flag=True, help="With --resume: go on with other data than before.")
@click.option("--overwrite", is_flag=True, help="Delete the run that the output folder holds.")
@click.option(
    "--prove-resume",
    is_flag=True,
    help="Train a short run several times, straight, killed and on two processes, and compare the bits.",
)
@click.option(
    "--p",
    "fan_ratio",
    type=float,
    default=None,
    help="Share of the channels where FAN stands given to cos, and again to sin.  [default: 0.15]",
)
@log_to_option
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any field of the run, or model.FIELD.")
def train(
    preset: str | None,
    config_file: Path | None,
    fan_ratio: float | None,
    settings: tuple[str, ...],
    prove_resume: bool,
    log_to: tuple[str, ...],
    multimodal: str | None,
    **flags: Any,
) -> None:
    """Train a model and leave a complete `transformers` folder behind.

    The folder holds safetensors weights, tokenizer, model card, run.yaml, metrics.jsonl and loss.png.
    """
    overrides = parsed_fields(flags, settings)
    if preset is not None:
        overrides["preset"] = preset
    if fan_ratio is not None:
        overrides["model.fan_ratio"] = fan_ratio
    if multimodal is not None:
        config = _resolve_multimodal(multimodal, config_file, overrides)
    else:
        config = resolve_run(config_file, overrides)
    if prove_resume:
        prove_and_report(config, log_to)
    else:
        run_and_report(config, log_to)


def _resolve_multimodal(file: str, config_file: Path | None, overrides: dict[str, Any]) -> RunConfig:
    from fanformer.loading import longest_text

    for name, value in (("data", overrides.get("data")), ("config", config_file)):
        if value is not None:
            raise ConfigError(f"`--{name}` does not go with `--multimodal`, got {value}: keep one of them.")
    return resolve_multimodal(lambda: longest_text(overrides["init_from"]), {**overrides, "data": file})


def parsed_fields(flags: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """Return the fields of a run that flags and `--set` say; a flag that is None or False says nothing."""
    given = {name: value for name, value in flags.items() if value is not None and value is not False}
    return given | dict(map(parse_setting, settings))


def run_and_report(config: RunConfig, log_to: Sequence[str] = (), to_go_on: str = "go on with --resume") -> None:
    """Train, draw the progress, send figures to trackers, and print the result; shared with HybridFun.py and the demo.

    Args:
        config: the run.
        log_to: names of trackers.
        to_go_on: what is said of a run that was stopped.

    Raises:
        click.exceptions.Exit: where a signal stopped it, with 128 and its number.
    """
    spin_briefly(os.environ)
    from fanformer.cli.terminal import TerminalReporter
    from fanformer.training.run import train as train_model

    with contextlib.ExitStack() as stack:
        listener: Listener = stack.enter_context(TerminalReporter())
        for name in log_to:
            from fanformer.training.trackers import also_to

            listener = stack.enter_context(also_to(name, config, listener))
        result = train_model(config, listener)
    code = 128 + signal.Signals[result.stopped_by] if result.stopped_by is not None else 0
    if launched_rank():  # the first of several processes tells the result
        raise click.exceptions.Exit(code)
    if result.stopped_by is not None:
        click.echo(f"stopped by {result.stopped_by} after step {result.step}, which is saved: {to_go_on}")
        raise click.exceptions.Exit(code)
    assert result.held_out is not None, "only a signal ends a run before it was measured"
    click.echo(result.held_out.told())
    for name, value in (("gzip -9", result.gzip_bits_per_byte), ("xz -9", result.xz_bits_per_byte)):
        if value is not None:
            click.echo(f"  {name} on all held-out bytes: {value:.4f} bits per byte")
    if not result.reached_end:
        click.echo(f"the time limit ended the run after step {result.step}, which is saved: {to_go_on}")
    click.echo(f"model: {result.folder}")


def prove_and_report(config: RunConfig, log_to: Sequence[str] = ()) -> None:
    """Prove that a run of this configuration loses nothing, and print the table; exit code 1 where it does.

    Raises:
        ConfigError: if its figures are to go to a tracker.
    """
    if log_to:
        raise ConfigError(f"`--log-to` does not apply to --prove-resume, got {', '.join(log_to)}: leave one out.")
    spin_briefly(os.environ)  # of the processes that are started
    from fanformer.training.proof import LARGEST_DIFFERENCE, prove

    if config.output.output_dir is None:
        config = config.replace(output_dir=f"runs/{config.preset}-proof")
    findings = prove(config, lambda text: click.echo(text, err=True))
    columns = list(findings[0].equal)
    lines = [["training", "kills", *(f"equal {name}" for name in columns), "largest loss difference", "holds"]]
    for finding in findings:
        marks = ["yes" if finding.equal[name] else "no" for name in columns]
        verdict = "yes" if finding.holds else "NO"
        lines.append([finding.name, str(finding.kills), *marks, f"{finding.largest_difference:.1e}", verdict])
    echo_table(lines)
    click.echo(
        "killed trainings must equal those that were not in every bit, two processes one process in all rows and, to "
        f"{LARGEST_DIFFERENCE:g} relative, in every loss"
    )
    click.echo(f"trainings and proof.json: {config.folder}")
    if not all(finding.holds for finding in findings):
        raise click.exceptions.Exit(1)
