"""How a command ends when something goes wrong: one line on stderr, and an exit code that says whose fault it is."""

import errno
import io
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import click

from fanformer.cli.interrupts import INTERRUPTED, heeded
from fanformer.errors import FANformerError, did_you_mean

USER_ERROR = 2
BUG = 1
BROKEN_PIPE = 141  # 128 + SIGPIPE, what a shell reports for `yes | head`

# Errors of the operating system that are the user's to mend; the others are bugs.
_MENDABLE = {
    errno.ENOENT: "no such file or folder",
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.EEXIST: "exists already",
    errno.ENOTDIR: "not a folder",
    errno.EISDIR: "a folder, expected a file",
    errno.ENOTEMPTY: "folder is not empty",
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "disk quota used up",
    errno.EROFS: "file system is read-only",
    errno.ENAMETOOLONG: "name is too long",
    errno.EFBIG: "file is too large",
}


def run_command(command: click.Command, arguments: Sequence[str], name: str) -> int:
    """Run `command` and return its exit code; every failure becomes one line on stderr.

    Args:
        command: what to run.
        arguments: the words after the program's name; `--debug` among them (before a `--`) asks for tracebacks.
        name: the program's name as `--help` shows it.

    Returns:
        0, or 1 for a bug, 2 for bad input, 130 after Ctrl-C, 141 where the reader of stdout went away.
    """
    try:
        with heeded():
            return _run(command, list(arguments), name)
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(command: click.Command, own: list[str], name: str) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character that the terminal lacks is no reason to stop
            stream.reconfigure(errors="replace")
    debug = "--debug" in (own[: own.index("--")] if "--" in own else own)
    quiet_libraries()
    try:
        # Not command.main, which has ways of its own to end after Ctrl-C or a broken pipe.
        try:
            # the words are kept for verbs that record them or run them again
            with command.make_context(name, list(own), obj=tuple(own)) as context:
                result = command.invoke(context)
        except click.exceptions.Exit as stop:
            result = stop.exit_code
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.Abort:
        return INTERRUPTED
    except BrokenPipeError:
        _abandon_stdout()
        return BROKEN_PIPE
    except Exception as error:
        if debug:
            traceback.print_exc()
        code, message = USER_ERROR, user_message(error)
        if message is None:
            first = " ".join(str(error).split())[:200]
            hint = "" if debug else "; run again with --debug for the traceback"
            code, message = BUG, f"internal error, {type(error).__name__}: {first}{hint}."
        from fanformer.machine.launch import launched_rank

        rank = launched_rank()  # of several processes that train together
        click.echo(f"process {rank}: {message}" if rank else f"error: {message}", err=True)
        try:
            sys.stdout.flush()
        except OSError:
            _abandon_stdout()
        return code


def run_program(main: Callable[[], int], interrupted: str = "stopped: the same command goes on") -> NoReturn:
    """End the process with the status of a script beside the package; what a user can mend is a line, as of a command.

    Args:
        main: the script; returns its status.
        interrupted: what Ctrl-C says.
    """
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(USER_ERROR)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Put `path` into errors of writing to it, which come without a name once the file is open."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
    except Exception as error:  # the safetensors library has an error of its own for a full disk
        if os.strerror(errno.ENOSPC) not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error


def user_message(error: Exception) -> str | None:
    """Return the line for an error that the user can mend, or None for a bug."""
    from fanformer.files.durable import error_number

    message: str | None = None
    if isinstance(error, click.ClickException):
        message = _usage_message(error)
    elif isinstance(error, FANformerError) or _is_configuration_error(error):
        message = str(error.__cause__ if type(error).__name__.startswith("Strict") else error)
    elif (number := error_number(error)) in _MENDABLE:
        name = getattr(error, "filename", None)
        place = f": {Path(os.fsdecode(name)).absolute()}" if name is not None else ""
        message = f"{_MENDABLE[number]}{place}"
    elif _is_out_of_memory(error):
        message = "out of memory: use a smaller batch, a shorter length or --dtype bfloat16."
    return None if message is None else " ".join(message.split())


def _is_out_of_memory(error: Exception) -> bool:
    """Whether there was not enough memory; torch says it of a CPU with a RuntimeError like any other."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    said = ("DefaultCPUAllocator: can't allocate memory", "Storage size calculation overflowed")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


def _is_configuration_error(error: Exception) -> bool:
    """Whether the model's own files, which raise plain ValueError, or the strict configuration refused a value."""
    hub = sys.modules.get("huggingface_hub.errors")
    if hub is not None and isinstance(error, hub.StrictDataclassError):
        return error.__cause__ is not None
    frames = list(traceback.walk_tb(error.__traceback__))
    raiser = frames[-1][0].f_globals.get("__name__", "") if frames else ""
    return isinstance(error, ValueError) and raiser.startswith("fanformer.model.")


def _usage_message(error: click.ClickException) -> str:
    context = error.ctx if isinstance(error, click.UsageError) else None
    path = context.command_path if context is not None else "fanformer"
    if isinstance(error, click.NoSuchOption) and context is not None:
        flags = [flag for item in context.command.get_params(context) for flag in item.opts if flag.startswith("--")]
        suggestion = did_you_mean(error.option_name, flags)
        if not suggestion.startswith("did"):
            suggestion = f"`{path} --help` lists them."
        return f"no option `{error.option_name}` of `{path}`: {suggestion}"
    text = error.format_message().rstrip(".")
    return f"{text[:1].lower()}{text[1:]}; see `{path} --help`."


def _abandon_stdout() -> None:
    """Send what is left in stdout nowhere: the interpreter writes it at exit and would complain again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def quiet_libraries() -> None:
    """Keep the libraries' own notices off the terminal; must come before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of libraries; ours are of another kind
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
