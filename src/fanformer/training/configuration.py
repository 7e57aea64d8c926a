"""How a run is configured: a preset and its recipe, a file, and what the command says, each over the one before.

This module imports neither torch nor transformers, so that `--help` stays fast.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin

import yaml

from fanformer.data.sources.documents import is_prepared_folder
from fanformer.errors import ConfigError, did_you_mean
from fanformer.training.fields import LENGTHS, RunConfig, run_field
from fanformer.training.folder import RUN_FILE

# What a configuration of `transformers` holds besides the model's fields.
_OF_THE_FOLDER = ("architectures", "auto_map", "dtype", "model_type", "transformers_version")
# Fields of a model that ranks for each kind of layer have replaced; a run.yaml of that time holds all of them.
_MODEL_BEFORE_RANKS = {"cola_rank_ratio", "cola_rank", "cola_layers"}
OF_ONE_COMMAND = ("resume", "overwrite", "allow_changed_data")
"""Fields that say what one command does; the run's next command does it only where it is asked to again."""


TUNING: Mapping[str, Any] = {
    "objective": "answers",
    "epochs": 2.0,
    "batch_size": 8,
    "optimizer": "adamw",
    "learning_rate": 5e-4,
    "embedding_learning_rate_scale": 1.0,
    "weight_decay": 0.0,
    "schedule": "cosine",
    "sample_prompt": None,
}
"""Fields of a tuning in a preset's place; not chosen by measurement."""
PREFERENCES: Mapping[str, Any] = {**TUNING, "objective": "preferences", "learning_rate": 5e-5, "dpo_beta": 0.1}
"""The same for preferences."""
_RECIPES = {str(recipe["objective"]): recipe for recipe in (TUNING, PREFERENCES)}
MULTIMODAL: Mapping[str, Any] = {
    "objective": "multimodal",
    "epochs": 10.0,
    "batch_size": 8,
    "optimizer": "adamw",
    "learning_rate": 1e-3,
    "embedding_learning_rate_scale": 1.0,
    "weight_decay": 0.05,
    "schedule": "cosine",
    "sample_prompt": None,
    "compile": "off",
}
"""Fields of a training on pictures and recordings in a preset's place."""
LONGEST_MULTIMODAL_ROW = 256
LONGEST_TUNING_ROW = 1024
"""Tokens of a row above which the positions of a base are no longer the default."""


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
    base = load_preset(content["base"]) if "base" in content else Preset(name, {}, {})
    return Preset(name, model={**base.model, **content["model"]}, run={**base.run, **content["run"]})


def _value_of(key: str, value: Any) -> Any:
    """Return the value of a field of RunConfig where YAML or people write it otherwise: 3M, 5m, 1e-3, on.

    Raises:
        ConfigError: if there is no such field, or its parser cannot read the text.
    """
    hint = run_field(key).type
    if isinstance(value, bool) and get_origin(hint) is Literal:
        return "on" if value else "off"  # YAML 1.1 makes truth values of these words
    if isinstance(value, str) and key in PARSERS:
        return PARSERS[key](value)
    if isinstance(value, str) and float in (hint, *get_args(hint)):
        return _number(value)
    return value


def _number(text: str) -> str | float:
    """Return a number that YAML 1.1 takes for a word, since it wants a dot and a sign in 1e-3; others as they are."""
    return float(text) if re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", text) else text


def resolve(
    preset: str = "nano", config_file: Path | None = None, overrides: Mapping[str, Any] | None = None
) -> RunConfig:
    """Join preset, configuration file and overrides, later ones winning, into one checked configuration.

    A preset's length is left out where another one is given, its tokenizer where the data are prepared, the weights are
    those of a saved model or a `vocab_size` asks for a new one, and its model where the file holds a whole one from
    before the preset was another. The length of the file is left out where the overrides name another kind of length.

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
    if any(given.get(name) is not None for name in LENGTHS):  # the preset's own length is for runs that name none
        merged = {key: value for key, value in merged.items() if key not in LENGTHS}
    own = is_prepared_folder(str(given.get("data"))) or given.get("init_from")  # which have a tokenizer of their own
    if own or given.get("vocab_size") is not None:  # or one is to be trained
        merged.pop("tokenizer", None)
    from_file = _without_replaced_length(from_file, overrides or {})
    for key, value in [*from_file.items(), *(overrides or {}).items()]:
        if key == "model":
            whole = (value or {}).keys() >= _MODEL_BEFORE_RANKS
            merged["model"] = {**({} if whole else merged["model"]), **(value or {})}
        elif key.startswith("model."):
            merged["model"][key.removeprefix("model.")] = value
        else:
            merged[key] = _value_of(key, value)
    return RunConfig.from_fields(merged)


def resolve_run(config_file: Path | None, overrides: Mapping[str, Any]) -> RunConfig:
    """Return the configuration of a new run, or of the one that is resumed with the given fields changed."""
    if overrides.get("resume") and config_file is None:
        folder = Path(overrides.get("output_dir") or f"runs/{overrides.get('preset', 'nano')}")
        if (folder / RUN_FILE).is_file():
            config_file = folder / RUN_FILE
    config = resolve(config_file=config_file, overrides=overrides)
    if config.init_from is not None:
        _refuse_other_shape(config.init_from, config_file, overrides)
    return config if overrides.get("resume") else config.replace(resume=False)


def _refuse_other_shape(init_from: str, config_file: Path | None, overrides: Mapping[str, Any]) -> None:
    """Raise ConfigError if fields of a model are asked for that the weights to start from decide."""
    from fanformer.model.configuration_fanformer import RECURRENCE  # for which a plain folder has its weights

    asked = {name.removeprefix("model."): value for name, value in overrides.items() if name.startswith("model.")}
    asked |= {**_model_of_a_plain_file(config_file), **(overrides.get("model") or {})}
    if other := sorted(asked.keys() - RECURRENCE):
        raise ConfigError(
            f"`model.{other[0]}` does not apply beside `init_from`, got {asked[other[0]]!r}: the weights of "
            f"{init_from} have a shape of their own; leave it out."
        )


def _model_of_a_plain_file(path: Path | None) -> dict[str, Any]:
    """Return the model's fields of a configuration file that a person wrote; a run's own says what became of it."""
    content = yaml.safe_load(path.read_text(encoding="utf-8")) if path is not None else {}
    return {} if "configuration" in content else dict(content.get("model") or {})


def resolve_tuning(
    base: str,
    positions: Callable[[], int | None],
    overrides: Mapping[str, Any],
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> RunConfig:
    """Return the configuration of a tuning; what a run that goes on began with stays.

    Args:
        base: folder of the model to tune.
        positions: returns the longest text that it takes, or None; asked for a new run only.
        overrides: fields of RunConfig.
        defaults: of a new run, beside those of the recipe.

    Raises:
        ConfigError: if a key is unknown, or a value has the wrong type or range.
    """
    folder = overrides.get("output_dir") or _beside(base, "tuned")
    fields = {"init_from": base, **overrides, "output_dir": str(folder)}
    recipe = {**_RECIPES.get(overrides.get("objective", ""), TUNING), **defaults}
    return _resolve_recipe(recipe, LONGEST_TUNING_ROW, positions, fields)


def resolve_multimodal(positions: Callable[[], int | None], overrides: Mapping[str, Any]) -> RunConfig:
    """Return the configuration of a training on pictures and recordings; what a run that goes on began with stays.

    Args:
        positions: returns the longest text that the base takes, or None; asked for a new run only.
        overrides: fields of RunConfig, `init_from` among those of a new run.

    Raises:
        ConfigError: if there is no base, a key is unknown, or a value has the wrong type or range.
    """
    base = overrides.get("init_from")
    folder = overrides.get("output_dir") or (_beside(base, "multimodal") if base else None)
    fields = {**overrides, "output_dir": folder}
    if base is None and not (overrides.get("resume") and folder and (Path(folder) / RUN_FILE).is_file()):
        raise ConfigError("`init_from` is needed beside `--multimodal`, got none: name the folder of a language model.")
    return _resolve_recipe(MULTIMODAL, LONGEST_MULTIMODAL_ROW, positions, fields)


def _beside(base: str, made: str) -> str:
    """Return where what is made of the model in folder `base` goes by itself."""
    return f"runs/{os.path.basename(os.path.abspath(base))}-{made}"


def _resolve_recipe(
    recipe: Mapping[str, Any], longest: int, positions: Callable[[], int | None], fields: Mapping[str, Any]
) -> RunConfig:
    """Return the configuration of a run by a recipe, or of the one that its folder holds."""
    if fields.get("resume") and (Path(str(fields["output_dir"])) / RUN_FILE).is_file():
        return resolve_run(None, fields)
    known = {**recipe, "sequence_length": min(positions() or longest, longest)}
    if any(fields.get(name) is not None for name in LENGTHS[:3]):
        known.pop("epochs")
    return resolve_run(None, {**known, **fields})


def tuning_rows(data: str | None, preferences: str | None) -> dict[str, Any]:
    """Return the fields that say what a tuning learns from.

    Args:
        data: conversations, whose answers are learnt.
        preferences: in their place, pairs of answers of which one is better.

    Raises:
        ConfigError: unless one of both is given.
    """
    if (data is None) == (preferences is None):
        got = "neither" if data is None else "both"
        raise ConfigError(f"`data` or `preferences` is needed to tune a model, got {got}: name one file of rows.")
    if preferences is not None:
        return {"data": preferences, "objective": PREFERENCES["objective"]}
    return {"data": data}


def _without_replaced_length(from_file: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return a file's fields without the length that the overrides replace by one of another kind.

    A limit of time stays beside a length in steps, but where it is the file's only length it is replaced too.
    """
    *lengths, limit = LENGTHS
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
        ConfigError: if there is no `=`, or the value is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"a setting must be key=value, got {text!r}.")
    try:
        parsed = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: of a date that does not exist
        raise ConfigError(
            f"the value of `{key.strip()}` must be YAML, got {value!r}: put quotes around it, {key.strip()}='\"...\"'."
        ) from error
    return key.strip(), _number(parsed) if isinstance(parsed, str) else parsed


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
