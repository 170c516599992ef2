"""What is trained, one LightningModule for each variant of adversarial training, or measured."""

from robust_flatness.lightning_modules.at import AT, ATAWP
from robust_flatness.lightning_modules.at_entropy_sgd import ATEntropySGD
from robust_flatness.lightning_modules.at_self_supervision import ATSelfSupervision
from robust_flatness.lightning_modules.at_unlabeled import ATUnlabeled
from robust_flatness.lightning_modules.checkpoints import load_checkpoint
from robust_flatness.lightning_modules.entropy_sgd import EntropySGD
from robust_flatness.lightning_modules.external import External
from robust_flatness.lightning_modules.mart import MART, MARTAWP
from robust_flatness.lightning_modules.schedules import Cyclic, MultiStep
from robust_flatness.lightning_modules.trades import TRADES, TRADESAWP

__all__ = [
    "AT",
    "ATAWP",
    "MART",
    "MARTAWP",
    "TRADES",
    "TRADESAWP",
    "ATEntropySGD",
    "ATSelfSupervision",
    "ATUnlabeled",
    "Cyclic",
    "EntropySGD",
    "External",
    "MultiStep",
    "load_checkpoint",
]
