import pytest
import torch
from networks_for_tests import PassCounter, images_and_labels, same, snapshot, tiny_network
from torch import nn
from torch.nn.functional import cross_entropy, softplus

from robust_flatness.functional import (
    average_case_flatness,
    loss_landscape,
    loss_surface,
    robust_loss,
    weight_directions,
)

SETTINGS = {"eps": 0.05, "steps": 3}


def linear(classes: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes)).double()


def given(network: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {name: torch.randn_like(value) for name, value in network.named_parameters()}


def test_clean_loss_of_a_linear_network_agrees_with_the_closed_form():
    images, labels = images_and_labels(10, classes=3, channels=1)
    images, network = images.double(), linear()
    direction = given(network)
    found = loss_landscape(
        network, images, labels, directions=direction, num_steps=7, extent=(-2, 1), loss="clean"
    )
    assert found.coordinates.tolist() == pytest.approx([-2, -1.5, -1, -0.5, 0, 0.5, 1])
    for s, losses in zip(found.coordinates, found.losses[0]):
        weight = network[1].weight + s * direction["1.weight"]
        bias = network[1].bias + s * direction["1.bias"]
        logits = images.flatten(1) @ weight.T + bias
        expected = logits.logsumexp(1) - logits[range(10), labels]
        torch.testing.assert_close(losses, expected, rtol=0, atol=1e-12)


def test_robust_loss_of_a_linear_network_agrees_with_the_closed_form():
    # The worst linf perturbation of a two-class linear network costs the margin eps·‖gap‖_1.
    images, labels = images_and_labels(10, classes=2, channels=1)
    images, network, eps = 0.3 + 0.4 * images.double(), linear(2), 0.1
    direction = {name: 0.1 * value for name, value in given(network).items()}
    found = loss_landscape(
        network, images, labels, directions=[direction], num_steps=5, eps=eps, steps=40
    )
    sign = torch.where(labels == 1, 1.0, -1.0).double()
    for s, losses in zip(found.coordinates, found.losses[0]):
        weight = (network[1].weight + s * direction["1.weight"]).detach()
        bias = (network[1].bias + s * direction["1.bias"]).detach()
        gap = weight[1] - weight[0]
        margin = sign * (images.flatten(1) @ gap + bias[1] - bias[0]) - eps * gap.abs().sum()
        torch.testing.assert_close(losses, softplus(-margin), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["random", "adversarial", "hessian"])
def test_the_middle_is_the_robust_loss_of_the_same_attack(kind):
    images, labels = images_and_labels(8)
    network = tiny_network()
    found = loss_landscape(
        network,
        images,
        labels,
        directions=kind,
        num_directions=2,
        num_steps=3,
        extent=(-1, 1),
        restarts=2,
        seed=3,
        **SETTINGS,
    )
    expected = robust_loss(network, images, labels, restarts=2, seed=3, **SETTINGS)
    assert found.coordinates[1] == 0
    for losses in found.losses[:, 1]:
        assert torch.equal(losses, expected)


@pytest.mark.parametrize("relative_to", ["layer", "filter", "network"])
def test_agrees_with_flatness_on_the_same_directions(relative_to):
    images, labels = images_and_labels(12)
    network = tiny_network().double()
    common = {"relative_to": relative_to, "seed": 2, **SETTINGS}
    found = loss_landscape(
        network,
        images.double(),
        labels,
        num_directions=3,
        length=0.8,
        num_steps=5,
        **common,
    )
    for place, xi in ((4, 0.8), (3, 0.4)):
        flatness = average_case_flatness(
            network, images.double(), labels, xi=xi, num_perturbations=3, **common
        )
        rise = found.losses[:, place] - found.losses[:, 2]
        torch.testing.assert_close(
            rise, flatness.perturbed_losses - flatness.reference_losses, rtol=0, atol=1e-9
        )
        assert (found.mean[place] - found.mean[2]).item() == pytest.approx(flatness.value, abs=1e-9)


def test_attacks_anew_at_every_step():
    images, labels = images_and_labels(4)
    network, seen = tiny_network(), []
    before = snapshot(network)
    (direction,) = weight_directions(network, images, labels, num_directions=1)
    network.register_forward_pre_hook(lambda m, _: seen.append(m[0].weight.detach().clone()))
    loss_landscape(network, images, labels, num_directions=1, num_steps=5, **SETTINGS)
    # An attack of three steps and its last iterate.
    assert len(seen) == 5 * 4
    for place, weight in enumerate(seen):
        s = -1 + 0.5 * (place // 4)
        torch.testing.assert_close(weight, before["0.weight"] + s * direction["0.weight"])
    assert same(before, snapshot(network))


def test_a_share_of_the_images_has_their_losses():
    images, labels = images_and_labels(9)
    network = tiny_network().double()
    settings = {"num_directions": 2, "num_steps": 3, **SETTINGS}
    whole = loss_landscape(network, images.double(), labels, **settings)
    indices = [2, 3, 7]
    part = loss_landscape(
        network,
        images[indices].double(),
        labels[indices],
        indices=indices,
        batch_size=2,
        **settings,
    )
    torch.testing.assert_close(part.losses, whole.losses[:, :, indices], rtol=0, atol=1e-9)


def test_curves_mean_and_band_are_those_of_the_losses():
    images, labels = images_and_labels(5)
    found = loss_landscape(tiny_network(), images, labels, num_steps=4, loss="clean")
    assert found.losses.shape == (10, 4, 5)
    curves = found.losses.double().mean(2)
    assert torch.equal(found.curves, curves)
    assert torch.equal(found.mean, curves.mean(0))
    assert torch.equal(found.max, curves.max(0).values)
    assert torch.equal(torch.stack(found.band), torch.stack([curves.amin(0), curves.amax(0)]))


def test_surface_is_that_of_both_directions():
    images, labels = images_and_labels(6, classes=3, channels=1)
    images, network = images.double(), linear()
    pair = [given(network, seed) for seed in (0, 1)]
    found = loss_surface(network, images, labels, directions=pair, num_steps=3, loss="clean")
    assert found.losses.shape == (3, 3, 6)
    for i, s in enumerate(found.coordinates):
        for j, t in enumerate(found.coordinates):
            moved = {
                name: value + s * pair[0][name] + t * pair[1][name]
                for name, value in network.named_parameters()
            }
            logits = images.flatten(1) @ moved["1.weight"].T + moved["1.bias"]
            expected = cross_entropy(logits, labels).item()
            assert found.mean[i, j].item() == pytest.approx(expected, abs=1e-12)


def test_axes_of_a_surface_are_the_first_two_curves():
    images, labels = images_and_labels(6)
    network, settings = tiny_network().double(), {"num_steps": 3, **SETTINGS}
    curves = loss_landscape(network, images.double(), labels, num_directions=2, **settings)
    surface = loss_surface(network, images.double(), labels, **settings)
    torch.testing.assert_close(surface.losses[:, 1], curves.losses[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(surface.losses[1], curves.losses[1], rtol=0, atol=1e-12)


def test_spends_the_minimum_of_passes():
    images, labels = images_and_labels(4)
    network, calls = tiny_network(), []
    passes = PassCounter(network)
    loss_landscape(
        network,
        images,
        labels,
        num_directions=2,
        num_steps=3,
        restarts=2,
        batch_size=3,
        on_attack=lambda: calls.append(1),
        **SETTINGS,
    )
    attacks = 2 * 3 * 2
    assert (passes.forwards, passes.backwards) == (4 * attacks * (3 + 1), 4 * attacks * 3)
    assert len(calls) == attacks * 2
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"directions": "up"}, "`kind` to be one of"),
        ({"directions": []}, "`directions` to hold a direction"),
        ({"directions": {"0.weight": torch.ones(2)}}, r"to be \(6, 3, 3, 3\) but got"),
        ({"num_steps": 1}, "`num_steps` to be >= 2 but got 1"),
        ({"extent": (1, -1)}, "`extent` to go from low to high but got 1 to -1"),
        ({"loss": "worst"}, "`loss` to be one of robust, clean but got worst"),
        ({"restarts": 0}, "`restarts` to be >= 1 but got 0"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        loss_landscape(tiny_network(), *images_and_labels(4), **kwargs)


def test_a_surface_needs_two_directions():
    network = linear()
    with pytest.raises(ValueError, match="`directions` to be two for a surface but got 1"):
        loss_surface(
            network, *images_and_labels(4, classes=3, channels=1), directions=[given(network)]
        )


def test_adversarial_directions_of_the_clean_loss_face_no_attack():
    images, labels = images_and_labels(6)
    network = tiny_network()
    clean, unattacked, attacked = (
        loss_landscape(
            network, images, labels, directions="adversarial", num_steps=2, num_directions=1, **look
        ).losses
        for look in ({"loss": "clean", **SETTINGS}, {"steps": 0}, SETTINGS)
    )
    assert torch.equal(clean, unattacked)
    assert not torch.equal(clean, attacked)
