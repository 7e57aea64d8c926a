"""What each switch of the configuration does: which parameters come or go, and how the output behaves."""

import pytest
import torch

from fanformer.model import FANformerForCausalLM


def names(model):
    return {name for name, _ in model.named_parameters()}


def attention_of(model):
    return model.model.layers[1].self_attn


def logits(model, input_ids):
    with torch.no_grad():
        return model(input_ids).logits


def with_weights_of(model, other):
    model.load_state_dict(other.state_dict())
    return model


def recorded_input(module):
    """Keep the last input of a module in the returned list."""
    seen = []
    module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    return seen


def test_fan_projection_gives_unit_circles_then_the_linear_part(tiny_model):
    fields = {"cola_rank_ratio": 0.25, "cola_input": "separate"}
    attention = attention_of(tiny_model(fan_placement="projection", **fields))
    periodic = int(0.15 * 64)
    assert attention.q_proj.periodic.weight.shape == (periodic, 16)
    assert attention.q_proj.linear.weight.shape == (64 - 2 * periodic, 16)
    assert attention.k_proj.periodic.weight.shape == (int(0.15 * 32), 16)
    assert attention.qkv_input.factor.weight.shape == (6 * 16, 64)  # p and g of Q, K and V have their own W_a
    u, v = torch.randn(5, 16), torch.randn(5, 16)
    cos, sin, linear = attention.q_proj(u, v).split((periodic, periodic, 64 - 2 * periodic), dim=-1)
    torch.testing.assert_close(cos**2 + sin**2, torch.ones(5, periodic))
    torch.testing.assert_close(linear, attention.q_proj.linear(v))


def test_fan_layer_is_shared_by_q_k_and_v(tiny_model, token_ids):
    model = tiny_model(fan_placement="layer", fan_ratio=0.25, cola_rank_ratio=0.25, cola_input="separate")
    attention = attention_of(model)
    assert attention.fan_layer.projection.weight.shape == (64 - 16, 64)
    assert attention.fan_layer.projection.bias.shape == (48,)
    assert attention.qkv_input.factor.weight.shape == (3 * 16, 64)
    seen = recorded_input(attention.qkv_input)
    logits(model, token_ids(1, 5))
    torch.testing.assert_close(seen[0][..., :16] ** 2 + seen[0][..., 16:32] ** 2, torch.ones(1, 5, 16))


def test_fan_none_leaves_plain_projections(tiny_model):
    attention = attention_of(tiny_model(fan_placement="none"))
    assert attention.fan_layer is None
    assert type(attention.q_proj) is torch.nn.Linear
    assert not [name for name in names(tiny_model(fan_placement="none")) if "periodic" in name or "fan_layer" in name]


@pytest.mark.parametrize("cola_input", ["shared", "separate"])
@pytest.mark.parametrize("placement", ["ffn", "attention", "both", "none"])
def test_fan_between_factors_gives_unit_circles_then_the_activation(tiny_model, cola_input, placement):
    layer = tiny_model(cola_input=cola_input, cola_layers="all", fan_placement=placement).model.layers[1]
    inputs = {
        layer.self_attn.qkv_input: ("attention", 3),
        layer.self_attn.o_proj.input: ("attention", 1),
        layer.mlp.gate_up_input: ("ffn", 2),
        layer.mlp.down_proj.input: ("ffn", 1),
    }
    for part, (branch, readers) in inputs.items():
        periodic = int(0.15 * 48) if placement in (branch, "both") else 0
        stored = 1 if cola_input == "shared" else readers
        width = part.factor.in_features
        assert part.factor.weight.shape == (stored * (48 - periodic), width)
        hidden = part(torch.randn(5, width))
        assert len(hidden) == readers
        for each in hidden:
            cos, sin, rest = each.split((periodic, periodic, 48 - 2 * periodic), dim=-1)
            torch.testing.assert_close(cos**2 + sin**2, torch.ones(5, periodic))
            assert rest.min() >= -0.2785  # the least value of SiLU
    assert type(layer.self_attn.q_proj) is type(layer.mlp.up_proj) is torch.nn.Linear


@pytest.mark.parametrize(("ratio", "of_48", "of_64"), [(0.0, 0, 0), (0.15, 7, 9), (0.5, 24, 32)])
def test_fan_ratio_is_the_share_of_cos_and_of_sin(tiny_model, token_ids, ratio, of_48, of_64):
    model = tiny_model(fan_ratio=ratio)
    assert model.model.layers[0].mlp.gate_up_input.factor.weight.shape[0] == 48 - of_48
    assert logits(model, token_ids(1, 5)).isfinite().all()
    model = tiny_model(fan_ratio=ratio, fan_placement="projection")
    assert attention_of(model).q_proj.periodic.weight.shape[0] == of_64
    assert logits(model, token_ids(1, 5)).isfinite().all()


@pytest.mark.parametrize(
    ("fields", "rank"),
    [
        ({"cola_rank_ratio": 0.25}, 64 // 4),
        ({"cola_rank_ratio": 0.5}, 32),
        ({"cola_rank": 5}, 5),
        ({"cola_rank": 5, "cola_rank_ratio": None}, 5),
    ],
    ids=str,
)
def test_cola_rank_is_the_width_between_the_factors(tiny_model, fields, rank):
    fields["fan_placement"] = "projection"
    layer = tiny_model(cola_layers="all", cola_input="separate", **fields).model.layers[0]
    assert layer.self_attn.qkv_input.factor.weight.shape == (6 * rank, 64)
    assert layer.self_attn.q_proj.linear.weight.shape == (64 - 18, rank)
    assert layer.mlp.gate_up_input.factor.weight.shape == (2 * rank, 64)
    assert layer.mlp.up_proj.weight.shape == (96, rank)
    assert layer.mlp.down_proj.input.factor.weight.shape == (rank, 96)
    assert layer.mlp.down_proj.output.weight.shape == (64, rank)


def test_full_rank_has_no_factors(tiny_model):
    model = tiny_model(cola_rank_ratio=None, fan_placement="projection")
    assert not [name for name in names(model) if "factor" in name]
    layer = model.model.layers[0]
    assert layer.mlp.down_proj.weight.shape == (64, 96)
    assert layer.self_attn.q_proj.linear.weight.shape == (64 - 18, 64)


@pytest.mark.parametrize(
    ("chosen", "low_rank"),
    [
        ("readers", {"qkv_input", "gate_up_input"}),
        ("all", {"qkv_input", "o_proj", "gate_up_input", "down_proj"}),
        ("attention", {"qkv_input", "o_proj"}),
        ("ffn", {"gate_up_input", "down_proj"}),
    ],
    ids=["readers", "all", "attention", "ffn"],  # a set's text has another order in every process
)
def test_cola_layers_says_which_layers_have_factors(tiny_model, chosen, low_rank):
    model = tiny_model(cola_layers=chosen, fan_placement="projection")
    assert {name.split(".")[4] for name in names(model) if "factor" in name} == low_rank
    layer = model.model.layers[0]
    attention_width, ffn_width = (48 if part in low_rank else 64 for part in ("qkv_input", "gate_up_input"))
    assert layer.self_attn.q_proj.periodic.weight.shape == (9, attention_width)
    assert layer.self_attn.v_proj.linear.weight.shape == (32 - 2 * 4, attention_width)
    assert layer.mlp.gate_proj.weight.shape == layer.mlp.up_proj.weight.shape == (96, ffn_width)
    for output, part in ((layer.self_attn.o_proj, "o_proj"), (layer.mlp.down_proj, "down_proj")):
        assert (type(output) is torch.nn.Linear) == (part not in low_rank)


def test_a_shared_input_factor_is_one_for_all_its_readers(tiny_model):
    layer = tiny_model(cola_input="shared", fan_placement="projection").model.layers[0]
    assert layer.self_attn.qkv_input.factor.weight.shape == (48, 64)
    assert layer.mlp.gate_up_input.factor.weight.shape == (48, 64)
    assert layer.self_attn.q_proj.periodic.weight.shape == (9, 48)  # as with a factor of its own
    inputs = layer.self_attn.qkv_input(torch.randn(1, 3, 64))
    assert len(inputs) == 6
    assert all(torch.equal(inputs[0], other) for other in inputs)
    separate = tiny_model(cola_input="separate")
    assert len({id(own) for own in separate.model.layers[0].mlp.gate_up_input(torch.randn(1, 3, 64))}) == 2


@pytest.mark.parametrize("cola_input", ["separate", "shared"])
def test_cola_norm_makes_the_factors_blind_to_the_scale_of_the_first(tiny_model, cola_input):
    for normed in (False, True):
        fields = {"cola_input": cola_input, "cola_norm": normed, "cola_layers": "all"}
        part = tiny_model(**fields, rms_norm_eps=1e-12).model.layers[0].mlp
        assert [name for name, _ in part.named_parameters() if "norm" in name] == (
            ["gate_up_input.norm.weight", "down_proj.input.norm.weight"] if normed else []
        )
        x = torch.randn(3, 64)
        before = part(x)
        with torch.no_grad():
            part.gate_up_input.factor.weight.mul_(3)
        assert torch.allclose(part(x), before, atol=1e-5) == normed


def test_cola_activation_stands_between_the_factors(tiny_model):
    x = torch.randn(3, 96)
    for activation, function in (
        ("silu", torch.nn.functional.silu),
        ("gelu", torch.nn.functional.gelu),  # exact, by erf
        ("linear", lambda t: t),
    ):
        fields = {"cola_activation": activation, "cola_layers": "all", "cola_norm": False, "fan_placement": "none"}
        down = tiny_model(**fields).model.layers[0].mlp.down_proj
        expected = function(x @ down.input.factor.weight.T) @ down.output.weight.T + down.output.bias
        torch.testing.assert_close(down(x), expected)


def test_projection_bias_is_on_every_output_but_cos_and_sin(tiny_model):
    others = {"o_proj", "gate_proj", "up_proj", "down_proj"}
    for placement, expected in (
        ("ffn", {"q_proj", "k_proj", "v_proj"} | others),
        ("projection", {"q_proj.linear", "k_proj.linear", "v_proj.linear"} | others),
    ):
        biases = {name for name in names(tiny_model(fan_placement=placement)) if name.endswith(".bias")}
        assert {name.split(".", 4)[4].removesuffix(".bias") for name in biases} == expected
    assert not [name for name in names(tiny_model(projection_bias=False)) if name.endswith(".bias")]
    # The FAN layer keeps its bias, as the published code has it.
    layer_biases = {n for n in names(tiny_model(projection_bias=False, fan_placement="layer")) if n.endswith(".bias")}
    assert {name.split(".", 4)[4] for name in layer_biases} == {"fan_layer.projection.bias"}


def test_hidden_act_is_that_of_the_gate(tiny_model):
    z = torch.randn(1, 3, 64)
    for hidden_act, function in (("silu", torch.nn.functional.silu), ("linear", lambda t: t)):
        mlp = tiny_model(hidden_act=hidden_act).model.layers[0].mlp
        gate, up = mlp.gate_up_input(z)
        torch.testing.assert_close(mlp(z), mlp.down_proj(function(mlp.gate_proj(gate)) * mlp.up_proj(up)))


@pytest.mark.parametrize(
    ("placement", "normed_layers"), [("hybrid-star", [0]), ("hybrid", []), ("pre", [0, 1, 2])], ids=str
)
def test_norm_placement_says_where_attention_has_a_norm(tiny_model, placement, normed_layers):
    model = tiny_model(norm_placement=placement, num_hidden_layers=3)
    assert names(model) >= {f"model.layers.{index}.post_attention_layernorm.weight" for index in range(3)}
    found = [index for index in range(3) if f"model.layers.{index}.input_layernorm.weight" in names(model)]
    assert found == normed_layers


@pytest.mark.parametrize(("placement", "normed"), [("hybrid-star", True), ("hybrid", True), ("pre", False)], ids=str)
def test_norm_placement_says_which_residual_the_ffn_gets(tiny_model, placement, normed):
    layer = tiny_model(norm_placement=placement, num_hidden_layers=1, gated_residual=False).model.layers[0]
    for branch in (layer.mlp.down_proj, layer.self_attn.o_proj):
        torch.nn.init.zeros_(branch.weight)
        torch.nn.init.zeros_(branch.bias)
    x = torch.randn(1, 4, 64)
    ones = torch.ones(1, 4, 1, 8)
    output = layer(x, position_embeddings=(ones, ones))
    torch.testing.assert_close(output, layer.post_attention_layernorm(x) if normed else x)


@pytest.mark.parametrize(("qkv_norm", "normed"), [("qkv", "qkv"), ("qk", "qk"), ("none", "")])
def test_qkv_norm_makes_attention_blind_to_the_scale_of_what_it_normalises(tiny_model, token_ids, qkv_norm, normed):
    # A tiny eps, else it would be what the scale is compared with; no biases, so that scaling a weight scales its part.
    model = tiny_model(
        qkv_norm=qkv_norm, fan_placement="none", projection_bias=False, rms_norm_eps=1e-12, num_hidden_layers=1
    )
    present = {part for part in "qkv" if f"model.layers.0.self_attn.{part}_norm.weight" in names(model)}
    assert present == set(normed)
    input_ids = token_ids(1, 9)
    before = logits(model, input_ids)
    for part in "qkv":
        projection = getattr(model.model.layers[0].self_attn, f"{part}_proj")
        with torch.no_grad():
            projection.weight.mul_(3)
            changed = (logits(model, input_ids) - before).abs().max().item()
            projection.weight.div_(3)
        # 1e-4 is far above rounding at logits of about 10, and far below the change that a factor of 3 makes.
        assert (changed < 1e-4) == (part in normed), f"{part}: logits changed by {changed}"


def test_gated_residual_scales_each_branch_by_a_sigmoid(tiny_model):
    model = tiny_model()
    residual = model.model.layers[0].mlp_residual
    x, branch = torch.randn(2, 3, 64), torch.randn(2, 3, 64)
    torch.testing.assert_close(residual(x, branch), x + torch.sigmoid(residual.gate) * branch)
    torch.nn.init.zeros_(residual.gate)
    torch.testing.assert_close(residual(x, branch), x + 0.5 * branch)
    torch.nn.init.constant_(residual.gate, -100.0)
    torch.testing.assert_close(residual(x, branch), x)


@pytest.mark.parametrize("start", [0.0, -2.0, 3, 16.0])
def test_gate_initial_is_the_strength_that_each_branch_starts_with(tiny_config, start):
    model = FANformerForCausalLM(tiny_config(gate_initial=start))
    gates = {name: gate for name, gate in model.named_parameters() if name.endswith("residual.gate")}
    assert len(gates) == 2 * 2
    for gate in gates.values():
        torch.testing.assert_close(gate.detach(), torch.full((64,), float(start)), atol=0, rtol=0)
    x, branch = torch.randn(2, 3, 64), torch.randn(2, 3, 64)
    residual = model.model.layers[1].mlp_residual
    torch.testing.assert_close(residual(x, branch), x + torch.sigmoid(torch.tensor(float(start))) * branch)


def test_ungated_residual_adds_the_branch(tiny_model):
    model = tiny_model(gated_residual=False)
    assert not [name for name in names(model) if name.endswith(".gate")]
    x, branch = torch.randn(2, 3, 64), torch.randn(2, 3, 64)
    torch.testing.assert_close(model.model.layers[0].mlp_residual(x, branch), x + branch)


def test_dropout_acts_on_the_branch_and_only_in_training(tiny_model):
    residual = tiny_model(dropout=0.5, gated_residual=False).model.layers[0].attention_residual
    x, branch = torch.randn(4, 8, 64), torch.ones(4, 8, 64)
    torch.testing.assert_close(residual(x, branch), x + branch)
    residual.train()
    torch.manual_seed(0)
    kept = residual(x, branch) - x
    torch.testing.assert_close(kept.round(), kept, atol=1e-5, rtol=0)
    assert set(kept.round().unique().tolist()) == {0.0, 2.0}
    assert kept.mean().item() == pytest.approx(1.0, abs=0.1)  # 2048 fair coins: standard deviation 0.022


def test_attention_dropout_acts_on_the_weights_and_only_in_training(tiny_model, token_ids):
    model, plain = tiny_model(attention_dropout=0.5), tiny_model()
    input_ids = token_ids(1, 17)
    assert torch.equal(logits(model, input_ids), logits(plain, input_ids))
    model.train()
    assert not torch.allclose(logits(model, input_ids), logits(model, input_ids))


def test_tied_embedding_is_the_head(tiny_model):
    model = tiny_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight is model.get_output_embeddings().weight
    untied = tiny_model()
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
