"""The roofline of a training step: counted by hand for a small Llama, and what bounds it."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fanformer.model import FANformerConfig, FANformerForCausalLM

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


@pytest.fixture
def roofline(repository, monkeypatch):
    monkeypatch.syspath_prepend(str(repository / "benchmarks" / "accelerator"))
    import roofline

    return roofline


def test_products_of_a_llama(roofline):
    found = roofline.products_of(LlamaForCausalLM(LlamaConfig(**SHAPE)), 3, 5)
    layer = [(16, 32, False), (16, 16, True), (16, 16, True), (32, 16, False)]
    layer += [(16, 24, False), (16, 24, True), (24, 16, False)]
    assert [(one.inputs, one.outputs, one.shared) for one in found] == [*layer, *layer, (16, 50, False)]
    assert {one.rows for one in found} == {15}


def test_products_of_ours_are_all_matrices_but_the_lookup(roofline):
    model = FANformerForCausalLM(FANformerConfig(**SHAPE, dropout=0.0))
    found = roofline.products_of(model, 1, 4)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2) - model.get_input_embeddings().weight.numel()
    assert sum(one.inputs * one.outputs for one in found) == matrices


def test_a_matrix_outside_every_product_is_told(roofline):
    class Forgetful(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.forgotten = torch.nn.Linear(2, 3, bias=False)

    with pytest.raises(ValueError, match=r"forgotten.weight is in none"):
        roofline.products_of(Forgetful(LlamaConfig(**SHAPE)), 1, 4)


def test_on_endless_bandwidth_only_operations_count_and_on_an_endless_processor_only_bytes(roofline):
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2) - 16 * 50
    operations = roofline.roofline_seconds(model, 3, 5, 1.0, float("inf"))
    assert operations["products"] == 3 * 2 * 15 * weights
    assert operations["attention"] == 2 * (1 + 2.5) * 4 * 32 * 15 * 5 / 2
    assert operations["between products"] == operations["weights"] == 0
    moved = roofline.roofline_seconds(model, 3, 5, float("inf"), 1.0)
    assert moved["weights"] == 34 * sum(p.numel() for p in model.parameters())
    assert moved["attention"] == 2 * 3 * 2 * 15 * (32 + 32 + 32)
    both = roofline.roofline_seconds(model, 3, 5, 1.0, 1.0)
    assert both["products"] >= max(operations["products"], moved["products"])
    assert both["total"] == sum(value for name, value in both.items() if name != "total")
