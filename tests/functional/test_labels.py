"""Label noise and label smoothing, written out by hand."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from robust_flatness.functional import TrainingLabels

LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 3.0]], dtype=torch.float64)
LABELS = torch.tensor([0, 1])


def by_hand(weights: list[list[float]]) -> float:
    """Mean of -sum_k q_k log p_k, in plain Python."""
    total = 0.0
    for row, target in zip(LOGITS.tolist(), weights):
        normaliser = math.log(sum(math.exp(z) for z in row))
        total -= sum(q * (z - normaliser) for q, z in zip(target, row))
    return total / len(weights)


@pytest.mark.parametrize(("spread", "true", "other"), [("others", 0.7, 0.15), ("all", 0.8, 0.1)])
def test_smoothed_loss_by_hand_in_both_conventions(spread, true, other):
    labels = TrainingLabels(smoothing=0.3, spread=spread)
    expected = by_hand([[true, other, other], [other, true, other]])
    assert labels.loss(LOGITS, LABELS).item() == pytest.approx(expected, abs=1e-7)


def test_spread_over_all_is_torchs_label_smoothing():
    found = TrainingLabels(smoothing=0.3, spread="all").loss(LOGITS, LABELS)
    expected = cross_entropy(LOGITS, LABELS, label_smoothing=0.3)
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=0)


def test_without_smoothing_it_is_cross_entropy_bit_for_bit():
    assert torch.equal(TrainingLabels().loss(LOGITS, LABELS), cross_entropy(LOGITS, LABELS))


def test_share_of_kept_labels_is_one_minus_tau_plus_its_part_of_tau():
    count, tau, classes = 100_000, 0.3, 10
    labels = torch.arange(count) % classes
    draws = torch.rand(count, 2, generator=torch.Generator().manual_seed(0))
    noisy = TrainingLabels(noise=tau).resample(labels, draws, classes)
    kept = 1 - tau + tau / classes
    sigma = math.sqrt(kept * (1 - kept) / count)
    assert (noisy == labels).float().mean().item() == pytest.approx(kept, abs=3 * sigma)
    # What changed is uniform over the other classes.
    shift = ((noisy - labels) % classes)[noisy != labels]
    shares = torch.bincount(shift, minlength=classes)[1:] / len(shift)
    assert (shares - 1 / 9).abs().max() < 3 * math.sqrt(1 / 9 / len(shift))


def test_largest_draw_is_the_last_class():
    draws = torch.tensor([[0.0, 1 - 2**-24]])
    assert TrainingLabels(noise=1.0).resample(torch.tensor([0]), draws, 10).item() == 9


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"noise": 1.5}, r"`label_noise` to be in \[0, 1\] but got 1.5"),
        ({"smoothing": -0.1}, r"`label_smoothing` to be in \[0, 1\] but got -0.1"),
        ({"spread": "none"}, "`smoothing_spread` to be one of others, all but got none"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        TrainingLabels(**kwargs)
