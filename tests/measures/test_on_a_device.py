"""Measures on a device: what waits for it, what is copied, and that none needs float64 there."""

import pytest
from networks_for_tests import images_and_labels, tiny_network
from pretend_device import DEVICE, pretended_device

from robust_flatness.callbacks.fixed_images import PixelInput
from robust_flatness.measures import (
    AdaptiveSharpness,
    AttackChecks,
    AutoAttackError,
    AverageCaseFlatness,
    BoundaryThickness,
    Curvature,
    FirstOrderFlatness,
    GradientNorm,
    HessianTrace,
    LocalLipschitz,
    LossLandscape,
    Margins,
    RobustLoss,
    SingleStepRobustness,
    WorstCaseFlatness,
)

LIGHT = {"batch_size": 4, "eps": 0.1}
# Those whose next step depends on no value of the last one.
STRAIGHT = [
    (RobustLoss, {"restarts": 2}),
    (AverageCaseFlatness, {"num_perturbations": 2}),
    (WorstCaseFlatness, {"restarts": 2, "xi": 0.05}),
    (LossLandscape, {"directions": ["adversarial"], "num_directions": 1, "num_steps": 2}),
    (HessianTrace, {"num_probes": 2}),
    (GradientNorm, {}),
    (Margins, {}),
    (LocalLipschitz, {"search_steps": 2}),
    (SingleStepRobustness, {}),
]
OTHERS = [
    AdaptiveSharpness(case="worst", weight_steps=2, steps=1, **LIGHT),
    Curvature(batch_size=4),
    FirstOrderFlatness(weight_steps=1, steps=1, **LIGHT),
    BoundaryThickness(batch_size=4, num_points=2, steps=1),
    AttackChecks(square_queries=2, more_steps=2, steps=1, **LIGHT),
]


def measured(monkeypatch, measure, network=None, count=4, **kwargs):
    """The pretended device after a measure of images and a network that are on it."""
    with pretended_device(monkeypatch, **kwargs) as device:
        network = (network or tiny_network().eval()).to(DEVICE)
        images, labels = (part.to(DEVICE) for part in images_and_labels(count))
        device.copies.clear()
        measure(network, images, labels)
    return device


@pytest.mark.parametrize(
    ("kind", "kwargs"), STRAIGHT, ids=lambda value: getattr(value, "__name__", "")
)
def test_steps_of_an_attack_neither_wait_for_the_device_nor_copy(kind, kwargs, monkeypatch):
    few, many = (measured(monkeypatch, kind(steps=steps, **kwargs, **LIGHT)) for steps in (1, 4))
    # Starts and directions are drawn on the CPU, for all machines alike.
    assert len(few.waits) == len(many.waits)
    assert few.copies == many.copies


def test_batches_do_not_wait_for_the_device(monkeypatch):
    one, two = (measured(monkeypatch, RobustLoss(steps=1, **LIGHT), count=n) for n in (4, 8))
    assert one.waits == two.waits


def test_normalization_is_copied_to_the_device_once(monkeypatch):
    network = PixelInput(tiny_network().eval(), ([0.5] * 3, [0.2] * 3))
    plain = measured(monkeypatch, RobustLoss(steps=4, **LIGHT))
    normalized = measured(monkeypatch, RobustLoss(steps=4, **LIGHT), network)
    assert len(normalized.copies) - len(plain.copies) <= 2


@pytest.mark.parametrize(
    "measure",
    [*(kind(steps=1, **kwargs, **LIGHT) for kind, kwargs in STRAIGHT), *OTHERS],
    ids=lambda measure: type(measure).__name__,
)
def test_no_measure_needs_float64_on_the_device(measure, monkeypatch):
    here = "robust_flatness.functional.evaluation.has_float64"
    monkeypatch.setattr(here, lambda device: device != DEVICE)
    measured(monkeypatch, measure, refuses_float64=True)


def test_autoattack_needs_no_float64_on_the_device(monkeypatch):
    here = "robust_flatness.functional.evaluation.has_float64"
    monkeypatch.setattr(here, lambda device: device != DEVICE)
    attack = AutoAttackError(attacks=["square"], eps=0.01)
    attack.square_queries = 2
    measured(monkeypatch, attack, refuses_float64=True)
