"""An example whose logits are not finite counts as misclassified, and its loss as not finite."""

import math

import pytest
import torch
from networks_for_tests import images_and_labels, tiny_network
from torch import nn

from robust_flatness.functional import (
    PGD,
    FriendlyPGD,
    average_case_flatness,
    evaluate_robustness,
    pgd_attack,
    worst_case_flatness,
)
from robust_flatness.functional.attack import Iterate

NOT_FINITE = [math.nan, math.inf, -math.inf]


class Broken(nn.Module):
    """Logits of one class are not finite for images that are bright in a corner."""

    def __init__(self, value, threshold=0.5, place=1):
        super().__init__()
        self.net, self.value, self.threshold, self.place = tiny_network(), value, threshold, place

    def forward(self, images):
        logits = self.net(images)
        bright = images[:, 0, 0, 0] > self.threshold
        hole = torch.zeros_like(logits)
        hole[:, self.place] = self.value
        return torch.where(bright[:, None] & (hole != 0), hole, logits)


def corner(images, *values):
    images = images.clone()
    images[:, 0, 0, 0] = torch.tensor(values)
    return images


def test_a_loss_that_is_no_number_is_the_highest_and_stays():
    images = torch.arange(3.0).view(3, 1, 1, 1)
    logits = torch.zeros(3, 2)
    nan = logits.clone()
    nan[1] = math.nan
    kept = Iterate(images, None, None).keep_higher_loss(images, torch.ones(3), logits)
    kept = kept.keep_higher_loss(images + 10, torch.tensor([2.0, math.nan, 0.5]), nan)
    kept = kept.keep_higher_loss(images + 20, torch.full((3,), 9.0), logits)
    assert kept.images.flatten().tolist() == [20, 11, 22]
    assert kept.losses[1].isnan()
    assert kept.predictions.tolist() == [0, -1, 0]


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("label", [0, 1])
def test_clean_and_attacked_examples_count_as_wrong(value, label):
    images, _ = images_and_labels(4)
    labels = torch.full((4,), label)
    # Bright when clean; may become bright under attack; stays dark.
    images = corner(images, 0.9, 0.49, 0.1, 0.1)
    network = Broken(value)
    with torch.no_grad():
        # All are classified correctly by the part that is not broken.
        network.net[-1].weight.zero_()
        network.net[-1].bias.copy_(10.0 * nn.functional.one_hot(labels[0], 10))
    attack = {"eps": 0.1, "steps": 1, "restarts": 8, "start": "uniform"}
    result = evaluate_robustness(network, images, labels, **attack)
    assert result.clean_correct.tolist() == [False, True, True, True]
    assert result.robust_correct.tolist() == [False, False, True, True]
    assert result.losses.isfinite().tolist() == [False, False, True, True]
    assert result.clean_losses.isfinite().tolist() == [False, True, True, True]
    assert not math.isfinite(result.robust_loss)
    assert not math.isfinite(result.robust_loss_correct)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("value", NOT_FINITE)
def test_gradients_that_are_not_finite_leave_images_in_the_box(norm, value):
    images, labels = images_and_labels(4)
    network = nn.Sequential(tiny_network())
    network.register_full_backward_hook(lambda _, gradients, __: (gradients[0] * value,))
    for keep in ("best", "last"):
        adversarial = pgd_attack(network, images, labels, eps=0.1, steps=2, norm=norm, keep=keep)
        assert ((adversarial >= 0) & (adversarial <= 1)).all()


def test_one_broken_example_does_not_touch_the_others():
    images, labels = images_and_labels(4)
    broken = Broken(math.nan, threshold=0.97)
    images = corner(images, 1.0, *images[1:, 0, 0, 0].clamp(max=0.8))
    expected = evaluate_robustness(tiny_network(), images, labels, eps=0.1, steps=2, norm="l2")
    result = evaluate_robustness(broken, images, labels, eps=0.1, steps=2, norm="l2")
    assert result.losses.isnan().tolist() == [True, False, False, False]
    torch.testing.assert_close(result.losses[1:], expected.losses[1:])


def test_friendly_pgd_takes_it_for_misclassified():
    images, labels = images_and_labels(2)
    network = Broken(math.nan, threshold=-1.0, place=slice(None))
    start = PGD(eps=0.1).starts(images, range(2), seed=0, restart=0)
    # Also where the prediction to leave is that of logits which are not finite.
    for target in (labels, torch.full((2, 10), math.nan)):
        criterion = (lambda z, y: z.sum(1)) if target.ndim > 1 else None
        criteria = () if criterion is None else (criterion,)
        kept = (
            FriendlyPGD(eps=0.1, steps=2).attack(network, images, target, start, *criteria).images
        )
        assert torch.equal(kept, PGD(eps=0.1).begin(images, start))


@pytest.mark.parametrize("measure", [average_case_flatness, worst_case_flatness])
def test_flatness_is_not_finite_if_an_example_is_not(measure):
    images, labels = images_and_labels(4)
    network = Broken(math.nan, threshold=0.9)
    result = measure(network, corner(images, 1.0, 0, 0, 0), labels, eps=0.05, steps=1, restarts=1)
    assert not math.isfinite(result.value)
    assert not math.isfinite(result.reference_loss)
    assert result.reference_losses.isfinite().tolist() == [False, True, True, True]


def test_an_iterate_of_the_weights_whose_loss_is_nan_is_the_worst():
    images, labels = images_and_labels(2)
    network, passes = tiny_network(), []

    def break_one(module, inputs, logits):
        passes.append(None)
        # The reference attack takes four forwards; this is the second pass of the ascent.
        return logits * math.nan if len(passes) == 6 else logits

    network.register_forward_hook(break_one)
    settings = {"restarts": 1, "steps": 3, "eps": 0.1, "keep": "best"}
    assert math.isnan(worst_case_flatness(network, images, labels, **settings).value)
