"""`fanformer quantize`: a model folder made smaller, with a report of what every matrix lost, or what it would lose."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from fanformer.cli.failure import writing
from fanformer.cli.options import Verb, adapter_option
from fanformer.cli.progress import counted_progress
from fanformer.errors import ConfigError

if TYPE_CHECKING:
    from fanformer.gguf.export import Report
    from fanformer.quantization.quantized_folder import Report as LayersReport
    from fanformer.quantization.quantized_folder import Settings as LayersSettings
    from fanformer.quantization.sensitivity import Scan

_TYPES = "f32|f16|bf16|q8_0|q4_0|q4_k|q5_k|q6_k"
_FORMATS = ("gguf", "gptq", "awq", "gptq-v1")
# what has an effect on gguf alone, and on all others
_OF_GGUF, _OF_LAYERS = {"kind", "embedding_type", "head_type"}, {"bits", "group_size"}


@click.command(cls=Verb, example="fanformer quantize runs/nano --format gguf --type q8_0 --output-dir runs/nano-gguf")
@click.argument("folder", metavar="DIR")
@click.option("--format", "file_format", metavar="gguf|gptq|awq|gptq-v1", help="Kind of file.")
@click.option("--scan", is_flag=True, help="Measure what each part would lose, and write no model.")
@click.option("--type", "kind", default="q8_0", metavar=_TYPES, help="gguf: number format of the matrices.")
@click.option("--bits", default=4, metavar="4|8", help="gptq, awq, gptq-v1, scan: bits of a weight.")
@click.option("--group-size", default=64, help="gptq, awq, gptq-v1, scan: weights to a scale.")
@click.option(
    "--output-dir", required=True, metavar="OUT", help="Folder to write; gguf: for model-TYPE.gguf, or that file."
)
@click.option(
    "--embedding-type",
    metavar="TYPE",
    help="gguf: number format of the embedding.  [default: as --type; tied: the head's]",
)
@click.option(
    "--head-type",
    metavar="TYPE",
    help="gguf: number format of the LM head.  [default: q6_k for q4_0, q4_k, q5_k; else --type]",
)
@click.option(
    "--calibration",
    metavar="SPEC",
    help="Held-out text to run: stdlib, a file, glob or hf:NAME.  [default: gguf none; else what the run held out]",
)
@click.option("--calibration-tokens", default=65536, help="Tokens of it to run.")
@adapter_option
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@click.pass_context
def quantize(
    context: click.Context,
    folder: str,
    file_format: str | None,
    scan: bool,
    kind: str,
    bits: int,
    group_size: int,
    output_dir: str,
    embedding_type: str | None,
    head_type: str | None,
    **common: Any,
) -> None:
    """Write the model saved in DIR with fewer bits, with its tokenizer, and report what every matrix lost.

    gguf: a file that `fanformer generate`, `chat` and `eval` take where they take a folder; types with blocks need
    `pip install 'fanformer[gguf]'`. gptq and awq: a folder in the format compressed-tensors; they need
    `pip install 'fanformer[quantize]'`. gptq-v1: a folder in GPTQ's classic layout, for
    `pip install 'fanformer[gptq]'`. Norms, gates and biases are never cut.
    """
    if scan == (file_format is not None):
        raise ConfigError("`--format` or `--scan` is needed, and not both: gguf, gptq, awq or gptq-v1 write a model.")
    wanted = file_format or "scan"
    if not scan and wanted not in _FORMATS:
        raise ConfigError(f"`--format` must be gguf, gptq, awq or gptq-v1, got {wanted!r}.")
    _check_options(context, wanted)
    if wanted != "gguf":
        from fanformer.quantization.quantized_folder import Settings as LayersSettings

        layers = LayersSettings(wanted, bits, group_size, **common)
        (_scan if scan else _quantize_layers)(folder, output_dir, layers)
        return
    from fanformer.gguf.export import Settings, export_gguf, output_file, report_file

    settings = Settings(kind, embedding_type, head_type, **common)
    path = output_file(output_dir, kind)
    with writing(path), counted_progress("steps") as show:
        report = export_gguf(folder, output_dir, settings, on_progress=show)
    show_report(report)
    click.echo(f"{path}: {report.bytes:,} bytes, {report.bits_per_weight:.2f} bits per parameter")
    click.echo(f"{report_file(path)}: this report")


def _check_options(context: click.Context, wanted: str) -> None:
    """Refuse options that belong to another format, or to another option that is not there."""
    foreign = _OF_LAYERS if wanted == "gguf" else _OF_GGUF
    for option in context.command.params:
        if option.name in foreign and context.get_parameter_source(option.name) == ParameterSource.COMMANDLINE:
            name = "--scan" if wanted == "scan" else f"--format {wanted}"
            raise ConfigError(f"`{option.opts[-1]}` has no effect on `{name}`: leave it out.")
    tokens_given = context.get_parameter_source("calibration_tokens") == ParameterSource.COMMANDLINE
    if wanted == "gguf" and tokens_given and context.params["calibration"] is None:
        raise ConfigError(
            "`--calibration-tokens` has no effect on `--format gguf` without `--calibration`: leave it out."
        )


def _quantize_layers(folder: str, output_dir: str, settings: "LayersSettings") -> None:
    from fanformer.quantization.compressed_tensors import export_compressed
    from fanformer.quantization.gptq_v1 import METHOD, export_gptq_v1
    from fanformer.quantization.quantized_folder import REPORT_FILE

    export = export_gptq_v1 if settings.method == METHOD else export_compressed
    with writing(Path(output_dir)), counted_progress("layers") as show:
        report = export(folder, output_dir, settings, on_progress=show)
    show_layers(report)
    click.echo(f"{output_dir}: {report.bytes:,} bytes of weights, before {report.bytes_before:,}")
    click.echo(f"{Path(output_dir) / REPORT_FILE}: this report")


def show_layers(report: "LayersReport") -> None:
    """Print a line for every matrix, and what holds for the model as a whole."""
    width = max(len(item.name) for item in report.layers)
    head = f"{'layer':<{width}} {'shape':>14} {'method':>20} {'bits':>5} {'group':>6} {'weights':>8} {'outputs':>8}"
    click.echo(head)
    for item in report.layers:
        shape = " x ".join(map(str, item.shape))
        line = f"{item.name:<{width}} {shape:>14} {item.method:>20} {item.bits or '-':>5} {item.group_size or '-':>6}"
        click.echo(f"{line} {item.weight_error:>8.5f} {item.output_error:>8.5f}{'  ' + item.note if item.note else ''}")
    click.echo("weights, outputs: relative error of the layer's weights, and of its outputs on the calibration text")
    for note in report.notes:
        click.echo(note)


def _scan(folder: str, output_dir: str, settings: "LayersSettings") -> None:
    from fanformer.quantization.sensitivity import SCAN_FILE, scan_folder

    with writing(Path(output_dir)), counted_progress("parts") as show:
        found = scan_folder(folder, output_dir, settings, show)
    show_scan(found)
    click.echo(f"{Path(output_dir) / SCAN_FILE}: this table")


def show_scan(scan: "Scan") -> None:
    """Print a line for every part."""
    click.echo(f"{scan.bits_per_byte:.5f} bits per byte as it is; one part at a time rounded to {scan.bits} bits:")
    click.echo(f"{'part':<14} {'parameters':>11} {'bits_per_byte':>13} {'change':>9} {'weights':>8}  groups")
    for item in scan.parts:
        left = f", {len(item.left)} matrices left" if item.left else ""
        click.echo(
            f"{item.part:<14} {item.parameters:>11,} {item.bits_per_byte:>13.5f} {100 * item.change:>+8.3f}% "
            f"{item.relative_error:>8.5f}  {', '.join(map(str, item.group_sizes)) or '-'}{left}"
        )


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
