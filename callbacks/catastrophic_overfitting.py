"""The sudden loss of robustness in training on single-step attacks."""

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from robust_flatness import measures
from robust_flatness.callbacks.epoch_measures import EpochMeasure
from robust_flatness.callbacks.measuring import HoldsMeasure, is_finite, warn_if_results_stay
from robust_flatness.functional.checks import check_number
from robust_flatness.measures.base import Split


class _HoldsSingleStepRobustness(HoldsMeasure):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(measures.SingleStepRobustness(**kwargs))


class CatastrophicOverfitting(EpochMeasure, _HoldsSingleStepRobustness):
    """Warns if FGSM training loses its robustness against PGD, and keeps the weights from before.

    Within an epoch or two the error under FGSM falls while RErr under PGD rises to nearly 100 %
    (Wong et al., 2020). It is recognized by both: RErr is `jump` or more above its lowest value so
    far, and the error under FGSM below that of the same epoch. Robust overfitting raises both.
    Logs `single_step/fgsm_error/val`, `single_step/pgd_error/val` and `gradient/alignment/val`, see
    `measures.SingleStepRobustness`. Both errors are of the same held-out images, since a training
    batch with its adversarial examples is the module's own; `split="train"` takes training images.

    The kept weights are those of the lowest RErr until then, and stay if training recovers.
    `MeasuredCheckpoint(monitor="single_step/pgd_error/val", mode="min")` writes them as a
    checkpoint; on the command line `best.ckpt` has those of the lowest `val/robust_error`.

    Args:
        split: The images to measure.
        jump: Rise of RErr that counts, a share in [0, 1].
        **kwargs: Arguments of `EpochMeasure` and of `measures.SingleStepRobustness`.

    Attributes:
        overfitted_epoch: Epoch in which it was recognized; None before.
        epoch_before: Epoch of the kept weights, -1 until a measured network was finite.
        weights_before: State dict of the module there, on the CPU; may be empty.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> CatastrophicOverfitting(jump=0.2).metric_names[-1]
        'gradient/alignment/val'
    """

    def __init__(self, *, split: Split = "val", jump: float = 0.1, **kwargs: Any) -> None:
        super().__init__(split=split, **kwargs)
        check_number("jump", jump, high=1.0)
        self.jump = jump
        self._forget()

    def _forget(self) -> None:
        self.overfitted_epoch: int | None = None
        self.epoch_before = -1
        self.weights_before: dict[str, Tensor] = {}
        # Errors under FGSM and under PGD of the kept weights.
        self._before = (math.inf, math.inf)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._forget()
            warn_if_results_stay(trainer, self, "weights_before", "overfitted_epoch")

    @override
    @torch.no_grad()
    def on_measured(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> None:
        if self.overfitted_epoch is not None:
            return
        fgsm, pgd, alignment = (self.metrics[name] for name in self.metric_names)
        fgsm_before, pgd_before = self._before
        if pgd >= pgd_before + self.jump and fgsm < fgsm_before:
            self.overfitted_epoch = epoch
            rank_zero_warn(
                f"Catastrophic overfitting: since epoch {self.epoch_before} the error under FGSM "
                f"fell from {fgsm_before:.1%} to {fgsm:.1%} while that under "
                f"PGD-{self.measure.steps} rose from {pgd_before:.1%} to {pgd:.1%}; "  # type: ignore[attr-defined]
                f"gradient alignment is {alignment:.2f}. `weights_before` has the weights of epoch "
                f"{self.epoch_before}."
            )
        elif pgd < pgd_before and is_finite(trainer, pl_module):
            self.epoch_before, self._before = epoch, (fgsm, pgd)
            state = pl_module.state_dict()
            self.weights_before = {name: v.detach().cpu().clone() for name, v in state.items()}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "overfitted_epoch": self.overfitted_epoch,
            "epoch_before": self.epoch_before,
            "weights_before": self.weights_before,
            "before": self._before,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.overfitted_epoch = state_dict["overfitted_epoch"]
        self.epoch_before = state_dict["epoch_before"]
        self.weights_before = state_dict["weights_before"]
        self._before = state_dict["before"]
