"""The mathematics: pure functions on tensors and networks, without a Trainer."""

from robust_flatness.functional.attack import PGD, FriendlyPGD, pgd_attack
from robust_flatness.functional.awp import AWP
from robust_flatness.functional.batch_noise import BatchNoise
from robust_flatness.functional.flatness import FlatnessResult, average_case_flatness
from robust_flatness.functional.gradient_norm import (
    FirstOrderFlatnessResult,
    GradientNormResult,
    first_order_flatness,
    gradient_norm,
)
from robust_flatness.functional.hessian import (
    HessianResult,
    HessianTraceResult,
    hessian_extreme_eigenvalues,
    hessian_trace,
)
from robust_flatness.functional.landscape import (
    LandscapeResult,
    SurfaceResult,
    loss_landscape,
    loss_surface,
    normalize_direction,
    weight_directions,
)
from robust_flatness.functional.layer_weights import perturbed_weights
from robust_flatness.functional.objectives import (
    TrainingLabels,
    mart_loss,
    mart_objective,
    trades_loss,
    trades_objective,
)
from robust_flatness.functional.robust_loss import (
    RobustnessResult,
    evaluate_robustness,
    robust_loss,
)
from robust_flatness.functional.sharpness import SharpnessResult, adaptive_sharpness
from robust_flatness.functional.weight_perturbation import (
    adversarial_weight_perturbation,
    sample_weight_perturbation,
)
from robust_flatness.functional.worst_case_flatness import (
    Sharing,
    WorstCaseFlatnessResult,
    worst_case_flatness,
)

__all__ = [
    "AWP",
    "PGD",
    "BatchNoise",
    "FirstOrderFlatnessResult",
    "FlatnessResult",
    "FriendlyPGD",
    "GradientNormResult",
    "HessianResult",
    "HessianTraceResult",
    "LandscapeResult",
    "RobustnessResult",
    "Sharing",
    "SharpnessResult",
    "SurfaceResult",
    "TrainingLabels",
    "WorstCaseFlatnessResult",
    "adaptive_sharpness",
    "adversarial_weight_perturbation",
    "average_case_flatness",
    "evaluate_robustness",
    "first_order_flatness",
    "gradient_norm",
    "hessian_extreme_eigenvalues",
    "hessian_trace",
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
