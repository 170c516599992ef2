"""The mathematics: pure functions on tensors and networks, without a Trainer."""

from robust_flatness.functional.attack import PGD, pgd_attack
from robust_flatness.functional.awp import adversarial_weight_perturbation
from robust_flatness.functional.flatness import FlatnessResult, average_case_flatness
from robust_flatness.functional.robust_loss import (
    RobustnessResult,
    evaluate_robustness,
    robust_loss,
)
from robust_flatness.functional.weight_perturbation import (
    perturbed_weights,
    sample_weight_perturbation,
)

__all__ = [
    "PGD",
    "FlatnessResult",
    "RobustnessResult",
    "adversarial_weight_perturbation",
    "average_case_flatness",
    "evaluate_robustness",
    "perturbed_weights",
    "pgd_attack",
    "robust_loss",
    "sample_weight_perturbation",
]
