"""The triangular learning rate of the paper's cyclic rows."""

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR

from robust_flatness.functional.checks import check_count, check_number


class Cyclic(CyclicLR):
    """Raises the learning rate from 0 and lowers it to 0 again, in cycles (Smith, 2017).

    The paper's cycles have 30 epochs each, 15 up and 15 down, with a step after each batch; here
    they share training evenly, whatever its length. `AT` tells it the number of steps through
    `total`; until then the rate stays at `base_lr`.

    Args:
        optimizer: The optimizer.
        cycles: Number of cycles; 2 in the paper's Table 1.
        base_lr: Rate at the ends of a cycle.
        max_lr: Rate in its middle.
        cycle_momentum: Whether momentum falls to `base_momentum` while the rate rises. So it does
            in the paper's code, by torch's default; its text does not say.
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
        # Before training is known to end, a cycle must not: the rate would oscillate.
        size = float("inf") if steps is None else steps / self.cycles
        self.total_size = size  # type: ignore[assignment]

    def state_dict(self) -> dict[str, Any]:
        """The schedule's position, without its length: a resumed run may be made longer."""
        state: dict[str, Any] = super().state_dict()
        return {key: value for key, value in state.items() if key not in ("_total", "total_size")}
