"""Fixtures of this folder: models of several architectures, saved with a byte-level tokenizer."""

import pytest

from tests.saved_models import loaded, model_copy, saved_model, tiny_tokenizer  # noqa: F401


@pytest.fixture(scope="session")
def make_model(tiny_model):
    """Make a tiny model of the named architecture with weights that matter and 320 tokens."""

    def make(kind, positions=128):
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config
        from transformers import Qwen3ForCausalLM as Qwen3

        if kind == "fanformer":
            return tiny_model(vocab_size=320, eos_token_id=0, bos_token_id=0, max_position_embeddings=positions)
        sizes = {
            "vocab_size": 320,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": positions,
        }
        ends = {"bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.2}
        torch.manual_seed(0)
        if kind == "gpt2":
            return GPT2LMHeadModel(
                GPT2Config(vocab_size=320, n_positions=positions, n_embd=64, n_layer=2, n_head=4, **ends)
            ).eval()
        config, model = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3)}[kind]
        return model(config(**sizes, **ends)).eval()

    return make
