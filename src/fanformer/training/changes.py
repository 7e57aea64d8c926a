"""What may change between two parts of one run, and what must not: a resumed run is refused or says what is new."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from fanformer.errors import CheckpointError
from fanformer.training.configuration import OF_ONE_COMMAND
from fanformer.training.fields import RunConfig

_FIXED = ("batch_size", "sequence_length", "seed", "optimizer", "init_from")
"""Fields that decide which rows make up a step, or what the optimizer's state means."""
DATA_FIELDS = ("data", "eval_data", "tokenizer", "vocab_size", "held_out_fraction", "max_data_bytes")
_NOT_OF_THE_RUN = (*OF_ONE_COMMAND, "output_dir", "push_to_hub")
MACHINE_FIELDS = ("device", "precision", "compile", "threads")
"""Fields whose change makes a run decide anew about the machine."""


def changed_fields(before: Mapping[str, Any], config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Return the fields of a run that differ from those it began with, each with its old and new value.

    Args:
        before: `configuration` of the run's run.yaml.
        config: what is asked for now.

    Raises:
        CheckpointError: if one of them must not change.
    """
    now = config.to_dict()
    changed = {
        name: (before[name], now[name])
        for name in now
        if name in before and before[name] != now[name] and name not in _NOT_OF_THE_RUN
    }
    for name in _FIXED:
        if name in changed:
            old, new = changed[name]
            raise CheckpointError(
                f"`{name}` of a run cannot change on resume: it was {old}, got {new}: go on with {old}, or begin a new "
                f"run from these weights with --init-from {config.folder} --output-dir ANOTHER."
            )
    return changed


def check_model(before: Mapping[str, Any], now: Mapping[str, Any], folder: Any) -> None:
    """Refuse a model other than the one the run began with.

    Args:
        before: `model` of the run's run.yaml.
        now: the configuration of the model built now, in the same form.
        folder: of the run.

    Raises:
        CheckpointError: naming both fingerprints and the first field that differs.
    """
    unlike = sorted(
        name
        for name in before.keys() | now.keys()
        if before.get(name) != now.get(name) and name not in ("transformers_version", "dtype", "auto_map")
    )
    if unlike:
        name = unlike[0]
        raise CheckpointError(
            f"the model changed since the run began, fingerprint {fingerprint(before)} then, {fingerprint(now)} now: "
            f"`{name}` was {before.get(name)}, is {now.get(name)}: resume {folder} without that change."
        )


def check_data(before: str, now: str, what: str, config: RunConfig) -> None:
    """Refuse data other than those the run began with, unless that is asked for.

    Args:
        before: fingerprint that the run began with.
        now: fingerprint of the data at hand.
        what: what changed, for people.
        config: the run.

    Raises:
        CheckpointError: naming both fingerprints.
    """
    if before != now and not config.output.allow_changed_data:
        raise CheckpointError(
            f"the data changed since the run began, fingerprint {before[:16]} then, {now[:16]} now ({what}): resume "
            "with the data it began with, or accept these with --allow-changed-data."
        )


def fingerprint(content: Any) -> str:
    """Return a short hash of JSON values."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
