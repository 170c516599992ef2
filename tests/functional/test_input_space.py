"""Margins, local Lipschitz constant and boundary thickness where closed forms exist, in float64."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from robust_flatness.functional.attack import PGD
from robust_flatness.functional.boundary import boundary_thickness, random_targets
from robust_flatness.functional.lipschitz import local_lipschitz
from robust_flatness.functional.margins import margins
from robust_flatness.measures import BoundaryThickness, LocalLipschitz, Margins


def linear(classes: int, size: int = 4, *, scale: float = 1.0) -> nn.Sequential:
    network = nn.Sequential(nn.Flatten(), nn.Linear(size**2, classes)).double()
    with torch.no_grad():
        network[1].weight.mul_(scale)
    return network


def gray(count: int, size: int = 4) -> Tensor:
    """Images whose balls are inside the box."""
    return 0.4 + 0.2 * torch.rand(count, 1, size, size, dtype=torch.float64)


def test_the_robust_margin_of_two_linear_classes():
    network, images, labels = linear(2), gray(11), torch.arange(11) % 2
    result = Margins(eps=0.1, batch_size=4)(network, images, labels)
    difference = network[1].weight[0] - network[1].weight[1]
    assert torch.allclose(result.robust, result.clean - 0.1 * difference.abs().sum(), atol=1e-12)
    logits = network(images)
    assert torch.allclose(result.clean, (logits[:, 0] - logits[:, 1]) * (1 - 2 * labels))
    assert torch.allclose(result.robust_probabilities, (result.robust / 2).tanh())
    values = Margins().metrics(result, "test")
    for name, margin in (("", result.clean), ("robust_", result.robust)):
        ordered = margin.sort().values
        assert values[f"margin/{name}median/test"] == pytest.approx(ordered[5].item())
        # Signed: below 0 as soon as a tenth of the images is misclassified.
        assert values[f"margin/{name}percentile_10/test"] == pytest.approx(ordered[1].item())
    assert values["margin/robust_percentile_10/test"] < 0


def test_margins_of_the_worst_restart():
    network, images, labels = linear(3), gray(6), torch.arange(6) % 3
    settings = {"eps": 0.1, "steps": 1, "step_size": 0.01}
    one, five = (Margins(restarts=n, **settings)(network, images, labels) for n in (1, 5))

    def losses(result):
        return result.robust_probabilities

    assert (losses(five) <= losses(one) + 0.02).all()
    assert (losses(five) < losses(one)).any()


@pytest.mark.parametrize("seed", range(3))
def test_the_lipschitz_constant_of_a_linear_network_is_that_of_the_best_sign_vector(seed):
    torch.manual_seed(seed)
    network, images = linear(3, size=3), gray(16, size=3)
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=9)), dtype=torch.float64)
    exact = (signs @ network[1].weight.T).abs().sum(1).max().item()
    labels = torch.zeros(16, dtype=torch.long)
    best, original = (
        LocalLipschitz(eps=0.1, original=original)(network, images, labels).quotients
        for original in (False, True)
    )
    assert best.max().item() == pytest.approx(exact, rel=1e-9)
    assert best.max() <= exact * (1 + 1e-9)
    assert original.mean() < best.mean()


def test_no_distance_is_no_change():
    class Rounding(nn.Sequential):
        """As attention in eval mode, which has another kernel if there is no graph."""

        def forward(self, images):
            return super().forward(images) * (1 + 1e-6 * torch.is_grad_enabled())

    images = gray(2)
    start = torch.zeros_like(images)
    assert not local_lipschitz(Rounding(*linear(3)), images, PGD(0.1, 3, 0.03), start).any()


def test_the_divergence_under_attack():
    network, images, labels = linear(2, scale=5.0), gray(5), torch.arange(5) % 2
    result = LocalLipschitz(eps=0.1)(network, images, labels)
    attacked = Margins(eps=0.1)(network, images, labels)
    p, q = attacked.clean.sigmoid(), attacked.robust.sigmoid()
    expected = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    assert torch.allclose(result.divergences, expected, atol=1e-12)


def two_classes(length: float, margin: float) -> nn.Sequential:
    """Linear logits whose difference has this gradient length, and this value at gray images."""
    network = linear(2, size=8)
    with torch.no_grad():
        weight, bias = network[1].weight, network[1].bias
        weight.mul_(length / (weight[0] - weight[1]).norm())
        bias.copy_(torch.tensor([margin, 0.0]) - weight.sum(1) / 2)
    return network


@pytest.mark.parametrize(("beta", "length"), [(0.75, 10.0), (0.5, 20.0)])
def test_the_thickness_of_a_linear_boundary(beta, length):
    images = torch.full((1, 1, 8, 8), 0.5, dtype=torch.float64)
    measure = BoundaryThickness(beta=beta, num_points=4000)
    result = measure(two_classes(length, 3.0), images, torch.tensor([0]))
    assert result.thickness.item() == pytest.approx(2 * math.atanh(beta) / length, abs=1 / 4000)
    assert result.reached.all()
    assert not result.same_class.any()


def test_ways_that_do_not_end_in_the_target_or_begin_in_it_are_counted():
    images = torch.full((1, 1, 8, 8), 0.5, dtype=torch.float64)
    attack = PGD(1.0, 20, 0.2, "l2", keep="last", start="zero")
    # The boundary is at a distance of 2.5, and the way ends after 1.
    far = boundary_thickness(two_classes(1.0, 2.5), images, torch.tensor([0]), attack)
    assert not far.reached.any()
    assert far.thickness.item() == pytest.approx(2 * math.atanh(0.75) - 1.5, abs=1 / 128)
    wrong = boundary_thickness(two_classes(10.0, 3.0), images, torch.tensor([1]), attack, alpha=-1)
    assert wrong.same_class.all()
    assert wrong.thickness.item() == 0
    values = BoundaryThickness().metrics(wrong, "train")
    assert values["boundary/same_class/train"] == 1
    assert values["boundary/not_reached/train"] == 0


def test_targets_are_all_other_classes_by_index():
    labels = torch.arange(200) % 4
    targets = random_targets(labels, 4, range(200))
    assert not (targets == labels).any()
    assert {*zip(labels.tolist(), targets.tolist())} == {*itertools.permutations(range(4), 2)}
    assert torch.equal(random_targets(labels[7:], 4, range(7, 200)), targets[7:])


def test_logits_that_are_not_finite_are_no_number():
    class Broken(nn.Module):
        def forward(self, images):
            logits = images.flatten(1)[:, :3]
            return torch.where(images.flatten(1)[:, :1] > 0.7, math.inf, logits)

    images, labels = gray(4), torch.zeros(4, dtype=torch.long)
    images[2] = 0.9
    for measure in (Margins(eps=0.01), LocalLipschitz(eps=0.01), BoundaryThickness(eps=0.01)):
        arrays = measure.arrays(measure(Broken(), images, labels), "test")
        values = next(iter(arrays.values()))
        assert values.isnan().tolist() == [False, False, True, False], type(measure)


@pytest.mark.parametrize("keep", ["best", "last"])
def test_a_change_to_infinite_logits_is_no_number(keep):
    class Broken(nn.Module):
        def forward(self, images):
            logits = images.flatten(1)[:, :3]
            return torch.where(logits > 0.55, math.inf, logits)

    images, search = torch.full((1, 1, 4, 4), 0.5), PGD(0.1, 3, 0.03, keep=keep)
    assert local_lipschitz(Broken(), images, search, torch.full_like(images, 0.01)).isnan()


def test_the_margin_of_probabilities_takes_any_scores():
    scores = torch.tensor([[0.2, 0.5, 0.3], [0.2, 0.5, 0.3]])
    assert torch.allclose(margins(scores, torch.tensor([1, 0])), torch.tensor([0.2, -0.3]))
