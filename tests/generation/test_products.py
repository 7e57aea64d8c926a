"""What reads one input is one product while decoding, with the numbers, names and weights that the layers have."""

import copy

import pytest
import torch
from torch import nn

from fanformer.generation.fast_decoding import JoinedAttention, JoinedMLP, fast_decoding, joined_products
from fanformer.model import FANformerForCausalLM

FULL_RANK = dict.fromkeys(("qkv_rank", "o_rank", "gate_up_rank", "down_rank"))
FORMS = {
    "default": {},
    "no bias": {"projection_bias": False},
    "no features": {"fan_placement": "none"},
    "layer": {"fan_placement": "layer"},
    "full rank": {**FULL_RANK, "fan_placement": "none"},
    "features at full rank": FULL_RANK,
    "between factors": {"fan_placement": "ffn"},
}


def joined_layers(model):
    return [module for module in model.modules() if isinstance(module, JoinedAttention | JoinedMLP)]


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_the_plain_ones(tiny_model, token_ids, form):
    model, ids = tiny_model(**FORMS[form]), token_ids(2, 7)
    names = [name for name, _ in model.named_parameters()]
    with torch.no_grad():
        expected = model(ids).logits
        with joined_products(model):
            assert len(joined_layers(model)) == 2 * model.config.num_hidden_layers
            torch.testing.assert_close(model(ids).logits, expected, atol=2e-5, rtol=2e-5)
            assert [name for name, _ in model.named_parameters()] == names
        assert joined_layers(model) == []
        assert torch.equal(model(ids).logits, expected)


def test_readers_with_inputs_of_their_own_stay(tiny_model):
    model = tiny_model(cola_input="separate")
    with joined_products(model):
        assert joined_layers(model) == []


def test_weights_are_moved_once_and_keep_their_names_and_values(tiny_model, tmp_path):
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with fast_decoding(model):
        places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    with fast_decoding(model):
        assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == places
    model.save_pretrained(tmp_path)
    loaded = FANformerForCausalLM.from_pretrained(tmp_path).state_dict()
    for state in (model.state_dict(), loaded, copy.deepcopy(model).state_dict()):
        assert state.keys() == before.keys()
        assert all(torch.equal(state[name], before[name]) for name in before)


def test_a_model_that_has_decoded_trains_as_one_that_has_not(tiny_model, token_ids):
    ids = token_ids(2, 9)
    logits = []
    for decodes in (False, True):
        model = tiny_model()
        if decodes:
            with torch.inference_mode(), fast_decoding(model):
                model(ids)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad(), fast_decoding(model):
            logits.append(model(ids).logits)  # of the weights after training, not of a copy from before
    assert torch.equal(*logits)


def test_a_layer_with_a_hook_or_of_another_kind_is_left_alone(tiny_model):
    model = tiny_model()
    first, second = model.model.layers
    first.mlp.up_proj.register_forward_hook(lambda module, inputs, output: output)
    second.self_attn.q_proj.linear.__class__ = type("Quantized", (nn.Linear,), {})
    with joined_products(model):
        assert joined_layers(model) == [first.self_attn, second.mlp]


def test_a_layer_whose_weight_a_quantizer_has_packed_is_left_alone(tiny_model, token_ids):
    """A quantizer leaves the class, packs the weight away and sets a `forward` of its own on the module."""
    model, ids = tiny_model(), token_ids(1, 1)
    packed = model.model.layers[0].mlp.up_proj
    weight = packed._parameters.pop("weight")
    packed.weight_packed = nn.Parameter(weight.detach().clone(), requires_grad=False)
    packed.forward = lambda x: nn.functional.linear(x, packed.weight_packed)
    with torch.no_grad():
        expected = model(ids).logits
        with fast_decoding(model):
            assert model.model.layers[0].mlp not in joined_layers(model)
            assert type(packed) is nn.Linear
            torch.testing.assert_close(model(ids).logits, expected)


def test_lora_on_all_linear_changes_what_is_decoded(tiny_model, token_ids):
    peft = pytest.importorskip("peft", reason="needs the extra `lora`")
    base, ids = tiny_model(), token_ids(1, 9)
    with torch.no_grad(), fast_decoding(base):
        before = base(ids).logits  # joined first, replaced by LoRA's layers afterwards
    torch.manual_seed(0)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    queries = [name for name, _ in model.named_parameters() if ".q_proj." in name and ".lora_B." in name]
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert queries
    assert all(model.get_parameter(name).any() for name in queries)  # LoRA's second factor starts at 0
    with torch.no_grad():
        expected = model(ids).logits
        with fast_decoding(base):
            assert joined_layers(base) == []
            torch.testing.assert_close(model(ids).logits, expected, atol=2e-5, rtol=2e-5)
    assert not torch.allclose(expected, before, atol=1e-3)
