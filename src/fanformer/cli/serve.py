"""`fanformer serve`: models behind HTTP, for any client of OpenAI's API."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fanformer.cli.options import Verb, device_option, dtype_option, threads_option
from fanformer.errors import ConfigError, DataError, DependencyError, FANformerError

if TYPE_CHECKING:
    from fanformer.server.models import ServedModel

_GIB = 1 << 30


@click.command(cls=Verb, example="fanformer serve runs/nano --port 8000")
@click.argument("models", metavar="[[NAME=]DIR]...", nargs=-1)
@click.option("--host", default="127.0.0.1", help="Address to listen at; one that others reach needs --api-key-file.")
@click.option("--port", default=8000, help="Port to listen at; 0 takes a free one.")
@click.option("--api-key-file", metavar="FILE", help="Text file with one key a line; requests must have one of them.")
@click.option("--allowed-host", "hosts", multiple=True, metavar="NAME", help="Name that a Host header may have.")
@click.option("--allow-origin", "origins", multiple=True, metavar="URL", help="Origin of web pages that may ask.")
@click.option("--slots", default=16, help="Texts that a model writes together.")
@click.option("--context", type=int, metavar="N", help="Tokens of each; default: the model's, at most 2048.")
@click.option("--queue-size", default=256, help="Requests that may wait for a slot of a model.")
@click.option("--memory-limit", type=float, metavar="GIB", help="Most memory of all models and slots; default: none.")
@click.option("--answer-seconds", default=600.0, help="Seconds until an answer must be complete.")
@click.option("--drain-seconds", default=30.0, help="Seconds that answers in work are given after SIGTERM.")
@click.option("--log-file", metavar="FILE", help="Where the log goes.  [default: standard error]")
@threads_option
@device_option
@dtype_option
def serve(
    models: tuple[str, ...],
    host: str,
    port: int,
    api_key_file: str | None,
    hosts: tuple[str, ...],
    origins: tuple[str, ...],
    log_file: str | None,
    memory_limit: float | None,
    **settings: Any,
) -> None:
    """Serve the models saved in each DIR, or .gguf file, to clients of OpenAI's API, until Ctrl-C or SIGTERM.

    A model is called by the name of its folder or file, or by NAME. Without DIR it is the one that came with this
    package, called `box`. The first stop signal lets answers in work be finished, a second one ends the server at once.
    """
    paths = named_models(models)
    keys = () if api_key_file is None else read_keys(api_key_file)
    run_server(paths, host, port, settings, keys, (hosts, origins), log_file, memory_limit)


def run_server(
    paths: dict[str, str],
    host: str,
    port: int,
    settings: dict[str, Any],
    keys: tuple[str, ...] = (),
    others: tuple[tuple[str, ...], tuple[str, ...]] = ((), ()),
    log_file: str | None = None,
    memory_limit: float | None = None,
    on_started: Callable[[str], None] = lambda address: None,
) -> None:
    """Serve models until Ctrl-C or SIGTERM.

    Args:
        paths: of the models, by name.
        host: address to listen at.
        port: 0 takes a free one.
        settings: what the other options of `fanformer serve` say, by their names.
        keys: API keys.
        others: names that a Host header may have, and origins of web pages that may ask.
        log_file: where the log goes, None for standard error.
        memory_limit: in GiB, None for none.
        on_started: told the address where the page is, once requests are welcome.
    """
    try:
        from fanformer.server.app import build
        from fanformer.server.process import bind, server
    except ModuleNotFoundError as error:
        raise DependencyError(
            f"serving needs {error.name}, which is not installed: pip install 'fanformer[serve]'"
        ) from error
    from fanformer.server.limits import Access, Limits
    from fanformer.server.logs import begin_log

    hosts, origins = (frozenset(name.lower() for name in names) for names in others)
    access = Access(host, keys, hosts, origins)
    if not access.is_loopback and not keys:
        raise ConfigError(f"`--host` {host} can be reached by others and needs --api-key-file, got none: give keys.")
    seconds = {name: settings.pop(name) for name in ("answer_seconds", "drain_seconds") if name in settings}
    for name, value in seconds.items():
        if not value > 0:
            raise ConfigError(f"`--{name.replace('_', '-')}` must be above 0, got {value:g}.")
    limits = dataclasses.replace(Limits(), **seconds)
    log = begin_log(log_file)
    with bind(host, port) as bound:
        served = _open(paths, memory_limit, **settings)
        service = build(served, access, limits, lambda: log.lost)
        address = f"http://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}/"

        def tell() -> None:
            for model in served.values():
                click.echo(f"serving {model.in_words}")
            click.echo(f"playground at {address}")
            click.echo(f"listening at {address}v1")
            on_started(address)

        try:
            server(service, tell).run(sockets=[bound])
        finally:
            service.close()


def named_models(models: tuple[str, ...]) -> dict[str, str]:
    """Return the path of each model by its name; of the model in the box where none is given.

    Raises:
        ConfigError: if two have one name, or one has none.
        CheckpointError: if none is given, and this installation came without one.
    """
    if not models:
        from fanformer.loading import model_in_the_box

        models = (str(model_in_the_box()),)
    found: dict[str, str] = {}
    for given in models:
        name, equals, path = given.partition("=")
        if not equals or Path(given).exists():
            path = given
            resolved = Path(path).resolve()
            name = resolved.stem if resolved.suffix == ".gguf" else resolved.name
        if not name or name in found:
            raise ConfigError(f"each model needs a name of its own, got {name!r} for {path}: write NAME={path}.")
        found[name] = path
    return found


def _open(
    paths: dict[str, str],
    memory_limit: float | None,
    slots: int,
    context: int | None,
    queue_size: int,
    leaves_out: bool = False,
    **where: Any,
) -> "dict[str, ServedModel]":
    """Load the models, within the limit on their memory.

    Where folders stand beside GGUF files, `threads` is for the files, and device and dtype are for the folders. With
    `leaves_out` what cannot be loaded is named on standard error, as long as another model can.
    """
    from fanformer.loading import is_gguf
    from fanformer.server.models import ServedModel, SlotSettings

    if slots < 1 or queue_size < 0:
        raise ConfigError(f"`--slots` must be at least 1 and `--queue-size` 0, got {slots} and {queue_size}.")
    if memory_limit is not None and not memory_limit > 0:
        raise ConfigError(f"`--memory-limit` must be above 0 GiB, got {memory_limit:g}: leave it out for none.")
    served: dict[str, ServedModel] = {}
    settings = SlotSettings(slots, context, queue_size)
    is_mixed = len({is_gguf(path) for path in paths.values()}) > 1
    try:
        for name, path in paths.items():
            own = {key: value for key, value in where.items() if not is_mixed or (key == "threads") == is_gguf(path)}
            used = sum(model.memory_bytes for model in served.values())
            check = None if memory_limit is None else functools.partial(_check_memory, memory_limit, name, path, used)
            try:
                served[name] = ServedModel.open(path, name, settings, check_memory=check, **own)
            except FANformerError as error:
                if not leaves_out or (not served and name == list(paths)[-1]):
                    raise
                click.echo(f"{name} is left out: {' '.join(str(error).split())}", err=True)
    except BaseException:
        for model in served.values():
            model.close()
        raise
    return served


def _check_memory(limit: float, name: str, path: str, used: int, needed: int) -> None:
    """Raise ConfigError where a model needs more bytes than those before it have left of the limit, in GiB."""
    from fanformer.loading import is_gguf

    if used + needed > limit * _GIB:
        kind = "a smaller type" if is_gguf(path) else "--dtype bfloat16"
        raise ConfigError(
            f"`--memory-limit` is {limit:g} GiB, got {(used + needed) / _GIB:.2f} GiB with {name}: lower --slots or "
            f"--context, or take {kind}."
        )


def read_keys(file: str) -> tuple[str, ...]:
    """Return the API keys in a file, one a line; empty lines and those that begin with # do not count.

    Raises:
        DataError: if there are none, or one has characters that no header can hold.
    """
    try:
        lines = Path(file).read_text(encoding="ascii").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"API keys must be ASCII, got other bytes in {Path(file).absolute()}.") from error
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys or any(len(key.split()) != 1 or not key.isprintable() for key in keys):
        raise DataError(f"no API keys, or keys with spaces, in {Path(file).absolute()}: expected one a line.")
    return keys
