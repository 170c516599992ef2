"""Callbacks that measure a network while it trains, in any Lightning project."""

from robust_flatness.callbacks.adversarial_training import (
    AdversarialTraining,
    AdversarialWeightPerturbation,
)
from robust_flatness.callbacks.catastrophic_overfitting import CatastrophicOverfitting
from robust_flatness.callbacks.epoch_measures import (
    Curvature,
    EpochMeasure,
    Flatness,
    RobustEvaluation,
    WorstCaseFlatness,
)
from robust_flatness.callbacks.final_evaluation import (
    AutoAttack,
    FinalEvaluation,
    FinalMeasure,
    evaluate,
)
from robust_flatness.callbacks.landscape import Landscape
from robust_flatness.callbacks.line_progress_bar import LineProgressBar
from robust_flatness.callbacks.results import Results
from robust_flatness.callbacks.robust_early_stopping import (
    MeasuredCheckpoint,
    RobustEarlyStopping,
)
from robust_flatness.callbacks.trajectory import Trajectory
from robust_flatness.callbacks.weight_averaging import WeightAveraging
from robust_flatness.callbacks.weight_clipping import WeightClipping

__all__ = [
    "AdversarialTraining",
    "AdversarialWeightPerturbation",
    "AutoAttack",
    "CatastrophicOverfitting",
    "Curvature",
    "EpochMeasure",
    "FinalEvaluation",
    "FinalMeasure",
    "Flatness",
    "Landscape",
    "LineProgressBar",
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
