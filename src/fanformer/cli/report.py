"""`fanformer report`: the pictures of runs, as a page of one file or followed in the browser."""

import contextlib
import webbrowser
from pathlib import Path

import click

from fanformer.cli.failure import writing
from fanformer.cli.options import Verb
from fanformer.errors import ConfigError


@click.command(cls=Verb, example="fanformer report runs/nano runs/other --output report.html")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--output",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="The page.  [default: report.html in the folder of the run, of several in the current folder]",
)
@click.option("--live", is_flag=True, help="Follow the runs in the browser until Ctrl-C; nothing is written.")
@click.option("--port", type=int, metavar="N", help="Port of --live.  [default: a free one]")
@click.option("--browser/--no-browser", default=True, help="Whether --live opens the browser.")
def report(runs: tuple[Path, ...], output: Path | None, live: bool, port: int | None, browser: bool) -> None:
    """Show what each RUN, a folder of `fanformer train`, did: one HTML page that needs no other, and its charts as PNG.

    The page has loss, bits per byte, learning rate, gradient norm and throughput, what the model wrote as it learned,
    how the runs differ, and the tables of `fanformer eval --json RUN/NAME.json` and of quantized folders in RUN.
    """
    if live:
        if output is not None:
            raise ConfigError(f"`--output` writes a page and --live none, got {output}: leave one of them out.")
        _follow(runs, port or 0, browser)
        return
    if port is not None:
        raise ConfigError(f"`--port` applies to --live, got {port} without: leave it out.")
    from fanformer.training.pages.report import write_run_page

    if output is not None and output.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"`--output` must be a file that ends in .html, got {output}: its charts go beside it.")
    path = output or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    with writing(path):
        written = write_run_page(runs, path)
    click.echo(f"report: {written[0]}, {len(written) - 1} charts as PNG in {written[0].with_suffix('')}")


def _follow(runs: tuple[Path, ...], port: int, browser: bool) -> None:
    from fanformer.report.live import LIVE_SCRIPT, LiveServer
    from fanformer.training.pages.report import live_page
    from fanformer.training.pages.runs import changes

    make = live_page(runs, LIVE_SCRIPT)
    make()  # what cannot be read is told before a port is opened
    with LiveServer(port, make, lambda: changes(runs)) as server:
        click.echo(f"following {len(runs)} run{'s' if len(runs) > 1 else ''} at {server.address}, until Ctrl-C")
        if browser:
            webbrowser.open(server.address)
        with contextlib.suppress(KeyboardInterrupt):  # the way to end it, and no failure
            server.serve_forever()
