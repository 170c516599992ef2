"""Early stopping on robust error."""

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from robust_flatness.callbacks.isolation import averaged_weights
from robust_flatness.callbacks.logs import warn_if_results_stay
from robust_flatness.callbacks.robust_evaluation import RobustEvaluation
from robust_flatness.functional.checks import check_count


class RobustEarlyStopping(RobustEvaluation):
    """Keeps the weights of lowest robust error on held-out images (Rice et al., 2020).

    Logs `val/error`, `val/robust_loss` and `val/robust_error`. The earliest epoch wins ties. By
    default training goes on and only the weights are kept, as in the paper, whose early stopping
    selects on the last 500 test images: figures of early-stopped weights are optimistic by that.
    A network with a weight or a loss that is not finite is never kept.
    `MeasuredCheckpoint(monitor="val/robust_error", mode="min")` keeps the same weights on disk;
    here they stay in memory and in the callback's state.

    Args:
        split: The images to select on.
        steps: Steps of the attack.
        patience: Stops training after so many measurements without a lower robust error; `None`
            never stops.
        kwargs: Further arguments of `Measurement`; the paper takes `restarts=5` and
            `every_n_epochs=5`.

    Attributes:
        best_epoch: Epoch of the kept weights, -1 as long as no measured network was finite.
        best_error: Robust error there, in [0, 1].
        best_weights: State dict of the module as it was measured there, on the CPU; may be empty.
        trajectory: Robust error by measured epoch.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> RobustEarlyStopping(patience=3).best_epoch
        -1
    """

    def __init__(
        self,
        *,
        split: str = "val",
        steps: int = 7,
        patience: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(split=split, steps=steps, **kwargs)
        if patience is not None:
            check_count("patience", patience, low=1)
        self.patience = patience
        self._forget()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begins a fit without the weights of an earlier one; a checkpoint's come afterwards."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._forget()
            warn_if_results_stay(trainer, self, "best_weights", "best_epoch", "trajectory")

    def _forget(self) -> None:
        self.best_epoch, self.best_error = -1, math.inf
        self.best_weights: dict[str, Tensor] = {}
        self.trajectory: dict[int, float] = {}
        self._since_best = 0

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures, keeps the weights if they are the best so far, and may end training."""
        super().on_train_epoch_end(trainer, pl_module)
        if self.patience is not None and self._since_best >= self.patience:
            # Figures are equal on all ranks, so all ranks decide alike.
            trainer.should_stop = True

    def take(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> dict[str, float]:
        """Measures the weights of an epoch and keeps them if they are the best so far."""
        with averaged_weights(trainer, pl_module):
            figures = super().take(trainer, pl_module, epoch)
            error = next(v for name, v in figures.items() if name.endswith("/robust_error"))
            self.trajectory[epoch] = error
            self._since_best += 1
            finite = all(map(math.isfinite, figures.values())) and is_finite(trainer, pl_module)
            if finite and error < self.best_error:
                self.best_epoch, self.best_error, self._since_best = epoch, error, 0
                self.best_weights = _on_cpu(pl_module)
        return figures

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: a test need not have the images to select on."""

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: there is nothing to select in a test."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of what `measure` returns."""
        return tuple(name for name in super().metric_names if "correct" not in name)

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Error, RLoss and RErr of the selection images."""
        figures = super().measure(trainer, pl_module)
        return {name: value for name, value in figures.items() if "correct" not in name}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to decide as the uninterrupted one would."""
        return {
            "best_epoch": self.best_epoch,
            "best_error": self.best_error,
            "best_weights": self.best_weights,
            "trajectory": self.trajectory,
            "since_best": self._since_best,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self.best_epoch = state_dict["best_epoch"]
        self.best_error = state_dict["best_error"]
        self.best_weights = state_dict["best_weights"]
        self.trajectory = dict(state_dict["trajectory"])
        self._since_best = state_dict["since_best"]


@torch.no_grad()
def _on_cpu(module: LightningModule) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}


def is_finite(trainer: Trainer, module: LightningModule) -> bool:
    """Whether all weights of a module are finite, on all ranks, and no buffer holds NaN.

    Args:
        trainer: The trainer.
        module: Its module.
    """
    # Masks and minima begin at infinity.
    finite = all(bool(weight.isfinite().all()) for weight in module.parameters())
    finite = finite and not any(bool(buffer.isnan().any()) for buffer in module.buffers())
    # Buffers of ranks differ, and ranks must decide alike.
    return bool(trainer.strategy.reduce_boolean_decision(finite))


def early_stopping_of(trainer: Trainer) -> RobustEarlyStopping | None:
    """The trainer's early stopping that has kept weights, if there is one."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, RobustEarlyStopping) and callback.best_weights:
            return callback
    return None
