import dataclasses

import pytest
import torch

from fanformer.training.configuration import resolve
from fanformer.training.optimizers import BlockMuon, create_optimizer, orthogonalize, split_parameters
from fanformer.training.state import Snapshot, restore_model, restore_optimizer
from tests.tiny_models import TUNED


def test_orthogonalize_brings_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((3, 16, 40), (3, 40, 16)):
        matrices = torch.randn(*shape) * torch.linspace(0.5, 2, shape[2])
        values = torch.linalg.svdvals(orthogonalize(matrices))
        assert values.min() > 0.4
        assert values.max() < 1.3


def test_one_matrix_a_weight_steps_as_torch_muon_does():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(16, 40)), torch.nn.Parameter(torch.randn(48, 16))]
    theirs = [torch.nn.Parameter(weight.detach().clone()) for weight in ours]
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "adjust_lr_fn": "match_rms_adamw"}
    block_muon = BlockMuon([{"params": ours, "blocks": 1}], **settings)
    muon = torch.optim.Muon(theirs, **settings)
    for _ in range(4):
        for mine, its in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            its.grad = mine.grad.clone()
        block_muon.step()
        muon.step()
    for mine, its in zip(ours, theirs, strict=True):
        # torch iterates in bfloat16 (2 to 3 digits); four steps move an entry by about 0.02
        torch.testing.assert_close(mine, its, atol=1e-3, rtol=0)


def test_stacked_factors_step_as_if_each_were_a_weight_of_its_own():
    torch.manual_seed(0)
    stacked = torch.nn.Parameter(torch.randn(30, 16))
    apart = [torch.nn.Parameter(part.clone()) for part in stacked.detach().chunk(3)]
    whole = torch.nn.Parameter(stacked.detach().clone())
    stacked.grad = torch.randn_like(stacked)
    whole.grad = stacked.grad.clone()
    for part, gradient in zip(apart, stacked.grad.chunk(3), strict=True):
        part.grad = gradient.clone()
    BlockMuon([{"params": [stacked], "blocks": 3}], lr=0.1).step()
    BlockMuon([{"params": apart, "blocks": 1}], lr=0.1).step()
    BlockMuon([{"params": [whole], "blocks": 1}], lr=0.1).step()
    torch.testing.assert_close(stacked, torch.cat(apart), atol=1e-6, rtol=0)  # the same products, batched otherwise
    assert not torch.allclose(stacked, whole, atol=1e-3)


def test_spectral_scaling_lets_every_shape_change_its_output_by_the_learning_rate():
    for rows, columns in ((64, 64), (64, 16), (16, 64), (160, 16)):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.zeros(rows, columns))
        weight.grad = torch.randn_like(weight)
        BlockMuon([{"params": [weight], "blocks": 1}], "spectral", lr=0.01, weight_decay=0.0).step()
        largest = torch.linalg.matrix_norm(weight, ord=2).item()  # of |W x| over |x|
        assert 0.006 < largest * (columns / rows) ** 0.5 < 0.013, (rows, columns)  # of their root mean squares


def test_parameters_are_sorted_by_role_and_counted_by_block(tiny_model):
    model = tiny_model(cola_input="separate")
    roles = split_parameters(model)
    assert [
        members[0][0] is weight
        for members, weight in (
            (roles["embedding"], model.model.embed_tokens.weight),
            (roles["head"], model.lm_head.weight),
        )
    ] == [True, True]
    blocks = {id(parameter): count for parameter, count in roles["factors"]}
    layer = model.model.layers[0]
    assert blocks[id(layer.self_attn.qkv_input.factor.weight)] == 6
    assert blocks[id(layer.mlp.gate_up_input.factor.weight)] == 2
    assert blocks[id(layer.mlp.down_proj.input.factor.weight)] == 1
    assert blocks[id(layer.self_attn.q_proj.periodic.weight)] == 1
    assert all(parameter.ndim == 1 for parameter, _ in roles["vectors"])
    assert sum(len(members) for members in roles.values()) == len(list(model.parameters()))
    shared = tiny_model().model.layers[0].self_attn.qkv_input
    assert shared.count == 1


def test_the_factors_of_low_rank_layers_have_a_rate_of_their_own(tiny_model):
    """In the tuned block O and down are whole; in the default no matrix is; with one scale both are one group."""
    fields = {"learning_rate": 0.01, "muon_learning_rate_scale": 4.0, "muon_factor_scale": 0.5}
    config = resolve("nano", overrides={"optimizer": "muon", **fields}).optimizer
    for block in (TUNED, {}):
        model = tiny_model(**block)
        rates = {id(p): g["lr"] for g in create_optimizer(model, config).param_groups for p in g["params"]}
        attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
        whole = [attention.o_proj.weight, mlp.down_proj.weight] if block else []
        factors = [
            *(
                part.weight
                for part in (attention.qkv_input.factor, mlp.gate_up_input.factor, mlp.gate_proj, mlp.up_proj)
            ),
            *(
                p
                for one in (attention.q_proj, attention.k_proj, attention.v_proj)
                for p in one.parameters()
                if p.ndim == 2
            ),
            *(p for one in (attention.o_proj, mlp.down_proj) if not block for p in one.parameters() if p.ndim == 2),
        ]
        assert {rates[id(weight)] for weight in whole} == ({0.04} if block else set())
        assert {rates[id(weight)] for weight in factors} == {0.02}
        assert len(factors) == (7 if block else 14)
    one = dataclasses.replace(config, muon_factor_scale=1.0)
    assert [g["lr"] for g in create_optimizer(model, one).param_groups if "blocks" in g] == [0.04]


def test_tied_embeddings_are_one_parameter_of_one_group(tiny_model):
    model = tiny_model(tie_word_embeddings=True)
    roles = split_parameters(model)
    assert roles["head"] == []
    optimizer = create_optimizer(model, resolve("nano", overrides={"optimizer": "adamw"}).optimizer)
    listed = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(listed) == sorted(id(parameter) for parameter in model.parameters())


def test_a_tied_embedding_learns_at_the_heads_rate(tiny_model):
    config = resolve("nano", overrides={"learning_rate": 0.01, "embedding_learning_rate_scale": 30.0}).optimizer
    for tied, expected in ((True, 0.01), (False, 0.3)):
        model = tiny_model(tie_word_embeddings=tied)
        groups = create_optimizer(model, config).param_groups
        found = [g["lr"] for g in groups if any(p is model.model.embed_tokens.weight for p in g["params"])]
        assert found == pytest.approx([expected])


def test_muon_with_adamw_moves_every_parameter_and_restores_its_state_bit_for_bit(tiny_model, token_ids, tmp_path):
    config = resolve("nano", overrides={"optimizer": "muon", "learning_rate": 0.01}).optimizer
    models = [tiny_model(seed=3), tiny_model(seed=3)]
    optimizers = [create_optimizer(model, config) for model in models]
    batch = token_ids(2, 16)

    def step(index):
        models[index](batch, labels=batch).loss.backward()
        optimizers[index].step()
        optimizers[index].zero_grad()

    before = [parameter.detach().clone() for parameter in models[0].parameters()]
    step(0)
    assert all(not torch.equal(old, new) for old, new in zip(before, models[0].parameters(), strict=True))

    snapshot = Snapshot(keep=True)
    snapshot.take(models[0], optimizers[0])
    models[0].save_pretrained(tmp_path)
    snapshot.save_optimizer(tmp_path)
    restore_model(models[1], tmp_path)
    restore_optimizer(models[1], optimizers[1], tmp_path)
    optimizers[1].param_groups[0]["lr"] = optimizers[0].param_groups[0]["lr"] = 0.005  # as a schedule writes it
    step(0)
    step(1)
    for first, second in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(first, second)
