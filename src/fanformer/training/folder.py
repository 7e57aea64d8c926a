"""The folder of a run: what it holds, who may write into it, and what a run that goes on finds there.

run.yaml        configuration, model, data, decisions and versions: `write_run_file`, `read_run_file`
metrics.jsonl   a line for every logged step, which a resumed run continues without gap or repetition: `RecordFile`
checkpoint-N/   what the run goes on from after N steps: `checkpoint.py`
reference.safetensors   what the base gives the answers of a run on preferences: `references.py`
data/           prepared training data; held-out/ where `eval_data` names others: `corpus.py`
README.md, loss.png, config.json, model.safetensors, tokenizer and code of the model: what `publish` and
`publishing.py` make of the last checkpoint
.lock           held while a process writes here: `claimed`
.replaced/      the run that was here before, until the new one has a checkpoint; .unfinished/ a checkpoint
"""

import contextlib
import errno
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fanformer.data.preparation.journal import require_utf8_name
from fanformer.errors import CheckpointError, ConfigError
from fanformer.files.durable import delete, replace_text
from fanformer.files.locking import hold
from fanformer.machine.launch import is_restarted, launcher
from fanformer.training.checkpoint import REPLACED, checkpoints, forget_replaced, remove_unfinished
from fanformer.training.fields import CorpusConfig, OutputConfig, RunConfig, TowersConfig

RUN_FILE, METRICS_FILE, LOCK_FILE = "run.yaml", "metrics.jsonl", ".lock"
ROUNDS_FILE = "community.json"
"""In the folder of a run in rounds, whose checkpoints a host makes of what others trained."""
DATA_FOLDER, HELD_OUT_FOLDER = "data", "held-out"
_REPLACING = ".replacing"
"""Folder of a run that is on its way to REPLACED or back: whatever lies beside it belongs to that run too."""
_DATA = {f"{name}{suffix}" for name in (DATA_FOLDER, HELD_OUT_FOLDER) for suffix in ("", ".partial", ".lock")}
_BEGINNINGS = {RUN_FILE, METRICS_FILE} | _DATA
"""What a run that was killed before it wrote run.yaml may leave, beside a `.new` of each."""
_PARTS_READ = ("configuration", "model", "data", "environment")
"""Parts of run.yaml without which a run cannot go on."""
EXACT = frozenset(
    f"{split}{name}"
    for split in ("", "val_")
    for name in ("loss", "loss_stderr", "bits_per_byte", "margin", "accuracy", "grad_norm", "learning_rate")
)
"""Figures written with all their digits, so that two runs can be compared bit for bit."""
_FIXED = (
    *("objective", "batch_size", "sequence_length", "seed", "optimizer", "init_from", "lora_rank"),
    *TowersConfig.__dataclass_fields__,
)
"""Fields that decide which rows make up a step, what the optimizer's state means, or what towers a model has."""
DATA_FIELDS = tuple(CorpusConfig.__dataclass_fields__)
MACHINE_FIELDS = ("device", "precision", "compile", "threads")
"""Fields whose change makes a run decide anew about the machine."""


def write_run_file(folder: Path, content: Mapping[str, Any]) -> None:
    """Write run.yaml: configuration, data, decisions, versions."""
    replace_text(folder / RUN_FILE, yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True))


def read_run_file(folder: Path) -> dict[str, Any]:
    """Read a run's run.yaml.

    Raises:
        CheckpointError: if it is missing or damaged.
    """
    path = folder / RUN_FILE
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise CheckpointError(
            f"cannot read {path.absolute()} ({type(error).__name__}): is this the folder of a run?"
        ) from error
    for name in _PARTS_READ:
        part = content.get(name) if isinstance(content, dict) else None
        if not isinstance(part, dict) or not part:
            raise CheckpointError(
                f"{path.absolute()} must have a mapping `{name}`, got {part!r:.40}: it was not written by `fanformer "
                "train`, or was changed since."
            )
    return content


def read_records(folder: Path) -> list[dict[str, float]]:
    """Return the lines of a run's metrics.jsonl; a last line that a kill left half written is passed over.

    Raises:
        CheckpointError: if another line is no record; the message names it.
    """
    path = folder / METRICS_FILE
    if not path.exists():
        return []
    *whole, _ = path.read_bytes().split(b"\n")
    return [_parse(line, f"{path.absolute()}:{number}") for number, line in enumerate(whole, start=1)]


def _parse(line: bytes, where: str) -> dict[str, float]:
    try:
        record = json.loads(line)
        if isinstance(record["step"], int):
            return record
    except (ValueError, RecursionError, KeyError, TypeError):
        pass
    shown = line[:40].decode("utf-8", "replace")
    raise CheckpointError(
        f"{where} must be a JSON object with `step`, got {shown!r}: delete that line; its figures are lost, the run's "
        "checkpoints are not."
    )


class RecordFile:
    """The metrics.jsonl that a run writes; lines that the disk has no room for wait for the next one."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / METRICS_FILE
        self._pending: list[str] = []
        self._lock = threading.Lock()  # checkpoints are written in a thread of their own, which calls `sync`

    def append(self, record: Mapping[str, float | str]) -> None:
        """Add one line."""
        rounded = {
            key: float(f"{value:.6g}") if isinstance(value, float) and key not in EXACT else value
            for key, value in record.items()
        }
        with self._lock:
            self._pending.append(json.dumps(rounded) + "\n")
            with contextlib.suppress(OSError):
                self._write()

    def _write(self) -> None:
        content = "".join(self._pending).encode()
        handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = os.fstat(handle).st_size
            try:
                written = os.write(handle, content)
            except OSError:
                written = 0
            if written < len(content):  # a full disk took some of it: leave whole lines only
                os.ftruncate(handle, size)
                return
            self._pending.clear()
        finally:
            os.close(handle)

    def sync(self) -> None:
        """Wait until all lines are on the disk.

        Raises:
            OSError: if they cannot be written.
        """
        with self._lock:
            if self._pending:
                self._write()
            left = bool(self._pending)
        if left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps that will be trained again."""
        folder = self._path.parent
        kept = [json.dumps(record) + "\n" for record in read_records(folder) if record["step"] <= step]
        replace_text(self._path, "".join(kept))
        self._pending.clear()


@contextlib.contextmanager
def claimed(
    folder: Path, resume: bool, overwrite: bool, note: Callable[[str], None] = lambda text: None
) -> Iterator[bool]:
    """Hold the run's folder, made if need be, while the block runs.

    A run that is to be replaced is put aside and deleted once the new one has a checkpoint (`forget_replaced`). Where
    the block raises before that, it is back as it was; where the process is killed, the next call puts it back, unless
    that is to replace it too. Where the block raises before a new run wrote run.yaml, the folder is left as it was
    found, but for a preparation of data that can go on.

    Args:
        folder: of the run.
        resume: whether a run in it is to go on.
        overwrite: whether a run in it is to be replaced.
        note: told what happened to the run before.

    Yields:
        Whether there is a run to go on with; False where a new one begins.

    Raises:
        CheckpointError: if the folder holds a run and neither `resume` nor `overwrite` is asked for, if it holds
            something that is not a run, which is never deleted, or if another process writes into it.
        ConfigError: if it is a file, or its name is not UTF-8.
    """
    require_utf8_name(folder, ConfigError)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"`output_dir` must be a folder, got the file {folder.absolute()}.")
    existed = folder.is_dir()
    if existed and _strangers(folder):
        raise CheckpointError(f"{folder.absolute()} is not empty and holds no run: choose another --output-dir.")
    folder.mkdir(parents=True, exist_ok=True)
    with hold(folder / LOCK_FILE, f"the folder {folder.absolute()}", CheckpointError):
        _recover(folder, overwrite, note)
        if (folder / RUN_FILE).is_file() and not resume:
            if not overwrite:
                raise CheckpointError(
                    f"{folder.absolute()} already holds a run: go on with --resume, replace it with --overwrite, "
                    "or choose another --output-dir."
                )
            _put_aside(folder)
        found = _content(folder)
        try:
            yield (folder / RUN_FILE).is_file()
        except Exception:  # not Ctrl-C: the same command goes on with data that are prepared, or half prepared
            if (folder / REPLACED).is_dir() and not checkpoints(folder):
                _put_back(folder, note)
            elif not (folder / RUN_FILE).is_file():
                _empty(folder, keep=[*found, *_worth_keeping(folder)])
                (folder / LOCK_FILE).unlink(missing_ok=True)
                if not existed and not any(folder.iterdir()):
                    folder.rmdir()
            raise


def is_own_restart(folder: Path) -> bool:
    """Return whether a launcher starts this process again, and it began, or went on with, the run in a folder."""
    return is_restarted() and (folder / RUN_FILE).is_file() and read_run_file(folder).get("launcher") == launcher()


def refuse_rounds(config: RunConfig) -> None:
    """Refuse to go on by oneself with a run that several train together: its host would not know it again.

    Raises:
        CheckpointError: if the folder holds one.
    """
    if config.output.resume and (config.folder / ROUNDS_FILE).is_file():
        raise CheckpointError(
            f"{config.folder.absolute()} holds a community run: go on with the same `fanformer community host`, or "
            f"train its model further with --init-from {config.folder} --output-dir ANOTHER."
        )


def _recover(folder: Path, overwrite: bool, note: Callable[[str], None]) -> None:
    """Bring a folder in order that a killed process left in the middle of something."""
    if (folder / _REPLACING).is_dir():
        _move_back(folder)
    remove_unfinished(folder)
    if (folder / REPLACED).is_dir():
        if checkpoints(folder):
            forget_replaced(folder)
        elif overwrite:  # once more: what it prepared is of use, if it is for the same data
            _empty(folder, keep=[folder / REPLACED, *(folder / name for name in _DATA)])
        else:
            _put_back(folder, note)


def _put_aside(folder: Path) -> None:
    """Move a run into REPLACED, so that a kill at any moment leaves either all of it there or all to be moved back."""
    aside = folder / _REPLACING
    aside.mkdir()
    for path in _content(folder):
        os.replace(path, aside / path.name)
    os.replace(aside, folder / REPLACED)


def _put_back(folder: Path, note: Callable[[str], None]) -> None:
    """Let the run that was to be replaced be the folder's again."""
    _empty(folder, keep=[folder / REPLACED])
    os.replace(folder / REPLACED, folder / _REPLACING)
    _move_back(folder)
    note(f"the run that was in {folder} before is back: the one that was to replace it ended without a checkpoint")


def _move_back(folder: Path) -> None:
    for path in (folder / _REPLACING).iterdir():
        os.replace(path, folder / path.name)
    (folder / _REPLACING).rmdir()


def _strangers(folder: Path) -> bool:
    """Whether a folder holds what is neither a run nor the beginning of one."""
    if any((folder / name).exists() for name in (RUN_FILE, REPLACED, _REPLACING)):
        return False
    return any(path.name != LOCK_FILE and path.name.split(".new")[0] not in _BEGINNINGS for path in folder.iterdir())


def _worth_keeping(folder: Path) -> list[Path]:
    """Return the preparations that ended in an error but said that the same command goes on with them."""
    names = (f"{name}.partial" for name in (DATA_FOLDER, HELD_OUT_FOLDER))
    return [folder / name for name in names if (folder / name).is_dir() and any((folder / name).iterdir())]


def _content(folder: Path) -> list[Path]:
    """Return everything in a folder but its lock and the way to REPLACED."""
    return [path for path in folder.iterdir() if path.name not in (LOCK_FILE, _REPLACING)]


def _empty(folder: Path, keep: Sequence[Path] = ()) -> None:
    """Delete everything but the lock and what is to be kept."""
    for path in _content(folder):
        if path not in keep:
            delete(path)


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
        if name in before and before[name] != now[name] and name not in OutputConfig.__dataclass_fields__
    }
    old, new = changed.get("init_from", (None, None))
    if None not in (old, new) and Path(old).absolute() == Path(new).absolute():  # the same folder in other words
        del changed["init_from"]
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
