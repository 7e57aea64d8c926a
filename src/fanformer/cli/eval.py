"""`fanformer eval`: how well a model predicts text."""

import json
from pathlib import Path
from typing import Any

import click

from fanformer.cli.failure import writing
from fanformer.cli.options import Verb, device_option, dtype_option
from fanformer.errors import ConfigError


@click.command(
    "eval", cls=Verb, example="fanformer eval runs/nano --text held-out.txt --text other.txt --json result.json"
)
@click.argument("folder", metavar="DIR")
@click.argument("more_files", nargs=-1, metavar="")
@click.option(
    "--text", "files", metavar="FILE ...", multiple=True, help="Text, jsonl or parquet files to predict; repeatable."
)
@click.option("--sequence-length", type=int, help="Longest context.  [default: the model's longest]")
@click.option("--batch-size", default=8, help="Rows that are computed together.")
@click.option("--json", "json_file", metavar="OUT", help="Write the figures to this file; - is standard output.")
@device_option
@dtype_option
def evaluate(
    folder: str,
    more_files: tuple[str, ...],
    files: tuple[str, ...],
    sequence_length: int | None,
    batch_size: int,
    json_file: str | None,
    device: str,
    dtype: str,
) -> None:
    """Measure how well the model saved in DIR predicts text files, each and in total.

    loss is in nats per token; bits_per_byte is comparable between models with different tokenizers.
    """
    if not files:
        raise ConfigError("`--text` is needed to evaluate: give the files to predict, as `--text FILE ...`.")
    for name, value in (("batch_size", batch_size), ("sequence_length", sequence_length)):
        if value is not None and value < 1:
            raise ConfigError(f"`{name}` must be at least 1, got {value}.")
    paths = [*files, *more_files]
    for path in paths:
        Path(path).open("rb").close()  # a missing or unreadable file is named before torch is imported
    if json_file not in (None, "-"):
        _check_writable(Path(json_file))

    from fanformer.data.documents import open_source
    from fanformer.evaluation.loss import evaluate_text, summarize
    from fanformer.inference.loading import load

    model, tokenizer = load(folder, device, dtype)
    longest = getattr(model.config, "max_position_embeddings", None)
    if sequence_length is not None and longest is not None and sequence_length > longest:
        raise ConfigError(f"`sequence_length` must be at most the model's {longest} positions, got {sequence_length}.")
    results: dict[str, dict[str, Any]] = {}
    for path in paths:
        click.echo(f"{path} ...", err=True)
        texts = (document.text for document in open_source(path))
        results[path] = evaluate_text(model, tokenizer, texts, sequence_length, batch_size)
    total = summarize(
        sum(result["loss"] * result["tokens"] for result in results.values()),
        sum(result["tokens"] for result in results.values()),
        sum(result["bytes"] for result in results.values()),
    ).to_dict()
    record = json.dumps({**total, "model": folder, "files": results}, indent=2)
    if json_file == "-":
        click.echo(record)
        return
    if json_file is not None:
        with writing(Path(json_file)):
            Path(json_file).write_text(record + "\n", encoding="utf-8")
    click.echo(f"{'loss':>8} {'perplexity':>12} {'bits_per_byte':>14} {'tokens':>12} {'bytes':>14}  file")
    rows = [*results.items(), *([("total", total)] if len(results) > 1 else [])]
    for name, result in rows:
        click.echo(
            f"{result['loss']:8.4f} {result['perplexity']:12.3f} {result['bits_per_byte']:14.4f} "
            f"{result['tokens']:12,} {result['bytes']:14,}  {name}"
        )


def _check_writable(path: Path) -> None:
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"`--json` must be a file in an existing folder, got {path.absolute()}.")
