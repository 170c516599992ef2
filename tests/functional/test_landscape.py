import pytest
import torch
from networks_for_tests import PassCounter, images_and_labels, same, snapshot, tiny_network
from torch import nn
from torch.nn.functional import cross_entropy, softplus

from robust_flatness.functional import (
    PGD,
    average_case_flatness,
    evaluate_robustness,
    hessian_extreme_eigenvalues,
    loss_landscape,
    loss_surface,
    normalize_direction,
    perturbed_weights,
    robust_loss,
    sample_weight_perturbation,
    weight_directions,
)

SETTINGS = {"eps": 0.05, "steps": 3}


def linear(classes: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes)).double()


def direction_of(network: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {name: torch.randn_like(value) for name, value in network.named_parameters()}


def test_clean_loss_of_a_linear_network_agrees_with_the_closed_form():
    images, labels = images_and_labels(10, classes=3, channels=1)
    images, network = images.double(), linear()
    direction = direction_of(network)
    result = loss_landscape(
        network, images, labels, directions=direction, num_steps=7, extent=(-2, 1), loss="clean"
    )
    assert result.coordinates.tolist() == pytest.approx([-2, -1.5, -1, -0.5, 0, 0.5, 1])
    for s, losses in zip(result.coordinates, result.losses[0]):
        weight = network[1].weight + s * direction["1.weight"]
        bias = network[1].bias + s * direction["1.bias"]
        logits = images.flatten(1) @ weight.T + bias
        expected = logits.logsumexp(1) - logits[range(10), labels]
        torch.testing.assert_close(losses, expected, rtol=0, atol=1e-12)


def test_robust_loss_of_a_linear_network_agrees_with_the_closed_form():
    # The worst linf perturbation of a two-class linear network costs the margin eps·‖gap‖_1.
    images, labels = images_and_labels(10, classes=2, channels=1)
    images, network, eps = 0.3 + 0.4 * images.double(), linear(2), 0.1
    direction = {name: 0.1 * value for name, value in direction_of(network).items()}
    result = loss_landscape(
        network, images, labels, directions=[direction], num_steps=5, eps=eps, steps=40
    )
    sign = torch.where(labels == 1, 1.0, -1.0).double()
    for s, losses in zip(result.coordinates, result.losses[0]):
        weight = (network[1].weight + s * direction["1.weight"]).detach()
        bias = (network[1].bias + s * direction["1.bias"]).detach()
        gap = weight[1] - weight[0]
        margin = sign * (images.flatten(1) @ gap + bias[1] - bias[0]) - eps * gap.abs().sum()
        torch.testing.assert_close(losses, softplus(-margin), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["random", "adversarial", "hessian"])
def test_the_middle_is_the_robust_loss_of_the_same_attack(kind):
    images, labels = images_and_labels(8)
    network = tiny_network()
    result = loss_landscape(
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
    assert result.coordinates[1] == 0
    for losses in result.losses[:, 1]:
        assert torch.equal(losses, expected)


@pytest.mark.parametrize("relative_to", ["layer", "filter", "network"])
def test_agrees_with_flatness_on_the_same_directions(relative_to):
    images, labels = images_and_labels(12)
    network = tiny_network().double()
    common = {"relative_to": relative_to, "seed": 2, **SETTINGS}
    result = loss_landscape(
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
        rise = result.losses[:, place] - result.losses[:, 2]
        torch.testing.assert_close(
            rise, flatness.perturbed_losses - flatness.reference_losses, rtol=0, atol=1e-9
        )
        assert (result.mean[place] - result.mean[2]).item() == pytest.approx(
            flatness.value, abs=1e-9
        )


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
    result = loss_landscape(tiny_network(), images, labels, num_steps=4, loss="clean")
    assert result.losses.shape == (10, 4, 5)
    curves = result.losses.double().mean(2)
    assert torch.equal(result.curves, curves)
    assert torch.equal(result.mean, curves.mean(0))
    assert torch.equal(result.max, curves.max(0).values)
    assert torch.equal(torch.stack(result.band), torch.stack([curves.amin(0), curves.amax(0)]))


def test_surface_is_that_of_both_directions():
    images, labels = images_and_labels(6, classes=3, channels=1)
    images, network = images.double(), linear()
    pair = [direction_of(network, seed) for seed in (0, 1)]
    result = loss_surface(network, images, labels, directions=pair, num_steps=3, loss="clean")
    assert result.losses.shape == (3, 3, 6)
    for i, s in enumerate(result.coordinates):
        for j, t in enumerate(result.coordinates):
            moved = {
                name: value + s * pair[0][name] + t * pair[1][name]
                for name, value in network.named_parameters()
            }
            logits = images.flatten(1) @ moved["1.weight"].T + moved["1.bias"]
            expected = cross_entropy(logits, labels).item()
            assert result.mean[i, j].item() == pytest.approx(expected, abs=1e-12)


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
        ({"directions": []}, "`directions` to hold at least one direction"),
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
            network,
            *images_and_labels(4, classes=3, channels=1),
            directions=[direction_of(network)],
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


def directions(network, count=8, **kwargs):
    images, labels = images_and_labels(count)
    dtype = network[0].weight.dtype
    return list(weight_directions(network, images.to(dtype), labels, **SETTINGS, **kwargs))


@pytest.mark.parametrize("relative_to", ["layer", "filter", "network"])
def test_random_directions_are_those_of_flatness_by_number(relative_to):
    network = tiny_network()
    results = directions(network, num_directions=3, seed=5, relative_to=relative_to)
    for k, direction in enumerate(results):
        expected = sample_weight_perturbation(
            network, xi=0.5, seed=5, direction=k, relative_to=relative_to
        )
        assert same(expected, direction)
    assert len(results) == 3


@pytest.mark.parametrize(
    ("kind", "share", "count"),
    [("random", 0.5, 10), ("adversarial", 0.025, 10), ("hessian", 0.5, 1)],
)
def test_each_layer_has_the_papers_relative_length(kind, share, count):
    network = tiny_network().double()
    results = directions(network, kind=kind)
    assert len(results) == count
    biases = {"0.bias", "8.bias"}
    for direction in results:
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
    (results,) = directions(network, kind="hessian", relative_to="network", length=0.2)
    vector = hessian_extreme_eigenvalues(network, images.double(), labels).max_eigenvector
    total = torch.cat([network.get_parameter(name).flatten() for name in vector]).norm().item()
    for name, value in vector.items():
        torch.testing.assert_close(results[name], 0.2 * total * value)


def test_adversarial_directions_rise_more_than_random_ones():
    images, labels = images_and_labels(16)
    network = tiny_network()

    def rise(direction):
        with perturbed_weights(network, direction):
            return evaluate_robustness(network, images, labels, restarts=1, **SETTINGS).robust_loss

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


def test_two_steps_on_a_linear_network_agree_with_the_closed_form():
    # Without an attack, the gradient of the weight is the sum of (p - y) xᵀ, of the bias of p - y.
    images, labels = images_and_labels(8, classes=3, channels=1)
    images, network = images.double(), linear()
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
    images, network, forwards = images.double(), linear(), []

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
    results = directions(network, kind="adversarial", num_directions=1)[0]
    assert not results["0.bias"].any()
    assert all(value.isfinite().all() for value in results.values())


def test_progress_counts_attacks_of_directions():
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
