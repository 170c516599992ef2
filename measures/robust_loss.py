"""Robust loss and robust error."""

from dataclasses import dataclass

from torch import Tensor, nn
from typing_extensions import override

from robust_flatness.functional.robust_loss import RobustnessResult, measure_robustness
from robust_flatness.measures.base import AttackMeasure, Examples

# Metrics of the training images must not be taken for those of training batches.
PREFIX = {"train": "train_eval", "val": "val", "test": "test"}


@dataclass(kw_only=True)
class RobustLoss(AttackMeasure):
    """Error, RLoss and RErr, and RLoss of the correct and of the incorrect examples (Fig. 2).

    Metrics are `test/error`, `test/robust_loss`, `test/robust_error`, `test/robust_loss_correct`
    and `test/robust_loss_incorrect`; for the training images they begin with `train_eval/`.
    Without correct, or incorrect, examples the RLoss of these is left out. An example whose logits
    are not finite counts as misclassified, and RLoss is not finite.

    Example:
        >>> import torch
        >>> images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> result = RobustLoss(eps=0.1)(network, images, torch.arange(4))
        >>> result.robust_error >= result.error
        True
    """

    @override
    def measure(self, network: nn.Module, examples: Examples) -> RobustnessResult:
        return measure_robustness(network, self.attacked(examples), examples.known)

    @override
    def metric_names(self, split: str) -> tuple[str, ...]:
        names = ["error", "robust_loss", "robust_error"]
        names += ["robust_loss_correct", "robust_loss_incorrect"]
        return tuple(f"{PREFIX[split]}/{name}" for name in names)

    @override
    def values(self, result: RobustnessResult) -> tuple[float | None, ...]:
        correct = result.clean_correct
        return (
            result.error,
            result.robust_loss,
            result.robust_error,
            result.robust_loss_correct if correct.any() else None,
            None if correct.all() else result.robust_loss_incorrect,
        )

    @override
    def arrays(self, result: RobustnessResult, split: str) -> dict[str, Tensor]:
        arrays = {
            "clean_loss": result.clean_losses,
            "clean_correct": result.clean_correct,
            "robust_loss": result.losses,
            "robust_correct": result.robust_correct,
        }
        return {f"{PREFIX[split]}/{name}": values for name, values in arrays.items()}

    @property
    @override
    def progress(self) -> tuple[str, int]:
        return f"RLoss, PGD-{self.steps} × {self.restarts} restarts", self.restarts

    @override
    def passes(self) -> tuple[int, int]:
        forward, backward = super().passes()
        # The clean images.
        return forward + 1, backward
