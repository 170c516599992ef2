"""The weights of lowest robust error, in memory and on disk."""

import math
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from robust_flatness.callbacks.epoch_measures import EpochMeasure, RobustEvaluation, epoch_measures
from robust_flatness.callbacks.measuring import (
    average_begun,
    averaged_weights,
    fingerprint,
    is_finite,
    warn_if_results_stay,
)
from robust_flatness.functional.checks import check_count
from robust_flatness.measures.base import Split


class RobustEarlyStopping(RobustEvaluation):
    """Keeps the weights of lowest robust error on held-out images (Rice et al., 2020).

    It selects weights and does not stop training unless `patience` is set. Logs `val/error`,
    `val/robust_loss` and `val/robust_error`. Of equal errors, the earliest epoch is kept. As in the
    paper, datamodules of this package take `val` from the test set by default (the last 500 test
    images), so metrics of early-stopped weights are optimistic; `val_from="train"` avoids it. A
    network with a weight or a loss that is not finite is never kept.
    `MeasuredCheckpoint(monitor="val/robust_error", mode="min")` keeps the same weights on disk;
    here they are in memory and in the callback's state.

    Args:
        split: The images to select on.
        steps: Number of steps of the attack.
        patience: Stops training after this number of measurements without a lower robust error;
            None never stops it.
        **kwargs: Arguments of `RobustEvaluation`; the paper uses `restarts=5` and
            `every_n_epochs=5`.

    Attributes:
        best_epoch: Epoch of the kept weights, counted from 0; -1 until a measured network was
            finite.
        best_error: Robust error there, in [0, 1].
        best_weights: State dict of the module as it was measured there, on the CPU; may be empty.
        trajectory: Robust error by measured epoch.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> RobustEarlyStopping(patience=3).best_epoch
        -1
    """

    # A test need not have the images to select on.
    measures_in_test: ClassVar[bool] = False

    def __init__(
        self,
        *,
        split: Split = "val",
        steps: int = 7,
        patience: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(split=split, steps=steps, **kwargs)
        if patience is not None:
            check_count("patience", patience, low=1)
        self.patience = patience
        self._forget()

    def _forget(self) -> None:
        self.best_epoch, self.best_error = -1, math.inf
        self.best_weights: dict[str, Tensor] = {}
        self.trajectory: dict[int, float] = {}
        self._since_best = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._forget()
            warn_if_results_stay(trainer, self, "best_weights", "best_epoch", "trajectory")

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if self.patience is not None and self._since_best >= self.patience:
            # Metrics are equal on all processes, so all decide alike.
            trainer.should_stop = True

    @override
    @torch.no_grad()
    def on_measured(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> None:
        error = next(v for name, v in self.metrics.items() if name.endswith("/robust_error"))
        self.trajectory[epoch] = error
        self._since_best += 1
        finite = all(map(math.isfinite, self.metrics.values())) and is_finite(trainer, pl_module)
        if finite and error < self.best_error:
            self.best_epoch, self.best_error, self._since_best = epoch, error, 0
            state = pl_module.state_dict()
            self.best_weights = {name: v.detach().cpu().clone() for name, v in state.items()}

    @property
    @override
    def metric_names(self) -> tuple[str, ...]:
        return tuple(name for name in super().metric_names if "correct" not in name)

    @override
    def compute(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        metrics = super().compute(trainer, pl_module)
        return {name: value for name, value in metrics.items() if "correct" not in name}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "best_epoch": self.best_epoch,
            "best_error": self.best_error,
            "best_weights": self.best_weights,
            "trajectory": self.trajectory,
            "since_best": self._since_best,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_epoch, self.best_error = state_dict["best_epoch"], state_dict["best_error"]
        self.best_weights = state_dict["best_weights"]
        self.trajectory = dict(state_dict["trajectory"])
        self._since_best = state_dict["since_best"]


def early_stopping_of(trainer: Trainer) -> RobustEarlyStopping | None:
    """Returns the trainer's early stopping that has kept weights, or None."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, RobustEarlyStopping) and callback.best_weights:
            return callback
    return None


class MeasuredCheckpoint(ModelCheckpoint):
    """A `ModelCheckpoint` that judges only weights that were measured, and keeps only finite ones.

    `trainer.callback_metrics` keeps a metric's last value, so that a stock `ModelCheckpoint` takes
    the score of another epoch for the weights of one that was not measured. This one saves by
    `monitor` only in epochs in which the callback that logs it has measured, with any `save_top_k`,
    and at the end of the epoch, whenever validation runs, unless `save_on_train_epoch_end` is set;
    it skips networks with a weight, or a metric of that callback, that is not finite, weights that
    changed after they were measured, with a warning, and epochs before the first update of averaged
    weights, which Lightning would save. If the last epoch is measured only when training has ended,
    it is considered too, and a checkpoint without `monitor` is written again, so that it holds what
    was measured.

    Args are those of Lightning's `ModelCheckpoint`.

    Example:
        >>> checkpoint = MeasuredCheckpoint(monitor="val/robust_error", save_top_k=3)
        >>> checkpoint.state_key.startswith("ModelCheckpoint{'monitor': 'val/robust_error'")
        True
    """

    _ended_epoch: int | None = None

    @override
    def _generate_state_key(self, **kwargs: Any) -> str:
        # Checkpoints of the stock class continue with this one.
        return f"{ModelCheckpoint.__qualname__}{kwargs!r}"

    def _logging(self, trainer: Trainer) -> list[EpochMeasure]:
        """The callbacks that log what is monitored, as far as they are of this package."""
        callbacks = epoch_measures(trainer)
        return [c for c in callbacks if self.monitor in {*c.metric_names, *c.metrics}]

    @override
    def _should_save_on_train_epoch_end(self, trainer: Trainer) -> bool:
        # Validation, after which Lightning would save, may end before anything is measured.
        if self._save_on_train_epoch_end is None and self._logging(trainer):
            return True
        return super()._should_save_on_train_epoch_end(trainer)

    @override
    def _save_topk_checkpoint(
        self, trainer: Trainer, monitor_candidates: dict[str, Tensor]
    ) -> None:
        # A run that goes on may have measured nothing yet, which Lightning takes for an error.
        if self.monitor in monitor_candidates or not self._logging(trainer):
            super()._save_topk_checkpoint(trainer, monitor_candidates)

    @override
    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        if current is None or not bool(torch.isfinite(torch.as_tensor(current))):
            return False
        # A metric that somebody else logs is judged as Lightning does.
        logging = self._logging(trainer)
        measured = [c for c in logging if c.measured_step == trainer.global_step]
        if logging and not any(self.monitor in c.metrics for c in measured):
            return False
        # What was measured is trained, and the checkpoint would hold an average that is not.
        if logging and not average_begun(trainer):
            return False
        if not all(math.isfinite(value) for c in logging for value in c.metrics.values()):
            return False
        module = trainer.lightning_module
        with averaged_weights(trainer, module):
            # Buffers of the processes differ, and processes must decide alike.
            same = all(c.measured_weights in (None, fingerprint(module)) for c in measured)
            if not trainer.strategy.reduce_boolean_decision(same):
                rank_zero_warn(
                    f"MeasuredCheckpoint does not save weights that changed after "
                    f"{', '.join(c.state_key for c in measured)} had measured them, such as in "
                    f"`on_train_epoch_end` of {type(module).__name__}; change them in a batch."
                )
                return False
            return is_finite(trainer, module) and super().check_monitor_top_k(trainer, current)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        late = [c for c in epoch_measures(trainer) if c.measured_late]
        if not late or trainer.fast_dev_run or not self.save_top_k:  # type: ignore[attr-defined]
            return
        if self.monitor is None or any(self.monitor in callback.metrics for callback in late):
            self._ended_epoch = trainer.current_epoch - 1
            candidates = self._monitor_candidates(trainer)
            candidates["epoch"] = torch.tensor(self._ended_epoch)
            self._save_topk_checkpoint(trainer, candidates)
            self._ended_epoch = None

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._ended_epoch is not None:
            # As in checkpoints that are written in the epoch, which has ended by now.
            checkpoint["epoch"] = self._ended_epoch
