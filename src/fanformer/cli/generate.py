"""`fanformer generate`: continue one prompt as it is written, or many from a file."""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from fanformer.cli.interrupts import INTERRUPTED
from fanformer.cli.options import (
    Verb,
    adapter_option,
    audio_option,
    device_option,
    drawn_as_asked,
    dtype_option,
    exit_threshold_option,
    image_option,
    num_steps_option,
    sampling_options,
    say_depth,
    threads_option,
)
from fanformer.errors import ConfigError, DataError
from fanformer.generation.settings import GenerationSettings

_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


@click.command(cls=Verb, example="fanformer generate runs/nano 'def ' --max-length 50 --seed 1")
@click.argument("words", metavar="[DIR] [PROMPT]...", nargs=-1)
@click.option("--prompts-file", metavar="FILE", help="Text file with one prompt a line; - reads standard input.")
@click.option("--batch-size", default=8, help="Prompts that are continued together.")
@click.option(
    "--compile", "compiled", is_flag=True, help="Compile the step from token to token; pays for long texts of a folder."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line instead of text.")
@image_option
@audio_option
@sampling_options()
@num_steps_option
@exit_threshold_option
@click.option(
    "--draft-tokens",
    type=int,
    metavar="N",
    help="Tokens that one step of a recurrent depth drafts before all steps verify them: the same text at "
    "--temperature 0; for folders.",
)
@adapter_option
@threads_option
@device_option
@dtype_option
def generate(
    words: tuple[str, ...],
    prompts_file: str | None,
    batch_size: int,
    compiled: bool,
    as_json: bool,
    num_steps: int | None,
    exit_threshold: float | None,
    draft_tokens: int | None,
    images: tuple[str, ...],
    audio: tuple[str, ...],
    adapter: str | None,
    threads: int | None,
    device: str,
    dtype: str,
    **sampling: Any,
) -> int:
    """Continue each PROMPT with the model saved in DIR, or in a .gguf file; without one, begin a new text.

    Without DIR the model in the box writes, which came with this package. A first PROMPT has a space in it, so that it
    cannot be meant for a DIR; --prompts-file takes any.

    Temperature, top-k and top-p are those that the model's generation_config.json asks for, where no option says
    otherwise; the defaults below are for a model that asks for none.

    A single text is written as it comes, prompt first. Ctrl-C stops it there. The same seed gives the same text, in
    whatever batch; equal prompts of one call get different texts.

    With pictures and recordings each PROMPT is a question about them, and its answer is written.
    """
    settings = GenerationSettings(**sampling)
    folder, prompts = model_and_prompts(words)
    if prompts and prompts_file is not None:
        raise ConfigError("prompts come from one place, got PROMPT and --prompts-file: keep one of them.")
    texts = read_prompts(prompts_file) if prompts_file is not None else list(prompts) or [""]

    from fanformer.generation.interruption import interruptible
    from fanformer.loading import load_text_model

    shows = bool(images or audio)
    if draft_tokens is not None and settings.temperature != 0:
        raise ConfigError(
            f"`draft_tokens` needs greedy decoding, got temperature {settings.temperature}: add --temperature 0."
        )
    depth: dict[str, Any] = {"num_steps": num_steps, "exit_threshold": exit_threshold, "draft_tokens": draft_tokens}
    model = load_text_model(folder, device, dtype, threads, compiled, adapter, towers=shows, **depth)
    say_depth(model.depth_note, num_steps)
    settings = drawn_as_asked(model, settings)
    streamed = len(texts) == 1 and not as_json
    with interruptible() as interruption:
        on_text = write_now if streamed else None
        options: dict[str, Any] = {"batch_size": batch_size, "interruption": interruption}
        if shows:
            from fanformer.generation.media_model import MediaModel, shown_media

            assert isinstance(model, MediaModel), "a model loaded with its towers"
            shown = [shown_media(images, audio)] * len(texts)
            completions = model.ask(texts, shown, settings, on_text, **options)
        else:
            completions = model.complete(texts, settings, on_text, **options)
            if streamed:
                write_now(texts[0])
        for completion in completions:
            if as_json:
                write_now(_json_line(dataclasses.asdict(completion)))
            else:
                gap = "\n" if shows else ""
                write_now("\n" if streamed else f"{completion.prompt}{gap}{completion.text}\n\n")
    return INTERRUPTED if interruption.requested else 0


def model_and_prompts(words: tuple[str, ...]) -> tuple[str | None, tuple[str, ...]]:
    """Return the model that the first word names, None for the one in the box, and the prompts.

    It names one if that is there, or if it reads as a path; else it is a prompt, and has a space. Neither a slip in a
    path nor a single word, which may be meant for a folder, is continued by a model that nobody named.

    Raises:
        ConfigError: if it is neither.
    """
    if not words:
        return None, ()
    first, place = words[0], os.path.dirname(words[0])
    spaced = any(map(str.isspace, first)) or not first
    if os.path.exists(first) or first.endswith(".gguf") or (place and (not spaced or os.path.isdir(place))):
        return first, words[1:]
    if spaced:
        return None, words
    raise ConfigError(
        f"no model folder or .gguf file {first!r}, expected one, or a prompt with a space in it for the model in the "
        "box: check the path, or give a prompt of one word by --prompts-file."
    )


def _json_line(record: dict[str, Any]) -> str:
    """Return a record as a line of JSON, whose characters are escaped where standard output lacks one of them."""
    line = json.dumps(record, ensure_ascii=False) + "\n"
    try:
        line.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        line = json.dumps(record) + "\n"
    return line


def write_now(text: str) -> None:
    """Write `text` to standard output without waiting for the end of a line.

    On a terminal, control characters but tab and line feed come as U+FFFD: a model may write what would command it.
    """
    sys.stdout.write(text.translate(_CONTROLS) if sys.stdout.isatty() else text)  # click.echo would drop some of it
    sys.stdout.flush()


def read_prompts(source: str) -> list[str]:
    """Return the lines of the file `source`, or of standard input for `-`; LF or CRLF ends a line, and nothing else.

    Raises:
        DataError: if there are none, or they are not UTF-8.
    """
    name = "standard input" if source == "-" else str(Path(source).absolute())
    content = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    try:
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"prompts must be UTF-8, got byte {content[error.start]:#x} in {name}: convert it.") from error
    if not lines[-1]:
        lines.pop()
    if not lines:
        raise DataError(f"no prompts in {name}: expected one a line.")
    return [line.removesuffix("\r") for line in lines]
