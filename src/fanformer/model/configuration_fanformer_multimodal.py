"""Configuration of a FANformer that sees and hears: the language model's, the towers', and what stands between."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from .configuration_fanformer import FANformerConfig

VISION_TYPES = ("siglip_vision_model",)
AUDIO_TYPES = ("phi4_multimodal_audio", "whisper")
_OF_THE_TEXT = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")


@strict
class FANformerMultimodalConfig(PreTrainedConfig):
    """Configuration of a language model with a tower, a projector and adapters for each modality.

    Source: Phi-4-multimodal, arXiv:2503.01743, section 2.

    Raises:
        StrictDataclassError: if a field has the wrong type or value, or fields contradict each other; the message names
            the field, the value, what was expected and a remedy.
    """

    model_type = "fanformer_multimodal"
    sub_configs = {"text_config": FANformerConfig, "vision_config": AutoConfig, "audio_config": AutoConfig}
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    text_config: Any = None
    """The language model."""
    vision_config: Any = None
    """The vision tower, a SigLIP; None is a model that sees nothing."""
    audio_config: Any = None
    """The audio tower, the conformer of Phi-4-multimodal or a Whisper encoder; None is a model that hears nothing."""
    image_token_id: int | None = None
    """Id that stands for a place of a picture; it may lie beyond the vocabulary, since its row is never read."""
    audio_token_id: int | None = None
    """Id that stands for a place of a recording."""
    image_downsample: int = 2
    """n: the n x n patches of the tower that one token of a picture is made of."""
    audio_stack: int = 1
    """States of the audio tower that one token of a recording is made of."""
    adapter_rank: int = 0
    """Rank of the adapters (LoRA, arXiv:2106.09685) of each modality in the decoder's linear layers; 0 is none."""
    adapter_alpha: float | int = 32
    """What the adapters' output is multiplied with, over `adapter_rank`."""
    embedding_norm: float | int = 1.0
    """Mean norm of the token embeddings, which the projectors' outputs start with."""
    blind: bool = False
    """Whether the towers are given ones alone: a twin that learns what text and lengths give away, and nothing more."""
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.text_config is None:
            self.text_config = FANformerConfig()
        elif isinstance(self.text_config, dict):
            self.text_config = FANformerConfig(**self.text_config)
        for name in ("vision_config", "audio_config"):
            tower = getattr(self, name)
            if isinstance(tower, dict):
                known = {key: value for key, value in tower.items() if key != "model_type"}
                setattr(self, name, AutoConfig.for_model(str(tower.get("model_type")), **known))
        for name in _OF_THE_TEXT:
            setattr(self, name, getattr(self.text_config, name))
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Check the rules that join several fields, and the ranges of single ones."""
        if self.vision_config is None and self.audio_config is None:
            raise ValueError("`vision_config` or `audio_config` must be given, got neither: a FANformer needs no more.")
        for name, kinds in (("vision_config", VISION_TYPES), ("audio_config", AUDIO_TYPES)):
            tower = getattr(self, name)
            if tower is not None and tower.model_type not in kinds:
                raise ValueError(f"`{name}` must be of a type among {', '.join(kinds)}, got {tower.model_type!r}.")
        for name, tower in (("image_token_id", self.vision_config), ("audio_token_id", self.audio_config)):
            if (getattr(self, name) is None) != (tower is None):
                raise ValueError(f"`{name}` must be given where there is such a tower only, got {getattr(self, name)}.")
        if self.image_token_id is not None and self.image_token_id == self.audio_token_id:
            raise ValueError(f"`image_token_id` and `audio_token_id` must differ, got {self.image_token_id} for both.")
        for name, least in (("image_downsample", 1), ("audio_stack", 1), ("adapter_rank", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")
        if self.vision_config is not None and self._patches_a_side % self.image_downsample:
            raise ValueError(
                f"`image_downsample` must divide the {self._patches_a_side} patches of a picture's side, got "
                f"{self.image_downsample}."
            )

    @property
    def _patches_a_side(self) -> int:
        return int(self.vision_config.image_size) // int(self.vision_config.patch_size)

    @property
    def image_seq_length(self) -> int:
        """Tokens of a picture."""
        return (self._patches_a_side // self.image_downsample) ** 2

    @property
    def frames_per_audio_token(self) -> int:
        """Frames of the spectrogram, 10 ms each, that one token of a recording is made of."""
        reduction = 2 if self.audio_config.model_type == "whisper" else self.audio_config.time_reduction
        return int(reduction) * self.audio_stack

    @property
    def most_audio_tokens(self) -> int | None:
        """Tokens that a recording may have; None where the tower takes any length, or there is none."""
        if self.audio_config is None or self.audio_config.model_type != "whisper":
            return None
        return 2 * int(self.audio_config.max_source_positions) // self.frames_per_audio_token

    @property
    def vocab_size(self) -> int:
        """V of the language model."""
        return int(self.text_config.vocab_size)

    @property
    def max_position_embeddings(self) -> int:
        """Positions of the language model."""
        return int(self.text_config.max_position_embeddings)


__all__ = ["AUDIO_TYPES", "VISION_TYPES", "FANformerMultimodalConfig"]
