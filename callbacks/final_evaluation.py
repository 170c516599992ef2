"""The paper's protocol, once, at the end."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from robust_flatness.callbacks.final_measurement import Figures, FinalMeasurement
from robust_flatness.callbacks.flatness import Flatness
from robust_flatness.callbacks.robust_evaluation import RobustEvaluation
from robust_flatness.configs.types import Eps
from robust_flatness.functional.flatness import Protocol


class FinalEvaluation(FinalMeasurement):
    """RLoss, RErr and flatness by the paper's protocol, for last and early-stopped weights.

    The first 1000 test and training images, PGD-20 with 10 restarts, flatness from 10 directions
    at ξ = 0.5 (Sec. 3). Logged as `final/test/robust_loss`, …, and `early_stopped/test/…`.

    Args:
        splits: What is measured.
        num_examples: Images of each split.
        eps: Radius of the attack; `None` takes the datamodule's `eps`, else 8/255.
        steps: Steps of the attack.
        restarts: Restarts for RLoss and RErr.
        num_perturbations: Directions of the flatness; 0 leaves it out.
        xi: Relative length ξ of a perturbation in each layer.
        protocol: Of the flatness, `shared` or `paper`.
        batch_size: Images measured at once.
        seed: Of all random numbers.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> FinalEvaluation(splits=["test"]).splits
        ['test']
    """

    def __init__(
        self,
        *,
        splits: Sequence[str] = ("test", "train"),
        num_examples: int = 1000,
        eps: Eps | None = None,
        steps: int = 20,
        restarts: int = 10,
        num_perturbations: int = 10,
        xi: float = 0.5,
        protocol: Protocol = "shared",
        batch_size: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.splits = list(splits)
        common: dict[str, Any] = {
            "num_examples": num_examples,
            "eps": eps,
            "steps": steps,
            "batch_size": batch_size,
            "seed": seed,
        }
        self._evaluations = [
            RobustEvaluation(split=split, restarts=restarts, **common) for split in self.splits
        ]
        self._flatness = [
            Flatness(
                split=split,
                num_perturbations=num_perturbations,
                xi=xi,
                protocol=protocol,
                **common,
            )
            for split in (self.splits if num_perturbations else [])
        ]

    def measure_all(self, trainer: Trainer, pl_module: LightningModule) -> Figures:
        """All figures of the protocol."""
        figures: Figures = {}
        for measurement in (*self._evaluations, *self._flatness):
            found = measurement.measure(trainer, pl_module)
            figures |= found
            count = len(measurement.examples(trainer, pl_module))
            self.final_results["num_examples"] |= dict.fromkeys(found, count)
        return figures

    def logged_name(self, name: str, weights: str) -> str:
        """`final/…` or `early_stopped/…`, beside the epochs' lighter measures."""
        return f"{weights}/{name}"
