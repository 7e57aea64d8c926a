"""Fixtures common to all tests: no network, a tiny model, golden files, and real data where they are at hand."""

import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

from fanformer.machine.threads import spin_briefly

spin_briefly(os.environ)  # tests side by side share the cores
os.environ["HF_HUB_OFFLINE"] = "1"
_HF_HOME = tempfile.TemporaryDirectory(prefix="fanformer-tests-")  # removed when the process ends
os.environ["HF_HOME"] = _HF_HOME.name
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers share the cores

_LOOPBACK = ("127.", "::1", "localhost")
_connect, _connect_ex = socket.socket.connect, socket.socket.connect_ex


def _refuse_network(sock: socket.socket, address) -> None:
    if sock.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(_LOOPBACK):
        raise OSError(f"tests must not use the network, got a connection to {address}")


def _guarded_connect(sock, address):
    _refuse_network(sock, address)
    return _connect(sock, address)


def _guarded_connect_ex(sock, address):
    _refuse_network(sock, address)
    return _connect_ex(sock, address)


@pytest.fixture(scope="session", autouse=True)
def _no_network():
    """Raise on every connection that leaves this machine."""
    socket.socket.connect, socket.socket.connect_ex = _guarded_connect, _guarded_connect_ex
    yield
    socket.socket.connect, socket.socket.connect_ex = _connect, _connect_ex


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of this repository."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def golden_files() -> Path:
    """The folder of weights and logits of the published implementations."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def shared(repository: Path) -> Path:
    """The folder of real data beside the repository."""
    path = repository.parent / "shared"
    if not path.is_dir():
        pytest.skip(f"needs real data, which are not at {path}")
    return path


@pytest.fixture(scope="session")
def tiny_config():
    """Make a configuration of 2 layers and width 64, ranks in the default's proportions; keywords replace fields."""

    def make(**fields):
        from fanformer.model import FANformerConfig

        tiny = {
            "vocab_size": 256,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 128,
            "dropout": 0.0,
            "qkv_rank": 44,
            "o_rank": 32,
            "gate_up_rank": 28,
            "down_rank": 40,
        }
        return FANformerConfig(**{**tiny, **fields})

    return make


@pytest.fixture(scope="session")
def tiny_model(tiny_config):
    """Make a tiny model in evaluation mode; the same seed and fields give the same weights.

    Biases, gates, norms and the matrices that end a branch are moved off their initial 0 and 1, so that every parameter
    matters, and the LM head is scaled up, so that greedy text does not repeat one token.
    """

    def make(seed=0, **fields):
        import torch

        from fanformer.model import FANformerForCausalLM

        torch.manual_seed(seed)
        model = FANformerForCausalLM(tiny_config(**fields)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
                elif not parameter.any():
                    parameter.normal_(std=parameter.shape[1] ** -0.5)
            model.lm_head.weight.mul_(10 if not model.config.tie_word_embeddings else 20)
        return model

    return make


@pytest.fixture(scope="session")
def token_ids():
    """Make random token ids (B, T) below 256."""

    def make(*shape, seed=1):
        import torch

        return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture
def mount_disk(tmp_path):
    """Mount a file system with the given tmpfs options, such as `size=64k,ro`, and return its folder."""
    mounted = []

    def mount(options):
        path = tmp_path / "disk"
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("needs the right to mount a tmpfs")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", str(path)], check=True)
