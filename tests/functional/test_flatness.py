"""Average-case flatness against closed forms, and its options."""

import math

import numpy as np
import pytest
import torch
from networks_for_tests import PassCounter, images_and_labels, same, snapshot, tiny_network
from scaled_networks import scaled
from torch import nn
from torch.nn.functional import cross_entropy, softplus

from robust_flatness.functional import (
    average_case_flatness,
    perturbed_weights,
    sample_weight_perturbation,
)

SETTINGS = {"eps": 0.05, "steps": 3, "num_perturbations": 3}


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


CHOICES = [
    {"distribution": distribution, "relative_to": relative_to}
    for distribution in ("sphere", "ball")
    for relative_to in ("layer", "filter", "network")
]


def two_layer_network() -> nn.Sequential:
    """Two linear layers for two classes: a linear network, whose attack has a closed form."""
    torch.manual_seed(2)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Linear(5, 2)).double()


def inner_images(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images that no attack of radius 0.1 drives out of the box."""
    generator = torch.Generator().manual_seed(0)
    images = 0.3 + 0.4 * torch.rand(count, 1, 4, 4, generator=generator).double()
    return images, torch.arange(count) % 2


@torch.no_grad()
def worst_losses_of(network: nn.Sequential, images, labels, eps) -> torch.Tensor:
    """The worst linf perturbation of a two-class linear network costs the margin eps·‖gap‖_1."""
    first, second = network[1], network[2]
    gap = (second.weight[1] - second.weight[0]) @ first.weight
    logits = network(images)
    sign = torch.where(labels == 1, 1.0, -1.0).double()
    return softplus(eps * gap.abs().sum() - sign * (logits[:, 1] - logits[:, 0]))


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("per_batch", [False, True])
def test_two_layer_network_agrees_with_the_closed_form(choice, per_batch):
    (images, labels), network = inner_images(12), two_layer_network()
    reference = worst_losses_of(network, images, labels, 0.1)
    expected = torch.zeros(3, 12).double()
    for k in range(3):
        for number, part in enumerate(torch.arange(12).split(5)):
            batch = number if per_batch else None
            nu = sample_weight_perturbation(network, xi=0.4, direction=k, batch=batch, **choice)
            with perturbed_weights(network, nu):
                expected[k, part] = worst_losses_of(network, images[part], labels[part], 0.1)
    settings = {"num_perturbations": 3, "eps": 0.1, "steps": 40, "batch_size": 5}
    found = average_case_flatness(
        network, images, labels, xi=0.4, per_batch=per_batch, **settings, **choice
    )
    torch.testing.assert_close(found.reference_losses, reference, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.perturbed_losses, expected, rtol=0, atol=1e-9)
    assert found.value == pytest.approx((expected - reference).mean().item(), abs=1e-9)


@pytest.mark.parametrize(("distribution", "power"), [("sphere", 0.5), ("ball", 1.5)])
def test_the_expectation_is_that_of_the_distribution(distribution, power):
    # One weight of 2 × 2 entries: the margin moves by r·t, t one coordinate of a random vector in
    # four dimensions, whose density is (1 - t²)^(1/2) on the sphere and (1 - t²)^(3/2) in the ball.
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False)).double()
    images, labels = torch.tensor([[[[0.4, 0.8]]]]).double(), torch.tensor([1])
    weight = network[1].weight.detach()
    margin = ((weight[1] - weight[0]) @ images.flatten()).item()
    reach = 10.0 * (weight.norm() * math.sqrt(2) * images.norm()).item()
    t = np.linspace(-1, 1, 20001)
    density = (1 - t**2) ** power
    rises = np.logaddexp(0, -(margin + reach * t)) - np.logaddexp(0, -margin)
    expected = (rises * density).sum() / density.sum()
    found = average_case_flatness(
        network,
        images,
        labels,
        xi=10.0,
        num_perturbations=2500,
        loss="clean",
        distribution=distribution,
    )
    assert found.value == pytest.approx(expected, abs=3 * found.standard_error)
    # The two expectations are far enough apart for the test to tell them.
    other = (1 - t**2) ** (2 - power)
    gap = abs((rises * other).sum() / other.sum() - expected)
    assert gap > 6 * found.standard_error


@pytest.mark.parametrize("choice", CHOICES)
def test_grows_with_xi_on_the_two_layer_network(choice):
    (images, _), network = inner_images(12), two_layer_network()
    labels = network(images).argmax(1)
    values = [
        average_case_flatness(
            network, images, labels, xi=xi, eps=0.01, steps=3, num_perturbations=20, **choice
        ).value
        for xi in (0.0, 0.25, 0.5, 1.0)
    ]
    assert values[0] == 0
    assert values == sorted(set(values))


@pytest.mark.parametrize("factor", [0.5, 3.7])
@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"distribution": "ball"},
        {"relative_to": "filter", "distribution": "ball"},
        {"loss": "clean"},
        {"per_batch": True},
    ],
)
def test_is_invariant_to_the_scale_of_normalised_layers(factor, choice):
    images, labels = images_and_labels(12)
    settings = {"eps": 0.05, "steps": 3, "num_perturbations": 2, "batch_size": 5, **choice}
    plain, moved = (
        average_case_flatness(network, images.double(), labels, **settings).value
        for network in (tiny_network().double(), scaled(tiny_network().double(), factor))
    )
    assert plain != 0
    assert moved == pytest.approx(plain, abs=1e-9)


def test_relative_to_the_network_it_is_not_invariant():
    images, labels = images_and_labels(12)
    plain, moved = (
        average_case_flatness(
            network, images.double(), labels, loss="clean", relative_to="network"
        ).value
        for network in (tiny_network().double(), scaled(tiny_network().double(), 3.7))
    )
    assert abs(plain - moved) > 1e-3


def test_clean_loss_spends_one_forward_for_each_direction_and_knows_no_attack():
    images, labels = images_and_labels(8)
    network = tiny_network().eval()
    passes = PassCounter(network)
    found = average_case_flatness(
        network, images, labels, loss="clean", num_perturbations=3, restarts=4, protocol="paper"
    )
    assert (passes.forwards, passes.backwards) == (8 * (3 + 1), 0)
    with perturbed_weights(network, sample_weight_perturbation(network, direction=2)):
        expected = cross_entropy(network(images), labels, reduction="none")
    torch.testing.assert_close(found.perturbed_losses[2], expected.detach())


@pytest.mark.parametrize("loss", ["robust", "clean"])
def test_batches_are_those_of_the_global_index(loss):
    images, labels = images_and_labels(13)
    settings = {"eps": 0.1, "steps": 2, "num_perturbations": 2, "batch_size": 4, "loss": loss}
    settings["per_batch"] = True
    images = images.double()
    network = tiny_network().double()
    whole = average_case_flatness(network, images, labels, **settings).perturbed_losses
    for mine in ([0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12], [5, 9]):
        part = average_case_flatness(
            network, images[mine], labels[mine], indices=mine, **settings
        ).perturbed_losses
        torch.testing.assert_close(part, whole[:, mine], rtol=0, atol=1e-12)
    shared = average_case_flatness(network, images, labels, **{**settings, "per_batch": False})
    assert not torch.allclose(shared.perturbed_losses, whole)
    nothing = average_case_flatness(network, images[:0], labels[:0], **settings)
    assert nothing.perturbed_losses.shape == (2, 0)


@pytest.mark.parametrize("name", ["loss", "distribution", "relative_to", "protocol"])
def test_unknown_choices_are_named(name):
    images, labels = images_and_labels(2)
    with pytest.raises(ValueError, match=f"Expected `{name}` to be one of .* but got cube"):
        average_case_flatness(tiny_network(), images, labels, steps=1, **{name: "cube"})
