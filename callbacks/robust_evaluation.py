"""Robust loss and error of a split, epoch by epoch."""

import torch
from lightning.pytorch import LightningModule, Trainer

from robust_flatness.callbacks.measurement import PREFIX, Measurement
from robust_flatness.functional.robust_loss import RobustnessResult, measure_robustness


class RobustEvaluation(Measurement):
    """Logs error, RLoss and RErr of a split, and RLoss of its correct and incorrect examples.

    The paper's Fig. 2 over epochs. Names are `test/error`, `test/robust_loss`,
    `test/robust_error`, `test/robust_loss_correct`, `test/robust_loss_incorrect`; for the training
    images `train_eval/…`. Without correct, or incorrect, examples theirs is left out. Logits that
    are not finite count as misclassified, and make RLoss not finite.

    Args are those of `Measurement`.

    Example:
        >>> RobustEvaluation(split="train", steps=20, restarts=10).state_key
        'RobustEvaluation[train]'
    """

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of what `measure` returns."""
        parts = ("", "_correct", "_incorrect")
        names = ["error", "robust_error", *(f"robust_loss{part}" for part in parts)]
        return tuple(f"{PREFIX[self.split]}/{name}" for name in names)

    def passes(self) -> tuple[int, int]:
        """An attack for each restart, and one forward of the clean images."""
        return self.restarts * (self.steps + 1) + 1, self.restarts * self.steps

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """RLoss, RErr and clean error of the split."""
        found = self.evaluate(trainer, pl_module)
        arrays = {
            "clean_loss": found.clean_losses,
            "clean_correct": found.clean_correct,
            "robust_loss": found.losses,
            "robust_correct": found.robust_correct,
        }
        self.arrays = {f"{PREFIX[self.split]}/{name}": values for name, values in arrays.items()}
        figures = {
            "error": found.error,
            "robust_loss": found.robust_loss,
            "robust_error": found.robust_error,
        }
        # Without such examples their mean is undefined.
        if found.clean_correct.any():
            figures["robust_loss_correct"] = found.robust_loss_correct
        if not found.clean_correct.all():
            figures["robust_loss_incorrect"] = found.robust_loss_incorrect
        return {f"{PREFIX[self.split]}/{name}": value for name, value in figures.items()}

    def evaluate(self, trainer: Trainer, pl_module: LightningModule) -> RobustnessResult:
        """What PGD finds about each example, on every rank."""
        settings = self.measure_settings(trainer)
        with self.network(trainer, pl_module) as network:
            values = self.sharded(
                trainer,
                pl_module,
                lambda images, labels, indices, on_attack: _rows(
                    measure_robustness(
                        network,
                        images,
                        labels,
                        indices=indices,
                        on_attack=on_attack,
                        **settings,
                    )
                ),
                what=f"RLoss {self.split}: PGD-{self.steps} × {self.restarts} restarts",
                attacks_per_batch=self.restarts,
            )
        clean, clean_correct, losses, correct = values
        return RobustnessResult(clean, clean_correct.bool(), losses, correct.bool())


def _rows(found: RobustnessResult) -> torch.Tensor:
    columns = (found.clean_losses, found.clean_correct, found.losses, found.robust_correct)
    return torch.stack([column.double() for column in columns])
