import pytest
import torch
from networks_for_tests import images_and_labels, same, snapshot, tiny_network
from torch import nn
from torch.nn.functional import cross_entropy

from robust_flatness.functional import adversarial_weight_perturbation, perturbed_weights


def test_one_step_is_the_closed_form():
    images, labels = images_and_labels(8)
    network = tiny_network().double().eval()
    found = adversarial_weight_perturbation(network, images.double(), labels, xi=0.02)
    weights = {f"{i}.weight": network[i].weight for i in (0, 3, 8)}
    loss = cross_entropy(network(images.double()), labels)
    gradients = torch.autograd.grad(loss, list(weights.values()))
    assert found.keys() == weights.keys()
    for (name, weight), gradient in zip(weights.items(), gradients):
        expected = 0.02 * weight.norm() * gradient / gradient.norm()
        torch.testing.assert_close(found[name], expected.detach())
        # The public code returns the unperturbed model after one step.
        assert found[name].norm() > 0


@pytest.mark.parametrize("steps", [1, 3])
def test_raises_the_loss_and_stays_in_the_ball(steps):
    images, labels = images_and_labels(16)
    images, network = images.double(), tiny_network().double().eval()
    nu = adversarial_weight_perturbation(network, images, labels, xi=1e-3, steps=steps)
    before = cross_entropy(network(images), labels)
    with perturbed_weights(network, nu):
        after = cross_entropy(network(images), labels)
    assert after > before
    for name, value in nu.items():
        weight = network.get_parameter(name)
        assert value.norm() <= 1e-3 * weight.norm() * (1 + 1e-9)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_leaves_weights_buffers_gradients_and_modes_alone(mode):
    images, labels = images_and_labels(8)
    network = tiny_network()
    network[1].eval()
    before = snapshot(network)
    adversarial_weight_perturbation(network, images, labels, steps=2, mode=mode)
    assert same(before, snapshot(network))
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not network[1].training
    assert network[4].training


def test_train_mode_ascends_on_batch_statistics():
    images, labels = images_and_labels(8)
    network = tiny_network()
    found = [
        adversarial_weight_perturbation(network, images, labels, mode=mode)["0.weight"]
        for mode in ("eval", "train")
    ]
    assert not torch.allclose(found[0], found[1])


def test_unused_and_zero_weights_do_not_move():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.zero = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
            nn.init.zeros_(self.zero.weight)

        def forward(self, x):
            return self.zero(self.used(x.flatten(1)))

    nu = adversarial_weight_perturbation(Unused(), torch.rand(2, 1, 2, 2), torch.tensor([0, 1]))
    assert nu["unused.weight"].eq(0).all()
    assert nu["zero.weight"].eq(0).all()
    assert nu["used.weight"].isfinite().all()


def test_a_loss_of_nan_leaves_the_perturbation_finite():
    images, labels = images_and_labels(4)
    network = tiny_network()
    with torch.no_grad():
        network[8].bias.fill_(torch.nan)
    nu = adversarial_weight_perturbation(network, images, labels)
    assert all(value.isfinite().all() for value in nu.values())


def test_gradients_are_handed_over_ranks():
    images, labels = images_and_labels(8)
    network = tiny_network().double()
    opposite = adversarial_weight_perturbation(
        network, images.double(), labels, reduce=lambda gradients: [-g for g in gradients]
    )
    plain = adversarial_weight_perturbation(network, images.double(), labels)
    for name in plain:
        torch.testing.assert_close(opposite[name], -plain[name])


def test_bad_arguments_are_named():
    images, labels = images_and_labels(4)
    with pytest.raises(ValueError, match="`xi` to be >= 0 but got -1"):
        adversarial_weight_perturbation(tiny_network(), images, labels, xi=-1)
    with pytest.raises(ValueError, match="`steps` to be >= 1 but got 0"):
        adversarial_weight_perturbation(tiny_network(), images, labels, steps=0)
