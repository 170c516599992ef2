"""The mathematics: pure functions on tensors and networks, without a Trainer."""

from robust_flatness.functional.attack import PGD, pgd_attack
from robust_flatness.functional.awp import adversarial_weight_perturbation
from robust_flatness.functional.flatness import FlatnessResult, average_case_flatness
from robust_flatness.functional.friendly_attack import FriendlyPGD
from robust_flatness.functional.labels import TrainingLabels
from robust_flatness.functional.mart import mart_loss, mart_objective
from robust_flatness.functional.robust_loss import (
    RobustnessResult,
    evaluate_robustness,
    robust_loss,
)
from robust_flatness.functional.trades import trades_loss, trades_objective
from robust_flatness.functional.weight_perturbation import (
    perturbed_weights,
    sample_weight_perturbation,
)

__all__ = [
    "PGD",
    "FlatnessResult",
    "FriendlyPGD",
    "RobustnessResult",
    "TrainingLabels",
    "adversarial_weight_perturbation",
    "average_case_flatness",
    "evaluate_robustness",
    "mart_loss",
    "mart_objective",
    "perturbed_weights",
    "pgd_attack",
    "robust_loss",
    "sample_weight_perturbation",
    "trades_loss",
    "trades_objective",
]
