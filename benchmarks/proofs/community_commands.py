"""The commands of a community run as processes, in network namespaces where they are to be; for the drill."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

MEMBER_PROGRAM = Path(__file__).with_name("community_member.py")
_PATIENCE_SECONDS = 240.0
TINY = {
    "vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 16, "intermediate_size": 96, "max_position_embeddings": 64, "qkv_rank": 32, "o_rank": 16,
    "gate_up_rank": 32, "down_rank": 32,
}  # fmt: skip


def wait_until(holds: Callable[[], Any], what: str, seconds: float = _PATIENCE_SECONDS) -> Any:
    """Return what `holds` returns once it is true.

    Raises:
        TimeoutError: if that takes too long.
    """
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := holds():
            return found
        time.sleep(0.2)
    raise TimeoutError(f"waited {seconds:.0f} s for {what}")


def free_port() -> int:
    """Return a port that nobody listens at, of those that systems hand out to nobody by themselves."""
    while True:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port


class Command:
    """A command as a process with its output in a file."""

    def __init__(self, words: Sequence[object], log: Path, namespace: str = "") -> None:
        """Start it.

        Args:
            words: after the interpreter's.
            log: file that its output is added to.
            namespace: network namespace to run in.
        """
        inside = ["ip", "netns", "exec", namespace] if namespace else []
        self.words, self.log = [*inside, sys.executable, *map(str, words)], log
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                self.words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True,
            )  # fmt: skip

    @property
    def output(self) -> str:
        """What it has said so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to it and what it started in its group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def wait(self, seconds: float = _PATIENCE_SECONDS) -> int:
        """Return its exit code."""
        return self.process.wait(seconds)


def fanformer(*words: object) -> subprocess.CompletedProcess[str]:
    """Run a command of fanformer to its end."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fanformer.cli.main", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=_PATIENCE_SECONDS)


class Camp:
    """A host and its members in one folder; a context manager that leaves no process behind."""

    def __init__(self, folder: Path, spaces: Mapping[str, str] | None = None, **plan: object) -> None:
        """Set up.

        Args:
            folder: for all files, made if need be.
            spaces: network namespaces by member, in the order of their links; None has all on the loopback.
            plan: options of `community host`, by their names with underscores.
        """
        self.folder, self.run = folder, folder / "run"
        self.keys, self.public = folder / "keys", folder / "members"
        for place in (self.keys, self.public):
            place.mkdir(parents=True, exist_ok=True)
        self.port, self.spaces = free_port(), dict(spaces or {})
        self.plan = {"rounds": 6, "round_steps": 8, "batch_size": 4, "sequence_length": 64, "round_time": "60s", **plan}
        self.model: dict[str, int] = TINY
        self.host: Command | None = None
        self.members: dict[str, Command] = {}
        self._programs: dict[str, Sequence[object]] = {}

    def __enter__(self) -> "Camp":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for command in [*self.members.values(), *([self.host] if self.host else [])]:
            command.kill()
            command.process.wait()
        if kind is not None:
            print(self.told())

    def told(self) -> str:
        """Return how all logs end."""
        logs = [*sorted(self.folder.glob("*.log")), self.run / "flower" / "link.log"]
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-2500:]}" for log in logs if log.exists())

    def make_key(self, name: str, registered: bool = True) -> None:
        """Make the key of a member, and give its public half to the host."""
        done = fanformer("community", "key", name, "--output-dir", self.keys)
        assert done.returncode == 0, done.stderr
        if registered:
            shutil.copy(self.keys / f"{name}.pub", self.public)

    def start_host(self) -> None:
        """Start the host by its command, a new one or one that goes on."""
        options = [word for name, value in self.plan.items() for word in (f"--{name.replace('_', '-')}", value)]
        recipe = [f"--set=model.{name}={value}" for name, value in self.model.items()]
        recipe += ["--set=max_data_bytes=300000", "--set=eval_tokens=8192", "--set=compile=off",
                   "--set=precision=float32"]  # fmt: skip
        words = ["-m", "fanformer.cli.main", "community", "host", "--preset", "nano", "--members", self.public,
                 "--port", self.port, "--output-dir", self.run, *options, *recipe]  # fmt: skip
        for address in self.addresses:
            words += ["--address", address]
        if not self.spaces:
            words += ["--listen", "127.0.0.1"]
        self.host = Command(words, self.folder / "host.log")

    @property
    def addresses(self) -> list[str]:
        """What members dial, this end of each one's link."""
        return [f"10.77.{number}.1" for number in range(len(self.spaces))] or ["127.0.0.1"]

    def invitation(self, name: str) -> str:
        """Return the invitation that the host printed for a member's link."""
        assert self.host is not None, "a host prints it"
        host, number = self.host, list(self.spaces).index(name) if name in self.spaces else 0

        def printed() -> str | None:
            assert host.process.poll() is None, f"the host ended:\n{self.told()}"
            address = re.escape(self.addresses[number])
            found = re.findall(rf"^invitation: (https://{address}:\S+)$", host.output, re.MULTILINE)
            return found[-1] if found else None

        return str(wait_until(printed, "the invitation"))

    def join(self, name: str, *options: object, invitation: str = "", program: Sequence[object] = ()) -> Command:
        """Start a member by its command, or by another program that takes the same arguments."""
        begin = [*program, "--"] if program else ["-m", "fanformer.cli.main", "community", "join"]
        words = [*begin, invitation or self.invitation(name), "--key", self.keys / f"{name}.key", "--output-dir",
                 self.folder / f"joined-{name}", "--device", "cpu", "--compile", "off", "--precision", "float32",
                 *options]  # fmt: skip
        self.members[name] = Command(words, self.folder / f"{name}.log", self.spaces.get(name, ""))
        self._programs[name] = program
        return self.members[name]

    def join_again(self, name: str) -> Command:
        """Start a member by the program that it was started by last."""
        return self.join(name, program=self._programs.get(name, ()))

    def attack(self, name: str, kind: str) -> Command:
        """Start a member that attacks."""
        return self.join(name, program=(MEMBER_PROGRAM, "--attack", kind))

    def revive(self) -> list[str]:
        """Start again what ended by itself and not well, which is to be nothing, and return what did."""
        ended = []
        if self.host is not None and self.host.process.poll():
            ended.append(f"the host ended with {self.host.process.returncode}: {self.host.output[-300:]}")
            self.start_host()
        for name, member in list(self.members.items()):
            if member.process.poll():
                ended.append(f"{name} ended with {member.process.returncode}: {member.output[-300:]}")
                self.join_again(name)
        return ended

    def records(self) -> list[dict[str, Any]]:
        """Return what became of the rounds so far."""
        path = self.run / "rounds.jsonl"
        whole, _, _ = path.read_text().rpartition("\n") if path.exists() else ("", "", "")
        return [json.loads(line) for line in whole.splitlines()]  # without a line that is being written

    def accepted(self) -> int:
        """Return how many rounds are accepted."""
        return sum(record["accepted"] for record in self.records())

    def wait_for(self, rounds: int, seconds: float = _PATIENCE_SECONDS) -> None:
        """Wait until so many rounds are accepted."""
        wait_until(lambda: self.accepted() >= rounds, f"{rounds} rounds", seconds)

    def wait_for_end(self, seconds: float = _PATIENCE_SECONDS) -> None:
        """Wait until the host has ended, which is to be well."""
        assert self.host is not None, "a host ends"
        code = self.host.wait(seconds)
        assert code == 0, f"the host ended with {code}"


def can_have_namespaces() -> bool:
    """Whether network namespaces, and links between them, may be made here."""
    if shutil.which("ip") is None or os.name != "posix" or os.geteuid() != 0:
        return False
    name = f"drill-{os.getpid()}-try"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return False
    made = subprocess.run(["ip", "link", "add", "drill-try", "type", "veth", "peer", "name", "drill-try2"],
                          capture_output=True)  # fmt: skip
    subprocess.run(["ip", "link", "del", "drill-try"], capture_output=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return made.returncode == 0


@contextlib.contextmanager
def namespaces(names: Sequence[str]) -> Iterator[dict[str, str]]:
    """Give each name a network namespace of its own, linked to this one; 10.77.N.1 is this end of link N.

    Yields:
        Name of the namespace by name.
    """
    made: dict[str, str] = {}

    def ip(*words: object) -> None:
        subprocess.run(["ip", *map(str, words)], check=True, capture_output=True)

    try:
        for number, name in enumerate(names):
            space, here, there = f"drill-{os.getpid()}-{number}", f"dr{os.getpid() % 10000}h{number}", f"n{number}"
            ip("netns", "add", space)
            made[name] = space
            ip("link", "add", here, "type", "veth", "peer", "name", there, "netns", space)
            ip("addr", "add", f"10.77.{number}.1/24", "dev", here)
            ip("link", "set", here, "up")
            ip("-n", space, "addr", "add", f"10.77.{number}.2/24", "dev", there)
            for one in (there, "lo"):
                ip("-n", space, "link", "set", one, "up")
            ip("-n", space, "route", "add", "default", "via", f"10.77.{number}.1")
        yield made
    finally:
        for space in made.values():
            subprocess.run(["ip", "netns", "del", space], capture_output=True)


def set_link(space: str, number: int, state: str) -> None:
    """Cut a namespace's link, "down", or mend it, "up"; its routes go with it."""
    subprocess.run(["ip", "-n", space, "link", "set", f"n{number}", state], check=True, capture_output=True)
    if state == "up":
        subprocess.run(["ip", "-n", space, "route", "replace", "default", "via", f"10.77.{number}.1"], check=True,
                       capture_output=True)  # fmt: skip


def shape_link(space: str, number: int, rate: str, delay: str, loss: str) -> str:
    """Let what leaves a namespace go slowly, late and not always, and return how much of that this kernel can."""
    begin = ["ip", "netns", "exec", space, "tc", "qdisc", "add", "dev", f"n{number}", "root"]
    for told, words in (
        (f"{rate}, {delay}, {loss} loss", ["netem", "rate", rate, "delay", delay, "loss", loss]),
        (f"{rate} alone", ["tbf", "rate", rate, "burst", "64kb", "latency", "400ms"]),
    ):
        if not subprocess.run([*begin, *words], capture_output=True).returncode:
            return told
    return ""
