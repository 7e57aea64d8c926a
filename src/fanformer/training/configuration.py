"""What a training run is told: presets, their recipes, and one frozen configuration with every field explained.

This module imports neither torch nor transformers, so that `--help` stays fast.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from fanformer.data.sources.documents import is_prepared_folder
from fanformer.errors import ConfigError, did_you_mean

# What a configuration of `transformers` holds besides the model's fields.
_OF_THE_FOLDER = ("architectures", "auto_map", "dtype", "model_type", "transformers_version")
# Fields of a model that ranks for each kind of layer have replaced; a run.yaml of that time holds all of them.
_MODEL_BEFORE_RANKS = {"cola_rank_ratio", "cola_rank", "cola_layers"}
# Fields that say how long a run is; the last may stand beside one of the others, as a limit.
_LENGTHS = ("max_steps", "tokens", "epochs", "max_time")
OF_ONE_COMMAND = ("resume", "overwrite", "allow_changed_data")
"""Fields that say what one command does; the run's next command does it only where it is asked to again."""
_MOST = 10**15  # of anything that is counted: what is above is a slip of the finger, and too much for float64 below


@dataclass(frozen=True)
class Preset:
    """A named starting point: fields of FANformerConfig and fields of RunConfig that differ from their defaults."""

    name: str
    model: dict[str, Any]
    run: dict[str, Any]


def preset_names() -> list[str]:
    """Return the names of the presets that ship with the package."""
    folder = resources.files("fanformer.training") / "presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_preset(name: str) -> Preset:
    """Return the preset called `name`.

    Raises:
        ConfigError: if there is no such preset; the message offers the nearest name.
    """
    if name not in preset_names():
        raise ConfigError(f"preset must be one that exists, got {name!r}: {did_you_mean(name, preset_names())}")
    text = (resources.files("fanformer.training") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    return Preset(name, model=content["model"], run=content["run"])


def _setting(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a training run; `run.yaml` in the output folder holds the resolved copy."""

    preset: str = _setting("nano", "model and recipe to start from: nano, 92m, 92m-tuned or 1b")
    model: Mapping[str, Any] = field(default_factory=dict, metadata={"help": "fields of the model configuration"})
    init_from: str | None = _setting(None, "folder of a saved model whose weights to start from")

    data: str = _setting(
        "stdlib", "stdlib, a file or glob of .txt/.jsonl/.parquet, hf:NAME[:CONFIG], or a prepared folder"
    )
    eval_data: str | None = _setting(None, "data to measure the held-out loss on; default: a held-out part of the data")
    held_out_fraction: float = _setting(0.05, "share of the documents that is held out")
    max_data_bytes: int | None = _setting(None, "read documents only until they hold this many bytes")
    tokenizer: str | None = _setting(None, "folder or hub name of a tokenizer; default: train one on the data")
    vocab_size: int | None = _setting(None, "size of the tokenizer to train; default: the preset's vocabulary")
    sequence_length: int = _setting(1024, "tokens per row")

    output_dir: str | None = _setting(None, "folder of the run; default runs/PRESET")
    resume: bool = _setting(False, "go on from the last good checkpoint of the output folder")
    overwrite: bool = _setting(False, "delete the run that the output folder holds")
    save_steps: int | None = _setting(None, "steps between checkpoints; default: a fifth of the run")
    keep_last: int = _setting(2, "checkpoints to keep")
    keep_best: bool = _setting(True, "also keep the checkpoint with the lowest held-out loss")
    background_save: bool = _setting(True, "write checkpoints while training goes on")
    allow_changed_data: bool = _setting(False, "resume on other data or another tokenizer than the run began with")
    push_to_hub: str | None = _setting(None, "hub repository that receives the finished folder")

    max_steps: int | None = _setting(None, "optimizer steps to train")
    tokens: int | None = _setting(None, "tokens to train on, as 500000, 3M or 2B")
    epochs: float | None = _setting(None, "passes over the data to train")
    max_time: float | None = _setting(
        None,
        "wall-clock limit, as 90s, 5m or 2h30m: of this command where another field sets the length of the run, else "
        "it is the length of the run",
    )
    grace_seconds: float = _setting(60.0, "longest time from a signal to stop to the end of the process")

    seed: int = _setting(0, "seed of initialisation, data order and dropout")
    batch_size: int = _setting(16, "rows per optimizer step, over all processes")
    micro_batch_size: int | None = _setting(None, "rows per forward pass and process; default: the whole batch")
    optimizer: Literal["adamw", "muon"] = _setting(
        "adamw", "muon orthogonalises the updates of the blocks' matrices; adamw does the rest"
    )
    learning_rate: float = _setting(3e-3, "peak learning rate of AdamW")
    muon_scaling: Literal["adamw", "spectral"] = _setting(
        "adamw",
        "size of Muon's updates of a matrix, m outputs by n inputs: AdamW's, 0.2 sqrt(max(m, n)), or spectral, "
        "sqrt(m / n)",
    )
    muon_learning_rate_scale: float = _setting(1.0, "Muon's learning rate over AdamW's")
    embedding_learning_rate_scale: float = _setting(
        1.0, "the embedding's learning rate over the head's; 1 where they are tied"
    )
    weight_decay: float = _setting(0.1, "decoupled weight decay of matrices")
    beta1: float = _setting(0.9, "AdamW's decay of the gradient average")
    beta2: float = _setting(0.95, "AdamW's decay of the squared-gradient average")
    muon_momentum: float = _setting(0.95, "Muon's momentum")
    max_grad_norm: float = _setting(1.0, "gradient norm above which gradients are scaled down; 0 is off")
    schedule: Literal["wsd", "cosine"] = _setting(
        "wsd", "learning rate over the run: warm-up, stable, decay, or a cosine"
    )
    warmup_fraction: float = _setting(0.05, "share of the run over which the learning rate rises from 0")
    decay_fraction: float = _setting(0.4, "share of the run over which wsd falls")
    min_learning_rate_ratio: float = _setting(0.0, "final learning rate over the peak")

    max_skipped_steps: int = _setting(10, "steps in a row without a finite gradient after which the run ends")
    spike_rollback: float | None = _setting(
        None,
        "standard deviations of the loss above its recent mean from which the run goes back to its last checkpoint",
    )
    max_rollbacks: int = _setting(3, "how often a run goes back after a spike")

    eval_steps: int | None = _setting(None, "steps between held-out evaluations; default: a fifth of the run")
    eval_tokens: int = _setting(65536, "held-out tokens per evaluation during training")
    final_eval_tokens: int | None = _setting(None, "held-out tokens of the last evaluation; default: all")
    log_steps: int | None = _setting(
        None, "steps between lines of metrics.jsonl; default: a hundredth of the run, at most 50"
    )
    sample_prompt: str | None = _setting(None, "prompt continued after each evaluation; default: an empty one")

    device: Literal["auto", "cpu", "cuda", "mps"] = _setting("auto", "where to train")
    precision: Literal["auto", "float32", "bfloat16"] = _setting(
        "auto", "auto measures whether bfloat16 products are faster here"
    )
    compile: Literal["auto", "on", "off"] = _setting(
        "auto", "auto compiles where the planned run is long enough to pay for it"
    )
    attention: Literal["auto", "sdpa", "varlen", "flash_attention_2", "flash_attention_3", "flex_attention"] = _setting(
        "auto",
        "how packed rows are attended to; auto takes blocks of queries in compiled code on a CPU, flex_attention in "
        "compiled code on CUDA in bfloat16, else torch's SDPA; "
        "the others need CUDA and never multiply what belongs to two documents",
    )
    threads: int | None = _setting(None, "CPU threads; default: one a physical core")
    recompute: Literal["none", "low-rank", "block"] = _setting(
        "none",
        "what the backward pass computes again instead of keeping it: nothing, all but the low-rank activations "
        "(CoLA-M), or whole blocks; the same bits for less memory and more time",
    )
    deterministic: bool = _setting(
        True, "on CUDA, take the operations that give the same bits again, which resuming bit for bit needs"
    )
    parallel: Literal["auto", "ddp", "fsdp2"] = _setting(
        "auto", "how several processes share a model; auto does what the launcher says, else ddp"
    )

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            _check_type(item.name, getattr(self, item.name), FIELD_TYPES[item.name])
        for name, value in self.to_dict().items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"`{name}` must be a finite number, got {value}.")
            if isinstance(value, (int, float)) and value > _MOST and not name.endswith(("_rate", "_norm", "_scale")):
                raise ConfigError(f"`{name}` must be a number of at most {_MOST:g}, got {value}.")
        if not 0 <= self.seed < 1 << 32:
            raise ConfigError(f"`seed` must be in [0, 2**32), got {self.seed}.")
        for name in ("batch_size", "sequence_length", "keep_last", "eval_tokens", "max_skipped_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in (
            "max_steps",
            "tokens",
            "epochs",
            "max_time",
            "save_steps",
            "eval_steps",
            "final_eval_tokens",
            "log_steps",
            "threads",
            "micro_batch_size",
            "vocab_size",
            "max_data_bytes",
            "grace_seconds",
            "spike_rollback",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"`{name}` must be above 0, got {value}.")
        for name in ("learning_rate", "muon_learning_rate_scale", "embedding_learning_rate_scale"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"`{name}` must be above 0, got {getattr(self, name)}.")
        for name in ("warmup_fraction", "decay_fraction", "min_learning_rate_ratio", "beta1", "beta2", "muon_momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"`{name}` must be in [0, 1], got {getattr(self, name)}.")
        if not 0 < self.held_out_fraction < 1:
            raise ConfigError(f"`held_out_fraction` must be between 0 and 1, got {self.held_out_fraction}.")
        if self.warmup_fraction + self.decay_fraction > 1:
            raise ConfigError(
                "`warmup_fraction` and `decay_fraction` must add up to at most 1, got "
                f"{self.warmup_fraction} and {self.decay_fraction}."
            )
        lengths = [name for name in _LENGTHS[:3] if getattr(self, name) is not None]
        if len(lengths) > 1:
            raise ConfigError(f"the length of a run is set once, got {' and '.join(lengths)}: keep one of them.")
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ConfigError(
                "`batch_size` must be a multiple of `micro_batch_size`, got "
                f"{self.batch_size} and {self.micro_batch_size}."
            )
        if self.resume and self.overwrite:
            raise ConfigError("`resume` and `overwrite` exclude each other: one goes on with the run, one deletes it.")

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return Path(self.output_dir or f"runs/{self.preset}")

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, `model` as a plain dictionary."""
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self)} | {"model": dict(self.model)}


FIELD_TYPES = get_type_hints(RunConfig)
"""Type of every field of RunConfig by its name."""


def _as_word(value: Any, hint: Any) -> Any:
    """Return `on` or `off` for the truth values that YAML 1.1 makes of them, where a field is one of such words."""
    if isinstance(value, bool) and get_origin(hint) is Literal:
        return "on" if value else "off"
    return value


def _check_type(name: str, value: Any, hint: Any) -> None:
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ConfigError(f"`{name}` must be one of {', '.join(get_args(hint))}, got {value!r}.")
        return
    allowed = tuple(
        get_origin(part) or part for part in (get_args(hint) if get_origin(hint) is not Mapping else ())
    ) or (get_origin(hint) or hint,)
    if float in allowed:
        allowed += (int,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in allowed)
        raise ConfigError(f"`{name}` must be {expected}, got {value!r}.")


def resolve(
    preset: str = "nano", config_file: Path | None = None, overrides: Mapping[str, Any] | None = None
) -> RunConfig:
    """Join preset, configuration file and overrides, later ones winning, into one checked configuration.

    A preset's length is left out where another one is given, its tokenizer where the data are prepared or the weights
    are those of a saved model, and its model where the file holds a whole one from before the preset was another. The
    length of the file is left out where the overrides name another kind of length.

    Args:
        preset: name of the preset to start from; a `preset` key of the file or the overrides replaces it.
        config_file: YAML with fields of RunConfig, `model` being a mapping (such as a run's own run.yaml).
        overrides: fields of RunConfig; `model.NAME` sets one field of the model.

    Raises:
        ConfigError: if a key is unknown (the nearest is offered), or a value has the wrong type or range.
    """
    from_file = read_config_file(config_file) if config_file is not None else {}
    given = {**from_file, **(overrides or {})}
    chosen = load_preset(str(given.get("preset", preset)))
    merged: dict[str, Any] = {"preset": chosen.name, "model": dict(chosen.model), **chosen.run}
    if any(given.get(name) is not None for name in _LENGTHS):  # the preset's own length is for runs that name none
        merged = {key: value for key, value in merged.items() if key not in _LENGTHS}
    if is_prepared_folder(str(given.get("data"))) or given.get("init_from"):  # which have a tokenizer of their own
        merged.pop("tokenizer", None)
    from_file = _without_replaced_length(from_file, overrides or {})
    for key, value in [*from_file.items(), *(overrides or {}).items()]:
        if key == "model":
            whole = (value or {}).keys() >= _MODEL_BEFORE_RANKS
            merged["model"] = {**({} if whole else merged["model"]), **(value or {})}
        elif key.startswith("model."):
            merged["model"][key.removeprefix("model.")] = value
        elif key in FIELD_TYPES:
            merged[key] = _as_word(value, FIELD_TYPES[key])
        else:
            raise ConfigError(f"`{key}` is not a field of the run configuration: {did_you_mean(key, FIELD_TYPES)}")
    return RunConfig(**merged)


def resolve_run(config_file: Path | None, overrides: Mapping[str, Any]) -> RunConfig:
    """Return the configuration of a new run, or of the one that is resumed with the given fields changed."""
    if overrides.get("resume") and config_file is None:
        folder = Path(overrides.get("output_dir") or f"runs/{overrides.get('preset', 'nano')}")
        if (folder / "run.yaml").is_file():
            config_file = folder / "run.yaml"
    config = resolve(config_file=config_file, overrides=overrides)
    fields = sorted(name for name in overrides if name.startswith("model."))
    if config.init_from is not None and fields:
        raise ConfigError(
            f"`{fields[0]}` does not apply beside `init_from`, got {overrides[fields[0]]!r}: the weights of "
            f"{config.init_from} have a shape of their own; leave it out."
        )
    return config if overrides.get("resume") else dataclasses.replace(config, resume=False)


def _without_replaced_length(from_file: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return a file's fields without the length that the overrides replace by one of another kind.

    A limit of time stays beside a length in steps, but where it is the file's only length it is replaced too.
    """
    *lengths, limit = _LENGTHS
    if all(overrides.get(name) is None for name in lengths):
        return from_file
    replaced = [name for name in lengths if from_file.get(name) is not None] or [limit]
    return {name: value for name, value in from_file.items() if name not in replaced}


def read_config_file(path: Path) -> dict[str, Any]:
    """Read a YAML file of RunConfig fields.

    Of a run's own run.yaml the part under `configuration` counts, without the fields that are OF_ONE_COMMAND.

    Where the run's model is from before each kind of layer had a rank, that model counts, whole: its preset now means
    another.

    Raises:
        ConfigError: if the file is missing, not YAML, or not a mapping.
    """
    if not path.is_file():
        raise ConfigError(f"configuration file not found: {path.absolute()}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a mapping of fields to values, got {type(content).__name__}.")
    of_a_run, built = "configuration" in content, content.get("model")
    content = content.get("configuration", content)
    if not isinstance(content, dict) or not content or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"`configuration` of {path} must be a mapping of fields to values, got {content!r:.60}.")
    if not of_a_run:
        return content
    content = {name: value for name, value in content.items() if name not in OF_ONE_COMMAND}
    if isinstance(built, dict) and built.keys() >= _MODEL_BEFORE_RANKS:
        model = {key: value for key, value in built.items() if key not in _OF_THE_FOLDER}
        content["model"] = model | (content.get("model") or {})
    return content


def parse_setting(text: str) -> tuple[str, Any]:
    """Split `key=value`, the value being YAML (so 3, 0.5, true, null and words come out as such).

    Raises:
        ConfigError: if there is no `=`.
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"a setting must be key=value, got {text!r}.")
    parsed = yaml.safe_load(value)
    if isinstance(parsed, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", parsed):
        parsed = float(parsed)  # YAML 1.1 wants a dot and a sign before it sees a float in 1e-3
    return key.strip(), parsed


def parse_duration(text: str) -> float:
    """Return seconds for 90, 90s, 5m, 2h30m or 1d.

    Raises:
        ConfigError: if the text is none of these.
    """
    match = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?", text.strip())
    if not text.strip() or match is None:
        raise ConfigError(f"a duration must look like 90s, 5m, 2h30m or 1d, got {text!r}.")
    days, hours, minutes, seconds = (float(group or 0) for group in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def parse_count(text: str) -> int:
    """Return an integer for 500000, 500k, 3M or 2B.

    Raises:
        ConfigError: if the text is none of these.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMbB]?)", text.strip().replace("_", ""))
    if match is None:
        raise ConfigError(f"a count must look like 500000, 500k, 3M or 2B, got {text!r}.")
    return int(float(match[1]) * {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}[match[2].lower()])


PARSERS: Mapping[str, Callable[[str], Any]] = {"max_time": parse_duration, "tokens": parse_count}
"""What reads the fields that people write as text."""
