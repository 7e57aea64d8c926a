"""`fanformer quantize`: a model folder as a smaller file, with a report of what every tensor lost."""

from typing import TYPE_CHECKING

import click

from fanformer.cli.failure import writing
from fanformer.cli.options import Verb
from fanformer.cli.progress import counted_progress
from fanformer.errors import ConfigError

if TYPE_CHECKING:
    from fanformer.quantization.gguf_export import Report

_TYPES = "f32|f16|bf16|q8_0|q4_0|q4_k|q5_k|q6_k"


@click.command(cls=Verb, example="fanformer quantize runs/nano --format gguf --type q8_0 --output-dir runs/nano-gguf")
@click.argument("folder", metavar="DIR")
@click.option("--format", "file_format", required=True, metavar="gguf", help="Kind of file.")
@click.option("--type", "kind", default="q8_0", metavar=_TYPES, help="Number format of the matrices.")
@click.option(
    "--output-dir", required=True, metavar="OUT", help="Folder for model-TYPE.gguf, or the .gguf file itself."
)
@click.option(
    "--embedding-type", metavar="TYPE", help="Number format of the embedding.  [default: as --type; tied: the head's]"
)
@click.option(
    "--head-type",
    metavar="TYPE",
    help="Number format of the LM head.  [default: q6_k for q4_0, q4_k, q5_k; else --type]",
)
@click.option(
    "--calibration", metavar="SPEC", help="Held-out text that shows which channels count: a file, glob or hf:NAME."
)
@click.option("--calibration-tokens", default=65536, help="Tokens of it to run.")
@click.option("--overwrite", is_flag=True, help="Replace a file that is there.")
def quantize(
    folder: str,
    file_format: str,
    kind: str,
    output_dir: str,
    embedding_type: str | None,
    head_type: str | None,
    calibration: str | None,
    calibration_tokens: int,
    overwrite: bool,
) -> None:
    """Write the model saved in DIR as a file of fewer bits, with its tokenizer, and report what every tensor lost.

    `fanformer generate`, `chat` and `eval` take the file where they take a folder. Types with blocks need
    `pip install 'fanformer[gguf]'`. Norms, gates and biases stay float32.
    """
    if file_format != "gguf":
        raise ConfigError(f"`--format` must be gguf, got {file_format!r}.")
    from fanformer.quantization.gguf_export import Settings, export_gguf, output_file, report_file

    settings = Settings(kind, embedding_type, head_type, calibration, calibration_tokens, overwrite)
    path = output_file(output_dir, kind)
    with writing(path), counted_progress("steps") as show:
        report = export_gguf(folder, output_dir, settings, on_progress=show)
    show_report(report)
    click.echo(f"{path}: {report.bytes:,} bytes, {report.bits_per_weight:.2f} bits per parameter")
    click.echo(f"{report_file(path)}: this report")


def show_report(report: "Report") -> None:
    """Print a line for every matrix, one for all vectors, and what holds for the file as a whole."""
    width = max(len(item.name) for item in report.tensors)
    click.echo(f"{'tensor':<{width}} {'shape':>14} {'type':>5} {'bits':>6} {'error':>8}")
    vectors = [item for item in report.tensors if len(item.shape) == 1]
    for item in report.tensors:
        if len(item.shape) > 1:
            shape = " x ".join(map(str, item.shape))
            line = f"{item.name:<{width}} {shape:>14} {item.type:>5} {item.bits_per_weight:>6.2f}"
            click.echo(f"{line} {item.relative_error:>8.5f}{'  ' + item.note if item.note else ''}")
    click.echo(f"{len(vectors)} norms, gates and biases stay float32")
    for note in report.notes:
        click.echo(note)
