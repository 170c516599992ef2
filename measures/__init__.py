"""Properties of a network on fixed images, as plain objects; no Lightning.

Example:
    >>> import torch
    >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    >>> images, labels = torch.rand(4, 1, 8, 8), torch.arange(4)
    >>> AverageCaseFlatness(eps=0.1, steps=2)(network, images, labels).increases.shape
    torch.Size([10, 4])
"""

from robust_flatness.measures.adaptive_sharpness import AdaptiveSharpness
from robust_flatness.measures.attack_checks import AttackChecks
from robust_flatness.measures.autoattack import AutoAttackError
from robust_flatness.measures.average_case_flatness import AverageCaseFlatness
from robust_flatness.measures.base import AttackMeasure, Examples, Measure, Processes
from robust_flatness.measures.boundary_thickness import BoundaryThickness
from robust_flatness.measures.curvature import Curvature
from robust_flatness.measures.first_order_flatness import FirstOrderFlatness
from robust_flatness.measures.gradient_norm import GradientNorm
from robust_flatness.measures.hessian_trace import HessianTrace
from robust_flatness.measures.landscape import LossLandscape
from robust_flatness.measures.local_lipschitz import LocalLipschitz
from robust_flatness.measures.margins import Margins
from robust_flatness.measures.robust_loss import RobustLoss
from robust_flatness.measures.single_step import SingleStepRobustness
from robust_flatness.measures.worst_case_flatness import WorstCaseFlatness

__all__ = [
    "AdaptiveSharpness",
    "AttackChecks",
    "AttackMeasure",
    "AutoAttackError",
    "AverageCaseFlatness",
    "BoundaryThickness",
    "Curvature",
    "Examples",
    "FirstOrderFlatness",
    "GradientNorm",
    "HessianTrace",
    "LocalLipschitz",
    "LossLandscape",
    "Margins",
    "Measure",
    "Processes",
    "RobustLoss",
    "SingleStepRobustness",
    "WorstCaseFlatness",
]
