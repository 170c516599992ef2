"""When a run has started, and whether what it watches is logged."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from typing_extensions import override

from robust_flatness.loggers import EpochCSVLogger, EpochWandbLogger

# What modules of this package log themselves.
_OF_MODULES = ("train/", "awp/", "entropy_sgd/", "label_noise/", "unlabeled/")


class RunStart(SaveConfigCallback):
    """Writes to the run folder, and opens the W&B run, once a first batch has been trained on.

    Until then any argument, image or weight may still be refused, and nothing is left of a run that
    is. Loggers keep what they are sent meanwhile.

    Attributes:
        wandb_logger: Joins the trainer's loggers in `setup`, because Lightning opens those that it
            has before it sets anything up; `None` for none.
    """

    wandb_logger: EpochWandbLogger | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.wandb_logger is not None and self.wandb_logger not in trainer.loggers:
            trainer.loggers = [*trainer.loggers, self.wandb_logger]

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._start(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A finished run that is resumed has no further batch, and is measured once more.
        if trainer.num_training_batches == 0:
            raise ValueError("Expected training data of at least one batch but got none.")
        self._start(trainer, pl_module)

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.already_saved:
            return
        for logger in trainer.loggers:
            if isinstance(logger, (EpochCSVLogger, EpochWandbLogger)):
                logger.release()
        # Last, as the folder of a run that has started is known by its config.yaml.
        super().setup(trainer, pl_module, "fit")


def check_monitors(trainer: Trainer, module: LightningModule) -> None:
    """Refuses callbacks that watch a metric which nothing logs.

    Args:
        trainer: With its callbacks.
        module: What it trains. What a module or a callback of the user logs is not known.

    Raises:
        ValueError: If a metric is not known.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    known = {name for callback in callbacks for name in getattr(callback, "metric_names", ())}
    if not all(_is_known(type(part)) for part in (module, *callbacks)):
        return
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if monitor is not None and monitor not in known and not monitor.startswith(_OF_MODULES):
            raise ValueError(
                f"Expected `monitor` of {type(callback).__name__} to be one of the metrics "
                f"train/loss, {', '.join(sorted(known))} but got {monitor}."
            )


def _is_known(kind: type) -> bool:
    return kind.__module__.startswith(("robust_flatness.", "lightning.pytorch."))
