"""The model that sees and hears: importing this registers it with the Auto classes, beside the language model alone."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .configuration_fanformer_multimodal import FANformerMultimodalConfig
from .media_fanformer import base64_bytes, load_picture, load_recording, media_bytes
from .modeling_fanformer_multimodal import (
    FANformerForConditionalGeneration,
    FANformerMultimodalForCausalLM,
    FANformerMultimodalModel,
)
from .processing_fanformer import FANformerProcessor, pad_spectrograms

AutoConfig.register("fanformer_multimodal", FANformerMultimodalConfig)
AutoModel.register(FANformerMultimodalConfig, FANformerMultimodalModel)
AutoModelForCausalLM.register(FANformerMultimodalConfig, FANformerMultimodalForCausalLM)
AutoModelForImageTextToText.register(FANformerMultimodalConfig, FANformerForConditionalGeneration)
AutoModelForMultimodalLM.register(FANformerMultimodalConfig, FANformerForConditionalGeneration)
AutoProcessor.register(FANformerMultimodalConfig, FANformerProcessor)
FANformerMultimodalConfig.register_for_auto_class()
FANformerMultimodalModel.register_for_auto_class("AutoModel")
FANformerForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
FANformerProcessor.register_for_auto_class()

__all__ = [
    "FANformerForConditionalGeneration",
    "FANformerMultimodalConfig",
    "FANformerMultimodalForCausalLM",
    "FANformerMultimodalModel",
    "FANformerProcessor",
    "base64_bytes",
    "load_picture",
    "load_recording",
    "media_bytes",
    "pad_spectrograms",
]
