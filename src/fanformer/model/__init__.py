"""The model, as an ordinary `transformers` citizen: importing this registers it with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_fanformer import FANformerConfig
from .modeling_fanformer import FANformerForCausalLM, FANformerModel, FANformerPreTrainedModel

AutoConfig.register("fanformer", FANformerConfig)
AutoModel.register(FANformerConfig, FANformerModel)
AutoModelForCausalLM.register(FANformerConfig, FANformerForCausalLM)
FANformerConfig.register_for_auto_class()
FANformerModel.register_for_auto_class("AutoModel")
FANformerForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["FANformerConfig", "FANformerForCausalLM", "FANformerModel", "FANformerPreTrainedModel"]
