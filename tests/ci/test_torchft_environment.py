"""The example for trusted clusters, where torchft is: a group is killed, comes back, and has the others' weights."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import venv

import pytest

pytestmark = pytest.mark.ci

PINS = ("torchft==0.2.0",)
MODEL = ("hidden_size=32", "num_hidden_layers=2", "head_dim=16", "intermediate_size=64")
RUN = ("max_data_bytes=200000", "vocab_size=400", "batch_size=4", "sequence_length=64", "precision=float32")


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """An interpreter that has torchft beside what this one has; the borrowed torch is the one that pip finds."""
    folder = tmp_path_factory.mktemp("environment") / "env"
    venv.create(folder, with_pip=True)
    [site] = (folder / "lib").glob("python*/site-packages")
    borrowed = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "borrowed.pth").write_text(borrowed + "\n")
    python = folder / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PINS], check=True, timeout=600)
    return python


class Cluster:
    """A lighthouse and replica groups, whose logs are files."""

    def __init__(self, python, repository, folder):
        self.python, self.folder, self.processes = python, folder, {}
        self.program = repository / "examples" / "community_torchft.py"
        with socket.socket() as tried:
            tried.bind(("127.0.0.1", 0))
            port = tried.getsockname()[1]
        self.environment = {**os.environ, "PYTHONPATH": str(repository / "src"), "HF_HUB_OFFLINE": "1",
                            "OMP_NUM_THREADS": "1", "TORCHFT_LIGHTHOUSE": f"http://localhost:{port}"}  # fmt: skip
        light = python.with_name("torchft_lighthouse")
        self.start("light", light, "--min_replicas", "1", "--join_timeout_ms", "3000", "--heartbeat_timeout_ms", "3000",
                   "--bind", f"[::]:{port}")  # fmt: skip

    def start(self, name, *words):
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                list(map(str, words)), env=self.environment, stdout=log, stderr=log, cwd=self.folder
            )

    def train(self, name, group):
        settings = [*RUN, *(f"model.{item}" for item in MODEL)]
        self.start(name, self.python, self.program, "--group", group, "--output-dir", self.folder / name, "--syncs",
                   100_000, "--sync-steps", 5, "--set", *settings)  # fmt: skip

    def syncs(self, name):
        """Return the weights' checksum that a group told after each sync that two groups took part in."""
        text = (self.folder / f"{name}.log").read_text(errors="replace")
        return dict(re.findall(r"^sync (\d+) groups 2 .* weights (\w+)$", text, re.MULTILINE))

    def wait_for_common(self, one, other, most=150):
        """Wait until two groups told of the same sync, and return its number and both checksums."""
        until = time.monotonic() + most
        while time.monotonic() < until:
            first, second = self.syncs(one), self.syncs(other)
            both = sorted(first.keys() & second.keys(), key=int)
            if len(both) >= 2:
                return both[-1], first[both[-1]], second[both[-1]]
            time.sleep(0.5)
        logs = [(self.folder / f"{name}.log").read_text(errors="replace")[-3000:] for name in (one, other)]
        raise AssertionError(f"no common sync in {most} s\n" + "\n---\n".join(logs))

    def close(self):
        for process in self.processes.values():
            process.kill()
            process.wait()


@pytest.mark.timeout(700)
def test_a_killed_group_comes_back_and_is_in_step(python, repository, tmp_path):
    cluster = Cluster(python, repository, tmp_path)
    try:
        for group in (0, 1):
            cluster.train(f"group-{group}", group)
        _, first, second = cluster.wait_for_common("group-0", "group-1")
        assert first == second
        cluster.processes["group-1"].send_signal(signal.SIGKILL)
        cluster.processes["group-1"].wait()
        cluster.train("again", 1)
        number, first, second = cluster.wait_for_common("group-0", "again")
        assert int(number) > 2, "it went on, rather than beginning anew"
        assert first == second
        assert cluster.processes["group-0"].poll() is None
    finally:
        cluster.close()
