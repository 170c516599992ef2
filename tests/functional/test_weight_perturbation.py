import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks_for_tests import same, snapshot, tiny_network
from torch import nn

from robust_flatness.functional import perturbed_weights, sample_weight_perturbation
from robust_flatness.functional.weight_perturbation import perturbed_parameters, scale_to


def test_perturbs_convolutions_and_linear_layers_with_biases_but_no_normalisation():
    network = tiny_network()
    everything = ["0.weight", "0.bias", "3.weight", "8.weight", "8.bias"]
    assert list(perturbed_parameters(network)) == everything
    assert list(perturbed_parameters(network, biases=False)) == ["0.weight", "3.weight", "8.weight"]


@given(xi=st.floats(0, 3), seed=st.integers(0, 9), direction=st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_every_layer_moves_by_xi_of_its_norm(xi, seed, direction):
    network = tiny_network().double()
    nn.init.zeros_(network[8].bias)
    perturbation = sample_weight_perturbation(network, xi=xi, seed=seed, direction=direction)
    for name, parameter in perturbed_parameters(network).items():
        torch.testing.assert_close(perturbation[name].norm(), xi * parameter.detach().norm())
    assert (perturbation["8.bias"] == 0).all()


def test_directions_and_seeds_are_independent_and_repeatable():
    network = tiny_network()
    first = sample_weight_perturbation(network, seed=0, direction=0)["0.weight"]
    again = sample_weight_perturbation(network, seed=0, direction=0)["0.weight"]
    other = sample_weight_perturbation(network, seed=0, direction=1)["0.weight"]
    assert torch.equal(first, again)
    cosine = torch.cosine_similarity(first.flatten(), other.flatten(), dim=0)
    assert cosine.abs() < 0.4


def test_zero_or_broken_directions_do_not_move_anything():
    weight = torch.ones(3)
    assert scale_to(torch.zeros(3), weight, 0.5).tolist() == [0, 0, 0]
    assert scale_to(torch.tensor([1.0, torch.nan, 0]), weight, 0.5).tolist() == [0, 0, 0]
    assert scale_to(torch.ones(3), torch.zeros(3), 0.5).tolist() == [0, 0, 0]


def test_weights_come_back_bit_for_bit_after_an_exception():
    network = tiny_network()
    before = snapshot(network)
    perturbation = sample_weight_perturbation(network)
    with pytest.raises(RuntimeError, match="half-way"), perturbed_weights(network, perturbation):
        assert not same(before, snapshot(network))
        raise RuntimeError("half-way")
    assert same(before, snapshot(network))


def test_autocast_sees_the_perturbation():
    network = nn.Linear(4, 3)
    inputs = torch.ones(2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = network(inputs)
        with perturbed_weights(network, {"weight": torch.ones(3, 4)}):
            inside = network(inputs)
        after = network(inputs)
    torch.testing.assert_close(inside.float(), before.float() + 4, atol=0.05, rtol=0)
    assert torch.equal(before, after)


def test_shared_weights_are_perturbed_once():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    network = nn.Sequential(first, second)
    assert list(perturbed_parameters(network)) == ["0.weight", "0.bias", "1.bias"]


def test_a_network_without_layers_is_refused():
    with pytest.raises(ValueError, match="convolution or linear layers to perturb but got ReLU"):
        sample_weight_perturbation(nn.ReLU())
