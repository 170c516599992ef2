"""What makes training fast on a GPU without changing what is trained."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from robust_flatness.functional.arithmetic import bfloat16_forwards, has_bfloat16
from robust_flatness.functional.graphed_attack import GraphedAttack
from robust_flatness.functional.iterate import Criterion
from robust_flatness.functional.modes import Model
from robust_flatness.lightning_modules.pgd_mixin import PGDMixin

Fast = bool | Literal["graph"]


class FastMixin(PGDMixin, LightningModule):
    """Trains in bfloat16 where the device has it, with the optimizer's steps in one kernel.

    Weights, perturbations of images and weights, losses and gradients' sums stay float32; only
    convolutions and matrix products are in bfloat16. It stands back on other devices, and where the
    trainer was given a precision of its own.

    Attributes:
        fast: Whether to; `graph` also replays the attack as a CUDA graph, see `GraphedAttack`.
            Measures read it too: their attacks search in bfloat16, and the losses that they report
            are float32, without TF32.
    """

    fast: Fast
    _graphed: GraphedAttack | None = None

    @property
    def is_fast(self) -> bool:
        """Whether this training is: it was asked for, the device can, and nobody else decided."""
        return bool(self.fast) and self.trainer.precision == "32-true" and has_bfloat16(self.device)

    @contextmanager
    def arithmetic(self) -> Iterator[None]:
        """The arithmetic of a training step's forwards."""
        if self.is_fast:
            with bfloat16_forwards(self.device):
                yield
        else:
            yield

    def search(
        self, model: Model, images: Tensor, labels: Tensor, start: Tensor, criterion: Criterion
    ) -> Tensor:
        """Runs the attack, or replays it where it is on the module itself."""
        if model is not self or not self._replays:
            return super().search(model, images, labels, start, criterion)
        if self._graphed is None:
            self._graphed = GraphedAttack(self.pgd)
        return self._graphed(self, images, labels, start, criterion, self.arithmetic)

    @property
    def _replays(self) -> bool:
        return self.fast == "graph" and self.is_fast and self.pgd.mode == "eval"

    def fused(self, optimizer: Optimizer) -> Optimizer:
        """The optimizer, with fused steps if it has them and nothing was said of how to step.

        Args:
            optimizer: As it was built.
        """
        ways = [optimizer.defaults.get(way, False) for way in ("fused", "foreach")]
        if self.is_fast and ways == [None, None]:
            for settings in (optimizer.defaults, *optimizer.param_groups):
                settings["fused"] = True
        return optimizer
