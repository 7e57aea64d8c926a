"""Send a finished model folder, or a checkpoint, to the hub."""

import re
import shlex
import time
from fnmatch import fnmatch
from pathlib import Path

from fanformer.data.sources.hub import is_temporary, require_hub
from fanformer.errors import CheckpointError, ConfigError

TRIES = 4
"""How often an upload is tried; what the hub has received already is not sent again."""
WAIT_SECONDS = 5.0
"""Wait before the second try; each further one doubles it."""

FILES_THAT_STAY = (
    "optimizer*",
    "training_state*",
    "manifest.json",
    "*.lock",
    "*.new",
    "*.tmp",
    "*.partial",
)
"""Files of a model folder that serve only to go on training here, or are not finished."""


def files_to_push(folder: Path) -> list[Path]:
    """Return the files of a model folder that belong on the hub, relative to it.

    These are the plain files directly in it: checkpoints, prepared and held-out data have folders of their own. Hidden
    files stay, and what serves only to go on training.

    Raises:
        CheckpointError: if the folder holds no model.
    """
    if not (folder / "config.json").is_file() or not any(folder.glob("model*.safetensors")):
        raise CheckpointError(
            f"{folder.absolute()} must hold config.json and model.safetensors to be pushed: name a finished run's "
            "folder or one of its checkpoints"
        )
    return [path.relative_to(folder) for path in sorted(folder.iterdir()) if path.is_file() and not _stays(path.name)]


def _stays(name: str) -> bool:
    return name.startswith(".") or any(fnmatch(name, pattern) for pattern in FILES_THAT_STAY)


def check_push_possible(repository: str) -> None:
    """Return if a push to `repository` has what it needs: a valid name, a hub that answers, a token it knows.

    Raises:
        ConfigError: if the name is invalid, there is no token, or the hub does not accept it.
        DataError: if the hub does not answer.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"`push_to_hub` must be a repository as USER/NAME, got {repository!r}: {error}") from error
    if get_token() is None:
        raise ConfigError(
            f"`push_to_hub` {repository} needs a token, got none: log in with `hf auth login`, or set HF_TOKEN"
        )
    require_hub(f"`push_to_hub` {repository}", "run without it; `hf upload` sends the finished folder later")
    try:
        user = HfApi().whoami()
    except HfHubHTTPError as error:
        raise ConfigError(
            f"`push_to_hub` {repository}: the hub does not accept the token ({_one_line(error)}): log in with "
            "`hf auth login`, or set HF_TOKEN"
        ) from error
    owner, slash, _ = repository.partition("/")
    names = [user["name"], *(group["name"] for group in user.get("orgs", []))]
    if slash and owner not in names:
        raise ConfigError(
            f"`push_to_hub` {repository}: the token is of `{user['name']}`, who may write to {', '.join(names)}: "
            "name a repository of these"
        )


def push(folder: Path, repository: str) -> str:
    """Upload a model folder in one commit and return its address; what was there before and has no successor stays.

    Raises:
        CheckpointError: if the folder holds no model.
        ConfigError: if the hub cannot be reached or refuses; the folder is complete all the same.
    """
    from huggingface_hub import HfApi

    names = [name.as_posix() for name in files_to_push(folder)]
    for failures in range(1, TRIES + 1):
        try:
            api = HfApi()
            address = api.create_repo(repository, exist_ok=True)
            api.upload_folder(
                repo_id=address.repo_id,
                folder_path=folder,
                allow_patterns=[_literal(name) for name in names],
                commit_message=f"Upload {folder.resolve().name}",
            )
            return str(address)
        # the hub's client and its HTTP library raise errors without a common name
        except Exception as error:
            if failures == TRIES or not is_temporary(error):
                raise ConfigError(
                    f"`push_to_hub` {repository} failed ({_one_line(error)}): the model is complete in "
                    f"{folder.absolute()}; send it later with `{_upload_command(folder, repository)}`"
                ) from error
            time.sleep(WAIT_SECONDS * 2 ** (failures - 1))
    raise AssertionError("the last try returns or raises")


def _literal(name: str) -> str:
    """Return a pattern that matches this name only."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _upload_command(folder: Path, repository: str) -> str:
    pushed = {name.as_posix() for name in files_to_push(folder)}
    left = {f"{path.name}/*" if path.is_dir() else path.name for path in folder.iterdir() if path.name not in pushed}
    excluded = {re.sub(r"^checkpoint-\d+/", "checkpoint-*/", name) for name in left}
    options = [word for name in sorted(excluded) for word in ("--exclude", name)]
    return shlex.join(["hf", "upload", repository, str(folder), ".", *options])


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
