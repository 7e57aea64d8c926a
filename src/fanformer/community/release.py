"""Accepted rounds as signed folders: what makes one, and what checks it.

An accepted round is `checkpoint-N`, a complete `transformers` folder. Its `round.json` names the SHA-256 of every other
file but the card, of the round before, and who contributed; `round.json.sig` is the Ed25519 signature of its bytes.
"""

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fanformer.community.folder import BESIDE_THE_MODEL
from fanformer.community.identity import PublicKey, SigningKey, read_public_key
from fanformer.errors import CheckpointError, did_you_mean
from fanformer.files.durable import hash_file, read_json
from fanformer.training.checkpoint import MANIFEST_FILE, step_of
from fanformer.training.publishing import CARD_FILE

ROUND_FILE, SIGNATURE_FILE = "round.json", "round.json.sig"
FORMAT_VERSION = 1
_ROUND = re.compile(r"checkpoint-[0-9]+")
_NOT_SIGNED = (CARD_FILE, MANIFEST_FILE, ROUND_FILE, SIGNATURE_FILE)
"""The card is for people, who may edit it; the manifest is written after the signature, and lists the same files."""


def sign_folder(folder: Path, key: SigningKey, about: Mapping[str, Any]) -> None:
    """Write ROUND_FILE and SIGNATURE_FILE into a folder that has all its other files.

    Args:
        folder: of an accepted round, not yet where it is to be.
        key: of the run.
        about: what is said of the round, plain JSON.
    """
    files = {name: hash_file(folder / name) for name in _names(folder)}
    content = json.dumps({"format_version": FORMAT_VERSION, **about, "files": files}, indent=1) + "\n"
    (folder / ROUND_FILE).write_bytes(content.encode())
    (folder / SIGNATURE_FILE).write_text(key.sign(content.encode()) + "\n", encoding="ascii")


def _names(folder: Path) -> list[str]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return sorted(name for path in paths if (name := path.relative_to(folder).as_posix()) not in _NOT_SIGNED)


@dataclass(frozen=True)
class Verified:
    """What was found in the folder of a round.

    Attributes:
        folder: that was read.
        about: content of its round.json; empty where that is unreadable.
        problem: what is wrong, or "".
    """

    folder: Path
    about: Mapping[str, Any]
    problem: str


def verify_folder(folder: Path, key: PublicKey, is_run: bool = False) -> Verified:
    """Check signature and bytes of a round's folder.

    Args:
        folder: of the round.
        key: of the run.
        is_run: whether it is the run's own folder, where a round lies among the run's files and folders.
    """
    try:
        content = (folder / ROUND_FILE).read_bytes()
        signature = (folder / SIGNATURE_FILE).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        return Verified(folder, {}, f"it is not signed ({error})")
    if not key.has_signed(content, signature):
        return Verified(folder, {}, "its signature is not that of the run's key: it is forged, or was changed")
    about = json.loads(content)
    if about["format_version"] != FORMAT_VERSION:
        return Verified(folder, about, f"its format version is {about['format_version']}, expected {FORMAT_VERSION}")
    files = about["files"]
    there = _beside_the_run(folder) if is_run else _names(folder)
    for name in sorted({*files, *there}):
        if not (folder / name).is_file():
            return Verified(folder, about, f"{name} is missing")
        if name not in files:
            return Verified(folder, about, f"{name} is there and was not signed")
        if hash_file(folder / name) != files[name]:
            return Verified(folder, about, f"the SHA-256 of {name} is not the signed one")
    return Verified(folder, about, "")


def verify_run(folder: Path) -> list[Verified]:
    """Check every accepted round in a run's folder, that each follows the one before, and the folder's own model.

    The folder itself, last where it has more than the run's own files, must hold a round as it was signed, and no file
    beside it that the run does not know: a model could be loaded with it.

    Raises:
        CheckpointError: if the folder is none of a community run, or has no round.
    """
    if not folder.is_dir():
        raise CheckpointError(f"no folder {folder.absolute()}: expected that of a community run.")
    key = read_public_key(folder)
    found = [verify_folder(path, key) for path in _rounds(folder)]
    if not found:
        raise CheckpointError(f"{folder.absolute()} has no accepted round: expected folders such as checkpoint-0.")
    checked = [found[0]]
    for before, one in itertools.pairwise(found):
        follows = step_of(one.folder) == step_of(before.folder) + 1
        if follows and before.about and not one.problem and one.about["previous"] != digest_of(before.folder):
            one = Verified(one.folder, one.about, f"it does not follow {before.folder.name}, which is another round")
        checked.append(one)
    checked = [_named_right(one) for one in checked]
    if (folder / ROUND_FILE).exists() or _beside_the_run(folder):
        checked.append(verify_folder(folder, key, is_run=True))
    return checked


def _rounds(folder: Path) -> list[Path]:
    """Return all that bears a round's name, the earliest first, be it written to its end or not."""
    return sorted((path for path in folder.iterdir() if _ROUND.fullmatch(path.name)), key=step_of)


def _named_right(one: Verified) -> Verified:
    """Refuse a round that was signed as another number than its folder's name says."""
    if not one.problem and one.about["number"] != step_of(one.folder):
        return Verified(one.folder, one.about, f"it was signed as round {one.about['number']}")
    return one


def _beside_the_run(folder: Path) -> list[str]:
    return [name for name in _names(folder) if not _is_of_the_run(name)]


def _is_of_the_run(name: str) -> bool:
    """Return whether a file of a run's folder is the run's: what no model is loaded from."""
    return "/" in name or name in BESIDE_THE_MODEL or name.endswith(".new")  # which is being written


def digest_of(folder: Path) -> str:
    """Return the SHA-256 of what a round's folder says of itself, which the next round names."""
    return hash_file(folder / ROUND_FILE)


def read_round(folder: Path) -> dict[str, Any]:
    """Return what a round's folder says of itself, unverified.

    Raises:
        CheckpointError: if it cannot be read.
    """
    try:
        content: dict[str, Any] = read_json(folder / ROUND_FILE)
    except (OSError, ValueError) as error:
        names = [path.name for path in folder.parent.glob("checkpoint-*")]
        raise CheckpointError(
            f"cannot read {(folder / ROUND_FILE).absolute()}: {did_you_mean(folder.name, names)}"
        ) from error
    return content
