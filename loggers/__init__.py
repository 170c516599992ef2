"""Loggers: the table of epochs in the run folder, Weights & Biases, figures in other loggers."""

from robust_flatness.loggers.epoch_csv import EpochCSVLogger
from robust_flatness.loggers.figures import log_figures
from robust_flatness.loggers.wandb import (
    EpochWandbLogger,
    log_summary,
    log_trajectory,
    make_wandb_logger,
    warn_on_failure,
)

__all__ = [
    "EpochCSVLogger",
    "EpochWandbLogger",
    "log_figures",
    "log_summary",
    "log_trajectory",
    "make_wandb_logger",
    "warn_on_failure",
]
