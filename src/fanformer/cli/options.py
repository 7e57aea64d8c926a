"""What the verbs have in common: their class, and options that several of them take."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from fanformer.errors import did_you_mean
from fanformer.generation.settings import GenerationSettings

if TYPE_CHECKING:
    from fanformer.generation.text_model import TextModel

Function = TypeVar("Function", bound=Callable[..., Any])


def _debug_option() -> click.Option:
    # Read by failure.run_command from the words themselves, since parsing may be what fails.
    return click.Option(["--debug"], is_flag=True, expose_value=False, help="Show the traceback of an error.")


class Verb(click.Command):
    """A command whose help shows all defaults and ends with an example, and that takes `--debug`."""

    def __init__(self, *args: Any, example: str, **kwargs: Any):
        kwargs["epilog"] = f"\b\nExample:\n  {example}"
        kwargs["context_settings"] = {"show_default": True, "max_content_width": 100}
        super().__init__(*args, **kwargs)
        self.params.append(_debug_option())


class VerbGroup(click.Group):
    """A group of verbs, such as `fanformer data`; an unknown one comes with the nearest that exists."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.params.append(_debug_option())

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the verb that `args` begin with.

        Raises:
            UsageError: if there is none of that name.
        """
        if not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            suggestion = did_you_mean(args[0], self.list_commands(ctx)).rstrip(".")
            raise click.UsageError(f"no command `{args[0]}`: {suggestion}", ctx)
        return super().resolve_command(ctx, args)


device_option = click.option(
    "--device",
    default="auto",
    metavar="auto|cpu|cuda|mps",
    help="Where to compute; auto takes cuda, else mps, else cpu. One that is not there is an error.",
)
dtype_option = click.option(
    "--dtype",
    default="auto",
    metavar="auto|float32|bfloat16|float16",
    help="Number format of the weights; auto takes the one they were saved in.",
)
adapter_option = click.option(
    "--adapter", metavar="DIR", help="Folder of an adapter that PEFT saved for the model, to be merged into it."
)
num_steps_option = click.option(
    "--num-steps",
    type=int,
    metavar="R",
    help="How often a recurrent depth runs its core.  [default: the mean of its training]",
)
exit_threshold_option = click.option(
    "--exit-threshold",
    type=float,
    metavar="X",
    help="Relative change of its state from which on a token takes no further step, such as 0.02; for folders.",
)
image_option = click.option(
    "--image", "images", multiple=True, metavar="FILE", help="Picture (PNG, JPEG, WebP) that each PROMPT asks about."
)
audio_option = click.option(
    "--audio", multiple=True, metavar="FILE", help="Recording (wav, flac, ogg, mp3) that each PROMPT asks about."
)
threads_option = click.option(
    "--threads", type=int, metavar="N", help="Threads that run a .gguf file.  [default: the cores nobody else uses]"
)


def say_depth(note: str | None, num_steps: Any) -> None:
    """Say on standard error which depth a model has where the user named none."""
    if note is not None and num_steps is None:
        click.echo(note, err=True)


def echo_table(lines: Sequence[Sequence[str]]) -> None:
    """Print lines of cells, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        click.echo("  ".join(map(str.ljust, line, widths)).rstrip())


def sampling_options(separator: str = "-") -> Callable[[Function], Function]:
    """Return a decorator that adds the fields of GenerationSettings as flags.

    Args:
        separator: between the words of a flag's name.
    """

    def add(function: Function) -> Function:
        for item in reversed(dataclasses.fields(GenerationSettings)):
            kind = int if item.default is None else type(item.default)
            flag, text = f"--{item.name.replace('_', separator)}", item.metadata["help"]
            text = f"{text[0].upper()}{text[1:]}."
            function = click.option(flag, item.name, type=kind, default=item.default, help=text)(function)
        return function

    return add


def drawn_as_asked(model: "TextModel", settings: GenerationSettings) -> GenerationSettings:
    """Return the settings of `sampling_options` as the model asks for them where no flag says otherwise."""
    source = click.get_current_context().get_parameter_source
    own = {name: value for name, value in model.own_sampling.items() if source(name) is ParameterSource.DEFAULT}
    return dataclasses.replace(settings, **own)
