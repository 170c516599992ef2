"""The mathematics: pure functions on tensors and networks, without a Trainer."""

from robust_flatness.functional.attack import PGD, pgd_attack
from robust_flatness.functional.awp import adversarial_weight_perturbation
from robust_flatness.functional.directions import normalize_direction, weight_directions
from robust_flatness.functional.flatness import FlatnessResult, average_case_flatness
from robust_flatness.functional.friendly_attack import FriendlyPGD
from robust_flatness.functional.hessian import HessianResult, hessian_extreme_eigenvalues
from robust_flatness.functional.joint_ascent import Sharing
from robust_flatness.functional.labels import TrainingLabels
from robust_flatness.functional.landscape import LandscapeResult, loss_landscape
from robust_flatness.functional.mart import mart_loss, mart_objective
from robust_flatness.functional.robust_loss import (
    RobustnessResult,
    evaluate_robustness,
    robust_loss,
)
from robust_flatness.functional.surface import SurfaceResult, loss_surface
from robust_flatness.functional.trades import trades_loss, trades_objective
from robust_flatness.functional.weight_perturbation import (
    perturbed_weights,
    sample_weight_perturbation,
)
from robust_flatness.functional.worst_case_flatness import (
    WorstCaseFlatnessResult,
    worst_case_flatness,
)

__all__ = [
    "PGD",
    "FlatnessResult",
    "FriendlyPGD",
    "HessianResult",
    "LandscapeResult",
    "RobustnessResult",
    "Sharing",
    "SurfaceResult",
    "TrainingLabels",
    "WorstCaseFlatnessResult",
    "adversarial_weight_perturbation",
    "average_case_flatness",
    "evaluate_robustness",
    "hessian_extreme_eigenvalues",
    "loss_landscape",
    "loss_surface",
    "mart_loss",
    "mart_objective",
    "normalize_direction",
    "perturbed_weights",
    "pgd_attack",
    "robust_loss",
    "sample_weight_perturbation",
    "trades_loss",
    "trades_objective",
    "weight_directions",
    "worst_case_flatness",
]
