"""What a run leaves behind besides weights and metrics.jsonl: run.yaml, loss.png and the model card."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from fanformer.errors import CheckpointError
from fanformer.files.durable import replace_text
from fanformer.training.records import read_records

RUN_FILE, CURVE_FILE = "run.yaml", "loss.png"
_PARTS_READ = ("configuration", "model", "data", "environment")
"""Parts of run.yaml without which a run cannot go on."""


def write_run_file(folder: Path, content: Mapping[str, Any]) -> None:
    """Write run.yaml: configuration, data, decisions, versions."""
    replace_text(folder / RUN_FILE, yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True))


def read_run_file(folder: Path) -> dict[str, Any]:
    """Read a run's run.yaml.

    Raises:
        CheckpointError: if it is missing or damaged.
    """
    path = folder / RUN_FILE
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise CheckpointError(
            f"cannot read {path.absolute()} ({type(error).__name__}): is this the folder of a run?"
        ) from error
    for name in _PARTS_READ:
        part = content.get(name) if isinstance(content, dict) else None
        if not isinstance(part, dict) or not part:
            raise CheckpointError(
                f"{path.absolute()} must have a mapping `{name}`, got {part!r:.40}: it was not written by `fanformer "
                "train`, or was changed since."
            )
    return content


def plot_loss(folder: Path, title: str) -> None:
    """Draw loss.png: training and held-out loss over tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = read_records(folder)
    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=120)
    for key, label, style in (("loss", "training", "-"), ("val_loss", "held out", "o-")):
        points = [(record["tokens"], record[key]) for record in records if key in record]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.4, markersize=4)
    axes.set(xlabel="tokens", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(folder / CURVE_FILE)
    pyplot.close(figure)


def title(run: Mapping[str, Any]) -> str:
    """Return what a trained model is called, given the content of its run.yaml."""
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
        ("training loss", _figure(record, "loss", "nats per token")),
        ("held-out loss", _figure(record, "val_loss", "nats per token")),
        ("held-out bits per byte", _figure(record, "val_bits_per_byte", "")),
        ("gzip -9 on the same held-out bytes", _compressor(held_out, "gzip_bytes")),
        ("xz -9 on the same held-out bytes", _compressor(held_out, "xz_bytes")),
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

A base language model (it continues text; it was not taught to follow instructions), trained with `fanformer train`.
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


def _figure(record: Mapping[str, float], key: str, unit: str) -> str:
    return f"{record[key]:.4f} {unit}".strip() if key in record else "not measured"


def _compressor(held_out: Mapping[str, Any], key: str) -> str:
    size = held_out.get(key)
    return f"{8 * size / held_out['bytes']:.4f} bits per byte" if size else "not measured"
