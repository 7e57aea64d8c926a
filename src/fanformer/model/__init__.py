"""The model, as an ordinary `transformers` citizen: importing this registers it with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_fanformer import FANformerConfig
from .modeling_fanformer import (
    FANformerForCausalLM,
    FANformerForSequenceClassification,
    FANformerForTokenClassification,
    FANformerModel,
    FANformerPreTrainedModel,
)

AutoConfig.register("fanformer", FANformerConfig)
AutoModel.register(FANformerConfig, FANformerModel)
AutoModelForCausalLM.register(FANformerConfig, FANformerForCausalLM)
AutoModelForSequenceClassification.register(FANformerConfig, FANformerForSequenceClassification)
AutoModelForTokenClassification.register(FANformerConfig, FANformerForTokenClassification)
FANformerConfig.register_for_auto_class()
FANformerModel.register_for_auto_class("AutoModel")
FANformerForCausalLM.register_for_auto_class("AutoModelForCausalLM")
FANformerForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
FANformerForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")

__all__ = [
    "FANformerConfig",
    "FANformerForCausalLM",
    "FANformerForSequenceClassification",
    "FANformerForTokenClassification",
    "FANformerModel",
    "FANformerPreTrainedModel",
]
