"""Average-case flatness of the robust loss, epoch by epoch."""

from typing import Any, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import Dataset

from robust_flatness.callbacks.examples import Normalization
from robust_flatness.callbacks.measurement import Measurement
from robust_flatness.functional.checks import Eps, check_choice, check_count, check_number
from robust_flatness.functional.flatness import (
    PAPER_REFERENCE_RESTARTS,
    FlatnessResult,
    LossKind,
    Protocol,
    average_case_flatness,
)
from robust_flatness.functional.noise import Norm
from robust_flatness.functional.weight_perturbation import Distribution, RelativeTo


class Flatness(Measurement):
    """Logs how much RLoss rises when weights move in random directions (Eq. 1); lower is flatter.

    Logs `flatness/average/test` and its standard error over directions,
    `flatness/average/test_sem`; for the clean loss `flatness/clean_average/…`. The paper measures
    1000 images with PGD-20 and 10 directions at ξ = 0.5; the defaults are that, every epoch.

    Args:
        split: `train`, `val` or `test`.
        dataset: Where the images come from; `None` finds the split.
        num_examples: The first so many images are measured.
        num_perturbations: Number of random directions.
        xi: Relative length ξ of a perturbation in each layer.
        protocol: `shared` or `paper`, see `functional.average_case_flatness`.
        loss: `robust`, or `clean` for the images themselves.
        distribution: `sphere` or `ball`, see `functional.sample_weight_perturbation`.
        relative_to: `layer`, `filter` or `network`, see there.
        per_batch: Whether each batch has directions of its own.
        every_n_epochs: Measured in epochs 0, n, 2n, ... and in the last.
        eps: Radius of the attack, say 8/255; `None` takes the datamodule's `eps`, else 8/255.
        steps: Steps of the attack.
        step_size: Length of a step; `None` is the paper's 0.007 at 8/255, in proportion elsewhere.
        norm: `linf` or `l2`.
        restarts: Restarts of the attack, for reference and perturbed losses alike.
        batch_size: Images measured at once, and the unit that ranks share out.
        seed: Of directions and starts.
        normalization: `(mean, std)` where module and dataset deal in normalised images.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> Flatness(num_perturbations=3, every_n_epochs=5).state_key
        'Flatness[test]'
    """

    moves_weights = True

    def __init__(
        self,
        *,
        split: str = "test",
        dataset: Dataset[Any] | None = None,
        num_examples: int = 1000,
        num_perturbations: int = 10,
        xi: float = 0.5,
        protocol: Protocol = "shared",
        loss: LossKind = "robust",
        distribution: Distribution = "sphere",
        relative_to: RelativeTo = "layer",
        per_batch: bool = False,
        every_n_epochs: int = 1,
        eps: Eps | None = None,
        steps: int = 20,
        step_size: Eps | None = None,
        norm: Norm = "linf",
        restarts: int = 1,
        batch_size: int = 128,
        seed: int = 0,
        normalization: Normalization | None = None,
    ) -> None:
        super().__init__(
            split=split,
            dataset=dataset,
            num_examples=num_examples,
            every_n_epochs=every_n_epochs,
            eps=eps,
            steps=steps,
            step_size=step_size,
            norm=norm,
            restarts=restarts,
            batch_size=batch_size,
            seed=seed,
            normalization=normalization,
        )
        check_count("num_perturbations", num_perturbations, low=1)
        check_number("xi", xi)
        check_choice("protocol", protocol, get_args(Protocol))
        check_choice("loss", loss, get_args(LossKind))
        check_choice("distribution", distribution, get_args(Distribution))
        check_choice("relative_to", relative_to, get_args(RelativeTo))
        self.loss, self.distribution, self.relative_to = loss, distribution, relative_to
        self.per_batch = per_batch
        self.num_perturbations, self.xi, self.protocol = num_perturbations, xi, protocol

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the value and, if there are several directions, of its standard error."""
        kind = "average" if self.loss == "robust" else "clean_average"
        name = f"flatness/{kind}/{self.split}"
        return (name, f"{name}_sem") if self.num_perturbations > 1 else (name,)

    def passes(self) -> tuple[int, int]:
        """Attacks at the weights and at each perturbation of them."""
        reference, restarts = self._restarts()
        attacks = reference + self.num_perturbations * restarts
        steps = 0 if self.loss == "clean" else self.steps
        return attacks * (steps + 1), attacks * steps

    def _restarts(self) -> tuple[int, int]:
        """Restarts at the weights, and at each perturbation of them."""
        if self.loss == "clean":
            return 1, 1
        paper = self.protocol == "paper"
        return (PAPER_REFERENCE_RESTARTS, 1) if paper else (self.restarts, self.restarts)

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Value and, of several directions, standard error of the average-case flatness."""
        found = self.evaluate(trainer, pl_module)
        name, *sem = self.metric_names
        self.arrays = {name: found.increases.mean(dim=0)}
        return {name: found.value} | dict.fromkeys(sem, found.standard_error)

    def evaluate(self, trainer: Trainer, pl_module: LightningModule) -> FlatnessResult:
        """Reference and perturbed losses of each example, on every rank."""
        settings = self.attack_settings(trainer)
        reference, restarts = self._restarts()
        attack = "clean" if self.loss == "clean" else f"PGD-{self.steps} × {restarts} restarts"
        with self.network(trainer, pl_module) as network:
            values = self.sharded(
                trainer,
                pl_module,
                lambda images, labels, indices, on_attack: _rows(
                    average_case_flatness(
                        network,
                        images,
                        labels,
                        xi=self.xi,
                        num_perturbations=self.num_perturbations,
                        protocol=self.protocol,
                        loss=self.loss,
                        distribution=self.distribution,
                        relative_to=self.relative_to,
                        per_batch=self.per_batch,
                        indices=indices,
                        on_attack=on_attack,
                        **settings,
                    )
                ),
                what=f"flatness {self.split}: {self.num_perturbations} directions × {attack}",
                attacks_per_batch=reference + self.num_perturbations * restarts,
            )
        return FlatnessResult(values[0], values[1:])


def _rows(found: FlatnessResult) -> torch.Tensor:
    return torch.cat([found.reference_losses[None], found.perturbed_losses])
