"""Logging figures of the epochs, and of the end."""

from collections.abc import Mapping

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_warn


def log_equal(pl_module: LightningModule, figures: Mapping[str, float]) -> None:
    """Logs figures that every rank knows, also those that are not finite.

    Args:
        pl_module: The module to log through, so that stock callbacks can monitor the figures.
        figures: Values by logged name.
    """
    for name, value in figures.items():
        # The largest of equal values is exact on any number of ranks, as their mean is not.
        pl_module.log(name, value, sync_dist=True, reduce_fx="max")


def log_after_epochs(trainer: Trainer, figures: Mapping[str, float], epoch: int) -> None:
    """Logs figures of the last epoch when training has ended, where a module can no longer log.

    Args:
        trainer: The trainer, whose `callback_metrics` have the figures afterwards.
        figures: Values by logged name, the same on every rank.
        epoch: The epoch that they belong to.
    """
    trainer.callback_metrics.update({name: torch.tensor(v) for name, v in figures.items()})
    for logger in trainer.loggers if trainer.is_global_zero else []:
        logger.log_metrics({**figures, "epoch": epoch}, step=trainer.global_step)
        logger.save()


def warn_if_results_stay(trainer: Trainer, callback: Callback, *attributes: str) -> None:
    """Warns if what a callback finds stays in the processes that are spawned to find it.

    Args:
        trainer: The trainer. Lightning brings weights and logged metrics back from `ddp_spawn` and
            its like, but not its callbacks.
        callback: The callback.
        attributes: What it finds.
    """
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        name = type(callback).__name__
        rank_zero_warn(
            f"{', '.join(attributes)} of {name} will be empty after training, as this strategy "
            "measures in other processes: use `ddp`, or `trainer.callback_metrics`."
        )


def log_final(trainer: Trainer, figures: Mapping[str, float]) -> None:
    """Hands the loggers figures that belong to the run, not to an epoch.

    Args:
        trainer: The trainer.
        figures: Values by logged name.
    """
    for logger in trainer.loggers if trainer.is_global_zero else []:
        if isinstance(logger, WandbLogger):
            # In the history they would be charts of one point each.
            logger.experiment.summary.update(dict(figures))
        else:
            logger.log_metrics(dict(figures), step=trainer.global_step)
            logger.save()
