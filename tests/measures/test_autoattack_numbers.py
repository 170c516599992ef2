"""AutoAttack where numbers are not finite, or not float32."""

import math

import pytest
import torch
from networks_for_tests import images_and_labels
from torch import nn
from torch.utils.data import TensorDataset

from robust_flatness.callbacks import AutoAttack, evaluate
from robust_flatness.measures import AutoAttackError

ATTACKS = ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"]
QUIET = {"accelerator": "cpu", "enable_progress_bar": False}


def error(network, data, attacks, **kwargs):
    measure = AutoAttackError(attacks=attacks, **{"eps": 0.1, **kwargs})
    return measure(network, *data[:]).robust_error


class Bright(nn.Module):
    """Predicts class 0 for dark and class 1 for bright images, and something else on the way."""

    def __init__(self, otherwise, classes=4):
        super().__init__()
        self.slope = nn.Parameter(torch.ones(()))
        self.otherwise, self.classes = otherwise, classes

    def forward(self, images):
        mean = self.slope * images.flatten(1).mean(1, keepdim=True)
        low = -torch.arange(1.0, self.classes - 1).expand(len(images), -1).to(mean) - 9
        logits = torch.cat([1 - mean, mean, low], 1)
        between = (mean > 0.06) & (mean < 0.94)
        return torch.where(between, self.otherwise, logits)


def dark_and_bright(value=0.0):
    images = torch.full((4, 1, 6, 6), value)
    images[2:] = 1 - value
    return TensorDataset(images, torch.tensor([0, 0, 1, 1]))


@pytest.mark.parametrize(
    ("attack", "otherwise"),
    [(name, math.nan) for name in ATTACKS] + [("apgd-ce", math.inf), ("square", -math.inf)],
)
def test_an_attack_that_makes_logits_not_finite_has_broken_the_image(otherwise, attack):
    assert error(Bright(otherwise), dark_and_bright(), [attack]) == 1


@pytest.mark.parametrize("otherwise", [math.nan, math.inf])
def test_logits_that_are_not_finite_on_clean_images_are_misclassified(otherwise):
    data = dark_and_bright(0.3)
    assert error(Bright(otherwise), data, ["apgd-ce"]) == 1
    images = torch.cat([data[:][0], dark_and_bright()[:][0]])
    both = TensorDataset(images, torch.tensor([0, 0, 1, 1] * 2))
    assert error(Bright(otherwise), both, ["apgd-ce"], eps=0.01) == 0.5
    assert error(Bright(otherwise), both, ["apgd-ce"], eps=0.0) == 0.5


class Kink(Bright):
    """Gradients are NaN everywhere, logits finite."""

    def forward(self, images):
        nothing = (images - images).sqrt().flatten(1).sum(1, keepdim=True)
        return super().forward(images) + nothing


@pytest.mark.parametrize("attack", [name for name in ATTACKS if name != "square"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_gradients_that_are_not_finite_break_no_image(norm, attack):
    found = error(Kink(0.0), dark_and_bright(0.02), [attack], eps=0.03, norm=norm)
    assert found == 0


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 10))


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize(
    ("weights", "pixels"),
    [
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float64),
        (torch.float16, torch.float32),
    ],
)
def test_networks_and_images_of_any_precision_are_attacked(weights, pixels, attack):
    images = images_and_labels(2)[0]
    labels = linear()(images).argmax(1)
    data = TensorDataset(images.to(pixels), labels)
    # FAB and Square have no early end on an image that they do not break.
    for eps, expected in ((0.3, 1.0), (1e-4, 0.0)):
        if attack.startswith("apgd") or expected == 1:
            assert error(linear().to(weights), data, [attack], eps=eps) == expected


def test_logits_of_float64_beyond_float32_are_attacked_as_others():
    class Shifted(nn.Module):
        def __init__(self, shift):
            super().__init__()
            self.body, self.shift = linear().double(), shift

        def forward(self, images):
            return self.body(images) + self.shift

    images = images_and_labels(6)[0]
    data = TensorDataset(images, linear()(images).argmax(1))
    found = [error(Shifted(shift), data, ["apgd-ce"], eps=0.02) for shift in (0, 1e9, -1e9)]
    assert found == [error(linear(), data, ["apgd-ce"], eps=0.02)] * 3
    assert 0 < found[0] < 1


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "16-true"])
def test_a_trainer_of_another_precision_measures(precision):
    # Of random images the radius breaks some.
    images = images_and_labels(6)[0]
    data = TensorDataset(images, linear()(images).argmax(1))
    attack = AutoAttack(dataset=data, attacks=["apgd-ce"], eps=0.02)
    figures = evaluate(linear(), data, [attack], precision=precision, **QUIET)
    exact = error(linear(), data, ["apgd-ce"], eps=0.02)
    assert abs(figures["test/autoattack_error"] - exact) <= 1 / 6
