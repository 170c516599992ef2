"""What is watched while a network trains; for any Lightning project."""

from robust_flatness.callbacks.autoattack import AutoAttack
from robust_flatness.callbacks.curvature import Curvature
from robust_flatness.callbacks.evaluate import evaluate
from robust_flatness.callbacks.final_evaluation import FinalEvaluation
from robust_flatness.callbacks.flatness import Flatness
from robust_flatness.callbacks.landscape import Landscape
from robust_flatness.callbacks.measured_checkpoint import MeasuredCheckpoint
from robust_flatness.callbacks.results import Results
from robust_flatness.callbacks.robust_early_stopping import RobustEarlyStopping
from robust_flatness.callbacks.robust_evaluation import RobustEvaluation
from robust_flatness.callbacks.trajectory import Trajectory
from robust_flatness.callbacks.weight_averaging import WeightAveraging
from robust_flatness.callbacks.weight_clipping import WeightClipping
from robust_flatness.callbacks.worst_case_flatness import WorstCaseFlatness

__all__ = [
    "AutoAttack",
    "Curvature",
    "FinalEvaluation",
    "Flatness",
    "Landscape",
    "MeasuredCheckpoint",
    "Results",
    "RobustEarlyStopping",
    "RobustEvaluation",
    "Trajectory",
    "WeightAveraging",
    "WeightClipping",
    "WorstCaseFlatness",
    "evaluate",
]
