"""The data of a run: prepared in its folder or elsewhere, and on resume the very same ones or a refusal."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fanformer.data.documents import is_prepared_folder, open_source
from fanformer.data.shards import PreparedData, TokenStream, open_prepared, prepare
from fanformer.data.tokenizer import load_tokenizer
from fanformer.errors import CheckpointError, ConfigError
from fanformer.model import FANformerConfig
from fanformer.training.changes import DATA_FIELDS, check_data, fingerprint
from fanformer.training.configuration import RunConfig

DATA_FOLDER, HELD_OUT_FOLDER = "data", "held-out"


def begin_data(config: RunConfig, folder: str, progress: Any) -> PreparedData:
    """Prepare a new run's data inside its folder, or open those that are prepared elsewhere.

    Args:
        config: the run.
        folder: name, inside the run's folder, to prepare in.
        progress: called with bytes done and in all.

    Raises:
        ConfigError, DataError: on bad input.
    """
    here = config.folder / folder
    if is_prepared_folder(str(here)):  # by this run, before it was killed
        return open_prepared(here)
    if is_prepared_folder(config.data):
        if config.tokenizer is not None:
            raise ConfigError(f"`tokenizer` does not apply to the prepared data {config.data}: it has its own.")
        return open_prepared(Path(config.data))
    source = open_source(config.data)
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer is not None else None
    size = config.vocab_size or FANformerConfig(**config.model).vocab_size
    return prepare(
        source,
        here,
        tokenizer=tokenizer,
        vocab_size=size,
        held_out_fraction=config.held_out_fraction,
        max_bytes=config.max_data_bytes,
        progress=progress,
    )


def resume_data(
    config: RunConfig, before: Mapping[str, Any], changed: Mapping[str, tuple[Any, Any]], progress: Any
) -> PreparedData:
    """Open the data of a run that goes on.

    Args:
        config: the run as asked for now.
        before: `data` of its run.yaml.
        changed: the fields that differ from those the run began with.
        progress: called with bytes done and in all.

    Raises:
        CheckpointError: if they are not those the run began with, and other ones are not allowed.
    """
    asked = {name: pair for name, pair in changed.items() if name in DATA_FIELDS and name != "eval_data"}
    if asked:
        what = ", ".join(f"`{name}` was {old}, is {new}" for name, (old, new) in asked.items())
        then, now = _fingerprints(config, before, asked)
        check_data(then, now, what, config)
        if then != now:
            return begin_data(config, f"{DATA_FOLDER}-{now[:8]}", progress)
    folder = Path(before["folder"])
    data = open_prepared(folder if folder.is_absolute() else config.folder / folder)
    check_data(before["fingerprint"], data.fingerprint, f"{data.folder} was written anew", config)
    return data


def _fingerprints(
    config: RunConfig, before: Mapping[str, Any], asked: Mapping[str, tuple[Any, Any]]
) -> tuple[str, str]:
    """Return the fingerprints of the data then and now; of sources that are not prepared, those of what they are."""
    if is_prepared_folder(config.data):
        return before["fingerprint"], open_prepared(Path(config.data)).fingerprint
    sources = [before["metadata"]["source"], open_source(config.data).describe()]
    settings = {name: pair for name, pair in asked.items() if name != "data"}
    then, now = (
        fingerprint([identity(source), {name: pair[index] for name, pair in settings.items()}])
        for index, source in enumerate(sources)
    )
    return then, now


def identity(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return a source's description without how it was named."""
    return {key: value for key, value in description.items() if key != "spec"}


def held_out_stream(
    config: RunConfig, data: PreparedData, tokenizer: Any, before: Mapping[str, Any] | None, progress: Any
) -> TokenStream:
    """Open what the held-out loss is measured on: another source's text where the run names one, else a split.

    Raises:
        CheckpointError: if a run that goes on names another source than it began with.
        DataError: if there is none.
    """
    if config.eval_data is None:
        return data.split("heldout")
    here = config.folder / HELD_OUT_FOLDER
    if before is not None and before["configuration"].get("eval_data") != config.eval_data:
        raise CheckpointError(
            f"`eval_data` of a run cannot change on resume: it was {before['configuration'].get('eval_data')}, got "
            f"{config.eval_data}: leave it out, and measure other text with `fanformer eval`."
        )
    if not is_prepared_folder(str(here)):
        prepare(
            open_source(config.eval_data),
            here,
            tokenizer=tokenizer,
            vocab_size=len(tokenizer),
            held_out_fraction=0.0,
            progress=progress,
        )
    return open_prepared(here).split("train")
