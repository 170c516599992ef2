"""The paper's protocol, once, at the end."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import Dataset

from robust_flatness.callbacks.curvature import Curvature
from robust_flatness.callbacks.examples import Normalization
from robust_flatness.callbacks.final_measurement import Figures, FinalMeasurement
from robust_flatness.callbacks.flatness import Flatness
from robust_flatness.callbacks.measurement import SPLITS, Measurement
from robust_flatness.callbacks.robust_evaluation import RobustEvaluation
from robust_flatness.callbacks.worst_case_flatness import WorstCaseFlatness
from robust_flatness.functional.checks import Eps, check_choice
from robust_flatness.functional.flatness import Protocol
from robust_flatness.functional.noise import Norm

Extra = Literal["clean", "worst", "clean_worst", "curvature"]


class FinalEvaluation(FinalMeasurement):
    """RLoss, RErr and flatness by the paper's protocol, for last and early-stopped weights.

    The first 1000 test and training images, PGD-20 with 10 restarts, flatness from 10 directions
    at ξ = 0.5 (Sec. 3). Logged as `final/test/robust_loss`, …, and `early_stopped/test/…`, with the
    gaps between both splits as `gap/robust_loss` and `gap/robust_error`.

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
        extras: Further measures of each split: `clean` (average-case flatness of the clean loss,
            from the same directions), `worst` and `clean_worst` (worst-case flatness at ξ = 0.003
            with as many restarts), `curvature` (extreme eigenvalues of the Hessian).
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
        extras: Sequence[Extra] = (),
        norm: Norm = "linf",
        batch_size: int = 128,
        seed: int = 0,
        normalization: Normalization | None = None,
    ) -> None:
        super().__init__()
        if not splits:
            raise ValueError(f"Expected `splits` to name some of {', '.join(SPLITS)} but got none.")
        for split in splits:
            check_choice("splits", split, SPLITS)
        for extra in extras:
            check_choice("extras", extra, get_args(Extra))
        self.splits, self.extras = list(splits), list(extras)
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
            self._measurements += self._extra_measurements(given, restarts, num_perturbations, xi)

    def _extra_measurements(
        self, given: dict[str, Any], restarts: int, num_perturbations: int, xi: float
    ) -> list[Measurement]:
        unattacked = {name: v for name, v in given.items() if name not in ("eps", "steps", "norm")}
        makers: dict[str, Callable[[], Measurement]] = {
            "clean": lambda: Flatness(
                num_perturbations=max(1, num_perturbations), xi=xi, loss="clean", **given
            ),
            "worst": lambda: WorstCaseFlatness(restarts=restarts, **given),
            "clean_worst": lambda: WorstCaseFlatness(restarts=restarts, loss="clean", **given),
            "curvature": lambda: Curvature(**unattacked),
        }
        return [makers[extra]() for extra in self.extras]

    @property
    def measurements(self) -> Sequence[Measurement]:
        """RLoss and flatness of each split."""
        return self._measurements

    def _measure(self, trainer: Trainer, pl_module: LightningModule, weights: str) -> Figures:
        """Adds the generalisation gap, test minus training images (Sec. 4)."""
        figures = super()._measure(trainer, pl_module, weights)
        for name in ("robust_loss", "robust_error"):
            pair = [figures.get(f"{prefix}/{name}") for prefix in ("test", "train_eval")]
            if pair[0] is not None and pair[1] is not None:
                figures[f"gap/{name}"] = pair[0] - pair[1]
        return figures

    def logged_name(self, name: str, weights: str) -> str:
        """`final/…` or `early_stopped/…`, beside the epochs' lighter measures."""
        return f"{weights}/{name}"
