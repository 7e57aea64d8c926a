"""`fanformer data`: text to token files."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from fanformer.cli.options import Verb, VerbGroup
from fanformer.training.configuration import parse_count

SECONDS_BETWEEN_LINES = 5.0


@click.group(cls=VerbGroup, epilog="\b\nExample:\n  fanformer data prepare stdlib --output-dir data/stdlib")
def data() -> None:
    """Prepare training data."""


@data.command(cls=Verb, example="fanformer data prepare 'books/*.txt' --output-dir data/books --vocab-size 8192")
@click.argument("spec", metavar="SPEC")
@click.option("--output-dir", metavar="DIR", required=True, help="New folder for the token files.")
@click.option("--tokenizer", metavar="DIR|NAME", help="Tokenizer to use.  [default: one is trained on the data]")
@click.option("--vocab-size", default=4096, help="Size of the tokenizer to train.")
@click.option("--held-out-fraction", default=0.05, help="Share of the text that is held out, up to 0.5.")
@click.option("--max-bytes", metavar="N", help="Stop after this much text, as 500M.  [default: all of it]")
def prepare(
    spec: str,
    output_dir: str,
    tokenizer: str | None,
    vocab_size: int,
    held_out_fraction: float,
    max_bytes: str | None,
) -> None:
    """Turn the documents of SPEC into files of token ids, with their tokenizer and a fingerprint.

    SPEC is stdlib (the source of Python's own standard library), a file or glob of .txt, .jsonl or .parquet, plain or
    compressed, or hf:NAME[:CONFIG]. `fanformer train --data DIR` trains on the result.
    """
    limit = parse_count(max_bytes) if max_bytes is not None else None
    from fanformer.data import shards
    from fanformer.data.documents import open_source
    from fanformer.data.tokenizer import load_tokenizer

    source = open_source(spec)
    with byte_progress("encoding") as progress:
        prepared = shards.prepare(
            source,
            Path(output_dir),
            tokenizer=load_tokenizer(tokenizer) if tokenizer is not None else None,
            vocab_size=vocab_size,
            held_out_fraction=held_out_fraction,
            max_bytes=limit,
            progress=progress,
        )
    for name in shards.SPLITS:
        stream = prepared.split(name)
        click.echo(
            f"{name}: {stream.num_documents:,} documents, {stream.num_bytes:,} bytes, {len(stream.tokens):,} tokens"
        )
    click.echo(f"{prepared.folder}: fingerprint {prepared.fingerprint[:16]}")


@contextmanager
def byte_progress(description: str) -> Iterator[Callable[[int, int | None], None]]:
    """Give a function that shows bytes done of a total: a bar on a terminal, a line every few seconds elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        last = time.monotonic()

        def write_line(done: int, total: int | None) -> None:
            nonlocal last
            if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                of_total = f" of {total / 1e6:.1f}" if total else ""
                click.echo(f"{description}: {done / 1e6:.1f}{of_total} MB", err=True)

        yield write_line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
