"""Checkpoints on disk: written aside, made durable, marked complete with checksums, and only then given their name.

A checkpoint is an ordinary `transformers` folder with three files more: `optimizer.safetensors`,
`training_state.json`, and `manifest.json`, which is written last and holds the size and SHA-256 of the others.
Nothing in it depends on how many processes wrote it.
"""

import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fanformer.errors import CheckpointError
from fanformer.files.durable import hash_file, is_disk_full, sync

MANIFEST_FILE = "manifest.json"
STATE_FILE = "training_state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
WEIGHTS_FILE = "model.safetensors"
ADAPTER_FOLDER = "adapter"
"""Folder, inside a checkpoint, of the adapter as PEFT reads it; the checkpoint's own weights have it merged."""
UNFINISHED = ".unfinished"
REPLACED = ".replaced"
"""Folder, inside a run's, of the run that was there before, until the new one has a checkpoint."""
FORMAT_VERSION = 1
_PREFIX = "checkpoint-"
_OF_TRAINING_ONLY = (MANIFEST_FILE, STATE_FILE, OPTIMIZER_FILE)
# The card is for people, who may edit it; training does not read it.
_NOT_CHECKED = ("README.md",)

Fill = Callable[[Path], None]
"""Writes all files of a checkpoint but the manifest into a folder."""


def checkpoint_name(step: int) -> str:
    """Return the name of the checkpoint that is taken after `step` steps."""
    return f"{_PREFIX}{step}"


def step_of(checkpoint: Path) -> int:
    """Return the step that a checkpoint was taken after, from its name."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run that were written to their end, the earliest first; contents are not read."""
    return [path for path in _named(folder) if (path / MANIFEST_FILE).is_file()]


def _named(folder: Path) -> list[Path]:
    """Return everything with a checkpoint's name, the earliest first.

    Raises:
        CheckpointError: if something else stands where a checkpoint should be.
    """
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()]
    for path in found:
        if path.is_symlink() or not path.is_dir():
            kind = "a symbolic link" if path.is_symlink() else "a file"
            raise CheckpointError(
                f"{path.absolute()} must be a folder, got {kind}: move it away; nothing was read or deleted."
            )
    return sorted(found, key=step_of)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's training_state.json.

    Raises:
        CheckpointError: if it is missing, damaged or of another format version.
    """
    path = checkpoint / STATE_FILE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        version = state["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"cannot read {path.absolute()} ({type(error).__name__}): use another checkpoint."
        ) from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path.absolute()} must have format version {FORMAT_VERSION}, got {version}: "
            "resume with the release that wrote it."
        )
    return state


def write_state(checkpoint: Path, state: Mapping[str, Any]) -> None:
    """Write training_state.json, whose numbers come back with all their digits."""
    content = {"format_version": FORMAT_VERSION, **state}
    (checkpoint / STATE_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def problem(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, reading every byte of it, or None if it is as it was written."""
    path = checkpoint / MANIFEST_FILE
    if not path.is_file():
        return f"it has no {MANIFEST_FILE}, so it was never finished"
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST_FILE} is damaged"
    for name, (size, digest) in expected.items():
        file = checkpoint / name
        try:
            got = file.stat().st_size
            if got != size:
                return f"its {name} has {got:,} bytes instead of {size:,}"
            if hash_file(file) != digest:
                return f"the checksum of its {name} is not the one it was written with"
        except OSError as error:
            return f"its {name} cannot be read ({error.strerror or error})"
    return None


def newest_intact(folder: Path, note: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint whose every byte is as it was written, or None.

    A damaged one is kept under the name `checkpoint-N.damaged`, out of the way of the run, and `note` says so.
    """
    for path in reversed(_named(folder)):
        wrong = problem(path)
        if wrong is None:
            return path
        aside = _free_name(path.with_name(path.name + ".damaged"))
        os.replace(path, aside)
        note(f"{path.name} is damaged: {wrong}; kept as {aside.name}, going back to the one before")
    return None


def _free_name(path: Path) -> Path:
    candidate, number = path, 2
    while candidate.exists():
        candidate, number = path.with_name(f"{path.name}-{number}"), number + 1
    return candidate


def write_checkpoint(folder: Path, step: int, fill: Fill, needed_bytes: int = 0) -> Path:
    """Write `checkpoint-STEP` into a run's folder so that it is there whole or not at all, whatever happens.

    Args:
        folder: the run's folder.
        step: optimizer steps done.
        fill: writes the files.
        needed_bytes: what it will take on the disk, about.

    Raises:
        CheckpointError: if the disk is full; what was written aside is deleted, other checkpoints are not touched.
        OSError: if the disk refuses for another reason; the same holds.
    """
    staging = folder / UNFINISHED
    shutil.rmtree(staging, ignore_errors=True)
    target = folder / checkpoint_name(step)
    try:
        if shutil.disk_usage(folder).free < needed_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        staging.mkdir()
        fill(staging)
        files = {}
        for path in sorted(path for path in staging.rglob("*") if path.is_file()):
            sync(path)
            name = path.relative_to(staging).as_posix()
            if name not in _NOT_CHECKED:
                files[name] = {"bytes": path.stat().st_size, "sha256": hash_file(path)}
        manifest = {"format_version": FORMAT_VERSION, "step": step, "files": files}
        (staging / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        for path in (staging / MANIFEST_FILE, *(path for path in staging.rglob("*") if path.is_dir()), staging):
            sync(path)
        before = folder / f"{UNFINISHED}-{target.name}"
        if target.exists():  # of the same step: a rename cannot replace a full folder
            os.replace(target, before)
        os.replace(staging, target)
        shutil.rmtree(before, ignore_errors=True)
        sync(folder)
    except Exception as error:
        shutil.rmtree(staging, ignore_errors=True)
        if not is_disk_full(error):
            raise
        raise CheckpointError(
            f"the disk has no room for {target.absolute()}: {needed_bytes:,} bytes needed, "
            f"{shutil.disk_usage(folder).free:,} free; the checkpoints before are untouched: make room, or set "
            "`keep_last` lower."
        ) from error
    return target


def prune(folder: Path, keep_last: int, best_step: int | None) -> None:
    """Delete all but the last `keep_last` checkpoints and the one of `best_step`."""
    for path in checkpoints(folder)[:-keep_last]:
        if step_of(path) != best_step:
            delete_checkpoint(path)


def delete_checkpoint(path: Path) -> None:
    """Delete a checkpoint; a kill halfway leaves no half one."""
    doomed = path.with_name(f"{UNFINISHED}-{path.name}")
    os.replace(path, doomed)
    shutil.rmtree(doomed)


def remove_unfinished(folder: Path) -> None:
    """Delete what a killed process left half written or half deleted; a whole checkpoint gets its name."""
    staging = folder / UNFINISHED
    if problem(staging) is None:
        step = json.loads((staging / MANIFEST_FILE).read_text(encoding="utf-8"))["step"]
        if not (folder / checkpoint_name(step)).exists():
            os.replace(staging, folder / checkpoint_name(step))
    for path in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def forget_replaced(folder: Path) -> None:
    """Delete the run that was in a folder before, now that the one that replaces it has a checkpoint."""
    if (folder / REPLACED).is_dir():
        doomed = folder / f"{UNFINISHED}{REPLACED}"  # so that a kill halfway leaves no half run to go back to
        os.replace(folder / REPLACED, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def publish(checkpoint: Path, folder: Path) -> None:
    """Put the model of a checkpoint, without what only training needs, into the run's folder, file by file.

    Weights are hard links where the file system has them: no second copy. Each file takes its name once its bytes are
    on the disk; a kill in between leaves old and new ones mixed, and the checkpoint as it was.
    """
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        name = path.relative_to(checkpoint)
        if name.as_posix() in _OF_TRAINING_ONLY:
            continue
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}.new")
        aside.unlink(missing_ok=True)
        try:
            if path.suffix != ".safetensors":
                raise OSError
            os.link(path, aside)
        except OSError:
            shutil.copyfile(path, aside)
            sync(aside)
        os.replace(aside, target)


@dataclass(frozen=True)
class Written:
    """What became of one checkpoint: its step, how long writing took, and the error if it failed."""

    step: int
    seconds: float
    error: Exception | None


class CheckpointWriter:
    """Writes checkpoints in the background, one at a time, while training goes on."""

    def __init__(self, folder: Path, keep_last: int, background: bool = True) -> None:
        """Set up.

        Args:
            folder: the run's folder.
            keep_last: checkpoints to keep besides the best.
            background: False writes each before `submit` returns.
        """
        self._folder, self._keep_last, self._background = folder, keep_last, background
        self._thread: threading.Thread | None = None
        self._done: list[Written] = []

    def submit(self, step: int, fill: Fill, needed_bytes: int, best_step: int | None) -> None:
        """Begin to write a checkpoint; waits first for one that is still being written.

        Args:
            step: optimizer steps done.
            fill: writes its files, from data that nobody changes any more.
            needed_bytes: what it will take on the disk, about.
            best_step: step of the checkpoint with the best figures so far, which is kept.
        """
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(step, fill, needed_bytes, best_step))
        self._thread.start()
        if not self._background:
            self.wait()

    def _write(self, step: int, fill: Fill, needed_bytes: int, best_step: int | None) -> None:
        started = time.monotonic()
        error: Exception | None = None
        try:
            write_checkpoint(self._folder, step, fill, needed_bytes)
            forget_replaced(self._folder)
            prune(self._folder, self._keep_last, best_step)
        except Exception as caught:  # told to the training loop by `collect`
            error = caught
        self._done.append(Written(step, time.monotonic() - started, error))

    def wait(self) -> None:
        """Return once nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def collect(self) -> Sequence[Written]:
        """Return what was finished since the last call."""
        return [self._done.pop(0) for _ in range(len(self._done))]
