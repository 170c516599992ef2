import math

import pytest
import torch
from networks_for_tests import images_and_labels, tiny_network
from scaled_networks import scaled, scaled_filters, without_eps
from torch import nn
from torch.nn.functional import cross_entropy

from robust_flatness.functional import first_order_flatness, gradient_norm, worst_case_flatness
from robust_flatness.functional.gradient_norm import largest_gradient


def test_agrees_with_autograd_whatever_the_batch():
    images, labels = images_and_labels(13)
    network, images = tiny_network().double().eval(), images.double()
    weights = [*network[0].parameters(), network[3].weight, *network[8].parameters()]
    gradients = torch.autograd.grad(cross_entropy(network(images), labels), weights)
    result = gradient_norm(network, images, labels, batch_size=4)
    assert result.names == ("0.weight", "0.bias", "3.weight", "8.weight", "8.bias")
    whole = torch.cat([gradient.flatten() for gradient in gradients])
    assert result.norm == pytest.approx(whole.norm().item(), rel=1e-12)
    relative = sum(w.norm() * g.norm() for w, g in zip(weights, gradients))
    assert result.relative_norm == pytest.approx(relative.item(), rel=1e-12)


@pytest.mark.parametrize("factor", [0.5, 3.7])
def test_scaling_normalised_layers_changes_the_norm_and_not_the_relative_norm(factor):
    images, labels = images_and_labels(12)
    plain, moved = (
        gradient_norm(scaled(tiny_network().double(), s), images.double(), labels)
        for s in (1.0, factor)
    )
    assert moved.relative_norm == pytest.approx(plain.relative_norm, rel=1e-9)
    assert moved.norm != pytest.approx(plain.norm, rel=1e-2)
    expected = plain.gradient_norms / torch.tensor(
        [factor, factor, factor, 1, 1], dtype=torch.float64
    )
    torch.testing.assert_close(moved.gradient_norms, expected, rtol=1e-9, atol=1e-12)


def test_scaling_filters_changes_the_relative_norm():
    images, labels = images_and_labels(12)
    plain, moved = (
        gradient_norm(change(without_eps(tiny_network().double())), images.double(), labels)
        for change in (nn.Identity(), scaled_filters)
    )
    assert moved.gradient_norms[-1] == pytest.approx(plain.gradient_norms[-1].item(), rel=1e-9)
    assert moved.relative_norm != pytest.approx(plain.relative_norm, rel=1e-2)


def test_the_relative_norm_is_the_slope_of_worst_case_flatness_at_fixed_images():
    images, labels = images_and_labels(12)
    network, images = tiny_network().double(), images.double()
    xi = 1e-6
    flatness = worst_case_flatness(
        network, images, labels, xi=xi, loss="clean", weight_step=1.0, steps=2, restarts=1
    )
    expected = gradient_norm(network, images, labels).relative_norm
    assert flatness.value / xi == pytest.approx(expected, rel=1e-4)


def test_first_order_flatness_of_a_quadratic_is_its_largest_eigenvalue():
    torch.manual_seed(0)
    root = torch.randn(6, 6).double()
    matrix = root @ root.T
    norms = largest_gradient(
        lambda v, _: (matrix @ v, matrix @ matrix @ v), torch.randn(6).double(), 0.3, 60
    )
    expected = 0.3**2 * torch.linalg.eigvalsh(matrix)[-1].item()
    assert norms[0] == 0
    assert 0.3 * norms.max().item() == pytest.approx(expected, rel=1e-9)


def test_first_order_flatness_at_a_minimum_tends_to_the_largest_eigenvalue():
    # Both labels of one image, at weights of 0: the Hessian is x xᵀ/4 ⊗ [[1, -1], [-1, 1]].
    images = torch.rand(1, 1, 4, 4).double().repeat(2, 1, 1, 1)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 2, bias=False)).double()
    nn.init.zeros_(network[1].weight)
    rho = 1e-3
    result = first_order_flatness(network, images, torch.tensor([0, 1]), rho=rho)
    assert result.gradient_norms[0] == 0
    expected = rho**2 * images[0].square().sum().item() / 2
    assert result.value == pytest.approx(expected, rel=1e-5)


def test_the_first_step_is_that_of_gam_and_the_best_iterate_counts():
    images, labels = images_and_labels(9)
    network, images, rho = tiny_network().double().eval(), images.double(), 0.2
    weights = [*network[0].parameters(), network[3].weight, *network[8].parameters()]

    def gradient(**graph):
        loss = cross_entropy(network(images), labels)
        return torch.autograd.grad(loss, weights, **graph)

    result = first_order_flatness(network, images, labels, rho=rho, weight_steps=4, batch_size=4)
    norm = torch.cat([g.flatten() for g in gradient(create_graph=True)]).norm()
    assert result.gradient_norms[0].item() == pytest.approx(norm.item(), rel=1e-12)
    along = torch.autograd.grad(norm, weights)
    length = torch.cat([g.flatten() for g in along]).norm()
    with torch.no_grad():
        for weight, part in zip(weights, along):
            weight += rho * part / length
    moved = torch.cat([g.flatten() for g in gradient()]).norm()
    assert result.gradient_norms[1].item() == pytest.approx(moved.item(), rel=1e-9)
    assert result.value == rho * result.gradient_norms.max().item()
    assert len(result.gradient_norms) == 5


def test_scaling_normalised_layers_changes_first_order_flatness():
    images, labels = images_and_labels(12)
    plain, moved = (
        first_order_flatness(network, images.double(), labels, weight_steps=2).value
        for network in (tiny_network().double(), scaled(tiny_network().double(), 3.7))
    )
    assert moved != pytest.approx(plain, rel=1e-2)


def test_a_diverged_network_is_not_finite():
    images, labels = images_and_labels(4)
    network = tiny_network()
    with torch.no_grad():
        network[0].weight.fill_(math.nan)
    assert math.isnan(gradient_norm(network, images, labels).norm)
    assert math.isnan(first_order_flatness(network, images, labels, weight_steps=1).value)


@pytest.mark.parametrize("function", [gradient_norm, first_order_flatness])
def test_bad_arguments_are_named(function):
    with pytest.raises(ValueError, match="`images` to hold at least one image"):
        function(tiny_network(), *images_and_labels(0))
    with pytest.raises(ValueError, match="`batch_size` to be >= 1 but got 0"):
        function(tiny_network(), *images_and_labels(4), batch_size=0)
