"""How the rounds of a host go, told from the process that keeps them to the one that watches it.

The file has its size from the beginning, so that a full disk has room for the reason too.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fanformer.community.folder import FLOWER_FOLDER
from fanformer.files.durable import read_json

NODES_FILE = "nodes.json"
"""In the same folder: names of members, with the numbers that Flower gave their keys, and who may take part no more."""
_SIZE = 4096
_FILE = "outcome"
_LONGEST_ERROR = 400


@dataclass(frozen=True)
class Outcome:
    """How the rounds go.

    Attributes:
        state: "" before they are kept, "running", "finished" or "failed".
        error: why they failed.
        pid: number of the process that keeps them.
    """

    state: str = ""
    error: str = ""
    pid: int = 0


def clear_outcome(folder: Path) -> None:
    """Take the file's place on the disk, and say that no rounds are kept yet.

    Args:
        folder: of the run.
    """
    path = folder / FLOWER_FOLDER / _FILE
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.write_bytes(b" " * _SIZE)


def write_outcome(folder: Path, state: str, error: str = "") -> None:
    """Say how the rounds that this process keeps go."""
    outcome = Outcome(state, ascii(" ".join(error.split()))[1:-1][:_LONGEST_ERROR], os.getpid())
    content = json.dumps(asdict(outcome)).encode().ljust(_SIZE)
    handle = os.open(folder / FLOWER_FOLDER / _FILE, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.write(handle, content)
        os.fsync(handle)
    finally:
        os.close(handle)


def read_outcome(folder: Path) -> Outcome:
    """Return how the rounds of a run's folder go."""
    try:
        text = (folder / FLOWER_FOLDER / _FILE).read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return Outcome()
    return Outcome(**json.loads(text)) if text else Outcome()


def read_nodes(folder: Path) -> dict[int, str]:
    """Return the names of those members of a run's folder who may take part, by the numbers that Flower gave them."""
    return {int(node["number"]): str(node["name"]) for node in _nodes(folder)}


def read_fingerprints(folder: Path) -> frozenset[str]:
    """Return the fingerprints of the keys of those who may take part in the run of a folder."""
    return frozenset(str(node["fingerprint"]) for node in _nodes(folder))


def _nodes(folder: Path) -> list[dict[str, Any]]:
    try:
        return [node for node in read_json(folder / FLOWER_FOLDER / NODES_FILE) if not node.get("is_out")]
    except FileNotFoundError:
        return []
