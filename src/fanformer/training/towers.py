"""A language model joined with towers: fresh ones, pretrained ones, and those it has; and which of it learns."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
    WhisperFeatureExtractor,
    WhisperModel,
)
from transformers.models.phi4_multimodal.configuration_phi4_multimodal import Phi4MultimodalAudioConfig

from fanformer.errors import CheckpointError, ConfigError
from fanformer.generation.loading import load_config, load_model
from fanformer.generation.media_model import load_with_towers
from fanformer.model import FANformerConfig
from fanformer.model.multimodal import (
    FANformerForConditionalGeneration,
    FANformerMultimodalConfig,
    FANformerProcessor,
)
from fanformer.training.fields import TowersConfig

TOWERS: Mapping[str, str] = {"image": "vision", "audio": "audio"}
"""For each kind of media, what its tower, projector and adapters are called."""
_HEADS = 4
_DOWNSAMPLES = (2, 3, 1)
"""How many patches of a pretrained tower a side of a token has, the first of these that divides them."""
_ALPHA_OVER_RANK = 2


def has_tower(config: PreTrainedConfig, kind: str) -> bool:
    """Return whether a model of this configuration has a tower for "image" or "audio"."""
    return getattr(config, f"{TOWERS[kind]}_config", None) is not None


def chosen_stage(asked: TowersConfig, base: PreTrainedConfig, kinds: Sequence[str]) -> str:
    """Return "align" or "tune".

    Raises:
        ConfigError: if adapters are to learn beside towers that have learnt nothing.
    """
    missing = [kind for kind in kinds if not has_tower(base, kind)]
    if asked.stage == "auto":
        return "align" if missing else "tune"
    if asked.stage == "tune" and missing:
        raise ConfigError(
            f"`stage` tune needs a model with a tower for what is shown, got none for {missing[0]}: align it first, "
            "without `--stage`."
        )
    return asked.stage


def joined_config(
    asked: TowersConfig, base: PreTrainedConfig, kinds: Sequence[str], ids: Mapping[str, int]
) -> FANformerMultimodalConfig:
    """Return the configuration of a base with a tower for each kind of media.

    Args:
        asked: the run's.
        base: of the model to start from, with towers or without.
        kinds: of media that are shown.
        ids: of each kind's placeholder.

    Raises:
        ConfigError: if the base is no FANformer, a pretrained tower is of another kind or not there, or a field of
            `asked` has no effect on the base.
    """
    _check_effect(asked, base, kinds)
    if isinstance(base, FANformerMultimodalConfig):
        config = copy.deepcopy(base)
    elif isinstance(base, FANformerConfig):
        config = None
    else:
        raise ConfigError(f"`init_from` must be a FANformer, got a {base.model_type}: it is what towers are joined to.")
    if base.get_text_config().recurrence is not None:
        raise ConfigError("`init_from` must have no recurrent depth, got one: towers are not joined to such a model.")
    fields: dict[str, Any] = {}
    for kind in kinds:
        if config is None or not has_tower(config, kind):
            name = TOWERS[kind]
            fields[f"{name}_config"] = (vision_config if kind == "image" else audio_config)(asked)
            fields[f"{kind}_token_id"] = ids[kind]
    if "vision_config" in fields:
        side = fields["vision_config"].image_size // fields["vision_config"].patch_size
        fields["image_downsample"] = next(count for count in _DOWNSAMPLES if side % count == 0)
    if "audio_config" in fields and fields["audio_config"].model_type == "whisper":
        fields["audio_stack"] = asked.audio_token_ms // 20
    stage = chosen_stage(asked, base, kinds)
    rank = config.adapter_rank if config is not None else 0
    if stage == "tune" and not rank:
        rank = asked.adapter_rank
        fields["adapter_alpha"] = _ALPHA_OVER_RANK * rank
    fields |= {"adapter_rank": rank, "blind": asked.blind}
    if config is None:
        return FANformerMultimodalConfig(text_config=copy.deepcopy(base), **fields)
    for name, value in fields.items():
        setattr(config, name, value)
    config.validate_architecture()
    return config


def _check_effect(asked: TowersConfig, base: PreTrainedConfig, kinds: Sequence[str]) -> None:
    """Refuse a pretrained tower that has no place, and another rank than that of the adapters that are there."""
    for kind, name in TOWERS.items():
        given, shown = getattr(asked, f"{name}_tower"), "pictures" if kind == "image" else "recordings"
        if given is not None and has_tower(base, kind):
            raise ConfigError(
                f"`{name}_tower` has no effect where `init_from` has a tower for {shown}, got {given}: leave it out, "
                "or begin with the language model alone."
            )
        if given is not None and kind not in kinds:
            raise ConfigError(f"`{name}_tower` has no effect where no {shown} are shown, got {given}: leave it out.")
    rank, usual = getattr(base, "adapter_rank", 0), TowersConfig().adapter_rank
    if rank and asked.adapter_rank not in (rank, usual):
        raise ConfigError(
            f"`adapter_rank` must be {rank}, that of the adapters in `init_from`, got {asked.adapter_rank}: leave it "
            "out."
        )


def vision_config(asked: TowersConfig) -> PreTrainedConfig:
    """Return the configuration of a vision tower, pretrained or fresh."""
    if asked.vision_tower is None:
        return SiglipVisionConfig(
            hidden_size=asked.tower_width,
            intermediate_size=4 * asked.tower_width,
            num_hidden_layers=asked.tower_layers,
            num_attention_heads=_HEADS,
            image_size=asked.image_size,
            patch_size=asked.patch_size,
            vision_use_head=False,
        )
    found = _pretrained(asked.vision_tower, "vision_tower")
    found = getattr(found, "vision_config", found)
    if found.model_type != "siglip_vision_model":
        raise ConfigError(f"`vision_tower` must be a SigLIP, got {asked.vision_tower}, a {found.model_type}.")
    found.vision_use_head = False
    return found


def audio_config(asked: TowersConfig) -> PreTrainedConfig:
    """Return the configuration of an audio tower, pretrained or fresh."""
    if asked.audio_tower is None:
        width = asked.tower_width
        return Phi4MultimodalAudioConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_blocks=asked.tower_layers,
            num_attention_heads=_HEADS,
            ext_pw_out_channel=width,
            depthwise_separable_out_channel=width,
            nemo_conv_channels=max(8, width // 4),
            time_reduction=asked.audio_token_ms // 10,
            bias_max_distance=100,
        )
    found = _pretrained(asked.audio_tower, "audio_tower")
    if found.model_type != "whisper":
        raise ConfigError(f"`audio_tower` must be a Whisper, got {asked.audio_tower}, a {found.model_type}.")
    return found


def _pretrained(name: str, field: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"`{field}` {name} cannot be read: {' '.join(str(error).split())[:200]}") from error


def make_processor(asked: TowersConfig, config: FANformerMultimodalConfig, tokenizer: Any) -> FANformerProcessor:
    """Return what prepares media for a model's towers.

    Args:
        asked: the run's.
        config: of the model.
        tokenizer: with placeholders and a chat template.
    """
    side = config.vision_config.image_size if config.vision_config is not None else 1
    bands = 80
    if config.audio_config is not None:
        is_whisper = config.audio_config.model_type == "whisper"
        bands = config.audio_config.num_mel_bins if is_whisper else config.audio_config.input_size
    return FANformerProcessor(
        SiglipImageProcessorPil(size={"height": side, "width": side}),
        WhisperFeatureExtractor(feature_size=bands),
        tokenizer,
        chat_template=tokenizer.chat_template,
        image_seq_length=config.image_seq_length if config.vision_config is not None else 1,
        frames_per_audio_token=config.frames_per_audio_token if config.audio_config is not None else 1,
    )


@torch.no_grad()
def join_towers(
    base: str, config: FANformerMultimodalConfig, asked: TowersConfig, known: int | None
) -> PreTrainedModel:
    """Return the model of `config` with the weights of a base, its new towers pretrained or fresh; float32 on the CPU.

    Args:
        base: folder of the model to start from.
        config: as `joined_config` made it.
        asked: the run's.
        known: tokens of the base whose embeddings mean something; None where `config` has their mean norm already.

    Raises:
        CheckpointError: if the base cannot be loaded, or weights of it find no place.
    """
    before = load_config(base)
    if isinstance(before, FANformerMultimodalConfig):
        weights = load_with_towers(base, "cpu", "float32").state_dict()
    else:
        text = load_model(base, "cpu", "float32").state_dict()
        weights = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in text.items()}
    if known is not None and not isinstance(before, FANformerMultimodalConfig):
        table = weights["model.language_model.embed_tokens.weight"][:known]
        config.embedding_norm = float(table.norm(dim=-1).mean())
    model = FANformerForConditionalGeneration(config)
    new = [name for kind, name in TOWERS.items() if has_tower(config, kind) and not has_tower(before, kind)]
    for name, load, pretrained in (("vision", _siglip, asked.vision_tower), ("audio", _whisper, asked.audio_tower)):
        if name in new and pretrained is not None:
            weights |= {f"model.{name}_tower.{key}": value for key, value in load(pretrained, config).items()}
    found = model.load_state_dict(weights, strict=False)
    fresh = tuple(f"model.{part}" for name in new for part in (f"{name}_tower.", f"projectors.{name}."))
    lost = [name for name in found.missing_keys if ".lora_" not in name and not name.startswith(fresh)]
    if lost or found.unexpected_keys:
        raise CheckpointError(f"the weights in {base} do not fit, `{[*lost, *found.unexpected_keys][0]}` first.")
    return model


def _siglip(name: str, config: FANformerMultimodalConfig) -> dict[str, Tensor]:
    return _weights(SiglipVisionModel, name, config=config.vision_config)


def _whisper(name: str, config: FANformerMultimodalConfig) -> dict[str, Tensor]:
    whole = _weights(WhisperModel, name)
    return {key.removeprefix("encoder."): value for key, value in whole.items() if key.startswith("encoder.")}


def _weights(kind: type[PreTrainedModel], name: str, **options: Any) -> dict[str, Tensor]:
    """Return the weights of a pretrained model, all of which must be there: what is missing would begin fresh."""
    try:
        model, report = kind.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the weights of {name} cannot be read: {' '.join(str(error).split())[:200]}") from error
    if report["missing_keys"]:
        raise CheckpointError(f"the weights of {name} lack `{min(report['missing_keys'])}`: take another tower.")
    weights: dict[str, Tensor] = model.state_dict()
    return weights


def choose_learning(
    model: nn.Module, stage: str, kinds: Sequence[str], asked: TowersConfig, new: Sequence[str]
) -> None:
    """Let the parts of a model learn that its stage says, and everything else rest, the language model always.

    Args:
        model: with towers.
        stage: "align": projectors, and towers that began fresh; "tune": projectors and adapters.
        kinds: of media that are shown.
        asked: the run's.
        new: the kinds among these that the base had no tower for: where there are some, they alone are aligned.
    """
    model.requires_grad_(False)
    for kind in (new or kinds) if stage == "align" else kinds:
        name = TOWERS[kind]
        model.model.projectors[name].requires_grad_(True)
        if stage == "align" and getattr(asked, f"{name}_tower") is None:
            getattr(model.model, f"{name}_tower").requires_grad_(True)
        if stage == "tune":
            for key, parameter in model.named_parameters():
                if f".lora_A.{name}." in key or f".lora_B.{name}." in key:
                    parameter.requires_grad_(True)
