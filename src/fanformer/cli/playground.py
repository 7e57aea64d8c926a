"""`fanformer playground`: models to play with in the browser."""

import threading
import webbrowser
from pathlib import Path
from typing import Any

import click

from fanformer.cli.options import Verb, device_option, dtype_option, threads_option
from fanformer.cli.serve import named_models, run_server

_RUNS = "runs"
_MOST_FOUND = 4


@click.command(cls=Verb, example="fanformer playground runs/nano small=out-gguf/model-q8_0.gguf")
@click.argument("models", metavar="[[NAME=]DIR...]", nargs=-1)
@click.option("--port", default=0, help="Port to listen at; 0 takes a free one.")
@click.option("--browser/--no-browser", default=True, help="Whether to open the browser.")
@click.option("--slots", default=4, help="Texts that a model writes together.")
@click.option("--context", type=int, metavar="N", help="Tokens of each; default: the model's, at most 2048.")
@click.option("--log-file", metavar="FILE", help="Where the log goes.  [default: standard error]")
@threads_option
@device_option
@dtype_option
def playground(models: tuple[str, ...], port: int, browser: bool, log_file: str | None, **settings: Any) -> None:
    """Play with the models saved in each DIR, or .gguf file, in the browser, until Ctrl-C.

    Without DIR the newest models of the folder runs are taken, those that can be loaded; where it has none, the one
    that came with this package. The page needs no network; `fanformer serve` has it too.
    """

    def open_browser(address: str) -> None:
        if browser:  # which may take a while to come up, and the server has requests to answer
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()

    paths = named_models(models or tuple(map(str, newest_models(Path(_RUNS)))))
    settings |= {"queue_size": 256, "leaves_out": not models}
    run_server(paths, "127.0.0.1", port, settings, log_file=log_file, on_started=open_browser)


def newest_models(folder: Path) -> list[Path]:
    """Return the model folders in a folder, the newest first, at most four."""
    weights = [path for pattern in ("*/model.safetensors", "*/model-*.safetensors") for path in folder.glob(pattern)]
    times = {path.parent: path.stat().st_mtime for path in weights if (path.parent / "config.json").is_file()}
    return sorted(times, key=lambda path: times[path], reverse=True)[:_MOST_FOUND]
