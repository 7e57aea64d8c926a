"""Trainings, each in a process of its own; what is done is not done again, whatever ends the work."""

import json
import math
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import fanformer
from fanformer.comparison.trial import TRIAL_FILE, Result, Trial, read_result
from fanformer.errors import FANformerError
from fanformer.files.durable import replace_json
from fanformer.machine.threads import spin_briefly
from fanformer.training.events import Event, Listener

LOG_FILE = "trial.log"
_GRACE_SECONDS = 90.0
"""Longest time a training gets to save after it was asked to stop."""
_SECONDS_BETWEEN_LOOKS = 0.5
"""How often a silent training's process looks whether it is to stop."""


class OutOfTimeError(Exception):
    """The time given is over; the same call goes on where it stopped."""


class TrialFailedError(FANformerError):
    """A training that could not be done; the message is the training's own."""


def run_trial_in_process(
    trial: Trial, folder: Path, listener: Listener, deadline: float | None, halt: threading.Event | None = None
) -> Result:
    """Train in a process of its own, going on where an earlier one stopped, and return the result.

    Args:
        trial: what to train.
        folder: of this training; made if need be.
        listener: hears how far it is.
        deadline: when to stop, on the clock of `time.monotonic`; None for never.
        halt: set by another thread to stop as at the deadline.

    Raises:
        OutOfTimeError: at the deadline; the training has saved and can go on.
        TrialFailedError: if the training refuses its input or dies.
    """
    done = read_result(folder)
    if done is not None:
        return done
    folder.mkdir(parents=True, exist_ok=True)
    replace_json(folder / TRIAL_FILE, asdict(trial))
    with (folder / LOG_FILE).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "fanformer.comparison.trial", str(folder)],
            stdout=subprocess.PIPE,
            stderr=log,
            env=_environment(),
            start_new_session=True,  # a Ctrl-C in the terminal is for this process, which asks the training to stop
        )
    error = None
    try:
        for line in _lines(process, deadline, halt):
            if "progress" in line:
                listener(Event("progress", line["text"], line["progress"], name=trial.name))
            error = line.get("error", error)
    finally:
        _stop(process)
    result = read_result(folder)
    if result is not None:
        return result
    if error is None:
        error = f"the training ended with status {process.returncode}: {_last_line(folder / LOG_FILE)}"
    raise TrialFailedError(error)


def _environment() -> dict[str, str]:
    """Return the environment of a training: it finds this package, installed or not, and lets others compute too."""
    home = str(Path(fanformer.__file__).parents[1])
    paths = os.pathsep.join([home, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
    spin_briefly(environment)
    return environment


def _lines(
    process: "subprocess.Popen[bytes]", deadline: float | None, halt: threading.Event | None
) -> Iterator[dict[str, Any]]:
    """Yield what a training tells, until it ends.

    Raises:
        OutOfTimeError: at the deadline, or where `halt` is set.
    """
    assert process.stdout is not None, "it was opened as a pipe"
    unfinished = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            left = math.inf if deadline is None else deadline - time.monotonic()
            if left <= 0 or (halt is not None and halt.is_set()):
                raise OutOfTimeError
            if not selector.select(min(left, _SECONDS_BETWEEN_LOOKS)):
                continue
            content = os.read(process.stdout.fileno(), 1 << 16)
            if not content:
                process.wait()
                return
            *lines, unfinished = (unfinished + content).split(b"\n")
            for line in lines:
                if line.startswith(b"{"):
                    yield json.loads(line)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Ask a training that still runs to save and end, and wait for it."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip()]
    return said[-1][:300] if said else "it said nothing"
