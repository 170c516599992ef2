"""Adversarial training with Entropy-SGD."""

from typing import Any

from lightning.pytorch.cli import OptimizerCallable

from robust_flatness.lightning_modules.at import AT
from robust_flatness.lightning_modules.entropy_sgd import EntropySGD


class ATEntropySGD(AT):
    """Adversarial training whose optimizer is `EntropySGD` (Chaudhari et al., 2017).

    Every batch is attacked once, at the weights of the walk. `EntropySGD` can be the optimizer of
    every other variant as well; for this one it is the default.

    The paper's text takes the baseline's schedule, as this class does; in its code schedules do not
    reach the optimizer, and its curves look so. `--model.lr_scheduler.milestones []` is that, and
    the preset's choice.

    Args:
        optimizer: Builds an `EntropySGD`; `--model.optimizer.langevin_steps 2` sets L.
        args, kwargs: Arguments of `AT`.

    Raises:
        ValueError: If the optimizer is another; before training starts.

    Example:
        >>> ATEntropySGD(eps=0.1).pgd.eps
        0.1
    """

    def __init__(
        self, *args: Any, optimizer: OptimizerCallable = EntropySGD, **kwargs: Any
    ) -> None:
        super().__init__(*args, optimizer=optimizer, **kwargs)

    def configure_optimizers(self) -> Any:
        """Optimizer and schedule from the module's arguments."""
        configured = super().configure_optimizers()
        optimizer = configured["optimizer"]
        if not isinstance(optimizer, EntropySGD):
            raise ValueError(
                "Expected `optimizer` to build an EntropySGD for ATEntropySGD but got "
                f"{type(optimizer).__name__}."
            )
        return configured

    def on_train_epoch_end(self) -> None:
        """Logs the means of the epoch, and the pull γ that it ended with."""
        super().on_train_epoch_end()
        optimizer = self.optimizers(use_pl_optimizer=False)
        if isinstance(optimizer, EntropySGD):
            self.log("entropy_sgd/pull", optimizer.pull)
