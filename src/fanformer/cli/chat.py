"""`fanformer chat`: read a line, write the answer as it comes, again."""

import codecs
import contextlib
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from fanformer.cli.generate import write_now
from fanformer.cli.options import (
    Verb,
    adapter_option,
    device_option,
    drawn_as_asked,
    dtype_option,
    exit_threshold_option,
    num_steps_option,
    sampling_options,
    say_depth,
    threads_option,
)
from fanformer.errors import ConfigError, FANformerError
from fanformer.generation.settings import GenerationSettings

if TYPE_CHECKING:
    from fanformer.generation.text_model import TextModel

HELP = (
    "/reset forgets the conversation, /exit or the end of input leaves, Ctrl-C stops the text; a line that ends in \\ "
    "goes on in the next."
)
_ANSWER_TOKENS = 400
"""A short story; what is learnt from conversations ends by itself."""
SHOW = "/image FILE and /audio FILE show something with the next message."


@click.command(cls=Verb, example="fanformer chat runs/nano --max-length 60 --temperature 0.5")
@click.argument("folder", metavar="[DIR]", required=False)
@sampling_options()
@num_steps_option
@exit_threshold_option
@adapter_option
@threads_option
@device_option
@dtype_option
def chat(
    folder: str | None,
    num_steps: int | None,
    exit_threshold: float | None,
    adapter: str | None,
    threads: int | None,
    device: str,
    dtype: str,
    **sampling: Any,
) -> None:
    """Talk with the model saved in DIR, or in a .gguf file, line by line; without DIR with the one in the box.

    The one in the box came with this package. A tokenizer with a chat template keeps the conversation; a base model
    continues each line as a new text. Answers may have 400 tokens, or half of the model's positions, where --max-length
    does not say otherwise; temperature, top-k and top-p are the model's own, as in `generate`.

    Commands: /help, /reset, /exit; /image FILE and /audio FILE for a model that sees and hears. A line that ends in a
    backslash goes on in the next. Ctrl-C stops the text; twice at the prompt, it leaves.
    """
    usual, source = sampling["max_length"], click.get_current_context().get_parameter_source("max_length")
    if source is ParameterSource.DEFAULT:
        sampling["max_length"] = _ANSWER_TOKENS
    settings = GenerationSettings(**sampling)
    from fanformer.loading import has_towers, load_text_model, model_in_the_box

    path = model_in_the_box() if folder is None else folder
    depth: dict[str, Any] = {"num_steps": num_steps, "exit_threshold": exit_threshold}
    sees = num_steps is exit_threshold is None and has_towers(path)
    towers = sees and adapter is None
    model = load_text_model(path, device, dtype, threads, adapter=adapter, towers=towers, **depth)
    say_depth(model.depth_note, num_steps)
    settings = drawn_as_asked(model, settings)
    if sees and not towers:
        _notice(f"{adapter} belongs to the language model alone: without it, pictures and recordings are taken too.")
    if source is ParameterSource.DEFAULT:
        longest = _ANSWER_TOKENS if model.positions is None else min(_ANSWER_TOKENS, model.positions // 2)
        settings = replace(settings, max_length=longest if model.has_chat_template else usual)
    converse(model, settings, name=folder or "the model in the box")


def converse(model: "TextModel", settings: GenerationSettings, name: str, exit_words: Sequence[str] = ()) -> None:
    """Answer every line of standard input until its end or an exit word.

    Args:
        model: that answers.
        settings: how answers are drawn; a seed is used for the first one and counted up.
        name: what the notices call the model.
        exit_words: lines that leave, besides /exit.
    """
    from fanformer.generation.chat import Conversation
    from fanformer.generation.interruption import interruptible

    accept_any_bytes()
    conversation = Conversation(model, settings)
    shown: list[Any] = []
    if not model.has_chat_template:
        _notice(f"{name} is a base model: it continues what you write, it has not learnt to answer.")
    sees = hasattr(model, "look_at")
    help_text = f"{HELP} {SHOW}" if sees else HELP
    _notice(help_text)
    while (line := read_message()) is not None:
        command = line.strip()
        if command == "/exit" or command in exit_words:
            return
        if command == "/help":
            _notice(help_text)
        elif command == "/reset":
            conversation.reset()
            shown.clear()
            _notice("conversation forgotten.")
        elif command.split(" ")[0] in ("/image", "/audio"):
            _show(model if sees else None, command, shown)
        elif command.startswith("/") and " " not in command:
            _notice(f"no command {command}: {help_text}")
        else:
            try:
                write = from_first_sign(write_now) if model.has_chat_template else write_now
                with interruptible() as interruption:
                    forgotten = conversation.answer(line, write, interruption, shown)
                shown = []
            except ConfigError as error:
                _notice(f"error: {error}")
                continue
            click.echo()
            if conversation.cut:
                _notice(f"cut after {settings.max_length} tokens: --max-length sets how many.")
            if forgotten:
                _notice(f"the oldest {forgotten} messages no longer fit and are forgotten.")
            if interruption.requested:
                _notice("stopped.")


def from_first_sign(write: Callable[[str], None]) -> Callable[[str], None]:
    """Return what writes pieces of a text without the spaces and line ends in front of it."""
    begun = False

    def write_rest(piece: str) -> None:
        nonlocal begun
        piece = piece if begun else piece.lstrip()
        begun = begun or bool(piece)
        if piece:
            write(piece)

    return write_rest


def _show(model: Any, command: str, shown: list[Any]) -> None:
    """Read the picture or recording that a command names, and put it with what the next message shows."""
    kind, _, name = command[1:].partition(" ")
    if model is None:
        _notice(f"error: this model takes text only, got /{kind}: use one that `fanformer train --multimodal` made.")
        return
    try:
        shown.append(model.look_at(kind, name.strip()))
    except FANformerError as error:
        _notice(f"error: {error}")
        return
    _notice(f"{name.strip()} goes with the next message.")


def read_message() -> str | None:
    r"""Return the next message of standard input, or None at the end of input.

    It is a line, and one that ends in a backslash goes on in the next.

    Raises:
        KeyboardInterrupt: as `read_line`.
    """
    lines: list[str] = []
    while (line := read_line("> " if not lines else "| ")) is not None:
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])
    return "\n".join(lines) if lines else None


def read_line(prompt: str = "> ") -> str | None:
    """Return the next line of standard input without its end, or None at the end of input.

    What cannot be decoded comes as U+FFFD, with a notice.

    Args:
        prompt: what a terminal shows in front of it.

    Raises:
        KeyboardInterrupt: if Ctrl-C comes twice in a row at a terminal, or once where input is no terminal.
    """
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return _mended(line.rstrip("\r\n")) if line else None
    with contextlib.suppress(ImportError):  # Windows' terminals have both themselves
        import readline  # noqa: F401  gives input() a history and editing keys

    warned = False
    while True:
        try:
            return _mended(input(prompt))
        except EOFError:
            click.echo()
            return None
        except KeyboardInterrupt:
            if warned:
                raise
            warned = True
            click.echo()
            _notice("Ctrl-C again leaves.")


def accept_any_bytes() -> None:
    """Let bytes on standard input that cannot be decoded come as lone surrogates (PEP 383); UTF-8 where it is ASCII."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        encoding = codecs.lookup(sys.stdin.encoding).name
        with contextlib.suppress(io.UnsupportedOperation):  # read from already: it stays as it is
            sys.stdin.reconfigure(
                encoding="utf-8" if encoding == "ascii" else encoding, errors="surrogateescape", newline="\n"
            )


def _mended(line: str) -> str:
    """Return a line of standard input with U+FFFD for what was not in its encoding, and say so."""
    encoding = sys.stdin.encoding or "utf-8"
    mended = line.encode(encoding, "surrogateescape").decode(encoding, "replace")
    if mended != line:
        _notice(f"the line is not {encoding.upper()}: what cannot be read of it became U+FFFD.")
    return mended


def _notice(text: str) -> None:
    click.echo(text, err=True)
