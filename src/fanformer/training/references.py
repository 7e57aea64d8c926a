"""What the base gives the answers of a run on preferences: measured once, before the first step, and kept."""

from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from fanformer.errors import CheckpointError
from fanformer.evaluation.preferences import measure_pairs
from fanformer.files.durable import sync
from fanformer.training.events import Start
from fanformer.training.pair_loss import ReferencedRows

REFERENCE_FILE = "reference.safetensors"


def set_references(
    folder: Path,
    splits: Mapping[str, ReferencedRows],
    fingerprint: str,
    load_base: Callable[[], PreTrainedModel],
    start: Start,
) -> None:
    """Give rows the log-probabilities of their answers by the base: those that the run began with, else new ones.

    Args:
        folder: of the run.
        splits: the rows, by the name that they have in the file.
        fingerprint: of all of them.
        load_base: returns the base in float32 on the CPU.
        start: of the run.

    Raises:
        CheckpointError: if the run has a checkpoint, and what it began with is gone or damaged.
    """
    path = folder / REFERENCE_FILE
    found = _read(path, splits, fingerprint) if start.going_on else None
    if found is None:
        found = _measured(splits, load_base, start)
        if start.share.rank == 0:
            new = path.with_name(f"{path.name}.new")
            save_file(found, new, metadata={"rows": fingerprint})
            sync(new)
            new.replace(path)
            sync(folder)
        start.wait()
    for name, rows in splits.items():
        rows.reference = found[name]


def _measured(
    splits: Mapping[str, ReferencedRows], load_base: Callable[[], PreTrainedModel], start: Start
) -> dict[str, Tensor]:
    pairs = sum(rows.rows.num_examples for rows in splits.values())
    start.note(f"reference: measuring what the base gives the answers of {pairs:,} pairs")
    model = load_base().to(start.device).eval()
    return {
        name: measure_pairs(model, rows.rows, range(len(rows)), start.batch_size, start.autocast_dtype, start.share)
        for name, rows in splits.items()
    }


def _read(path: Path, splits: Mapping[str, ReferencedRows], fingerprint: str) -> dict[str, Tensor] | None:
    """Return what is kept; None where it is that of other rows, which the run was told to take."""
    remedy = "begin the run anew with --overwrite"
    try:
        with safe_open(path, framework="pt") as kept:
            of_rows = (kept.metadata() or {}).get("rows")
            found = {name: kept.get_tensor(name) for name in splits} if of_rows == fingerprint else None
    except (OSError, SafetensorError) as error:
        what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({type(error).__name__})"
        raise CheckpointError(
            f"{path.absolute()} {what}: expected the base's log-probabilities that this run began with; {remedy}."
        ) from error
    for name, values in (found or {}).items():
        if values.shape != (expected := splits[name].reference.shape):
            raise CheckpointError(
                f"{path.absolute()} must hold `{name}` of {tuple(expected)} numbers, got {tuple(values.shape)}: "
                f"{remedy}."
            )
    return found
