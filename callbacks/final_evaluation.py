"""The paper's protocol, once, at the end."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset

from robust_flatness.callbacks.examples import Normalization
from robust_flatness.callbacks.final_measurement import FinalMeasurement
from robust_flatness.callbacks.flatness import Flatness
from robust_flatness.callbacks.measurement import Measurement
from robust_flatness.callbacks.robust_evaluation import RobustEvaluation
from robust_flatness.configs.types import Eps
from robust_flatness.functional.flatness import Protocol
from robust_flatness.functional.noise import Norm


class FinalEvaluation(FinalMeasurement):
    """RLoss, RErr and flatness by the paper's protocol, for last and early-stopped weights.

    The first 1000 test and training images, PGD-20 with 10 restarts, flatness from 10 directions
    at ξ = 0.5 (Sec. 3). Logged as `final/test/robust_loss`, …, and `early_stopped/test/…`.

    Args:
        splits: What is measured.
        datasets: Where the images of a split come from; those not named are found.
        num_examples: Images of each split.
        eps: Radius of the attack; `None` takes the datamodule's `eps`, else 8/255.
        steps: Steps of the attack.
        restarts: Restarts for RLoss and RErr.
        num_perturbations: Directions of the flatness; 0 leaves it out.
        xi: Relative length ξ of a perturbation in each layer.
        protocol: Of the flatness, `shared` or `paper`.
        norm: `linf` or `l2`.
        batch_size: Images measured at once.
        seed: Of all random numbers.
        normalization: `(mean, std)` where module and datasets deal in normalised images.

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
        datasets: Mapping[str, Dataset[Any]] | None = None,
        num_examples: int = 1000,
        eps: Eps | None = None,
        steps: int = 20,
        restarts: int = 10,
        num_perturbations: int = 10,
        xi: float = 0.5,
        protocol: Protocol = "shared",
        norm: Norm = "linf",
        batch_size: int = 128,
        seed: int = 0,
        normalization: Normalization | None = None,
    ) -> None:
        super().__init__()
        self.splits = list(splits)
        common: dict[str, Any] = {
            "num_examples": num_examples,
            "eps": eps,
            "steps": steps,
            "norm": norm,
            "batch_size": batch_size,
            "normalization": normalization,
            "seed": seed,
        }
        self._measurements: list[Measurement] = []
        for split in self.splits:
            given: dict[str, Any] = {
                "split": split,
                "dataset": (datasets or {}).get(split),
                **common,
            }
            self._measurements.append(RobustEvaluation(restarts=restarts, **given))
            if num_perturbations:
                flatness = Flatness(
                    num_perturbations=num_perturbations, xi=xi, protocol=protocol, **given
                )
                self._measurements.append(flatness)

    @property
    def measurements(self) -> Sequence[Measurement]:
        """RLoss and flatness of each split."""
        return self._measurements

    def logged_name(self, name: str, weights: str) -> str:
        """`final/…` or `early_stopped/…`, beside the epochs' lighter measures."""
        return f"{weights}/{name}"
