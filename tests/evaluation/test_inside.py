"""A look inside: what the equations say of a model's own parts, however its layers are computed meanwhile."""

import threading

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fanformer.errors import ConfigError
from fanformer.evaluation.inside import BINS, attention_maps, has_inside, look_inside
from fanformer.generation.fast_decoding import fast_decoding
from fanformer.model.modeling_fanformer import FANLayer, FANProjection

IDS = [5, 9, 200, 31, 7, 88, 140, 3, 250, 17]
VARIANTS = {
    "projection": {},
    "separate": {"cola_input": "separate"},
    "layer": {"fan_placement": "layer", "fan_ratio": 0.25, "fan_multiple": 1},
    "factors": {"fan_placement": "ffn"},
}


def phases_by_hooks(model):
    """Every p of the equations, read where each module computes it: (T, P) a block."""
    found = [[] for _ in model.model.layers]
    handles = []
    for block, phases in zip(model.model.layers, found, strict=True):
        for module in block.modules():
            if isinstance(module, FANProjection):
                handles.append(
                    module.periodic.register_forward_hook(lambda m, i, o, phases=phases: phases.append(o[0]))
                )
            elif isinstance(module, FANLayer):
                width = module.periodic_width
                handles.append(
                    module.projection.register_forward_hook(
                        lambda m, i, o, phases=phases, width=width: phases.append(o[0, :, :width])
                    )
                )
            elif getattr(module, "periodic", 0) and not isinstance(module.periodic, torch.nn.Module):
                width = module.periodic
                handles.append(
                    module.norm.register_forward_hook(
                        lambda m, i, o, phases=phases, width=width: phases.append(o[0, ..., :width].flatten(1))
                    )
                )
    with torch.no_grad():
        model(torch.tensor([IDS]))
    for handle in handles:
        handle.remove()
    return [torch.cat(phases, dim=-1) for phases in found]


@pytest.mark.parametrize("name", VARIANTS)
def test_turns_and_gates_are_those_of_the_equations(tiny_model, name):
    model = tiny_model(**VARIANTS[name])
    expected = phases_by_hooks(model)
    for block, layer, phases in zip(model.model.layers, look_inside(model, IDS), expected, strict=True):
        assert layer.channels == phases.shape[1] > 0
        spread = phases.std(0).quantile(torch.tensor([0.1, 0.5, 0.9]))
        assert layer.turns == pytest.approx(tuple(spread.tolist()), rel=1e-5)
        gate = block.attention_residual.gate.sigmoid().quantile(torch.tensor([0.1, 0.5, 0.9]))
        assert layer.gates["attention"] == pytest.approx(tuple(gate.tolist()), rel=1e-6)
        assert set(layer.gates) == {"attention", "feed_forward"}


def test_spectrum_has_its_peak_where_the_channels_swing(tiny_model, monkeypatch):
    model = tiny_model()
    wave = torch.arange(64) * torch.pi / 2  # cos of it has a quarter of a cycle per token
    for block in model.model.layers:
        for projection in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
            width = projection.periodic.out_features
            monkeypatch.setattr(
                projection.periodic, "forward", lambda u, width=width: wave[None, :, None].expand(1, -1, width)
            )
    for layer in look_inside(model, list(range(64))):
        assert sum(layer.spectrum) == pytest.approx(1, abs=1e-5)
        assert layer.spectrum[BINS // 2 - 1] + layer.spectrum[BINS // 2] == pytest.approx(1, abs=1e-3)


def test_joined_products_give_the_same_look(tiny_model):
    model = tiny_model()
    plain = look_inside(model, IDS)
    with fast_decoding(model):
        joined = look_inside(model, IDS)
    for one, other in zip(plain, joined, strict=True):
        assert one.turns == pytest.approx(other.turns, rel=1e-4)
        assert one.spectrum == pytest.approx(other.spectrum, abs=1e-4)
    assert look_inside(model, IDS) == plain  # nothing is left hooked


def test_what_others_compute_meanwhile_is_not_seen(tiny_model, monkeypatch):
    model = tiny_model()
    expected = look_inside(model, IDS)
    norm = model.model.norm
    forward = norm.forward
    mine = threading.get_ident()

    def with_another(x):
        if threading.get_ident() == mine:
            other = threading.Thread(target=lambda: model(torch.tensor([IDS[::-1]])))
            other.start()
            other.join()
        return forward(x)

    monkeypatch.setattr(norm, "forward", with_another)
    assert look_inside(model, IDS) == expected


@pytest.mark.parametrize("name", [*VARIANTS, "no norms", "recurrent"])
def test_attention_maps_are_the_weights_of_eager_attention(tiny_model, name):
    recurrent = {"num_hidden_layers": 3, "prelude_layers": 1, "core_layers": 1, "coda_layers": 1}
    model = tiny_model(**{**VARIANTS, "no norms": {"qkv_norm": "none"}, "recurrent": recurrent}[name])
    with fast_decoding(model):
        found = [attention_maps(model, IDS, layer) for layer in range(len(model.model.layers))]
    model.set_attn_implementation("eager")
    steps = {"num_steps": 1} if name == "recurrent" else {}
    with torch.no_grad():
        expected = model(torch.tensor([IDS]), output_attentions=True, **steps).attentions
    for heads, weights in zip(found, expected, strict=True):
        assert len(heads) == weights.shape[1] == 4
        for head, rows in zip(heads, weights[0], strict=True):
            for place, row in enumerate(head):
                assert row == pytest.approx(rows[place, : place + 1].tolist(), abs=1e-5)
                assert sum(row) == pytest.approx(1, abs=1e-5)
    with pytest.raises(ConfigError, match=r"`layer` must be in \[0, \d\), got 9: the model has \d blocks"):
        attention_maps(model, IDS, 9)


def test_models_without_such_parts_are_refused(tiny_model):
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                         num_attention_heads=2))  # fmt: skip
    assert not has_inside(llama)
    with pytest.raises(ConfigError, match="needs gates or Fourier channels, got a llama model without"):
        look_inside(llama, IDS)
    with pytest.raises(ConfigError, match="needs at least 2 tokens, got 1: give a longer text"):
        look_inside(tiny_model(), IDS[:1])
    without = look_inside(tiny_model(fan_placement="none", fan_ratio=0.0), IDS)
    assert [(layer.channels, layer.turns, layer.spectrum) for layer in without] == [(0, None, [])] * 2


def test_a_recurrent_depth_shows_its_first_step(tiny_model):
    parts = {"num_hidden_layers": 3, "prelude_layers": 1, "core_layers": 1, "coda_layers": 1}
    model, plain = tiny_model(**parts), tiny_model(num_hidden_layers=3)
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if ".bridge." not in name})
    assert look_inside(model, IDS) == look_inside(plain, IDS)
