"""Means over an epoch's examples."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric


class EpochMeans(nn.Module):
    """Gathers values on the device and logs their means once an epoch.

    Each `log` call, and each update of a metric, costs time in every step and may wait for the
    device, so values are only added up there; NaN is kept, as it tells of a broken batch.

    Example:
        >>> import torch
        >>> means = EpochMeans()
        >>> means.add("train/loss", torch.tensor([1.0, 2.0]))
        >>> means["train/loss"].compute()
        tensor(1.5000)
    """

    def __init__(self) -> None:
        super().__init__()
        # By place, as modules cannot have all names that a figure can.
        self._metrics = nn.ModuleList()
        self._places: dict[str, int] = {}
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._paused = False

    def __getitem__(self, name: str) -> MeanMetric:
        """The mean of what was added since it was last logged, weighted by count over ranks."""
        metric = cast(MeanMetric, self._metrics[self._places[name]])
        if count := self._counts.pop(name, 0):
            total = self._sums.pop(name)
            metric.update(total / count, count)
        return metric

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Forgets what is added inside, where an objective is evaluated a second time."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def add(self, name: str, values: Tensor) -> None:
        """Adds one value for each example.

        Args:
            name: The name that the mean is logged under.
            values: Of any shape and type.
        """
        if self._paused or values.numel() == 0:
            return
        if name not in self._places:
            self._places[name] = len(self._metrics)
            # NaN stays NaN; the strategy `disable` would ignore weights (torchmetrics 1.9).
            self._metrics.append(MeanMetric(nan_strategy=math.nan).to(values.device))
        total = values.detach().sum(dtype=torch.float32)
        self._sums[name] = total + self._sums[name] if name in self._sums else total
        self._counts[name] = self._counts.get(name, 0) + values.numel()

    def log(self, module: LightningModule) -> None:
        """Logs what was gathered since the last time.

        Args:
            module: Whose `log` is called.
        """
        for name in self._places:
            if name in self._counts or self[name].update_called:
                module.log(name, self[name], prog_bar=name == "train/robust_loss")

    def reset(self) -> None:
        """Forgets what a training that failed has left."""
        self._sums, self._counts = {}, {}
        for metric in self._metrics:
            cast(MeanMetric, metric).reset()
