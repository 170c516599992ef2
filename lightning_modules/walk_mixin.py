"""What a module does for an optimizer that walks between its steps."""

from typing import Any, cast

from lightning.pytorch import LightningModule

from robust_flatness.lightning_modules.entropy_sgd import EntropySGD


class WalkMixin(LightningModule):
    """Ends `EntropySGD`'s walk with the epoch and with training; nothing for other optimizers.

    So measures, averages and checkpoints at the end of an epoch have outer weights. The last walk
    of an epoch may be shorter than the others.
    """

    _run_seed: int | None

    def on_train_start(self) -> None:
        """Gives the walk the run's seed, which is the same on all ranks."""
        super().on_train_start()
        if (walk := self.walk) is not None:
            walk.seed = self._run_seed or 0

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """A step of the optimizer, which ends the walk where no other follows."""
        walk, last = self.walk, self._is_last_step()
        if walk is not None:
            walk.cut_short = last
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if walk is not None and last:
            # A step that a gradient scaler skipped has not ended the walk.
            walk.finish()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Ends the walk where a callback, say a timer, stops training in the middle of an epoch."""
        if self.trainer.should_stop and self.walk is not None:
            self.walk.finish()

    @property
    def walk(self) -> EntropySGD | None:
        """The trainer's optimizer, if it is an `EntropySGD`."""
        optimizers = self.trainer.optimizers
        found = bool(optimizers) and isinstance(optimizers[0], EntropySGD)
        return cast(EntropySGD, optimizers[0]) if found else None

    def _is_last_step(self) -> bool:
        return self.trainer.is_last_batch or self.trainer.global_step + 1 == self.trainer.max_steps
