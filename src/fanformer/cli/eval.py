"""`fanformer eval`: how well a model predicts text."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fanformer.cli.failure import writing
from fanformer.cli.options import Verb, device_option, dtype_option
from fanformer.errors import ConfigError

if TYPE_CHECKING:
    from fanformer.evaluation.loss import DocumentSums
    from fanformer.inference.loading import LoadedModel

_DEFAULT_FIELD = "src"


@click.command(
    "eval", cls=Verb, example="fanformer eval runs/nano --text held-out.txt --text other.txt --json result.json"
)
@click.argument("folder", metavar="DIR")
@click.argument("more_files", nargs=-1, metavar="")
@click.option(
    "--text", "files", metavar="FILE ...", multiple=True, help="Text, jsonl or parquet files to predict; repeatable."
)
@click.option(
    "--by",
    metavar="FIELD",
    help="Field or column of jsonl and parquet files to give figures by; none leaves them out.  "
    "[default: src, if all such files have it]",
)
@click.option("--sequence-length", type=int, help="Longest context.  [default: the model's longest, at most 2048]")
@click.option("--batch-size", default=8, help="Rows that are computed together.")
@click.option("--json", "json_file", metavar="OUT", help="Write the figures to this file; - is standard output.")
@device_option
@dtype_option
def evaluate(
    folder: str,
    more_files: tuple[str, ...],
    files: tuple[str, ...],
    by: str | None,
    sequence_length: int | None,
    batch_size: int,
    json_file: str | None,
    device: str,
    dtype: str,
) -> None:
    """Measure how well the model saved in DIR predicts text files, each and in total.

    loss is in nats per token; bits_per_byte is comparable between models with different tokenizers. After +- stands
    the standard error that the documents give.
    """
    if not files:
        raise ConfigError("`--text` is needed to evaluate: give the files to predict, as `--text FILE ...`.")
    for name, value in (("batch_size", batch_size), ("sequence_length", sequence_length)):
        if value is not None and value < 1:
            raise ConfigError(f"`{name}` must be at least 1, got {value}.")
    paths = [*files, *more_files]
    for path in paths:
        Path(path).open("rb").close()  # a missing or unreadable file is named before torch is imported
    field = _source_field(paths, by)
    if json_file not in (None, "-"):
        _check_writable(Path(json_file))

    from fanformer.inference.loading import load

    loaded = load(folder, device, dtype)
    longest = getattr(loaded.model.config, "max_position_embeddings", None)
    if sequence_length is not None and longest is not None and sequence_length > longest:
        raise ConfigError(f"`sequence_length` must be at most the model's {longest} positions, got {sequence_length}.")
    result = _predict(loaded, paths, field, sequence_length, batch_size)
    record = json.dumps({**result, "model": folder}, indent=2)
    if json_file == "-":
        click.echo(record)
        return
    if json_file is not None:
        with writing(Path(json_file)):
            Path(json_file).write_text(record + "\n", encoding="utf-8")
    _show_text(result)


def _source_field(paths: list[str], by: str | None) -> str | None:
    """Return the field that says where a text comes from, or None.

    Raises:
        ConfigError: if `by` is asked for where no file has fields.
    """
    from fanformer.data.readers import field_names, file_kind

    names = {path: set(field_names(Path(path))) for path in paths if file_kind(Path(path)) != "text"}
    if by == "none":
        return None
    if by is not None and not names:
        raise ConfigError(f"`--by {by}` applies to jsonl and parquet files, got {', '.join(paths)}: leave it out.")
    if by is None and names and all(_DEFAULT_FIELD in found for found in names.values()):
        return _DEFAULT_FIELD
    return by


def _predict(
    loaded: "LoadedModel", paths: list[str], field: str | None, sequence_length: int | None, batch_size: int
) -> dict[str, Any]:
    """Return the figures of all files together, with those of each as `files` and of each source as `sources`."""
    import numpy as np

    from fanformer.data.documents import open_source
    from fanformer.data.readers import file_kind
    from fanformer.evaluation.loss import DocumentSums, default_sequence_length, evaluate_documents

    length = sequence_length or default_sequence_length(loaded.model)
    by_file: dict[str, DocumentSums] = {}
    sources: list[str | None] = []
    for path in paths:
        if path in by_file:
            raise ConfigError(f"`--text` must name every file once, got {path} twice.")
        click.echo(f"{path} ...", err=True)
        has_fields = file_kind(Path(path)) != "text"
        documents = list(open_source(path, source_field=field if has_fields else None))
        texts = [document.text for document in documents]
        by_file[path] = evaluate_documents(loaded.model, loaded.tokenizer, texts, length, batch_size)
        sources += [document.source for document in documents]
    everything = DocumentSums.join(by_file.values())
    result: dict[str, Any] = everything.figures().to_dict()
    result |= {"sequence_length": length, "files": {path: _figures(sums) for path, sums in by_file.items()}}
    if field is not None:
        labels = np.array(["" if source is None else source for source in sources])
        names = sorted({source for source in sources if source is not None})
        result |= {"by": field, "sources": {name: _figures(everything.select(labels == name)) for name in names}}
    return result


def _figures(sums: "DocumentSums") -> dict[str, Any]:
    return sums.figures().to_dict()


def _show_text(result: dict[str, Any]) -> None:
    """Print the figures as a table, one line for each source, each file, and all of them."""
    sources, files = result.get("sources", {}), result["files"]
    click.echo(f"{'loss':>17} {'perplexity':>23} {'bits_per_byte':>17} {'documents':>10} {'tokens':>12} {'bytes':>14}")
    rows = [(f"{result['by']} {name}", figures) for name, figures in sources.items()]
    rows += [*files.items(), *([("total", result)] if len(files) > 1 else [])]
    for name, figures in rows:
        click.echo(
            f"{_with_error(figures, 'loss', 8, 4)} {_with_error(figures, 'perplexity', 12, 3)} "
            f"{_with_error(figures, 'bits_per_byte', 8, 4)} {figures['documents']:10,} {figures['tokens']:12,} "
            f"{figures['bytes']:14,}  {name}"
        )
    if any(figures["loss_stderr"] is None for _, figures in rows):
        click.echo("no standard error (-) where there is one document only")


def _with_error(figures: dict[str, Any], name: str, width: int, digits: int) -> str:
    error = figures[f"{name}_stderr"]
    told = "-" if error is None else f"{error:.{digits}f}"
    return f"{figures[name]:{width}.{digits}f} +-{told:>{width - 2}}"


def _check_writable(path: Path) -> None:
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"`--json` must be a file in an existing folder, got {path.absolute()}.")
