"""The `fanformer` command: finds the verb, imports that one only, and turns failures into one line."""

from fanformer.cli import interrupts  # noqa: F401  the first thing: it heeds Ctrl-C while the rest is imported

# isort: split
import importlib
import sys
from collections.abc import Sequence

import click

from fanformer import __version__
from fanformer.cli.failure import run_command
from fanformer.cli.options import VerbGroup

# verb -> (where it is, what the list of verbs says about it); reading this imports none of them.
VERBS = {
    "info": ("fanformer.cli.info:info", "Explain a preset or a saved model part by part."),
    "train": ("fanformer.cli.train:train", "Train a model."),
    "finetune": ("fanformer.cli.finetune:finetune", "Teach a base model to answer."),
    "data": ("fanformer.cli.data:data", "Prepare training data."),
    "generate": ("fanformer.cli.generate:generate", "Continue prompts."),
    "chat": ("fanformer.cli.chat:chat", "Talk with a model line by line."),
    "playground": ("fanformer.cli.playground:playground", "Play with models in the browser."),
    "serve": ("fanformer.cli.serve:serve", "Serve models to clients of OpenAI's API."),
    "eval": ("fanformer.cli.eval:evaluate", "Measure a model on text and on benchmark tasks."),
    "report": ("fanformer.cli.report:report", "Show what trainings did, as a page with charts."),
    "community": ("fanformer.cli.community:community", "Train one model together, each on a machine of their own."),
    "compare": ("fanformer.cli.compare:compare", "Train architectures on the same tokens and compare them."),
    "quantize": ("fanformer.cli.quantize:quantize", "Write a model as a smaller file."),
    "convert": ("fanformer.cli.convert:convert", "Turn the published implementations' weights into a model folder."),
}


class LazyVerbs(VerbGroup):
    """A group that knows its verbs by name and imports one when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs in the order of VERBS."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return the verb called `cmd_name`, or None where there is none."""
        if cmd_name not in VERBS:
            return None
        module, _, attribute = VERBS[cmd_name][0].partition(":")
        return getattr(importlib.import_module(module), attribute)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of verbs without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in VERBS.items()])


@click.command(
    cls=LazyVerbs,
    invoke_without_command=True,
    epilog="\b\nExample:\n  fanformer train --preset nano && fanformer generate runs/nano 'def '",
)
@click.version_option(__version__, prog_name="fanformer")
@click.pass_context
def fanformer(context: click.Context) -> None:
    """Train, measure, run and ship a compact language model.

    `fanformer COMMAND --help` explains a command, with its defaults and an example.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the `fanformer` command and return its exit code.

    Args:
        arguments: the words after the program's name; default: those of this process.
    """
    return run_command(fanformer, sys.argv[1:] if arguments is None else arguments, "fanformer")


if __name__ == "__main__":
    sys.exit(main())
