"""What is trained: one LightningModule for each variant of adversarial training."""

from robust_flatness.lightning_modules.at import AT
from robust_flatness.lightning_modules.at_awp import ATAWP
from robust_flatness.lightning_modules.loading import load_checkpoint
from robust_flatness.lightning_modules.schedules import MultiStep

__all__ = ["AT", "ATAWP", "MultiStep", "load_checkpoint"]
