import torch
from networks_for_tests import images_and_labels
from torch import nn

from robust_flatness.functional import sample_weight_perturbation
from robust_flatness.functional.attack import PGD
from robust_flatness.functional.directions import WeightAscent


def linear() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).double()


def ascent(pgd: PGD, steps: int) -> WeightAscent:
    return WeightAscent(
        pgd, steps, length=0.3, seed=4, batch_size=3, indices=range(8), on_attack=None
    )


def test_two_steps_on_a_linear_network_agree_with_the_closed_form():
    # Without an attack, the gradient of the weight is the mean of (p - y) xᵀ, of the bias of p - y.
    images, labels = images_and_labels(8, classes=3, channels=1)
    images, network = images.double(), linear()
    found = ascent(PGD(0.1, steps=0), 2).direction(network, images, labels, number=2)
    weights = {name: value.detach() for name, value in network.named_parameters()}
    expected = sample_weight_perturbation(network, xi=0.3, seed=4, direction=2)

    def on_sphere(name: str, value: torch.Tensor) -> torch.Tensor:
        return 0.3 * weights[name].norm() * value / value.norm()

    for _ in range(2):
        moved = {name: weights[name] + expected[name] for name in weights}
        logits = images.flatten(1) @ moved["1.weight"].T + moved["1.bias"]
        residual = logits.softmax(1) - nn.functional.one_hot(labels, 3)
        slopes = {"1.weight": residual.T @ images.flatten(1), "1.bias": residual.sum(0)}
        expected = {
            name: on_sphere(name, expected[name] + on_sphere(name, slopes[name]))
            for name in weights
        }
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12)


def test_examples_are_crafted_anew_at_the_moved_weights_from_starts_of_the_number(monkeypatch):
    images, labels = images_and_labels(8, classes=3, channels=1)
    network, starts, seen = linear(), [], []
    original, attack = PGD.starts, PGD.attack

    def spy(self, images, indices, **settings):
        starts.append((list(indices), settings["seed"], settings["restart"]))
        return original(self, images, indices, **settings)

    def watched(self, model, *args):
        seen.append(model[1].weight.detach().clone())
        return attack(self, model, *args)

    monkeypatch.setattr(PGD, "starts", spy)
    monkeypatch.setattr(PGD, "attack", watched)
    ascent(PGD(0.1, steps=2), 2).direction(network, images.double(), labels, number=5)
    batches = [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert starts == [(batch, 4, 5) for batch in batches * 2]
    first = (
        network[1].weight
        + sample_weight_perturbation(network, xi=0.3, seed=4, direction=5)["1.weight"]
    )
    assert all(torch.equal(weight, first) for weight in seen[:3])
    assert not any(torch.equal(weight, first) for weight in seen[3:])
    assert not any(torch.equal(weight, network[1].weight) for weight in seen)
