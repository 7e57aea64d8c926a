"""The host's processes: Flower's SuperLink and what it starts, registered members, and a run handed to them."""

import contextlib
import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from fanformer.community.flower.content import flower
from fanformer.community.flower.link import PORT_FILE, end_all
from fanformer.community.flower.outcome import NODES_FILE
from fanformer.community.folder import FLOWER_FOLDER, KEYS_FOLDER
from fanformer.community.identity import CERTIFICATE, CERTIFICATE_KEY, PublicMember, read_public_bytes
from fanformer.errors import ConfigError, DataError
from fanformer.files.durable import read_json, replace_json

LINK_LOG = "link.log"
_APP_FOLDER, _HOME_FOLDER, _DATABASE = "app", "home", "state.db"
_START_SECONDS = 300.0
_STOP_SECONDS = 15.0
_LEFT_BEHIND_SECONDS = 30.0
_APP = {
    "pyproject.toml": """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "fanformer-community"
version = "1.0.0"
description = "Names what of the installed fanformer Flower is to run."
license = {{ file = "LICENSE" }}
dependencies = ["flwr>={version}"]

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "fanformer"
fab-format-version = 1
flwr-version-target = "{version}"

[tool.flwr.app.components]
serverapp = "community_app.server:app"
clientapp = "community_app.client:app"

[tool.flwr.app.config]
folder = ""
""",
    "LICENSE": "MIT, as fanformer.\n",
    "community_app/__init__.py": "",
    "community_app/server.py": "from fanformer.community.flower.server import server_app\n\napp = server_app()\n",
    "community_app/client.py": """from flwr.clientapp import ClientApp

app = ClientApp()  # does nothing: members run the fanformer that they installed


@app.train()
def train(message, context):
    raise RuntimeError("members of a community run join with `fanformer community join`")
""",
}
"""An app in Flower's form; it has no code of its own."""


class HostProcesses:
    """Flower's processes for one run; a context manager that stops them."""

    def __init__(self, folder: Path, host: str, port: int) -> None:
        """Set up.

        Args:
            folder: of the run.
            host: address to listen at for members.
            port: likewise.

        Raises:
            ConfigError: if the port is taken.
        """
        self._folder, self._host, self._port = folder.absolute(), host, port
        self._own = self._folder / FLOWER_FOLDER
        self._own.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._local_port = self._run = 0
        self._link: subprocess.Popen[bytes] | None = None
        require_free(folder, host, port)

    def __enter__(self) -> "HostProcesses":
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _environment(self) -> dict[str, str]:
        own = {
            "FLWR_HOME": str(self._own / _HOME_FOLDER),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "PYTHONUNBUFFERED": "1",
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        }
        return {**os.environ, **own}

    def start(self) -> None:
        """Start the SuperLink and wait until it answers.

        Raises:
            DataError: if it does not; the message has its last words.
        """
        self.stop()
        (self._own / PORT_FILE).unlink(missing_ok=True)
        keys = self._folder / KEYS_FOLDER
        words = [
            "--ssl-certfile", keys / CERTIFICATE, "--ssl-keyfile", keys / CERTIFICATE_KEY, "--ssl-ca-certfile",
            keys / CERTIFICATE, "--enable-supernode-auth", "--disable-runtime-dependency-installation", "--database",
            self._own / _DATABASE,
        ]  # fmt: skip
        command = [sys.executable, "-m", "fanformer.community.flower.link", self._folder, self._host, self._port,
                   *words]  # fmt: skip
        with (self._own / LINK_LOG).open("ab") as log:
            self._link = subprocess.Popen(
                list(map(str, command)), env=self._environment(), cwd=self._own, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self._wait()

    def _wait(self) -> None:
        until, place = time.monotonic() + _START_SECONDS, self._own / PORT_FILE
        while time.monotonic() < until and self.is_alive:
            if place.exists():
                self._local_port = int(place.read_text())
                with socket.socket() as tried:
                    if not tried.connect_ex(("127.0.0.1", self._local_port)):
                        return
            time.sleep(0.2)
        raise DataError(f"Flower's SuperLink did not start: {self.last_words()}")

    @property
    def is_alive(self) -> bool:
        """Whether the SuperLink runs."""
        return self._link is not None and self._link.poll() is None

    def last_words(self) -> str:
        """Return where the log is and how it ends."""
        path = self._own / LINK_LOG
        text = path.read_bytes()[-400:].decode("utf-8", "replace") if path.exists() else ""
        return f"{path} ends with {' '.join(text.split())!a}"

    @contextmanager
    def _control(self) -> Iterator[Any]:
        """Give a client of Flower's commands.

        Raises:
            DataError: if Flower refuses one.
        """
        httpx = flower("supercore.protobuf.client").httpx
        told_version = flower("supercore.interceptors.http.runtime_version").RuntimeVersionHttpInterceptor
        certificate = str(self._folder / KEYS_FOLDER / CERTIFICATE)
        opened = flower("supercore.control").ControlHttpClient.from_server_address(
            f"127.0.0.1:{self._local_port}", False, certificate, [told_version(component_name="flwr CLI")]
        )
        with opened as client:
            try:
                yield client
            except httpx.HTTPError as error:
                told = getattr(getattr(error, "response", None), "text", error)
                raise DataError(f"Flower refuses a command of the host: {ascii(str(told))[:300]}") from error

    def register(self, members: Sequence[PublicMember]) -> list[str]:
        """Let the SuperLink know who may take part, and return what is new, a line each.

        Whose key is gone stays registered with Flower, which takes no key twice, but gets no share any more.

        Raises:
            DataError: if Flower refuses a key.
        """
        path = self._own / NODES_FILE
        known: list[dict[str, Any]] = read_json(path) if path.exists() and (self._own / _DATABASE).exists() else []
        fingerprints = {one["fingerprint"] for one in known}
        new = [member for member in members if member.fingerprint not in fingerprints]
        told = _changed(known, {member.fingerprint for member in members})
        if told:
            replace_json(path, known)
        if not new:
            return told
        kinds = flower("proto.control_pb2")
        with self._control() as client:
            # Flower takes a key once, and a host that was killed may not have written down its number
            numbers = {node.public_key: node.node_id for node in client.ListNodes(kinds.ListNodesRequest()).nodes_info}
            for member in new:
                public = read_public_bytes(member.file)
                if public not in numbers:
                    request = kinds.RegisterNodeRequest(public_key=public, name=member.name)
                    numbers[public] = client.RegisterNode(request).node_id
                number = int(numbers[public])
                known.append({"number": number, "name": member.name, "fingerprint": member.fingerprint})
                replace_json(path, known)
        return told + [f"{member.name} may take part" for member in new]

    def submit(self) -> None:
        """Have the SuperLink start the process that keeps the rounds.

        Raises:
            DataError: if it refuses.
        """
        app = self._own / _APP_FOLDER
        for name, content in _APP.items():
            place = app / name
            place.parent.mkdir(parents=True, exist_ok=True)
            text = content.format(version=version("flwr")) if name == "pyproject.toml" else content
            place.write_text(text, encoding="utf-8")
        serde, kinds = flower("common.serde"), flower("proto.control_pb2")
        body = flower("cli.build").build_fab_from_disk(app)
        fab = flower("supercore.fab").Fab(hashlib.sha256(body).hexdigest(), body, {})
        settings = serde.user_config_to_proto({"folder": str(self._folder)})
        with self._control() as client:
            started = client.StartRun(kinds.StartRunRequest(fab=serde.fab_to_proto(fab), override_config=settings))
        self._run = int(started.run_id)

    def is_given_up(self) -> bool:
        """Return whether Flower has ended what was submitted last, as it does with a process that begins too slowly.

        Raises:
            DataError: if it does not say.
        """
        with self._control() as client:
            runs = client.ListRuns(flower("proto.control_pb2").ListRunsRequest(run_id=self._run)).run_dict
        return self._run in runs and runs[self._run].status.status == flower("common.constant").Status.FINISHED

    def stop(self) -> None:
        """Stop the SuperLink, and with it all that it started."""
        if self._link is None:
            return
        started: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error):  # it has ended already
            started = psutil.Process(self._link.pid).children(recursive=True)
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._link.poll() is None:
                self._link.send_signal(number)
                try:
                    self._link.wait(_STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    continue
        end_all(started)
        self._link = None


def _changed(known: Sequence[dict[str, Any]], wanted: set[str]) -> list[str]:
    """Note who of those that are known may take part, by the fingerprints of their keys, and return what changed."""
    told = []
    for one in known:
        is_out = one["fingerprint"] not in wanted
        if is_out != one.get("is_out", False):
            one["is_out"] = is_out
            told.append(f"{one['name']} may take part {'no more' if is_out else 'again'}")
    return told


def require_free(folder: Path, host: str, port: int) -> None:
    """Refuse a port that is taken.

    Args:
        folder: of the run that wants it; where its host was killed, its processes end a moment later.
        host: address to listen at for members.
        port: likewise.

    Raises:
        ConfigError: if the port is taken.
    """
    if port == 0:
        raise ConfigError("`--port` must be from 1 to 65535, got 0: members have to know it.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    until = time.monotonic() + (_LEFT_BEHIND_SECONDS if (folder / FLOWER_FOLDER / LINK_LOG).exists() else 0.0)
    while True:
        with socket.socket(family) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tried.bind((host, port))
                return
            except (OSError, OverflowError) as error:
                if time.monotonic() >= until:
                    raise ConfigError(
                        f"cannot listen at `--listen` {host}, `--port` {port}: {error}: choose others."
                    ) from error
        time.sleep(0.5)
