"""The model of a run: built with fresh weights, taken from a saved one, or as the run that goes on has it."""

import copy
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from fanformer.data.multimodal import placeholder_ids
from fanformer.errors import ConfigError
from fanformer.generation.settings import GenerationSettings
from fanformer.model import FANformerConfig, FANformerForCausalLM
from fanformer.model.configuration_fanformer import RECURRENCE
from fanformer.training.checkpoint import WEIGHTS_FILE, checkpoints
from fanformer.training.corpus import Corpus
from fanformer.training.fields import RunConfig, TowersConfig

if TYPE_CHECKING:
    from fanformer.training.depth import DepthLaw

_VOCABULARY_MULTIPLE = 64

ModelBuilder = Callable[[dict[str, Any]], PreTrainedModel]
"""Makes a model from the fields of `RunConfig.model`, its vocabulary and special tokens filled in."""


def build_fanformer(fields: dict[str, Any]) -> PreTrainedModel:
    """Return a FANformer with fresh weights."""
    return FANformerForCausalLM(FANformerConfig(**fields))


def law_of_depth(
    model: PreTrainedModel, config: RunConfig, before: Mapping[str, Any] | None = None
) -> "DepthLaw | None":
    """Return how many steps a recurrent depth takes in a run, None where the model is plain.

    Args:
        model: that of the run.
        config: the run.
        before: run.yaml of the run that goes on, None for a new one.

    Raises:
        ConfigError: if the run has a field of the law where it has no effect.
    """
    asked = (config.schedule.one_step_fraction, config.optimizer.core_learning_rate_scale)
    if getattr(model.config, "recurrence", None) is None and asked == (None, None):
        return None
    from fanformer.training.depth import depth_law

    if before is not None and "recurrent_depth" in before:
        return depth_law(model, config, float(before["recurrent_depth"]["one_step_fraction"]))
    return depth_law(model, config)


def check_model_fields(config: RunConfig) -> None:
    """Refuse what is wrong with a new run's model whatever the data hold, before time is spent on them.

    Raises:
        CheckpointError: if there is no model to start from.
        ConfigError: if its positions are fewer than a row has.
        ValueError: if a field of the model is wrong.
    """
    if config.corpus.objective != "multimodal":
        for name, default in vars(TowersConfig()).items():
            value = getattr(config.towers, name)
            if value != default:
                raise ConfigError(f"`{name}` has no effect without `--multimodal`, got {value!r}: leave it out.")
    if config.init_from is None:
        if config.lora_rank is not None:
            raise ConfigError(
                f"`lora_rank` needs `init_from`, what adapters belong to, got {config.lora_rank} alone: name it."
            )
        FANformerConfig(**config.model)
        return
    from fanformer.generation.loading import refuse_towers
    from fanformer.loading import is_gguf, load_config, longest_text

    if config.corpus.objective != "multimodal" and not is_gguf(config.init_from):
        refuse_towers(config.init_from, "training on text")
    if getattr(load_config(config.init_from), "quantization_config", None) is not None:
        raise ConfigError(
            f"{config.init_from} is quantized, and what learns must not be: name the folder that it was made from."
        )
    positions = longest_text(config.init_from)
    if positions is not None and config.batch.sequence_length > positions:
        raise ConfigError(
            f"`sequence_length` must be at most {positions}, the positions of {config.init_from}, got "
            f"{config.batch.sequence_length}: the trained model would refuse texts of its own length."
        )


def make_model(
    config: RunConfig,
    corpus: Corpus,
    build_model: ModelBuilder,
    before: Mapping[str, Any] | None,
    note: Callable[[str], None],
) -> PreTrainedModel:
    """Return a run's model; that of a run with checkpoints gets its weights from them later.

    Args:
        config: the run.
        corpus: what it trains on.
        build_model: makes a model with fresh weights.
        before: run.yaml of the run that goes on, None for a new one.
        note: told what was chosen.

    Raises:
        CheckpointError: if the model to start from cannot be read.
        ConfigError: if it knows fewer tokens than the tokenizer has, or the sample prompt fills its positions.
    """
    tokenizer = corpus.tokenizer
    if config.init_from is None:
        model = build_model(_fields(config, tokenizer, note))
    elif before is not None and config.lora_rank is None and checkpoints(config.folder):
        # what it began with may be gone since, but adapters need it
        model = corpus.empty_model(before["model"])
    else:
        model = begun_with(config, corpus)
    if config.init_from is not None:
        from fanformer.generation.loading import known_ids

        if known_ids(model.config) < len(tokenizer):
            raise ConfigError(
                f"the tokenizer has {len(tokenizer)} tokens, but the weights of {config.init_from} only "
                f"{model.config.vocab_size}: pass its own tokenizer with --tokenizer {config.init_from}."
            )
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and corpus.sample_tokens >= positions:
        raise ConfigError(
            f"`sample_prompt` must leave room in the model's {positions} positions, got {corpus.sample_tokens} tokens: "
            "shorten it."
        )
    model.generation_config = _generation_config(model, tokenizer)
    return model


def begun_with(config: RunConfig, corpus: Corpus) -> PreTrainedModel:
    """Return the model of `init_from`, a plain one with the recurrent depth that the run's preset has.

    Its first step is the plain model, whose weights it takes; the bridge starts as the identity.

    Raises:
        ConfigError: if the saved model cannot have this depth, or has another.
    """
    return recurrent_from(corpus.load_base(), config)


def recurrent_from(base: PreTrainedModel, config: RunConfig) -> PreTrainedModel:
    """Return a saved model with the depth of a run's preset, the model itself where that has none.

    Raises:
        ConfigError: as `begun_with`.
    """
    wanted = {name: config.model[name] for name in RECURRENCE if name in config.model}
    if not wanted:
        return base
    if not isinstance(base, FANformerForCausalLM):
        raise ConfigError(
            f"`preset` {config.preset} gives a FANformer recurrent depth, got a {base.config.model_type} in "
            f"{config.init_from}: take another preset."
        )
    try:
        asked = FANformerConfig.from_dict(base.config.to_dict() | wanted)
    except StrictDataclassError as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ConfigError(
            f"the depth of preset {config.preset} does not fit {config.init_from}: {reason} (others by --set "
            f"model.{next(iter(wanted))}=N and so on)"
        ) from error
    if base.config.recurrence is not None:
        if asked.recurrence != base.config.recurrence:
            raise ConfigError(
                f"{config.init_from} has a recurrent depth of its own, and preset {config.preset} another: leave the "
                "preset out."
            )
        return base
    model = FANformerForCausalLM(asked)
    missing, unexpected = model.load_state_dict(base.state_dict(), strict=False)
    assert {name.startswith("model.bridge.") for name in missing} == {True}, f"only the bridge is new: {missing}"
    assert not unexpected, f"all weights have a place: {unexpected}"
    return model


def _fields(config: RunConfig, tokenizer: PreTrainedTokenizerBase, note: Callable[[str], None]) -> dict[str, Any]:
    """Return the fields of a fresh model that the tokenizer and the rows fit."""
    planned, fields = FANformerConfig(**config.model), dict(config.model)
    fitting = -(-len(tokenizer) // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
    if fitting != planned.vocab_size:
        note(f"vocabulary: {len(tokenizer)} tokens, so vocab_size is {fitting} instead of {planned.vocab_size}")
    fields["vocab_size"] = fitting
    fields["max_position_embeddings"] = max(planned.max_position_embeddings, config.batch.sequence_length)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        fields.setdefault(name, getattr(tokenizer, name))
    return fields


def _generation_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Return the defaults of `generate`; ids that pad the vocabulary are never drawn."""
    placeholders = [number for number in placeholder_ids(tokenizer) if number < model.config.vocab_size]
    unknown = sorted({*range(len(tokenizer), model.config.vocab_size), *placeholders})
    drawing = GenerationSettings()
    ends = tokenizer.eos_token_id
    if tokenizer.chat_template is not None:
        from fanformer.data.conversations.chat_tokens import text_ends

        ends = text_ends(tokenizer)
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends,
        pad_token_id=padding,
        suppress_tokens=unknown or None,
        do_sample=True,
        max_new_tokens=drawing.max_length,
        temperature=drawing.temperature,
        top_k=drawing.top_k,
        top_p=drawing.top_p,
    )


def folder_without_weights(model: PreTrainedModel, tokenizer: Any) -> dict[str, bytes]:
    """Return the files of a model folder but its weights: configurations, tokenizer or processor, the model's code.

    They are the same in every checkpoint, and making them keeps Python busy, which a background thread must not do: the
    training loop would wait for the interpreter after each of its operations.
    """
    with torch.device("meta"):
        twin = type(model)(copy.deepcopy(model.config))
    twin.generation_config = model.generation_config
    saved = copy.deepcopy(tokenizer)
    text = getattr(saved, "tokenizer", saved)  # of a processor
    text.model_max_length = getattr(model.config, "max_position_embeddings", text.model_max_length)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        name, parameter = next(iter(model.named_parameters()))
        twin.save_pretrained(folder, state_dict={name: parameter.detach()[:1].clone()})
        (folder / WEIGHTS_FILE).unlink()
        saved.save_pretrained(folder)
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.iterdir())}
