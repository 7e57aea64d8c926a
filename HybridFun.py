"""Train a FANformer, or let it continue what you write: a thin door to the functions behind `fanformer`.

python HybridFun.py --mode train --epochs_text 2 --batch_size 16 --p 0.15
python HybridFun.py --mode inference --max_length 100 --top_k 100 --top_p 0.85 --temperature 0.7
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
LAST_TRAINING = ROOT / "runs" / "hybridfun-last.txt"

if importlib.util.find_spec("fanformer") is None:  # a clone whose requirements alone are installed
    sys.path.insert(0, str(ROOT / "src"))

from fanformer.cli import interrupts  # noqa: E402, F401  the first thing: it heeds Ctrl-C while the rest is imported

# isort: split
import click  # noqa: E402
from click.core import ParameterSource  # noqa: E402

from fanformer.cli.failure import run_command  # noqa: E402
from fanformer.cli.options import Verb, device_option, dtype_option, sampling_options  # noqa: E402
from fanformer.errors import CheckpointError, ConfigError  # noqa: E402
from fanformer.generation.settings import GenerationSettings  # noqa: E402

FLAGS_OF_MODE = {
    "train": {"epochs_text", "batch_size", "p", "data", "preset", "output_dir", "resume", "overwrite"},
    "inference": {"max_length", "min_length", "top_k", "top_p", "temperature", "model", "dtype"},
}


@click.command(cls=Verb, example="python HybridFun.py --mode train --epochs_text 2 --batch_size 16 --p 0.15")
@click.option("--mode", type=click.Choice(["train", "inference"]), required=True, help="What to do.")
@click.option("--epochs_text", type=float, help="Passes over the data.  [default: the preset's length]")
@click.option("--batch_size", type=int, help="Rows per optimizer step.  [default: the preset's]")
@click.option("--p", type=float, help="Share of a projection's outputs for cos, and for sin.  [default: the preset's]")
@click.option(
    "--data",
    metavar="SPEC",
    help="Text to train on: a file, a glob, stdlib or hf:NAME. A file brings its "
    "own tokenizer.  [default: the preset's]",
)
@click.option("--preset", default="92m", help="Model and recipe: 92m, nano or 1b.")
@click.option(
    "--output_dir", metavar="DIR", help="Folder of the run.  [default: runs/hybridfun-PRESET beside this file]"
)
@click.option("--resume", is_flag=True, help="Go on with the run in the output folder.")
@click.option("--overwrite", is_flag=True, help="Delete the run in the output folder first.")
@click.option("--model", metavar="DIR", help="Model folder for inference.  [default: the last training's]")
@sampling_options("_")
@device_option
@dtype_option
@click.pass_context
def hybridfun(context: click.Context, mode: str, **flags: Any) -> None:
    """Train a FANformer, or read prompts until `exit` and continue each."""
    other = "inference" if mode == "train" else "train"
    for name in sorted(FLAGS_OF_MODE[other]):
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise ConfigError(f"`--{name}` has no effect with --mode {mode}: leave it out, or use --mode {other}.")
    if mode == "train":
        train(flags)
    else:
        infer(flags)


def train(flags: dict[str, Any]) -> None:
    """Train as the flags say, and remember the folder for inference."""
    from fanformer.cli.train import run_and_report
    from fanformer.training.configuration import resolve_run

    names = ("preset", "batch_size", "data", "seed", "device", "resume", "overwrite")
    overrides = {name: flags[name] for name in names if flags[name] not in (None, False)}
    overrides["output_dir"] = flags["output_dir"] or str(ROOT / "runs" / f"hybridfun-{flags['preset']}")
    if flags["epochs_text"] is not None:
        overrides |= {"max_steps": None, "tokens": None, "max_time": None, "epochs": flags["epochs_text"]}
    if flags["p"] is not None:
        overrides["model.fan_ratio"] = flags["p"]
    if flags["data"] is not None:
        overrides["tokenizer"] = None  # trained on the data, so that a file alone is enough
    config = resolve_run(None, overrides)
    run_and_report(config)
    LAST_TRAINING.parent.mkdir(exist_ok=True)
    LAST_TRAINING.write_text(f"{config.folder.absolute()}\n", encoding="utf-8")


def infer(flags: dict[str, Any]) -> None:
    """Read prompts until `exit` and continue each."""
    settings = GenerationSettings(**{name: flags[name] for name in GenerationSettings.__dataclass_fields__})
    folder = flags["model"]
    if folder is None:
        if not LAST_TRAINING.is_file():
            raise CheckpointError(
                "no model to talk with: give one with --model DIR, or train one first with "
                "`python HybridFun.py --mode train --preset nano`."
            )
        folder = LAST_TRAINING.read_text(encoding="utf-8").strip()

    from fanformer.cli.chat import converse
    from fanformer.cli.options import drawn_as_asked, say_depth
    from fanformer.loading import load_text_model

    model = load_text_model(folder, flags["device"], flags["dtype"])
    say_depth(model.depth_note, None)
    converse(model, drawn_as_asked(model, settings), name=folder, exit_words=("exit",))


if __name__ == "__main__":
    sys.exit(run_command(hybridfun, sys.argv[1:], "python HybridFun.py"))
