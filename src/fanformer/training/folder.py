"""The folder of a run: who may write into it, and from which checkpoint a run goes on."""

import shutil
from pathlib import Path

from fanformer.errors import CheckpointError, ConfigError
from fanformer.training.artifacts import RUN_FILE
from fanformer.training.configuration import RunConfig


def checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run, the earliest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    complete = [path for path in found if (path / "trainer_state.json").is_file()]
    return sorted(complete, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def claim(config: RunConfig) -> bool:
    """Make the run's folder ready, and return whether it was made anew by this call.

    Raises:
        CheckpointError: if the folder holds a run and neither `resume` nor `overwrite` is asked for, or if it holds
            something that is not a run, which is never deleted.
    """
    folder = config.folder
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"`output_dir` must be a folder, got the file {folder.absolute()}.")
    is_run = (folder / RUN_FILE).is_file()
    if config.resume:
        if not is_run:
            raise CheckpointError(f"there is no run to resume in {folder.absolute()}: train without --resume first.")
        return False
    if folder.is_dir() and any(folder.iterdir()):
        if not is_run:
            raise CheckpointError(f"{folder.absolute()} is not empty and holds no run: choose another --output-dir.")
        if not config.overwrite:
            raise CheckpointError(
                f"{folder.absolute()} already holds a run: go on with --resume, replace it with --overwrite, "
                "or choose another --output-dir."
            )
        shutil.rmtree(folder)
    existed = folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    return not existed
