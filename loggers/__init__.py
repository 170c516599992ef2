"""Where the figures of a run go: a table in the run folder, and Weights & Biases."""

from robust_flatness.loggers.epoch_csv import EpochCSVLogger
from robust_flatness.loggers.wandb import (
    EpochWandbLogger,
    log_summary,
    log_trajectory,
    make_wandb_logger,
)

__all__ = [
    "EpochCSVLogger",
    "EpochWandbLogger",
    "log_summary",
    "log_trajectory",
    "make_wandb_logger",
]
