"""Adversarial training with Entropy-SGD."""

from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch.optim import Optimizer

from robust_flatness.lightning_modules.at import AT
from robust_flatness.lightning_modules.entropy_sgd import EntropySGD


class ATEntropySGD(AT):
    """Adversarial training whose optimizer is `EntropySGD` (Chaudhari et al., 2017).

    Every batch is attacked once, at the weights of the walk. The walk's noise comes from the run's
    seed, the same on all ranks, and an epoch's last walk ends with the epoch, so that measures and
    checkpoints see outer weights.

    The paper's text takes the baseline's schedule, as this class does; in its code schedules do not
    reach the optimizer, and its curves look so. `--model.lr_scheduler.milestones []` is that, and
    the preset's choice.

    Args:
        optimizer: Builds an `EntropySGD`; `--model.optimizer.langevin_steps 2` sets L.
        kwargs: Arguments of `AT`.

    Raises:
        ValueError: If the optimizer is another; before training starts.

    Example:
        >>> ATEntropySGD(eps=0.1).pgd.eps
        0.1
    """

    def __init__(self, *, optimizer: OptimizerCallable = EntropySGD, **kwargs: Any) -> None:
        super().__init__(optimizer=optimizer, **kwargs)

    def configure_optimizers(self) -> Any:
        """Optimizer and schedule from the module's arguments.

        Raises:
            ValueError: If the optimizer is no `EntropySGD`.
        """
        configured = super().configure_optimizers()
        optimizer = configured["optimizer"]
        if not isinstance(optimizer, EntropySGD):
            raise ValueError(
                "Expected `optimizer` to build an EntropySGD for ATEntropySGD but got "
                f"{type(optimizer).__name__}."
            )
        return configured

    def on_train_start(self) -> None:
        """Gives the walk the run's seed."""
        super().on_train_start()
        self._entropy_sgd().seed = self._run_seed or 0

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """A step of the walk, and with the epoch's last batch the outer step."""
        walk = self._entropy_sgd()
        # Inside the step, so that what hangs on it, such as clipping, sees the outer weights.
        walk.cut_short = self.trainer.is_last_batch
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.trainer.is_last_batch:
            # A step that a gradient scaler skipped has not ended the walk.
            walk.finish()

    def on_train_end(self) -> None:
        """Ends a walk that training was stopped in the middle of."""
        self._entropy_sgd().finish()

    def on_train_epoch_end(self) -> None:
        """Logs the epoch, and the pull γ that it ended with."""
        super().on_train_epoch_end()
        self.log("entropy_sgd/pull", torch.tensor(self._entropy_sgd().pull))

    def _entropy_sgd(self) -> EntropySGD:
        optimizer: Optimizer = self.trainer.optimizers[0]
        assert isinstance(optimizer, EntropySGD)  # held in configure_optimizers
        return optimizer
