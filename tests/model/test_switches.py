"""What each switch of the configuration does: which parameters come or go, and how the output behaves."""

import pytest
import torch

from fanformer.model import FANformerForCausalLM
from fanformer.model.configuration_fanformer import RANKS
from fanformer.model.modeling_fanformer import ResidualSiLU
from tests.tiny_models import FULL_RANK, PAPERS_COLA, TUNED, every_rank


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
    attention = attention_of(tiny_model(qkv_rank=16, cola_input="separate", fan_multiple=1))
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
    model = tiny_model(fan_placement="layer", fan_ratio=0.25, qkv_rank=16, cola_input="separate")
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
@pytest.mark.parametrize("placement", ["ffn", "none"])
def test_fan_between_factors_gives_unit_circles_then_the_activation(tiny_model, cola_input, placement):
    fields = {**every_rank(48), "fan_multiple": 1, "cola_input": cola_input}
    layer = tiny_model(**fields, fan_placement=placement, writer_activation="silu").model.layers[1]
    inputs = {
        layer.self_attn.qkv_input: ("attention", 3),
        layer.self_attn.o_proj.input: ("attention", 1),
        layer.mlp.gate_up_input: ("ffn", 2),
        layer.mlp.down_proj.input: ("ffn", 1),
    }
    for part, (branch, readers) in inputs.items():
        periodic = int(0.15 * 48) if placement == branch else 0
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
    model = tiny_model(**TUNED, fan_ratio=ratio)
    assert model.model.layers[0].mlp.gate_up_input.factor.weight.shape[0] == 48 - of_48
    assert logits(model, token_ids(1, 5)).isfinite().all()
    model = tiny_model(fan_ratio=ratio, fan_multiple=1)
    assert attention_of(model).q_proj.periodic.weight.shape[0] == of_64
    assert logits(model, token_ids(1, 5)).isfinite().all()


@pytest.mark.parametrize(
    ("multiple", "channels", "expected"),
    [
        (16, 1536, 224),  # Q of the default: 230.4 is nearer to 224 than to 240, and 1536 - 448 is a multiple too
        (16, 768, 112),  # K and V: 115.2
        (1, 1536, 230),  # as published: rounded down
        (1, 768, 115),
        (8, 1536, 232),
        (16, 192, 32),  # 28.8
        (16, 64, 8),  # 9.6 is less than 16
        (16, 32, 4),  # 4.8
        (16, 16, 2),  # one head of 16: 2.4
        (16, 24, 4),  # 3.6 is less than 4, but nearer to it than to 2
        (16, 63, 9),  # odd: no multiple but 1
    ],
)
def test_fan_multiple_rounds_p_so_that_p_and_the_rest_are_multiples(tiny_config, multiple, channels, expected):
    config = tiny_config(fan_multiple=multiple)
    assert config.periodic_width(channels) == expected
    model = FANformerForCausalLM(tiny_config(head_dim=channels if channels % 2 == 0 else 64, fan_multiple=multiple))
    projection = attention_of(model).k_proj
    assert 2 * projection.periodic.out_features + projection.linear.out_features == 2 * model.config.head_dim


def test_fan_multiple_never_takes_what_was_asked_for_away(tiny_config):
    for multiple in (1, 2, 4, 8, 16, 32):
        for ratio in (0.05, 0.15, 0.25, 0.4, 0.5):
            config = tiny_config(fan_multiple=multiple, fan_ratio=ratio)
            for channels in range(2, 400, 2):
                wide, share = config.periodic_width(channels), ratio * channels
                assert 0 <= 2 * wide <= channels
                assert wide > 0 or share < 1
                assert 2 * wide < channels or ratio == 0.5
                assert abs(wide - share) <= max(multiple / 2, 1)
                if channels % multiple == 0 and multiple <= min(share, channels - 2 * share or share):
                    assert wide % multiple == 0


def test_each_kind_of_layer_has_a_rank_of_its_own(tiny_model):
    layer = tiny_model(qkv_rank=11, o_rank=12, gate_up_rank=13, down_rank=14, fan_multiple=1).model.layers[0]
    assert layer.self_attn.qkv_input.factor.weight.shape == (11, 64)
    assert layer.self_attn.q_proj.linear.weight.shape == (64 - 18, 11)
    assert layer.self_attn.v_proj.periodic.weight.shape == (4, 11)
    assert layer.self_attn.o_proj.input.factor.weight.shape == (12, 64)
    assert layer.self_attn.o_proj.output.weight.shape == (64, 12)
    assert layer.mlp.gate_up_input.factor.weight.shape == (13, 64)
    assert layer.mlp.gate_proj.weight.shape == layer.mlp.up_proj.weight.shape == (96, 13)
    assert layer.mlp.down_proj.input.factor.weight.shape == (14, 96)
    assert layer.mlp.down_proj.output.weight.shape == (64, 14)


def test_separate_inputs_have_a_first_factor_for_each_reader(tiny_model):
    layer = tiny_model(**PAPERS_COLA, **every_rank(5)).model.layers[0]
    assert layer.self_attn.qkv_input.factor.weight.shape == (6 * 5, 64)  # p and g of Q, K and V
    assert layer.mlp.gate_up_input.factor.weight.shape == (2 * 5, 64)


@pytest.mark.parametrize("full", RANKS)
def test_a_rank_of_none_is_full_rank_for_its_layers_alone(tiny_model, full):
    model = tiny_model(**{full: None})
    parts = {"qkv_rank": "qkv_input", "o_rank": "o_proj", "gate_up_rank": "gate_up_input", "down_rank": "down_proj"}
    factors = {name.split(".")[4] for name in names(model) if "factor" in name}
    assert factors == set(parts.values()) - {parts[full]}
    layer = model.model.layers[0]
    assert layer.self_attn.q_proj.linear.in_features == (64 if full == "qkv_rank" else 44)
    assert layer.mlp.up_proj.in_features == (64 if full == "gate_up_rank" else 28)
    for output, name in ((layer.self_attn.o_proj, "o_rank"), (layer.mlp.down_proj, "down_rank")):
        assert (type(output) is torch.nn.Linear) == (name == full)


def test_full_rank_has_no_factors(tiny_model):
    model = tiny_model(**FULL_RANK, fan_multiple=1)
    assert not [name for name in names(model) if "factor" in name]
    layer = model.model.layers[0]
    assert layer.mlp.down_proj.weight.shape == (64, 96)
    assert layer.self_attn.q_proj.linear.weight.shape == (64 - 18, 64)


def test_a_shared_input_factor_is_one_for_all_its_readers(tiny_model):
    layer = tiny_model(cola_input="shared").model.layers[0]
    assert layer.self_attn.qkv_input.factor.weight.shape == (44, 64)
    assert layer.mlp.gate_up_input.factor.weight.shape == (28, 64)
    assert layer.self_attn.q_proj.periodic.weight.shape == (8, 44)  # as with a factor of its own
    inputs = layer.self_attn.qkv_input(torch.randn(1, 3, 64))
    assert len(inputs) == 6
    assert all(torch.equal(inputs[0], other) for other in inputs)
    separate = tiny_model(cola_input="separate")
    assert len({id(own) for own in separate.model.layers[0].mlp.gate_up_input(torch.randn(1, 3, 64))}) == 2


@pytest.mark.parametrize("cola_input", ["separate", "shared"])
def test_cola_norm_makes_the_readers_blind_to_the_scale_of_their_first_factor(tiny_model, cola_input):
    for normed in (False, True):
        fields = {"cola_norm": normed, "cola_input": cola_input}
        part = tiny_model(**fields, rms_norm_eps=1e-12).model.layers[0].mlp
        norms = ["gate_up_input.norm.weight"] if normed else []
        assert [name for name, _ in part.named_parameters() if "norm" in name] == norms
        x = torch.randn(3, 64)
        before = part(x)
        with torch.no_grad():
            part.gate_up_input.factor.weight.mul_(3)
        assert torch.allclose(part(x), before, atol=1e-5) == normed


FORMS = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,  # exact, by erf
    "linear": lambda t: t,
    "residual": lambda t: t + torch.nn.functional.silu(t),
}


@pytest.mark.parametrize("activation", FORMS)
def test_writer_activation_stands_between_the_factors_of_o_and_down(tiny_model, activation):
    x = torch.randn(3, 96)
    layer = tiny_model(writer_activation=activation).model.layers[0]
    down = layer.mlp.down_proj
    expected = FORMS[activation](x @ down.input.factor.weight.T) @ down.output.weight.T + down.output.bias
    torch.testing.assert_close(down(x), expected)
    assert type(layer.self_attn.o_proj.input.activation) is type(down.input.activation)
    assert type(layer.mlp.gate_up_input.activation) is torch.nn.SiLU


@pytest.mark.parametrize("activation", ["silu", "gelu", "linear"])
def test_cola_activation_stands_between_the_factors_of_the_layers_that_read(tiny_model, activation):
    z = torch.randn(3, 64)
    layer = tiny_model(cola_activation=activation, cola_norm=False).model.layers[0]
    gate, up = layer.mlp.gate_up_input(z)
    torch.testing.assert_close(gate, FORMS[activation](z @ layer.mlp.gate_up_input.factor.weight.T))
    assert gate is up
    assert type(layer.self_attn.qkv_input.activation) is type(layer.mlp.gate_up_input.activation)
    assert type(layer.mlp.down_proj.input.activation) is ResidualSiLU


def test_projection_bias_is_on_every_output_but_cos_and_sin(tiny_model):
    others = {"o_proj.output", "gate_proj", "up_proj", "down_proj.output"}
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
    for branch in (layer.mlp.down_proj.output, layer.self_attn.o_proj.output):
        torch.nn.init.zeros_(branch.weight)
        torch.nn.init.zeros_(branch.bias)
    x = torch.randn(1, 4, 64)
    ones = torch.ones(1, 4, 1, 8)
    output = layer(x, position_embeddings=(ones, ones))
    torch.testing.assert_close(output, layer.post_attention_layernorm(x) if normed else x)


@pytest.mark.parametrize(("qkv_norm", "normed"), [("qkv", "qkv"), ("none", "")])
def test_qkv_norm_makes_attention_blind_to_the_scale_of_what_it_normalises(tiny_model, token_ids, qkv_norm, normed):
    # A tiny eps, else it would be what the scale is compared with; no biases, so that scaling a weight scales its part.
    model = tiny_model(
        qkv_norm=qkv_norm,
        fan_placement="none",
        projection_bias=False,
        rms_norm_eps=1e-12,
        num_hidden_layers=1,
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
