"""Learning-rate schedules whose arguments are shares of training."""

import math
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LRScheduler

from robust_flatness.functional.checks import check_count, check_number


class MultiStep(LRScheduler):
    """Multiplies the learning rate by `gamma` at given shares of training.

    The paper drops by 0.1 after epochs 60, 90 and 120 of 150, that is at 40, 60 and 80 % (Sec. 3);
    with shares the same schedule serves any number of epochs. `AT` sets the number of epochs,
    `total`; until then, and without milestones, the rate is constant.

    Args:
        optimizer: The optimizer.
        milestones: Shares of training in [0, 1].
        gamma: Factor at each milestone.

    Raises:
        ValueError: If a milestone is outside [0, 1] or `gamma` is negative.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        >>> schedule = MultiStep(optimizer, milestones=[0.5])
        >>> schedule.total = 4
        >>> rates = []
        >>> for _ in range(4):
        ...     rates.append(optimizer.param_groups[0]["lr"])
        ...     optimizer.step()
        ...     schedule.step()
        >>> rates
        [1.0, 1.0, 0.1, 0.1]
    """

    total: int | None = None
    interval = "epoch"

    def __init__(
        self,
        optimizer: Optimizer,
        milestones: Sequence[float] = (0.4, 0.6, 0.8),
        gamma: float = 0.1,
    ) -> None:
        for milestone in milestones:
            check_number("milestones", milestone, high=1.0)
        check_number("gamma", gamma)
        self.milestones = list(milestones)
        self.gamma = gamma
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """Learning rates of the parameter groups at `last_epoch`."""
        passed = 0
        if self.total is not None:
            epochs = [epochs_of_share(share, self.total) for share in self.milestones]
            passed = sum(self.last_epoch >= epoch for epoch in epochs)
        return [float(rate) * self.gamma**passed for rate in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """The schedule's position, without `total`: a resumed run may be made longer."""
        return {key: value for key, value in super().state_dict().items() if key != "total"}


class Cyclic(CyclicLR):
    """Raises the learning rate from 0 and lowers it to 0 again, in cycles (Smith, 2017).

    The paper's cycles have 30 epochs each, 15 up and 15 down, with a step after each batch; here
    they divide training evenly, whatever its length. `AT` sets the number of steps, `total`; until
    then the rate is `base_lr`.

    Args:
        optimizer: The optimizer.
        cycles: Number of cycles; 2 in the paper's Table 1.
        base_lr: Rate at the ends of a cycle.
        max_lr: Rate in its middle.
        cycle_momentum: Whether momentum falls to `base_momentum` while the rate rises, as in the
            paper's code, by torch's default; its text does not say.
        base_momentum: Momentum in the middle of a cycle.
        max_momentum: Momentum at its ends.

    Raises:
        ValueError: If an argument is out of range, or the optimizer has no momentum to cycle.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0, momentum=0.9)
        >>> schedule = Cyclic(optimizer, cycles=1)
        >>> schedule.total, rates = 4, []
        >>> for _ in range(5):
        ...     rates.append(round(optimizer.param_groups[0]["lr"], 6))
        ...     optimizer.step()
        ...     schedule.step()
        >>> rates
        [0.0, 0.1, 0.2, 0.1, 0.0]
    """

    interval = "step"

    def __init__(
        self,
        optimizer: Optimizer,
        cycles: int = 2,
        base_lr: float = 0.0,
        max_lr: float = 0.2,
        cycle_momentum: bool = True,
        base_momentum: float = 0.8,
        max_momentum: float = 0.9,
    ) -> None:
        check_count("cycles", cycles, low=1)
        check_number("base_lr", base_lr)
        check_number("max_lr", max_lr, low=base_lr)
        check_number("max_momentum", max_momentum, high=1.0)
        check_number("base_momentum", base_momentum, high=max_momentum)
        if cycle_momentum and not all(g.get("momentum", True) for g in optimizer.param_groups):
            raise ValueError(
                "Expected an optimizer with momentum for `cycle_momentum` but got "
                f"{type(optimizer).__name__} with momentum 0."
            )
        self.cycles = cycles
        super().__init__(
            optimizer,
            base_lr,
            max_lr,
            step_size_up=1,
            cycle_momentum=cycle_momentum,
            base_momentum=base_momentum,
            max_momentum=max_momentum,
        )
        self.total: int | None = None

    @property
    def total(self) -> int | None:
        """Number of steps of the whole training."""
        return self._total

    @total.setter
    def total(self, steps: int | None) -> None:
        self._total = steps
        # Without a number of steps a cycle must not end: the rate would oscillate.
        size = float("inf") if steps is None else steps / self.cycles
        self.total_size = size  # type: ignore[assignment]

    def state_dict(self) -> dict[str, Any]:
        """The schedule's position, without its length: a resumed run may be made longer."""
        state: dict[str, Any] = super().state_dict()
        return {key: value for key, value in state.items() if key not in ("_total", "total_size")}


def epochs_of_share(share: float, epochs: int) -> int:
    """The whole epochs that a share of training takes.

    Example:
        >>> epochs_of_share(0.4, 60), epochs_of_share(0.966667, 150), epochs_of_share(0.05, 30)
        (24, 145, 2)
    """
    # 0.4 of 60 epochs must not be 25 by rounding, nor must a share that is written with six digits.
    return math.ceil(round(share * epochs, 3))


def prepare_schedule(schedule: Any, trainer: Trainer) -> None:
    """Sets the length of training, `total`, of a schedule whose arguments are shares of it.

    Args:
        schedule: One that counts epochs or steps, its `interval`; one without `total` is left
            alone.
        trainer: Its number of steps is known once it has loaders.

    Raises:
        ValueError: If training is endless.
    """
    if not hasattr(schedule, "total"):
        return
    epochs, by_step = trainer.max_epochs or -1, schedule.interval == "step"
    if epochs < 1 and not (by_step and trainer.max_steps > 0):
        raise ValueError(
            "Expected `trainer.max_epochs` to be >= 1, as the schedule goes by shares of training, "
            f"but got {trainer.max_epochs}."
        )
    if not by_step:
        schedule.total = epochs
        if isinstance(schedule, MultiStep):
            # The rate of a checkpoint is that of a run of another length.
            for group, rate in zip(schedule.optimizer.param_groups, schedule.get_lr()):
                group["lr"] = rate
    elif trainer.train_dataloader is not None:
        schedule.total = int(trainer.estimated_stepping_batches)
