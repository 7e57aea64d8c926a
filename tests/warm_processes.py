"""Processes of the `fanformer` command that start in milliseconds: forked from a parent that has imported the rest.

    with WarmParent("fanformer.cli.quantize", "fanformer.gguf.export") as warm:
        process = warm.start(["quantize", ...], cwd=folder)
        process.kill(signal.SIGINT)
        assert process.wait() == 130

A process has its own process group, nothing on standard input, its output in files, the signal handlers that Python
starts with, and ends as `fanformer` ends. What is read while a program starts (PYTHON* and OMP_* variables, the seed of
hashes) is the parent's: a test of those gives its parent the variables, or needs a process of its own. The parent forks
with one thread and has run no operation of torch, so that a child starts its threads itself.
"""

import gc
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from fanformer.cli.failure import quiet_libraries

_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"}
_HELD_BACK = {signal.SIGINT, signal.SIGTERM}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True)
class Strike:
    """A signal that a process sends itself right before it changes a file or folder below `cwd`.

    Python's own calls count (opening for writing, renaming, removing, making a folder), libraries' in C or Rust do not.
    """

    signal: int
    change: int
    """Before which change, from 1 on; a process that makes fewer is spared."""


class WarmProcess:
    """One run of the command; `pid`, `arguments`, and the files `stdout` and `stderr`."""

    def __init__(self, parent: "WarmParent", pid: int, arguments: list[str], stdout: Path, stderr: Path) -> None:
        self.pid, self.arguments, self.stdout, self.stderr = pid, arguments, stdout, stderr
        self.returncode: int | None = None
        self._parent = parent

    def poll(self) -> int | None:
        """Return the exit code, below 0 for the signal that ended the process, or None while it runs."""
        if self.returncode is None:
            self.returncode = self._parent.ask(poll=self.pid)
        return self.returncode

    def wait(self, timeout: float = 120.0) -> int:
        """Return the exit code when there is one; a process that has none after `timeout` seconds is killed."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"{self.arguments} ran for more than {timeout:g} s: {self.stderr.read_text()}")
            time.sleep(0.002)
        return code

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the process and all that it started, unless its end has been seen."""
        if self.returncode is None:  # not reaped yet, so that the number is still its own
            os.killpg(self.pid, number)


class WarmParent:
    """The parent; a context manager that ends with all its processes gone."""

    def __init__(self, *modules: str, env: Mapping[str, str] | None = None) -> None:
        """Start the parent.

        Args:
            modules: what it is to import besides the command itself.
            env: variables besides those of this process; what Python reads of them holds for all processes.
        """
        self._parent = subprocess.Popen(
            [sys.executable, "-m", "tests.warm_processes", *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parents[1],
            env={**os.environ, **(env or {})},
            start_new_session=True,  # Ctrl-C on the tests is theirs
        )

    def __enter__(self) -> "WarmParent":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the parent, which kills what still runs."""
        self._parent.communicate(timeout=60)

    def start(
        self,
        arguments: Sequence[object],
        cwd: Path,
        env: Mapping[str, str] | None = None,
        logs: Path | None = None,
        limits: Mapping[str, int] | None = None,
        strike: Strike | None = None,
        stdin: Path | None = None,
        stdout: Path | None = None,
        call: str | None = None,
    ) -> WarmProcess:
        """Start `fanformer` with `arguments`.

        Args:
            arguments: the words after the program's name.
            cwd: the folder that it runs in.
            env: variables besides those of this process.
            logs: folder for the files `stdout` and `stderr`, which must not be below `cwd`; default: beside it.
            limits: soft limits by their names in `resource`, such as RLIMIT_FSIZE.
            strike: a signal that comes in the middle of the work.
            stdin: what it reads, a file or a named pipe.
            stdout: what it writes to, such as a named pipe; the caller makes it. Default: a file in `logs`.
            call: MODULE:FUNCTION to call with the arguments instead of the command.
        """
        logs = logs or cwd.parent / f"{cwd.name}-logs"
        logs.mkdir(parents=True, exist_ok=True)
        words, stderr = [str(word) for word in arguments], logs / "stderr"
        stderr.write_bytes(b"")  # a process may be killed before it opens them
        if stdout is None:
            stdout = logs / "stdout"
            stdout.write_bytes(b"")
        pid = self.ask(
            arguments=words,
            call=call,
            cwd=str(cwd),
            env=dict(env or {}),
            stdin=str(stdin or os.devnull),
            stdout=str(stdout),
            stderr=str(stderr),
            limits=dict(limits or {}),
            strike=asdict(strike) if strike else None,
        )
        return WarmProcess(self, pid, words, stdout, stderr)

    def ask(self, **request: Any) -> Any:
        """Send the parent a request and return its answer."""
        assert self._parent.stdin is not None, "asked for a pipe"
        assert self._parent.stdout is not None, "asked for a pipe"
        self._parent.stdin.write(json.dumps(request) + "\n")
        self._parent.stdin.flush()
        answer = self._parent.stdout.readline()
        assert answer, f"the parent of the warm processes ended with {self._parent.wait()}"
        return json.loads(answer)


def _serve(modules: Sequence[str]) -> dict[str, Any] | None:
    """Answer requests; return one in the process that is to run it, and None in the parent when they end."""
    requests, answers = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints while it is imported is no answer
    quiet_libraries()
    for name in ("fanformer.cli.main", *modules):
        importlib.import_module(name)
    gc.freeze()  # else a child's last collection copies every page of the parent's: 2 s instead of 0.2
    assert threading.active_count() == 1, f"an import started threads: {threading.enumerate()}"
    running: set[int] = set()
    for line in requests:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            running.discard(pid)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_BACK)  # until the child is what it is to be
            answer = os.fork()
            if answer == 0:
                _become(request, requests, answers)
                return request
            os.setpgid(answer, answer)  # here and in the child: whoever is first
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD_BACK)
            running.add(answer)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    for pid in running:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return None


def _become(request: Mapping[str, Any], requests: IO[str], answers: IO[str]) -> None:
    """Turn a fork of the parent into what a shell would have started."""
    os.setpgid(0, 0)
    for kept in (requests, answers):
        kept.close()
    for target, name, flags in (
        (0, request["stdin"], os.O_RDONLY),
        (1, request["stdout"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, request["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        opened = os.open(name, flags, 0o644)
        os.dup2(opened, target)
        os.close(opened)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests are a shell's background job
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    for name, limit in request["limits"].items():
        kind = getattr(resource, name)
        resource.setrlimit(kind, (limit, resource.getrlimit(kind)[1]))
    if request["strike"] is not None:
        strike_at_change(Strike(**request["strike"]), Path(request["cwd"]).resolve())


def strike_at_change(strike: Strike, below: Path) -> None:
    """Let this process send itself a signal right before one of its changes below a folder."""
    left = strike.change

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event not in _CHANGES and not (event == "open" and arguments[2] & _WRITES):
            return
        if isinstance(arguments[0], int) or not below.is_dir():
            return
        relative_to_a_handle = event != "open" and arguments[-1] not in (-1, None)  # as shutil.rmtree removes
        place = Path(os.fsdecode(arguments[0]))
        if not relative_to_a_handle and below not in Path(os.path.abspath(place)).parents:
            return
        left -= 1
        if left == 0:
            os.kill(os.getpid(), strike.signal)

    sys.addaudithook(hook)


if __name__ == "__main__":
    wanted = _serve(sys.argv[1:])
    if wanted is not None and wanted["call"] is not None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD_BACK)
        module, _, function = wanted["call"].partition(":")
        getattr(importlib.import_module(module), function)(*wanted["arguments"])
    elif wanted is not None:
        from fanformer.cli.interrupts import heed_from_now
        from fanformer.cli.main import main

        sys.argv = ["fanformer", *wanted["arguments"]]
        heed_from_now()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD_BACK)
        sys.exit(main(wanted["arguments"]))
