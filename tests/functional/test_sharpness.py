import math

import pytest
import torch
from networks_for_tests import images_and_labels, same, snapshot, tiny_network
from scaled_networks import scaled, scaled_filters, without_eps
from torch import nn
from torch.nn.functional import cross_entropy, softplus

from robust_flatness.functional import adaptive_sharpness
from robust_flatness.functional.sharpness import ascend
from robust_flatness.networks import ReparameterizedBatchNorm2d

CLEAN = {"loss": "clean", "batch_size": 12}
LIGHT = {"eps": 0.05, "steps": 2, "batch_size": 5, "num_perturbations": 3, "weight_steps": 5}
BOTH = [
    {"case": case, "weight_norm": norm, "rho": rho}
    for case, norm, rho in (
        ("average", "l2", 0.2),
        ("average", "linf", 0.4),
        ("worst", "l2", 0.5),
        ("worst", "linf", 0.02),
    )
]
WORST = BOTH[2:]


def linear_network(classes: int = 2) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, classes, bias=False)).double()


def small_images(count: int) -> torch.Tensor:
    return torch.rand(count, 1, 4, 4).double()


def weight_gradients(network: nn.Sequential, images, labels) -> torch.Tensor:
    """w∘g of all weights and biases that are perturbed, as one vector."""
    layers = [m for m in network.eval() if isinstance(m, (nn.Conv2d, nn.Linear))]
    weights = [w for layer in layers for w in layer.parameters()]
    gradients = torch.autograd.grad(cross_entropy(network(images), labels), weights)
    return torch.cat([(w * g).flatten().detach() for w, g in zip(weights, gradients)])


@pytest.mark.parametrize("rho", [0.01, 0.3])
def test_worst_linf_of_a_linear_network_takes_every_weight_of_its_margin(rho):
    # The margin m falls by ρ Σ (|w_1| + |w_2|)|x|, with one row of weights for each class.
    network, images = linear_network(), small_images(1)
    rows = network[1].weight.detach()
    margin = (rows[1] - rows[0]) @ images.flatten()
    lost = rho * (rows.abs().sum(0) * images.flatten()).sum()
    expected = (softplus(lost - margin) - softplus(-margin)).item()
    result = adaptive_sharpness(
        network, images, torch.tensor([1]), case="worst", rho=rho, loss="clean"
    )
    assert result.value == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("case", WORST)
def test_worst_tends_to_the_dual_norm_of_weights_times_gradient(case):
    images, labels = images_and_labels(12)
    network, images = tiny_network().double(), images.double()
    order = 2 if case["weight_norm"] == "l2" else 1
    expected = weight_gradients(network, images, labels).norm(p=order).item()
    settings = {**case, **CLEAN, "rho": 1e-7, "weight_steps": 1}
    value = adaptive_sharpness(network, images, labels, **settings).value / 1e-7
    assert value == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("norm", "variance"), [("l2", 1.0), ("linf", 1 / 3)])
def test_average_tends_to_the_curvature_relative_to_the_weights(norm, variance):
    # One image with both labels and equal rows: the gradient is 0, and the Hessian of the mean loss
    # is x xᵀ/4 ⊗ [[1, -1], [-1, 1]], so that Σ w² H_ww = Σ (w_1² + w_2²) x² / 4.
    network = linear_network()
    with torch.no_grad():
        network[1].weight[1] = network[1].weight[0]
    images, labels = small_images(1).repeat(2, 1, 1, 1), torch.tensor([0, 1])
    curvature = (network[1].weight.detach() * images[0].flatten()).square().sum().item() / 4
    rho = 1e-3
    result = adaptive_sharpness(
        network, images, labels, weight_norm=norm, rho=rho, num_perturbations=400, loss="clean"
    )
    expected = rho**2 / 2 * variance * curvature
    assert result.standard_error < 0.1 * expected
    assert result.value == pytest.approx(expected, abs=3 * result.standard_error)


@pytest.mark.parametrize("loss", ["robust", "clean"])
@pytest.mark.parametrize("parameters", ["weights", "all"])
@pytest.mark.parametrize("case", BOTH, ids=lambda c: f"{c['case']}-{c['weight_norm']}")
def test_is_invariant_to_the_scale_of_layers_and_of_filters(case, parameters, loss):
    images, labels = images_and_labels(12)
    plain, whole, filters = (
        adaptive_sharpness(
            network, images.double(), labels, parameters=parameters, loss=loss, **LIGHT, **case
        ).value
        for network in (
            without_eps(tiny_network().double()),
            scaled(without_eps(tiny_network().double()), 3.7),
            scaled_filters(without_eps(tiny_network().double())),
        )
    )
    assert abs(plain) > 1e-4
    assert whole == pytest.approx(plain, abs=1e-9)
    assert filters == pytest.approx(plain, abs=1e-9)


def test_eta_breaks_the_invariance():
    images, labels = images_and_labels(12)
    plain, moved = (
        adaptive_sharpness(network, images.double(), labels, eta=0.1, **LIGHT, **BOTH[1]).value
        for network in (tiny_network().double(), scaled(tiny_network().double(), 3.7))
    )
    assert moved != pytest.approx(plain, abs=1e-6)


@pytest.mark.parametrize("case", BOTH, ids=lambda c: f"{c['case']}-{c['weight_norm']}")
def test_normalized_logits_survive_a_scaled_last_layer_at_fixed_images(case):
    images, labels = images_and_labels(12)
    found = {True: [], False: []}
    for factor in (1.0, 2.5):
        network = tiny_network().double()
        with torch.no_grad():
            network[8].weight.mul_(factor)
            network[8].bias.mul_(factor)
        for normalize, values in found.items():
            settings = {**LIGHT, **case, "loss": "clean", "normalize_logits": normalize}
            values.append(adaptive_sharpness(network, images.double(), labels, **settings).value)
    assert found[True][1] == pytest.approx(found[True][0], abs=1e-9)
    assert found[False][1] != pytest.approx(found[False][0], abs=1e-4)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("case", BOTH, ids=lambda c: f"{c['case']}-{c['weight_norm']}")
def test_rho_zero_is_exactly_zero_and_the_worst_case_never_negative(case, normalize):
    images, labels = images_and_labels(12)
    settings = {**LIGHT, **case, "restarts": 2, "normalize_logits": normalize}
    zero = adaptive_sharpness(tiny_network(), images, labels, **{**settings, "rho": 0.0})
    assert zero.value == 0
    if case["case"] == "worst":
        assert adaptive_sharpness(tiny_network(), images, labels, **settings).value >= 0


def test_scales_that_start_at_zero_move_relative_to_one_plus_themselves():
    network = nn.Sequential(
        ReparameterizedBatchNorm2d(1), nn.Flatten(), nn.Linear(16, 2, bias=False)
    ).double()
    images, labels = small_images(4), torch.tensor([0, 1, 1, 0])
    before, seen = snapshot(network), []
    hook = network[0].register_forward_pre_hook(
        lambda layer, _: seen.append((layer.weight.item(), layer.bias.item()))
    )
    adaptive_sharpness(
        network, images, labels, case="worst", rho=0.1, parameters="all", weight_steps=1, **CLEAN
    )
    hook.remove()
    # Its bias of 0 has no size.
    assert seen[0] == (0.0, 0.0)
    assert math.isclose(abs(seen[-1][0]), 0.1)
    assert seen[-1][1] == 0
    assert same(before, snapshot(network))


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_ascent_reaches_the_maximum_of_a_concave_function(norm):
    # The maximum lies inside the ball, so that steps of 2ρ must be halved.
    target = torch.tensor([0.05, -0.2, 0.1]).double()

    def evaluate(u, needs_gradient):
        return -(u - target).square()[None].sum(1), -2 * (u - target)

    first, best = ascend(evaluate, torch.zeros(3).double(), 1.0, norm, 100)
    assert first.item() == pytest.approx(-target.square().sum().item())
    assert best.item() == pytest.approx(0, abs=1e-4)


def test_a_diverged_network_is_not_finite():
    images, labels = images_and_labels(6)
    network = tiny_network()
    with torch.no_grad():
        network[0].weight.fill_(math.nan)
    for case in BOTH:
        value = adaptive_sharpness(network, images, labels, **LIGHT, **case).value
        assert not math.isfinite(value)
