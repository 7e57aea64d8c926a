"""What a comparison decides about the machine: once for all of its trainings, as long as the same is asked for."""

from pathlib import Path
from typing import Any

import yaml

from fanformer.files.durable import replace_text
from fanformer.training.environment import decide
from fanformer.training.events import Event, Listener
from fanformer.training.fields import MachineConfig
from fanformer.training.folder import MACHINE_FIELDS

DECISIONS_FILE = "decisions.yaml"


def decide_once(config: MachineConfig, operations: int, folder: Path, listener: Listener) -> dict[str, Any]:
    """Return device, precision, compilation and threads of all trainings of a comparison, as fields of RunConfig.

    What its folder holds counts where the same was asked for and planned; else it is decided anew.

    Args:
        config: what is asked for.
        operations: floating-point operations of the longest training.
        folder: of the comparison.
        listener: hears what is decided.

    Raises:
        ConfigError: as `environment.decide`.
    """
    path = folder / DECISIONS_FILE
    asked = {name: getattr(config, name) for name in MACHINE_FIELDS} | {"operations": operations}
    known = _read(path)
    if known.get("asked") == asked and known["decided"].keys() == set(MACHINE_FIELDS):
        return dict(known["decided"])
    environment = decide(config, float(operations), None)
    decided = {
        "device": environment.device,
        "precision": environment.precision,
        "compile": "on" if environment.compile else "off",
        "threads": environment.threads,
    }
    listener(Event("note", f"{', '.join(f'{name} {value}' for name, value in decided.items())}: the same for all"))
    replace_text(path, yaml.safe_dump({"asked": asked, "decided": decided}))
    return decided


def _read(path: Path) -> dict[str, Any]:
    """Return what a file holds; nothing where there is none, it is damaged, or an older version wrote it."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) and isinstance(content.get("decided"), dict) else {}
