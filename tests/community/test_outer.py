"""The outer step is Nesterov's, and its state comes back to the bit."""

import pytest
import torch

from fanformer.community.outer import OuterSettings, OuterState, outer_begin, outer_step
from fanformer.errors import CheckpointError, ConfigError, DataError


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in {"a": (3, 4), "b": (5,)}.items()}


def same(one, two):
    return all(one.keys() == two.keys() and torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_outer_steps_are_those_of_torch_s_sgd_with_nesterov(momentum):
    state, settings = outer_begin(weights()), OuterSettings(0.7, momentum)
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in weights().items()}
    sgd = torch.optim.SGD(parameters.values(), lr=0.7, momentum=momentum, nesterov=momentum > 0)
    for number in range(5):
        gradient = weights(seed=number + 1)
        for name, parameter in parameters.items():
            parameter.grad = gradient[name]
        sgd.step()
        state = outer_step(state, gradient, settings)
        for name, parameter in parameters.items():  # torch adds in another order
            torch.testing.assert_close(state.weights[name], parameter.detach(), rtol=1e-6, atol=1e-6)


def test_a_step_leaves_the_state_before_it_as_it_was():
    before = outer_step(outer_begin(weights()), weights(1), OuterSettings())
    copies = [{name: tensor.clone() for name, tensor in part.items()} for part in (before.weights, before.momentum)]
    outer_step(before, weights(2), OuterSettings())
    assert same(before.weights, copies[0])
    assert same(before.momentum, copies[1])


def test_a_fragment_moves_alone_and_keeps_its_own_momentum():
    first = outer_step(outer_begin(weights()), {"a": weights(1)["a"]}, OuterSettings())
    assert torch.equal(first.weights["b"], weights()["b"])
    assert list(first.momentum) == ["a"]
    second = outer_step(first, {"b": weights(2)["b"]}, OuterSettings())
    assert torch.equal(second.weights["a"], first.weights["a"])
    assert torch.equal(second.momentum["a"], first.momentum["a"])


def test_the_state_is_saved_and_restored_to_the_bit(tmp_path):
    settings = OuterSettings()
    state = outer_step(outer_begin(weights()), weights(1), settings)
    state.save(tmp_path / "outer.safetensors")
    again = OuterState.load(tmp_path / "outer.safetensors")
    assert same(state.weights, again.weights)
    assert same(state.momentum, again.momentum)
    assert same(outer_step(state, weights(2), settings).weights, outer_step(again, weights(2), settings).weights)


def test_what_is_wrong_is_named(tmp_path):
    with pytest.raises(DataError, match=r"`a` of a pseudo-gradient has no weight of its shape \(4, 3\)"):
        outer_step(outer_begin(weights()), {"a": weights()["a"].T}, OuterSettings())
    with pytest.raises(ConfigError, match=r"the outer `learning_rate` must be in \(0, 2\], got 0"):
        OuterSettings(learning_rate=0)
    with pytest.raises(ConfigError, match=r"the outer `momentum` must be in \[0, 1\), got 1"):
        OuterSettings(momentum=1)
    with pytest.raises(CheckpointError, match="cannot read"):
        OuterState.load(tmp_path / "outer")
    (tmp_path / "outer").write_bytes(b"no safetensors")
    with pytest.raises(CheckpointError, match="go back to an earlier round"):
        OuterState.load(tmp_path / "outer")
