"""What people get of a run: the model card, the curve, and the folder on the hub."""

import re
import shlex
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from fanformer.errors import CheckpointError, ConfigError
from fanformer.training.folder import read_records

CARD_FILE, CURVE_FILE = "README.md", "loss.png"
TRIES = 4
"""How often an upload is tried; what the hub has received already is not sent again."""
WAIT_SECONDS = 5.0
"""Wait before the second try; each further one doubles it."""

FILES_THAT_STAY = (
    "reference*",
    "optimizer*",
    "training_state*",
    "manifest.json",
    "*.lock",
    "*.new",
    "*.tmp",
    "*.partial",
)
"""Files of a model folder that serve only to go on training here, or are not finished."""


def plot_loss(folder: Path, run: Mapping[str, Any]) -> None:
    """Draw loss.png: training and held-out loss over tokens, given the content of run.yaml."""
    from fanformer.report.charts import Chart, Line

    records = read_records(folder)
    lines = []
    for number, (key, label) in enumerate((("loss", "training"), ("val_loss", "held out"))):
        points = [(record["tokens"], record[key]) for record in records if key in record]
        if points:
            lines.append(Line(label, number, number, *zip(*points, strict=True)))
    name = f"{title(run)}, {run['parameters']:,} parameters"
    chart = Chart(lines, name, "tokens", f"loss ({loss_unit(run)})", "loss", logarithmic=False)
    (folder / CURVE_FILE).write_bytes(chart.png())


_KINDS = {
    "text": "A base language model (it continues text; it was not taught to follow instructions), trained with "
    "`fanformer train`.",
    "answers": "A language model taught to answer, as its chat template writes conversations, with "
    "`fanformer finetune`. The loss is that of answers and their ends.",
    "preferences": "A language model taught which of two answers is better, with `fanformer finetune --preferences`. "
    "The loss is DPO's (arXiv:2305.18290), against the model that it began as.",
    "multimodal": "A language model with towers for pictures or sound, taught to answer about them with `fanformer "
    "train --multimodal`; the language model itself is as it was. Load it with `AutoModelForMultimodalLM` and "
    "`AutoProcessor`; what follows is its language model alone. The loss is that of answers and their ends.",
}
"""What a card says of a model, by the `objective` of its run."""


def title(run: Mapping[str, Any]) -> str:
    """Return what a trained model is called, given the content of its run.yaml."""
    if _objective(run) != "text":
        done = "with towers" if _objective(run) == "multimodal" else "tuned"
        return f"{Path(run['configuration']['init_from']).name}, {done}"
    kind, preset = run["model"]["model_type"], run["configuration"]["preset"]
    return f"FANformer, preset {preset}" if kind == "fanformer" else f"{kind}, trained as preset {preset}"


def model_card(run: Mapping[str, Any], record: Mapping[str, float], held_out: Mapping[str, Any], finished: bool) -> str:
    """Return the README.md of a model folder, with the figures of this run only.

    Args:
        run: the content of run.yaml.
        record: the latest figures, as in metrics.jsonl.
        held_out: what the prepared data says of its held-out split.
        finished: whether the run reached its planned end.
    """
    configuration, data = run["configuration"], run["data"]
    rows = [
        ("parameters", f"{run['parameters']:,}"),
        ("steps", f"{record['step']:,} ({'finished' if finished else 'a checkpoint of a run under way'})"),
        ("tokens trained on", f"{record['tokens']:,}"),
        ("training loss", _figure(record, "loss", loss_unit(run))),
        ("held-out loss", _figure(record, "val_loss", loss_unit(run))),
        *_of_objective(run, record, held_out),
        ("training data", f"`{configuration['data']}`, fingerprint `{data['fingerprint'][:16]}`"),
        (
            "optimizer, schedule",
            f"{configuration['optimizer']}, {configuration['schedule']}, "
            f"learning rate {configuration['learning_rate']}, {configuration['batch_size']} x "
            f"{configuration['sequence_length']} tokens a step",
        ),
        ("seed", str(configuration["seed"])),
        ("versions", ", ".join(f"{name} {number}" for name, number in run["versions"].items())),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [{run["model"]["model_type"]}, causal-lm]
---

# {title(run)}

{_KINDS[_objective(run)]}
Written on {datetime.now(UTC):%Y-%m-%d}; every figure below was measured in this run.

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)
```

`run.yaml` holds the whole configuration and every automatic decision; `metrics.jsonl` the curve.
"""


def _of_objective(
    run: Mapping[str, Any], record: Mapping[str, float], held_out: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """Return the rows of the card that depend on what was learnt."""
    if _objective(run) == "preferences":
        return [
            ("held-out margin", _figure(record, "val_margin", "nats")),
            ("held-out pairs whose chosen answer is ahead", _figure(record, "val_accuracy", "of 1")),
            ("beta", str(run["data"]["dpo_beta"])),
        ]
    return [
        ("held-out bits per byte", _figure(record, "val_bits_per_byte", "")),
        ("gzip -9 on all held-out bytes", _compressor(held_out, "gzip_bytes")),
        ("xz -9 on all held-out bytes", _compressor(held_out, "xz_bytes")),
    ]


def loss_unit(run: Mapping[str, Any]) -> str:
    """Return the unit of a run's losses, given the content of its run.yaml."""
    return "nats per pair" if _objective(run) == "preferences" else "nats per token"


def _objective(run: Mapping[str, Any]) -> str:
    return str(run["configuration"].get("objective", "text"))


def _figure(record: Mapping[str, float], key: str, unit: str) -> str:
    return f"{record[key]:.4f} {unit}".strip() if key in record else "not measured"


def _compressor(held_out: Mapping[str, Any], key: str) -> str:
    size = held_out.get(key)
    return f"{8 * size / held_out['bytes']:.4f} bits per byte" if size else "not measured"


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

    from fanformer.data.sources.hub import require_hub

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

    from fanformer.data.sources.hub import is_temporary

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
