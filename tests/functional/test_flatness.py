import math

import pytest
import torch
from networks_for_tests import PassCounter, images_and_labels, same, snapshot, tiny_network
from scaled_networks import scaled
from torch import nn
from torch.nn.functional import cross_entropy

from robust_flatness.functional import average_case_flatness, sample_weight_perturbation

SETTINGS = {"eps": 0.05, "steps": 3, "num_perturbations": 3}


@pytest.mark.parametrize("factor", [0.5, 2.0, 3.7])
def test_is_invariant_to_the_scale_of_normalised_layers(factor):
    images, labels = images_and_labels(16)
    images = images.double()
    plain = average_case_flatness(tiny_network().double(), images, labels, **SETTINGS)
    moved = average_case_flatness(
        scaled(tiny_network().double(), factor), images, labels, **SETTINGS
    )
    assert plain.value != 0
    assert moved.value == pytest.approx(plain.value, abs=1e-9)


def test_linear_network_agrees_with_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    images = 0.3 + 0.4 * torch.rand(20, 1, 4, 4, generator=generator).double()
    labels = torch.arange(20) % 2
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).double()
    eps, xi = 0.1, 0.4

    def worst(weight: torch.Tensor, bias: torch.Tensor) -> float:
        # The worst linf perturbation of a two-class linear network costs the margin eps·‖gap‖_1.
        gap = weight[1] - weight[0]
        margin = images.flatten(1) @ gap + bias[1] - bias[0]
        sign = torch.where(labels == 1, 1.0, -1.0).double()
        margin = sign * margin - eps * gap.abs().sum()
        return nn.functional.softplus(-margin).mean().item()

    weight, bias = network[1].weight.detach().clone(), network[1].bias.detach().clone()
    expected = []
    for k in range(4):
        nu = sample_weight_perturbation(network, xi=xi, direction=k)
        expected.append(worst(weight + nu["1.weight"], bias + nu["1.bias"]))
    found = average_case_flatness(
        network, images, labels, xi=xi, num_perturbations=4, eps=eps, steps=40
    )
    assert found.reference_loss == pytest.approx(worst(weight, bias), abs=1e-9)
    torch.testing.assert_close(
        found.perturbed_losses.mean(1),
        torch.tensor(expected, dtype=torch.float64),
        rtol=0,
        atol=1e-9,
    )
    assert found.value == pytest.approx(sum(expected) / 4 - worst(weight, bias), abs=1e-9)


def test_grows_with_xi_on_a_linear_network():
    images, labels = images_and_labels(32, classes=2, channels=1)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).double()
    labels = network(images.double()).argmax(1)
    values = [
        average_case_flatness(network, images.double(), labels, xi=xi, steps=5).value
        for xi in (0.25, 0.5, 1.0)
    ]
    assert 0 < values[0] < values[1] < values[2]


def test_xi_zero_is_exactly_zero():
    images, labels = images_and_labels(8)
    found = average_case_flatness(tiny_network(), images, labels, xi=0.0, restarts=2, **SETTINGS)
    assert found.value == 0.0
    assert found.standard_error == 0.0


def test_paper_protocol_compares_ten_restarts_with_one():
    images, labels = images_and_labels(16)
    network = tiny_network()
    paper = average_case_flatness(network, images, labels, xi=0.0, protocol="paper", **SETTINGS)
    shared = average_case_flatness(network, images, labels, xi=0.0, **SETTINGS)
    assert paper.reference_loss > shared.reference_loss
    assert paper.value < 0


def test_adversarial_examples_are_computed_anew_at_the_perturbed_weights():
    images, labels = images_and_labels(8)
    network = tiny_network()
    seen = []
    network.register_forward_pre_hook(lambda m, _: seen.append(m[0].weight.sum().item()))
    before = snapshot(network)
    average_case_flatness(network, images, labels, **SETTINGS)
    # Three steps and the last iterate, at the weights and at each of three perturbations.
    assert [seen.count(value) for value in dict.fromkeys(seen)] == [4] * 4
    assert same(before, snapshot(network))


def test_values_and_errors_are_those_of_the_losses():
    images, labels = images_and_labels(12)
    network = tiny_network().double()
    found = average_case_flatness(network, images.double(), labels, **SETTINGS)
    rises = found.perturbed_losses - found.reference_losses
    assert found.perturbed_losses.shape == (3, 12)
    assert found.value == pytest.approx(rises.mean().item())
    over_directions = rises.mean(1).std().item() / math.sqrt(3)
    assert found.standard_error == pytest.approx(over_directions)
    over_examples = rises.mean(0).std().item() / math.sqrt(12)
    assert found.standard_error_examples == pytest.approx(over_examples)


def test_without_steps_it_is_the_flatness_of_the_clean_loss():
    images, labels = images_and_labels(8)
    network = tiny_network().eval()
    found = average_case_flatness(network, images, labels, steps=0, num_perturbations=1)
    clean = cross_entropy(network(images), labels, reduction="none").detach()
    torch.testing.assert_close(found.reference_losses, clean)


def test_spends_the_minimum_of_passes():
    images, labels = images_and_labels(8)
    network = tiny_network()
    passes = PassCounter(network)
    average_case_flatness(network, images, labels, eps=0.1, steps=5, num_perturbations=3)
    assert passes.forwards == 8 * (3 + 1) * (5 + 1)
    assert passes.backwards == 8 * (3 + 1) * 5
    assert all(parameter.grad is None for parameter in network.parameters())
