"""Checkpoints by a figure that is not measured in each epoch."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from typing_extensions import override

from robust_flatness.callbacks.isolation import averaged_weights
from robust_flatness.callbacks.measurement import Measurement
from robust_flatness.callbacks.robust_early_stopping import is_finite


class MeasuredCheckpoint(ModelCheckpoint):
    """A `ModelCheckpoint` that judges only weights that were measured, and keeps only finite ones.

    `trainer.callback_metrics` keeps a figure's last value, so that a stock `ModelCheckpoint` takes
    the score of another epoch for the weights of one that was not measured. This one saves by
    `monitor` only in epochs in which the callback that logs it has measured, with any `save_top_k`;
    it skips networks with a weight, or a figure of that callback, that is not finite. If the last
    epoch is measured only when training has ended, it is considered too, and a checkpoint without
    `monitor` is written again, so that it holds what was measured.

    Args are those of Lightning's `ModelCheckpoint`.

    Example:
        >>> checkpoint = MeasuredCheckpoint(monitor="val/robust_error", save_top_k=3)
        >>> checkpoint.state_key.startswith("ModelCheckpoint{'monitor': 'val/robust_error'")
        True
    """

    _ended_epoch: int | None = None

    @override
    def _generate_state_key(self, **kwargs: Any) -> str:
        # Checkpoints of the stock class go on with this one.
        return f"{ModelCheckpoint.__qualname__}{kwargs!r}"

    @override
    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        if current is None or not bool(torch.isfinite(torch.as_tensor(current))):
            return False
        measured = [
            callback
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, Measurement) and self.monitor in callback.figures
        ]
        # A figure that somebody else logs is judged as Lightning does.
        if measured and all(c.measured_step != trainer.global_step for c in measured):
            return False
        if not all(torch.tensor(list(c.figures.values())).isfinite().all() for c in measured):
            return False
        module = trainer.lightning_module
        with averaged_weights(trainer, module):
            return is_finite(trainer, module) and super().check_monitor_top_k(trainer, current)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        late = [
            callback
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, Measurement) and callback.measured_late
        ]
        if not late or trainer.fast_dev_run or not self.save_top_k:  # type: ignore[attr-defined]
            return
        if self.monitor is None or any(self.monitor in callback.figures for callback in late):
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
