"""PGD that stops soon after an example is misclassified."""

import pytest
import torch
from networks_for_tests import PassCounter, images_and_labels, tiny_network
from torch import nn

from robust_flatness.functional import FriendlyPGD


class Ramp(nn.Module):
    """One pixel x against 0.5: class 1 above, class 0 below; raising x fools label 0."""

    def forward(self, images):
        height = images.flatten(1)[:, 0] - 0.5
        return torch.stack([-height, height], 1)


def ramp_attack(tau, values, steps=5, label=0):
    images = torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1)
    labels = torch.full((len(values),), label)
    attack = FriendlyPGD(eps=0.35, steps=steps, step_size=0.1, tau=tau)
    start = torch.zeros_like(images)
    return attack.attack(Ramp(), images, labels, start).images.flatten().tolist()


@pytest.mark.parametrize(("tau", "reached"), [(0, 0.55), (1, 0.65), (2, 0.7), (9, 0.7)])
def test_goes_tau_iterates_beyond_the_first_misclassified_one(tau, reached):
    # 0.35, 0.45, 0.55, 0.65, 0.7 (the ball's edge), 0.7
    assert ramp_attack(tau, [0.35]) == pytest.approx([reached])


def test_examples_that_no_iterate_fools_stay_clean():
    assert ramp_attack(0, [0.05]) == pytest.approx([0.05])


def test_an_image_that_is_misclassified_already_is_kept_with_tau_zero():
    assert ramp_attack(0, [0.6]) == pytest.approx([0.6])


def test_each_example_stops_for_itself():
    assert ramp_attack(0, [0.35, 0.05, 0.45]) == pytest.approx([0.55, 0.05, 0.55])


def test_without_steps_nothing_is_attacked():
    assert ramp_attack(3, [0.6], steps=0) == pytest.approx([0.6])


def test_stays_in_ball_and_box_and_spends_as_much_as_pgd():
    model = tiny_network().eval()
    images, labels = images_and_labels()
    passes = PassCounter(model)
    start = torch.full_like(images, 0.5)
    found = FriendlyPGD(eps=0.1, steps=4, tau=1).attack(model, images, labels, start)
    assert (passes.forwards, passes.backwards) == (8 * 5, 8 * 4)
    assert (found.images - images).abs().max() <= 0.1 + 1e-6
    assert found.images.min() >= 0
    assert found.images.max() <= 1
    assert not found.images.requires_grad
    with pytest.raises(ValueError, match="`tau` to be >= 0 but got -1"):
        FriendlyPGD(eps=0.1, tau=-1)
