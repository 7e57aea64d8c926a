"""The proof that a run loses nothing: the same short training straight, killed and resumed, and on two processes.

Every training is a process of its own and every kill a real one. As a program, this file is one such training:
`python -m fanformer.training.proof CONFIG.json`.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fanformer.errors import ConfigError
from fanformer.machine.launch import is_restarted, launched_processes, launched_rank
from fanformer.training.checkpoint import OPTIMIZER_FILE, WEIGHTS_FILE, checkpoint_name, checkpoints
from fanformer.training.events import Event
from fanformer.training.fields import LENGTHS, RunConfig
from fanformer.training.folder import read_records, read_run_file
from fanformer.training.run import train

DEFAULT_STEPS = 20
LARGEST_DIFFERENCE = 1e-6
"""Relative difference of losses that another number of processes may make: sums in another order, in float32."""
_DROPOUT = 0.1
_KILL = getattr(signal, "SIGKILL", signal.SIGTERM)
_KILLED = _KILL if sys.platform == "win32" else -_KILL
"""The exit status that a kill leaves."""
_LONGEST_WAIT_SECONDS = 120.0
_RESTARTS = 5  # the first meeting after a kill often fails, since some of the others are not gone yet


@dataclass(frozen=True)
class Training:
    """One training of the proof: after which steps it is killed, on how many processes it runs, with dropout or not."""

    name: str
    kills: tuple[int, ...] = ()
    processes: int = 1
    dropout: bool = True


@dataclass(frozen=True)
class Finding:
    """How a training compares to the one it must equal.

    Attributes:
        name: what was done to it.
        kills: how often it was killed.
        equal: for "rows", "losses", "gradient norms", "weights" and "optimizer", whether every bit is the same.
        largest_difference: of a loss, relative.
        holds: whether it is as equal as it must be.
    """

    name: str
    kills: int
    equal: dict[str, bool]
    largest_difference: float
    holds: bool


def prove(config: RunConfig, note: Callable[[str], None], *, two_processes: bool = True) -> list[Finding]:
    """Train the run of `config` several times over, killing some, and compare the bits.

    Dropout is on where one process must equal itself; two processes are compared in float32 without it. Everything
    lies in the run's folder, with the findings in proof.json.

    Args:
        config: the run; `max_steps` says how long each training is.
        note: told what goes on.
        two_processes: whether to compare two processes with one, too.

    Raises:
        ConfigError: if the run is too short or the folder is taken.
    """
    steps = config.length.max_steps or DEFAULT_STEPS
    if steps < 6:
        raise ConfigError(f"`max_steps` of a proof must be at least 6, got {steps}: it is killed twice on its way.")
    folder = config.folder.absolute()
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"`output_dir` of a proof must be a new folder, got {folder}: choose another.")
    folder.mkdir(parents=True, exist_ok=True)
    third = steps // 3
    straight, alone = Training("straight"), Training("one process, straight", dropout=False)
    two = Training("two processes", processes=2, dropout=False)
    compared = [
        (straight, Training("killed once, resumed", kills=(steps // 2 + 1,)), True),
        (straight, Training("killed twice, resumed twice", kills=(third + 1, 2 * third + 1)), True),
    ]
    if two_processes and _can_run_two(config, note):
        killed = dataclasses.replace(two, name="two processes, one killed", kills=(steps // 2 + 1,))
        compared += [(alone, two, False), (two, killed, True)]
    findings: list[Finding] = []
    done: set[str] = set()
    for reference, training, bits in compared:
        for each in (reference, training):
            if each.name not in done:
                note(f"training: {each.name}")
                _run(config, each, steps, folder)
                done.add(each.name)
        findings.append(_compare(_folder(folder, reference), _folder(folder, training), training, steps, bits))
    content = [dataclasses.asdict(finding) for finding in findings]
    (folder / "proof.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return findings


def _can_run_two(config: RunConfig, note: Callable[[str], None]) -> bool:
    """Say why, where two processes cannot be tried."""
    import torch

    from fanformer.machine.devices import resolve_device

    device = resolve_device(config.machine.device).type
    why = None
    if config.lora_rank is not None:
        why = "adapters are trained by a single process"
    elif config.corpus.objective == "multimodal":
        why = "pictures and recordings are learnt from by a single process"
    elif config.batch.batch_size % 2:
        why = f"the batch of {config.batch.batch_size} rows cannot be halved"
    elif device == "mps" or (device == "cuda" and torch.cuda.device_count() < 2):
        why = f"there is one {device} device"
    if why is not None:
        note(f"two processes were not tried: {why}")
    return why is None


def _folder(folder: Path, training: Training) -> Path:
    return folder / training.name.replace(",", "").replace(" ", "-")


def _run(config: RunConfig, training: Training, steps: int, folder: Path) -> None:
    """Do one training with its kills.

    Raises:
        RuntimeError: if a process ended otherwise than it should have.
    """
    output, first = _folder(folder, training), folder / "straight"
    fields = config.to_dict() | {
        "output_dir": str(output),
        **dict.fromkeys(LENGTHS),
        "max_steps": steps,
        "log_steps": 1,
        "save_steps": max(1, steps // 4),
        "eval_steps": max(1, steps // 2),
        # the loss on all of the text proves no more
        "final_eval_tokens": config.evaluation.final_eval_tokens or config.evaluation.eval_tokens,
        "push_to_hub": None,
        "micro_batch_size": None,
        "model": {**config.model, "dropout": _DROPOUT if training.dropout else 0.0},
    }
    if output != first:  # the first training prepared the data and decided about the machine, for all
        decided = read_run_file(first)
        environment = decided["environment"]
        if "folder" in decided["data"]:  # text, which is prepared
            fields |= {"data": str(first / decided["data"]["folder"]), "tokenizer": None, "vocab_size": None}
        fields |= {
            "compile": "on" if environment["compile"] else "off",
            "precision": environment["precision"] if training.dropout else "float32",
            "threads": environment["threads"] if training.dropout else max(1, environment["threads"] // 2),
        }
    settings = folder / f"{output.name}.json"
    settings.write_text(json.dumps(fields), encoding="utf-8")
    if training.processes > 1:
        kill = training.kills[0] if training.kills else 0
        launcher = ["torch.distributed.run", "--nproc-per-node", str(training.processes), "--master-port", "0"]
        launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--max-restarts", str(_RESTARTS)]
        _start([*launcher, "-m", __name__, str(settings), str(kill)], expected=0)
        return
    for kill in training.kills:
        _start([__name__, str(settings), str(kill)], expected=_KILLED)
    _start([__name__, str(settings), "0"], expected=0)


def _start(module: list[str], expected: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run([sys.executable, "-m", *module], env=environment, capture_output=True, text=True)
    if done.returncode != expected:
        raise RuntimeError(f"a training ended with {done.returncode}, expected {expected}: {done.stderr[-2000:]}")


def _compare(straight: Path, other: Path, training: Training, steps: int, bits: bool) -> Finding:
    """Compare two finished trainings line by line and tensor by tensor."""
    one, two = read_records(straight), read_records(other)
    complete = [record["step"] for record in two] == list(range(1, steps + 1))

    def same(key: str) -> bool:
        return complete and [record.get(key) for record in one] == [record.get(key) for record in two]

    last = checkpoint_name(steps)
    equal = {
        "rows": same("rows"),
        "losses": same("loss") and same("val_loss"),
        "gradient norms": same("grad_norm"),
        "weights": _same_tensors(straight / last / WEIGHTS_FILE, other / last / WEIGHTS_FILE),
        "optimizer": _same_tensors(straight / last / OPTIMIZER_FILE, other / last / OPTIMIZER_FILE),
    }
    differences = [
        abs(first["loss"] - second["loss"]) / abs(first["loss"]) for first, second in zip(one, two, strict=False)
    ]
    largest = max(differences) if complete else float("inf")
    holds = all(equal.values()) if bits else equal["rows"] and largest <= LARGEST_DIFFERENCE
    return Finding(training.name, len(training.kills), equal, largest, holds)


def _same_tensors(one: Path, other: Path) -> bool:
    import torch
    from safetensors.torch import load_file

    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(
        torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8))
        if first[name].ndim
        else torch.equal(first[name], second[name])
        for name in first
    )


class _Killer:
    """Kills a process of this training at a step."""

    def __init__(self, folder: Path, step: int) -> None:
        self._folder, self._step = folder, step

    def __call__(self, event: Event) -> None:
        """Kill, once the first checkpoint is whole, the last process of this training."""
        if event.kind != "step" or event.figures["step"] != self._step:
            return
        deadline = time.monotonic() + _LONGEST_WAIT_SECONDS
        while not checkpoints(self._folder) and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(int(_pid_file(self._folder, launched_processes() - 1).read_text()), _KILL)
        time.sleep(_LONGEST_WAIT_SECONDS)  # until this process is killed too, by the launcher


def _pid_file(folder: Path, rank: int) -> Path:
    return folder.with_name(f"{folder.name}.{rank}.pid")


def _train_once(settings: Path, kill_after: int) -> None:
    fields = json.loads(settings.read_text(encoding="utf-8"))
    config = RunConfig.from_fields(fields | {"resume": True})
    rank = launched_rank()
    _pid_file(config.folder, rank).write_text(str(os.getpid()))
    try:
        train(config, _Killer(config.folder, 0 if is_restarted() else kill_after))
    finally:
        with contextlib.suppress(OSError):
            _pid_file(config.folder, rank).unlink()


if __name__ == "__main__":
    _train_once(Path(sys.argv[1]), int(sys.argv[2]))
