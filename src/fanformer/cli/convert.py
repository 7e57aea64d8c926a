"""`fanformer convert`: the published implementations' weights as an ordinary model folder."""

from pathlib import Path

import click

from fanformer.cli.failure import writing
from fanformer.cli.options import Verb
from fanformer.errors import ConfigError
from fanformer.files.staging import check_folder, staged_folder


@click.command(
    cls=Verb,
    example="fanformer convert model.safetensors --config config.json --format cola --output-dir models/cola-60m",
)
@click.argument("weights", metavar="WEIGHTS")
@click.option("--config", "config", metavar="FILE", required=True, help="The implementation's own configuration, JSON.")
@click.option(
    "--format",
    "published_format",
    metavar="fanformer-olmo|cola|hybridnorm-olmo",
    required=True,
    help="Whose names and layouts the weights have.",
)
@click.option("--output-dir", metavar="DIR", required=True, help="New folder for the model.")
def convert(weights: str, config: str, published_format: str, output_dir: str) -> None:
    """Turn WEIGHTS, a safetensors file of a published implementation, into a `transformers` folder.

    The formats are those of the published FANformer (on OLMo), CoLA and HybridNorm (on OLMo).
    """
    folder = Path(output_dir).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"`--output-dir` must be new or empty, got {folder}: choose another name.")
    check_folder(folder)
    for file in (Path(weights), Path(config)):
        file.open("rb").close()  # a missing or unreadable file is named before torch is imported

    from fanformer.model.convert_published import convert as convert_weights

    model = convert_weights(Path(weights), Path(config), published_format)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with writing(folder), staged_folder(folder) as unfinished:
        model.save_pretrained(unfinished)
    click.echo(f"{model.num_parameters():,} parameters in {folder}", err=True)
