import math

import pytest
import torch
from networks_for_tests import images_and_labels, tiny_network
from scaled_networks import scaled
from torch import nn
from torch.autograd.functional import hessian
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from robust_flatness.functional import (
    average_case_flatness,
    hessian_extreme_eigenvalues,
    hessian_trace,
    sample_weight_perturbation,
)
from robust_flatness.networks import Normalize

EXACT = {"tolerance": 1e-12}


def small(double: bool = True) -> nn.Sequential:
    """A smooth network whose Hessian is not semidefinite."""
    torch.manual_seed(3)
    network = nn.Sequential(
        nn.Conv2d(1, 2, 3, stride=2),
        nn.BatchNorm2d(2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(18, 3),
    )
    return network.double() if double else network


def dense(network: nn.Module, names: list[str], images, labels) -> torch.Tensor:
    """The Hessian as a matrix, by another route."""
    parameters = dict(network.named_parameters())

    def loss(*values):
        return cross_entropy(functional_call(network, dict(zip(names, values)), images), labels)

    blocks = hessian(loss, tuple(parameters[name].detach() for name in names))
    sizes = [parameters[name].numel() for name in names]
    rows = [
        torch.cat([block.reshape(size, -1) for block in row], 1) for row, size in zip(blocks, sizes)
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("names", [["0.weight"], ["0.weight", "4.weight"], ["1.bias", "4.bias"]])
def test_agrees_with_the_dense_hessian(names):
    images, labels = images_and_labels(12, classes=3, channels=1)
    network = small().eval()
    result = hessian_extreme_eigenvalues(
        network, images.double(), labels, names=names, batch_size=5, **EXACT
    )
    matrix = dense(network, names, images.double(), labels)
    values, _ = torch.linalg.eigh(matrix)
    assert result.max_eigenvalue == pytest.approx(values[-1].item(), abs=1e-10)
    assert result.min_eigenvalue == pytest.approx(values[0].item(), abs=1e-10)
    assert result.convexity_ratio == pytest.approx(abs(values[0] / values[-1]).item(), abs=1e-9)
    for vector, value in (
        (result.max_eigenvector, result.max_eigenvalue),
        (result.min_eigenvector, result.min_eigenvalue),
    ):
        assert list(vector) == names
        flat = torch.cat([vector[name].flatten() for name in names])
        assert flat.norm().item() == pytest.approx(1)
        torch.testing.assert_close(matrix @ flat, value * flat, rtol=0, atol=1e-6)


def test_has_a_negative_eigenvalue_where_the_loss_is_not_convex():
    images, labels = images_and_labels(12, classes=3, channels=1)
    result = hessian_extreme_eigenvalues(small(), images.double(), labels, **EXACT)
    assert result.min_eigenvalue < -1e-4
    assert 0 < result.convexity_ratio < 1


def test_linear_network_agrees_with_the_closed_form():
    # For two classes, p = σ(margin), the Hessian is mean p(1 - p) x xᵀ ⊗ [[1, -1], [-1, 1]].
    images, labels = images_and_labels(20, classes=2, channels=1)
    images = images.double()
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).double()
    with torch.no_grad():
        probability = network(images).softmax(1)[:, 1]
    x = images.flatten(1)
    inner = (x * (probability * (1 - probability)).unsqueeze(1)).T @ x / 20
    expected = 2 * torch.linalg.eigvalsh(inner)[-1].item()
    result = hessian_extreme_eigenvalues(network, images, labels, **EXACT)
    assert result.max_eigenvalue == pytest.approx(expected, rel=1e-9)
    assert result.min_eigenvalue == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("factor", [0.5, 3.7])
def test_scaling_normalised_layers_scales_their_curvature_by_its_inverse_square(factor):
    images, labels = images_and_labels(16)
    images = images.double()
    names = ["0.weight", "0.bias", "3.weight"]
    plain, moved = (
        hessian_extreme_eigenvalues(
            scaled(tiny_network().double(), s), images, labels, names=names, **EXACT
        )
        for s in (1.0, factor)
    )
    assert moved.max_eigenvalue == pytest.approx(plain.max_eigenvalue / factor**2, rel=1e-7)
    assert moved.min_eigenvalue == pytest.approx(plain.min_eigenvalue / factor**2, rel=1e-6)


def test_a_loose_tolerance_in_float32_is_near_the_exact_value():
    images, labels = images_and_labels(32)
    loose = hessian_extreme_eigenvalues(tiny_network(), images, labels)
    exact = hessian_extreme_eigenvalues(tiny_network().double(), images.double(), labels, **EXACT)
    assert loose.max_eigenvalue == pytest.approx(exact.max_eigenvalue, rel=1e-3)
    assert loose.min_eigenvalue == pytest.approx(
        exact.min_eigenvalue, abs=1e-3 * exact.max_eigenvalue
    )


def test_converges_in_float32_though_the_smallest_eigenvalue_is_zero():
    # A tolerance relative to λ_min would ask for more digits than float32 has.
    images, labels = images_and_labels(16, channels=1)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    products = []
    network.register_forward_hook(lambda *_: products.append(1))
    result = hessian_extreme_eigenvalues(network, images, labels)
    assert abs(result.min_eigenvalue) < 1e-3 * result.max_eigenvalue
    assert len(products) < 200


def test_is_that_of_the_mean_whatever_the_batch():
    images, labels = images_and_labels(13, classes=3, channels=1)
    images = images.double()
    whole, parts, twice = (
        hessian_extreme_eigenvalues(small(), x, y, batch_size=size, **EXACT).max_eigenvalue
        for x, y, size in (
            (images, labels, 13),
            (images, labels, 4),
            (images.repeat(2, 1, 1, 1), labels.repeat(2), 13),
        )
    )
    assert parts == pytest.approx(whole, rel=1e-9)
    assert twice == pytest.approx(whole, rel=1e-9)


def test_two_weights_or_one_are_enough():
    images, labels = images_and_labels(4, classes=2, channels=1)
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2)).double()
    result = hessian_extreme_eigenvalues(network, images.double(), labels)
    matrix = dense(network, ["2.weight"], images.double(), labels)
    assert result.max_eigenvalue == pytest.approx(torch.linalg.eigvalsh(matrix)[-1].item())


def test_frozen_flags_come_back_after_an_exception():
    images, labels = images_and_labels(4)
    network = tiny_network().requires_grad_(False)
    with pytest.raises(RuntimeError):
        hessian_extreme_eigenvalues(network, images[:, :1], labels)
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_attention_has_a_second_derivative():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

        def forward(self, images):
            rows = images.flatten(1, 2)
            return self.head(self.attend(rows, rows, rows, need_weights=False)[0].mean(1))

    images, labels = images_and_labels(4, classes=3, channels=1)
    result = hessian_extreme_eigenvalues(Attention(), images, labels)
    assert result.max_eigenvalue > 0
    assert "attend.in_proj_weight" in result.max_eigenvector


def test_a_diverged_network_has_no_eigenvalues():
    images, labels = images_and_labels(4)
    network = tiny_network()
    with torch.no_grad():
        network[0].weight.fill_(math.nan)
    with pytest.warns(UserWarning, match="the loss or its derivatives are not finite"):
        result = hessian_extreme_eigenvalues(network, images, labels)
    assert math.isnan(result.max_eigenvalue)
    assert math.isnan(result.min_eigenvalue)
    assert math.isnan(result.convexity_ratio)


def test_a_flat_loss_has_zero_curvature():
    images, labels = images_and_labels(4)
    network = tiny_network()
    with torch.no_grad():
        network[8].weight.zero_()
    result = hessian_extreme_eigenvalues(network, images, labels, names=["0.weight"])
    assert result.max_eigenvalue == pytest.approx(0, abs=1e-12)
    assert result.min_eigenvalue == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"tolerance": 0.0}, "`tolerance` to be in"),
        ({"batch_size": 0}, "`batch_size` to be >= 1 but got 0"),
        ({"names": ["nothing"]}, "such as 0.weight but got nothing"),
        ({"names": []}, "but got none"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        hessian_extreme_eigenvalues(tiny_network(), *images_and_labels(4), **kwargs)


def test_an_empty_set_is_refused():
    with pytest.raises(ValueError, match="`images` to hold at least one image"):
        hessian_extreme_eigenvalues(tiny_network(), *images_and_labels(0))


class FirstLogit(nn.Module):
    """Two logits, of which the second is 0."""

    def forward(self, values):
        return torch.cat([values, torch.zeros_like(values)], 1)


def test_one_random_vector_is_exact_for_a_diagonal_hessian():
    # Each image has one bright pixel, so that each weight is used by one image.
    images = torch.eye(16).double().view(16, 1, 4, 4)
    labels = torch.arange(16) % 2
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 1, bias=False), FirstLogit()).double()
    diagonal = dense(network, ["1.weight"], images, labels).diagonal()
    result = hessian_trace(network, images, labels, num_probes=1, batch_size=5)
    assert result.trace == pytest.approx(diagonal.sum().item(), rel=1e-12)
    scale = network[1].weight.square().sum().item() / 16
    assert result.scale_free_trace == pytest.approx(scale * diagonal.sum().item(), rel=1e-12)
    assert math.isnan(result.trace_standard_error)


def test_mean_and_variance_of_the_trace_are_those_of_hutchinson():
    images, labels = images_and_labels(12, classes=3, channels=1)
    matrix = dense(small().eval(), ["0.weight", "4.weight"], images.double(), labels)
    result = hessian_trace(small(), images.double(), labels, num_probes=150, batch_size=5)
    squares = matrix.square()
    variance = 2 * (squares.sum() - squares.diagonal().sum()).item()
    assert result.trace == pytest.approx(matrix.trace().item(), abs=3 * (variance / 150) ** 0.5)
    assert result.estimates.var().item() == pytest.approx(variance, rel=0.3)
    assert result.trace_standard_error == pytest.approx((variance / 150) ** 0.5, rel=0.15)


@pytest.mark.parametrize("factor", [0.5, 3.7])
def test_scaling_normalised_layers_scales_the_trace_and_not_the_scale_free_one(factor):
    images, labels = images_and_labels(12)
    images, few = images.double(), {"num_probes": 3}
    networks = tiny_network().double(), scaled(tiny_network().double(), factor)
    for names in (["0.weight"], ["3.weight"], ["0.weight", "0.bias", "3.weight"]):
        plain, moved = (hessian_trace(n, images, labels, names=names, **few) for n in networks)
        assert moved.trace == pytest.approx(plain.trace / factor**2, rel=1e-9)
    plain, moved = (hessian_trace(network, images, labels, **few) for network in networks)
    assert moved.trace != pytest.approx(plain.trace, rel=1e-2)
    torch.testing.assert_close(
        moved.scale_free_estimates, plain.scale_free_estimates, rtol=1e-9, atol=1e-12
    )


def test_flatness_of_the_clean_loss_tends_to_the_scale_free_trace():
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 2, 3, stride=2, bias=False), nn.Linear(18, 3, bias=False)
    centered = Normalize([0.5], [0.3])
    network = nn.Sequential(centered, layers[0], nn.Tanh(), nn.Flatten(), layers[1]).double()
    images, labels = images_and_labels(24, classes=3, channels=1)
    images, xi, count = images.double(), 1e-3, 300
    weights = {"1.weight": layers[0].weight, "4.weight": layers[1].weight}
    loss = cross_entropy(network(images), labels)
    gradient = dict(zip(weights, torch.autograd.grad(loss, [*weights.values()])))
    rows = average_case_flatness(
        network, images, labels, xi=xi, num_perturbations=count, loss="clean"
    ).increases.mean(1)
    # The first order has mean 0 and would hide the second.
    for k in range(count):
        nu = sample_weight_perturbation(network, xi=xi, direction=k)
        rows[k] -= sum((gradient[name] * nu[name]).sum() for name in weights)
    matrix, sizes = dense(network, [*weights], images, labels), [18, 54]
    expected = sum(
        weight.square().sum().item() / size * block.diagonal().sum().item()
        for weight, size, block in zip(
            weights.values(), sizes, (matrix[:18, :18], matrix[18:, 18:])
        )
    )
    error = 3 * (rows.std() / count**0.5).item()
    assert error < 0.25 * rows.mean().item()
    assert rows.mean().item() == pytest.approx(xi**2 / 2 * expected, abs=error)
    estimate = hessian_trace(network, images, labels, num_probes=100)
    error = 3 * estimate.scale_free_standard_error
    assert estimate.scale_free_trace == pytest.approx(expected, abs=error)


def test_arguments_of_the_trace_are_checked():
    with pytest.raises(ValueError, match="`num_probes` to be >= 1 but got 0"):
        hessian_trace(tiny_network(), *images_and_labels(4), num_probes=0)
    with pytest.raises(ValueError, match="`images` to hold at least one image"):
        hessian_trace(tiny_network(), *images_and_labels(0))
