"""`fanformer data`: text to token files."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fanformer.cli.options import Verb, VerbGroup
from fanformer.errors import ConfigError
from fanformer.training.configuration import parse_count

if TYPE_CHECKING:
    from fanformer.data.preparation.prepare import PreparedData, Throughput

SECONDS_BETWEEN_LINES = 5.0
VOCAB_SIZE = 4096


@click.group(cls=VerbGroup, epilog="\b\nExample:\n  fanformer data prepare stdlib --output-dir data/stdlib")
def data() -> None:
    """Prepare training data."""


@data.command(cls=Verb, example="fanformer data prepare 'books/*.txt' --output-dir data/books --vocab-size 8192")
@click.argument("spec", metavar="SPEC")
@click.option("--output-dir", metavar="DIR", required=True, help="New folder for the token files.")
@click.option("--tokenizer", metavar="DIR|NAME", help="Tokenizer to use.  [default: one is trained on the data]")
@click.option("--vocab-size", metavar="N", type=int, help=f"Size of the tokenizer to train.  [default: {VOCAB_SIZE}]")
@click.option("--held-out-fraction", default=0.05, help="Share of the text that is held out, up to 0.5.")
@click.option("--max-bytes", metavar="N", help="Stop after this much text, as 500M.  [default: all of it]")
@click.option("--text-field", metavar="NAME", default="text", help="Field of jsonl or column of parquet with the text.")
@click.option(
    "--filter",
    "filters",
    metavar="NAME",
    multiple=True,
    help="Apply a filter, in the order given: min-words drops documents of ten words or fewer, clean-urls deletes web "
    "addresses.  [default: none]",
)
@click.option(
    "--dedup",
    type=click.Choice(["none", "exact"]),
    default="none",
    help="Drop texts that were there before, to the letter, after all filters. None is what training does by itself.",
)
@click.option("--licence", metavar="TEXT", help="Licence of texts that name none, for ATTRIBUTION.json.")
@click.option("--source-field", metavar="NAME", help="Field or column that says where a text comes from.")
@click.option("--licence-field", metavar="NAME", help="Field or column with a text's licence.")
@click.option(
    "--workers", metavar="N", type=int, help="Processes that encode.  [default: one for each core it may use]"
)
def prepare(
    spec: str,
    output_dir: str,
    tokenizer: str | None,
    vocab_size: int | None,
    max_bytes: str | None,
    text_field: str,
    dedup: str,
    source_field: str | None,
    licence_field: str | None,
    workers: int | None,
    **others: Any,
) -> None:
    """Turn the documents of SPEC into files of token ids, with their tokenizer and a fingerprint.

    SPEC is stdlib (the source of Python's own standard library), a file or glob of .txt, .jsonl or .parquet, plain or
    compressed, or hf:NAME[:CONFIG]. `fanformer train --data DIR` trains on the result. If the command is stopped or
    killed, the same command goes on from there.
    """
    if tokenizer is not None and vocab_size is not None:
        raise ConfigError(
            "`--vocab-size` has no effect on the tokenizer that `--tokenizer` names: leave one of them out"
        )
    limit = parse_count(max_bytes) if max_bytes is not None else None
    from fanformer.data.preparation import prepare as shards
    from fanformer.data.preparation.journal import lock_place, output_place, partial_place
    from fanformer.data.preparation.workers import usual_workers
    from fanformer.data.sources.documents import open_source
    from fanformer.data.tokenizer import load_tokenizer

    place = output_place(Path(output_dir))
    own = (partial_place(place), lock_place(place))
    source = open_source(spec, text_field, source_field=source_field, licence_field=licence_field, leave_out=own)
    outcome: list[Throughput] = []
    with byte_progress("encoding") as progress:
        prepared = shards.prepare(
            source,
            place,
            tokenizer=load_tokenizer(tokenizer) if tokenizer is not None else None,
            vocab_size=vocab_size if vocab_size is not None else VOCAB_SIZE,
            max_bytes=limit,
            progress=progress,
            deduplicate=dedup == "exact",
            workers=workers if workers is not None else usual_workers(),
            report=outcome.append,
            **others,  # what has the names of its arguments
        )
    _summarize(prepared)
    for throughput in outcome:
        _tell(throughput)
    click.echo(f"{prepared.folder}: fingerprint {prepared.fingerprint[:16]}")


def _summarize(prepared: "PreparedData") -> None:
    from fanformer.data.preparation.prepare import SPLITS

    for name in SPLITS:
        entry = prepared.metadata["splits"][name]
        click.echo(f"{name}: {entry['documents']:,} documents, {entry['bytes']:,} bytes, {entry['tokens']:,} tokens")
    for reason, count in prepared.metadata["dropped"].items():
        click.echo(f"dropped by {reason}: {count:,} documents")


def _tell(throughput: "Throughput") -> None:
    if throughput.resumed_bytes:
        click.echo(f"went on after {throughput.resumed_bytes:,} bytes of an earlier start")
    if throughput.tokenizer_seconds:
        click.echo(f"tokenizer trained in {throughput.tokenizer_seconds:.1f} s")
    seconds = max(throughput.encoding_seconds, 1e-9)
    click.echo(
        f"encoded in {seconds:.1f} s: {throughput.bytes / seconds / 1e6:.1f} MB/s, {throughput.tokens / seconds:,.0f} "
        f"tokens/s; at most {throughput.peak_bytes / 1e6:,.0f} MB of memory in all processes"
    )


@data.command(cls=Verb, example="fanformer data verify data/books")
@click.argument("folder", metavar="DIR")
def verify(folder: str) -> None:
    """Read every file of a prepared folder and compare it with its hash."""
    from fanformer.data.preparation.prepare import open_prepared

    prepared = open_prepared(Path(folder), verify=True)
    _summarize(prepared)
    click.echo(f"{prepared.folder}: complete and unchanged, fingerprint {prepared.fingerprint[:16]}")


@contextmanager
def byte_progress(description: str) -> Iterator[Callable[[int, int | None], None]]:
    """Give a function that shows bytes done of a total: a bar on a terminal, a line every few seconds elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        started = last = time.monotonic()

        def write_line(done: int, total: int | None) -> None:
            nonlocal last
            if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                of_total = f" of {total / 1e6:.1f}" if total else ""
                click.echo(f"{description}: {done / 1e6:.1f}{of_total} MB after {last - started:.0f} s", err=True)

        yield write_line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
