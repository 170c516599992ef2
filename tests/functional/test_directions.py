import pytest
import torch
from networks_for_tests import images_and_labels, same, tiny_network
from torch import nn

from robust_flatness.functional import (
    PGD,
    evaluate_robustness,
    hessian_extreme_eigenvalues,
    normalize_direction,
    perturbed_weights,
    sample_weight_perturbation,
    weight_directions,
)

ATTACK = {"eps": 0.05, "steps": 3}


def directions(network, count=8, **kwargs):
    images, labels = images_and_labels(count)
    dtype = network[0].weight.dtype
    return list(weight_directions(network, images.to(dtype), labels, **ATTACK, **kwargs))


@pytest.mark.parametrize("relative_to", ["layer", "filter", "network"])
def test_random_directions_are_those_of_flatness_by_number(relative_to):
    network = tiny_network()
    found = directions(network, num_directions=3, seed=5, relative_to=relative_to)
    for k, direction in enumerate(found):
        expected = sample_weight_perturbation(
            network, xi=0.5, seed=5, direction=k, relative_to=relative_to
        )
        assert same(expected, direction)
    assert len(found) == 3


@pytest.mark.parametrize(
    ("kind", "share", "count"),
    [("random", 0.5, 10), ("adversarial", 0.025, 10), ("hessian", 0.5, 1)],
)
def test_each_layer_has_the_papers_relative_length(kind, share, count):
    network = tiny_network().double()
    found = directions(network, kind=kind)
    assert len(found) == count
    biases = {"0.bias", "8.bias"}
    for direction in found:
        assert set(direction) - biases == {"0.weight", "3.weight", "8.weight"}
        assert biases <= set(direction) or kind == "hessian"
        for name, value in direction.items():
            weight = network.get_parameter(name)
            assert value.norm().item() == pytest.approx(share * weight.norm().item(), rel=1e-12)


@pytest.mark.parametrize("kind", ["random", "adversarial", "hessian"])
def test_each_filter_has_the_length_of_the_weights_filter(kind):
    network = tiny_network().double()
    for direction in directions(network, kind=kind, relative_to="filter", length=0.3):
        for name, value in direction.items():
            weight = network.get_parameter(name).detach()
            if value.ndim == 1:
                value, weight = value[None], weight[None]
            torch.testing.assert_close(
                value.flatten(1).norm(dim=1),
                0.3 * weight.flatten(1).norm(dim=1),
                rtol=1e-12,
                atol=0,
            )


def test_relative_to_the_network_an_eigenvector_stays_one():
    images, labels = images_and_labels(8)
    network = tiny_network().double()
    (found,) = directions(network, kind="hessian", relative_to="network", length=0.2)
    vector = hessian_extreme_eigenvalues(network, images.double(), labels).max_eigenvector
    total = torch.cat([network.get_parameter(name).flatten() for name in vector]).norm().item()
    for name, value in vector.items():
        torch.testing.assert_close(found[name], 0.2 * total * value)


def test_adversarial_directions_rise_more_than_random_ones():
    images, labels = images_and_labels(16)
    network = tiny_network()

    def rise(direction):
        with perturbed_weights(network, direction):
            return evaluate_robustness(network, images, labels, restarts=1, **ATTACK).robust_loss

    settings = {"length": 0.05, "num_directions": 3, "count": 16}
    adversarial, random = (
        [rise(d) for d in directions(network, kind=kind, **settings)]
        for kind in ("adversarial", "random")
    )
    assert min(adversarial) > max(random)
    assert len(set(adversarial)) == 3


def test_adversarial_directions_depend_on_seed_and_number_not_on_the_batch():
    network = tiny_network().double()
    settings = {"kind": "adversarial", "num_directions": 2}
    first, second = directions(network, **settings)
    again, _ = directions(network, batch_size=3, **settings)
    (other,) = directions(network, kind="adversarial", num_directions=1, seed=1)
    name = "3.weight"
    torch.testing.assert_close(again[name], first[name], rtol=1e-9, atol=1e-12)
    assert not torch.allclose(first[name], second[name], rtol=1e-3)
    assert not torch.allclose(first[name], other[name], rtol=1e-3)


def linear_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).double()


def test_two_steps_on_a_linear_network_agree_with_the_closed_form():
    # Without an attack, the gradient of the weight is the sum of (p - y) xᵀ, of the bias of p - y.
    images, labels = images_and_labels(8, classes=3, channels=1)
    images, network = images.double(), linear_network()
    settings = {"num_directions": 3, "steps": 0, "ascent_steps": 2, "length": 0.3, "seed": 4}
    *_, direction = weight_directions(
        network, images, labels, kind="adversarial", batch_size=3, **settings
    )
    weights = {name: value.detach() for name, value in network.named_parameters()}
    expected = sample_weight_perturbation(network, xi=0.3, seed=4, direction=2)

    def on_sphere(name, value):
        return 0.3 * weights[name].norm() * value / value.norm()

    for _ in range(2):
        moved = {name: weights[name] + expected[name] for name in weights}
        logits = images.flatten(1) @ moved["1.weight"].T + moved["1.bias"]
        residual = logits.softmax(1) - nn.functional.one_hot(labels, 3)
        gradients = {"1.weight": residual.T @ images.flatten(1), "1.bias": residual.sum(0)}
        expected = {
            name: on_sphere(name, expected[name] + on_sphere(name, gradients[name]))
            for name in weights
        }
    for name, value in expected.items():
        torch.testing.assert_close(direction[name], value, rtol=0, atol=1e-12)


def test_images_are_attacked_anew_at_the_moved_weights_from_the_starts_of_the_number():
    images, labels = images_and_labels(8, classes=3, channels=1)
    images, network, forwards = images.double(), linear_network(), []

    def record(module, inputs):
        forwards.append((inputs[0].detach().clone(), module[1].weight.detach().clone()))

    network.register_forward_pre_hook(record)
    settings = {"ascent_steps": 2, "length": 0.3, "seed": 4, "eps": 0.1, "steps": 1}
    directions = weight_directions(
        network, images, labels, kind="adversarial", num_directions=2, batch_size=5, **settings
    )
    list(directions)
    first = (
        network[1].weight
        + sample_weight_perturbation(network, xi=0.3, seed=4, direction=1)["1.weight"]
    )
    # A step of the attack, its last iterate, and the gradient, for two batches, steps, directions.
    assert len(forwards) == 3 * 2 * 2 * 2
    second_direction = forwards[12:]
    pgd = PGD(0.1)
    for place, indices in ((0, range(5)), (3, range(5, 8))):
        part = images[list(indices)]
        start = pgd.begin(part, pgd.starts(part, indices, seed=4, restart=1))
        for step in (0, 6):
            assert torch.equal(second_direction[place + step][0], start)
    assert all(torch.equal(weight, first) for _, weight in second_direction[:6])
    assert not any(torch.equal(weight, first) for _, weight in second_direction[6:])


def test_hessian_directions_are_those_of_both_ends():
    first, second = directions(tiny_network().double(), kind="hessian", num_directions=2)
    assert not torch.allclose(first["3.weight"], second["3.weight"])


def test_zero_biases_and_gradients_have_no_direction():
    network = tiny_network()
    with torch.no_grad():
        network[0].bias.zero_()
    found = directions(network, kind="adversarial", num_directions=1)[0]
    assert not found["0.bias"].any()
    assert all(value.isfinite().all() for value in found.values())


def test_progress_counts_attacks():
    calls = []
    directions(
        tiny_network(),
        kind="adversarial",
        num_directions=2,
        ascent_steps=3,
        batch_size=5,
        on_attack=lambda: calls.append(1),
    )
    assert len(calls) == 2 * 3 * 2


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"kind": "steepest"}, "`kind` to be one of random, adversarial, hessian but got steepest"),
        ({"relative_to": "model"}, "`relative_to` to be one of .* but got model"),
        ({"length": -0.5}, "`length` to be >= 0 but got -0.5"),
        ({"num_directions": 0}, "`num_directions` to be >= 1 but got 0"),
        ({"kind": "hessian", "num_directions": 3}, "`num_directions` to be 1 or 2"),
        ({"eps": -1.0}, "`eps` to be >= 0 but got -1.0"),
    ],
)
def test_bad_arguments_are_named_before_any_direction_is_made(kwargs, message):
    with pytest.raises(ValueError, match=message):
        weight_directions(tiny_network(), *images_and_labels(4), **kwargs)


@pytest.mark.parametrize("direction", [{"nothing": torch.ones(2)}, {"weight": torch.ones(2)}])
def test_directions_of_another_network_are_refused(direction):
    with pytest.raises(ValueError, match=r"(nothing|weight) of a direction in `directions` to be"):
        normalize_direction(nn.Linear(3, 2), direction, length=1.0)
