"""If memory runs out a measure goes on with smaller batches, to the same values."""

import dataclasses
import warnings

import pytest
import torch
from networks_for_tests import images_and_labels, tiny_network
from torch import nn

from robust_flatness.functional import evaluate_robustness
from robust_flatness.functional.memory import is_out_of_memory
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

LIGHT = {"steps": 2, "batch_size": 5, "eps": 0.1}
MEASURES = [
    RobustLoss(restarts=2, **LIGHT),
    AverageCaseFlatness(num_perturbations=2, per_batch=True, **LIGHT),
    WorstCaseFlatness(restarts=1, xi=0.05, **LIGHT),
    AdaptiveSharpness(num_perturbations=2, **LIGHT),
    AdaptiveSharpness(case="worst", weight_steps=2, normalize_logits=True, **LIGHT),
    LossLandscape(directions=["adversarial"], num_directions=1, num_steps=2, **LIGHT),
    Curvature(batch_size=5),
    HessianTrace(num_probes=2, **LIGHT),
    GradientNorm(**LIGHT),
    FirstOrderFlatness(weight_steps=1, **LIGHT),
    Margins(**LIGHT),
    LocalLipschitz(search_steps=2, **LIGHT),
    BoundaryThickness(batch_size=5, num_points=4, steps=2),
    SingleStepRobustness(**LIGHT),
    AttackChecks(square_queries=5, more_steps=3, **LIGHT),
    AutoAttackError(attacks=["apgd-ce"], chunk_size=5, eps=0.01),
]


class Small(nn.Module):
    """A network on a device that has memory for so many images."""

    def __init__(self, fits, error=None):
        super().__init__()
        self.network, self.fits = tiny_network().double().eval(), fits
        self.error = error or torch.OutOfMemoryError("CUDA out of memory.")
        self.counts = []

    def forward(self, images):
        if len(images) > self.fits:
            raise self.error
        self.counts.append(len(images))
        return self.network(images)


def tensors(result):
    if isinstance(result, dict):
        return {f"{k} {n}": t for k, part in result.items() for n, t in tensors(part).items()}
    fields = dataclasses.asdict(result)
    return {
        n: torch.as_tensor(v) for n, v in fields.items() if isinstance(v, (torch.Tensor, float))
    }


@pytest.mark.parametrize("measure", MEASURES, ids=lambda m: type(m).__name__)
def test_values_are_those_with_enough_memory_and_one_warning_names_the_batch(measure):
    images, labels = images_and_labels(7)
    images = images.double()
    if isinstance(measure, AutoAttackError):
        images = images[:3]
        labels = tiny_network().double().eval()(images).argmax(1)
    expected = tensors(measure(Small(100), images, labels))
    network = Small(2)
    with pytest.warns(UserWarning, match="memory") as caught:
        values = tensors(measure(network, images, labels))
    warned = [str(w.message) for w in caught if "ran out of memory" in str(w.message)]
    assert len(warned) == 1
    assert warned[0].startswith(f"{type(measure).__name__} ran out of memory and goes on with bat")
    assert "batches of 2;" in warned[0]
    assert max(network.counts) == 2
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(values[name], value, rtol=1e-6, atol=1e-9, equal_nan=True)


def test_a_single_image_that_does_not_fit_raises_the_original_error():
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with pytest.raises(torch.OutOfMemoryError) as raised:
        evaluate_robustness(Small(0, error), *images_and_labels(5), eps=0.1, steps=1)
    assert raised.value is error


def test_other_errors_are_raised_at_once():
    network = Small(2, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="shapes"):
        warnings.simplefilter("error")
        RobustLoss(**LIGHT)(network, *images_and_labels(5))
    assert network.counts == []


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("CUDA out of memory.", True),
        ("CUDA error: out of memory", True),
        ("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("MPS backend out of memory (MPS allocated: 18 GB", True),
        ("CUDA error: device-side assert triggered", False),
    ],
)
def test_errors_that_mean_too_little_memory(message, expected):
    assert is_out_of_memory(RuntimeError(message)) == expected
