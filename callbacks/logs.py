"""Logging what is already equal on all ranks."""

import math
import warnings
from collections.abc import Mapping

from lightning.pytorch import LightningModule


def log_equal(pl_module: LightningModule, figures: Mapping[str, float]) -> None:
    """Logs figures that every rank knows; undefined ones (NaN) are left out.

    Args:
        pl_module: The module to log through, so that stock callbacks can monitor the figures.
        figures: Values by logged name.
    """
    with warnings.catch_warnings():
        # Lightning would have us average over ranks what is already the same on each.
        warnings.filterwarnings("ignore", message=".*sync_dist=True.*")
        for name, value in figures.items():
            if not math.isnan(value):
                pl_module.log(name, value)
