"""AutoAttack at the end of a run."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from robust_flatness.callbacks.final_evaluation import FinalMeasure
from robust_flatness.callbacks.measuring import HoldsMeasure
from robust_flatness.loggers.epoch_csv import EpochCSVLogger
from robust_flatness.measures import AutoAttackError

# In the run folder, until the run has ended.
FOLDER = "autoattack"


class _HoldsAutoAttack(HoldsMeasure):
    measure: AutoAttackError

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(AutoAttackError(**kwargs))


class AutoAttack(FinalMeasure, _HoldsAutoAttack):
    """Logs AutoAttack's robust error (Croce & Hein, 2020) of last and early-stopped weights.

    Runs at the end of `fit` and in `test`. Logs `test/autoattack_error` and
    `test/autoattack_error_early_stopped`, see `measures.AutoAttackError`. In a run folder, which an
    `EpochCSVLogger` names, verdicts of finished chunks are kept until the run has ended: a run that
    was killed in between reads them from there.

    Args:
        **kwargs: Arguments of `FixedImages` and of `measures.AutoAttackError`.

    Raises:
        ValueError: If an argument is out of range; before training, if an attack does not work
            with the number of classes or the size of the images.

    Example:
        >>> AutoAttack(num_examples=64).state_key
        'AutoAttack[test]'
    """

    def logged_name(self, name: str, weights: str) -> str:
        """`test/autoattack_error` and `test/autoattack_error_early_stopped`."""
        return name if weights == "final" else f"{name}_early_stopped"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Receives the run folder from rank 0."""
        super().setup(trainer, pl_module, stage)
        tables = [logger for logger in trainer.loggers if isinstance(logger, EpochCSVLogger)]
        folder = trainer.strategy.broadcast(tables[0].log_dir if tables else None)
        self.measure.folder = None if folder is None else Path(folder) / FOLDER

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Removes the verdicts when all callbacks have ended: results have been written."""
        if trainer.is_global_zero:
            self.measure.remove_verdicts()
