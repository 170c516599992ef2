"""Curvature of the clean loss, epoch by epoch."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import Dataset

from robust_flatness.callbacks.examples import Normalization
from robust_flatness.callbacks.measurement import Measurement
from robust_flatness.functional.checks import check_number
from robust_flatness.functional.hessian import HessianResult, hessian_extreme_eigenvalues


class Curvature(Measurement):
    """Logs the extreme eigenvalues of the Hessian of the mean clean loss.

    Logs `hessian/max_eigenvalue`, `hessian/min_eigenvalue` and `hessian/convexity`, |λ_min| /
    |λ_max|; for another split than `test`, `hessian/train/max_eigenvalue` and so on. The paper
    takes the last 500 test images, `split="val"` of this package's datamodules, and sums four mean
    losses, so that its eigenvalues are about four times these.

    Every rank computes on all images: 1 and N processes agree bit for bit, and Lanczos, which stops
    when it is done, exchanges nothing. Eigenvalues depend on the scale of layers that a BatchNorm
    follows, as flatness does not.

    Args:
        split: `train`, `val` or `test`.
        dataset: Where the images come from; `None` finds the split.
        num_examples: The first so many images are measured.
        every_n_epochs: Measured in epochs 0, n, 2n, ... and in the last.
        tolerance: At which Lanczos stops, see `functional.hessian_extreme_eigenvalues`.
        batch_size: Images measured at once.
        seed: Of the vector that Lanczos starts from.
        normalization: `(mean, std)` where module and dataset deal in normalised images.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> Curvature(num_examples=128, every_n_epochs=5).state_key
        'Curvature[test]'
    """

    moves_weights = True

    def __init__(
        self,
        *,
        split: str = "test",
        dataset: Dataset[Any] | None = None,
        num_examples: int = 500,
        every_n_epochs: int = 1,
        tolerance: float = 1e-3,
        batch_size: int = 128,
        seed: int = 0,
        normalization: Normalization | None = None,
    ) -> None:
        super().__init__(
            split=split,
            dataset=dataset,
            num_examples=num_examples,
            every_n_epochs=every_n_epochs,
            batch_size=batch_size,
            seed=seed,
            normalization=normalization,
        )
        check_number("tolerance", tolerance, low=1e-12, high=1)
        self.tolerance = tolerance

    def radius(self, trainer: Trainer) -> float:
        """Nothing is attacked, whatever radius the data says."""
        return 0.0

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of what `measure` returns."""
        prefix = "hessian/" if self.split == "test" else f"hessian/{self.split}/"
        names = ("max_eigenvalue", "min_eigenvalue", "convexity")
        return tuple(f"{prefix}{name}" for name in names)

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Largest and smallest eigenvalue, and their ratio."""
        found = self.evaluate(trainer, pl_module)
        values = [found.max_eigenvalue, found.min_eigenvalue, found.convexity_ratio]
        # On a GPU two ranks may differ in the last digits.
        figures = dict(zip(self.metric_names, trainer.strategy.broadcast(values)))
        if found.max_eigenvalue == 0:
            # The ratio is undefined.
            del figures[self.metric_names[-1]]
        return figures

    def evaluate(self, trainer: Trainer, pl_module: LightningModule) -> HessianResult:
        """Eigenvalues and eigenvectors, on every rank."""
        examples, device = self.examples(trainer, pl_module), pl_module.device
        with self.network(trainer, pl_module) as network:
            return hessian_extreme_eigenvalues(
                network,
                examples.images.to(device),
                examples.labels.to(device),
                tolerance=self.tolerance,
                seed=self.seed,
                batch_size=self.batch_size,
            )
