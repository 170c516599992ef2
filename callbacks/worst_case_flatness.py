"""Worst-case flatness of the robust loss, epoch by epoch."""

import math
from typing import Any, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import Dataset

from robust_flatness.callbacks.examples import Normalization
from robust_flatness.callbacks.measurement import Measurement
from robust_flatness.functional.attack import Keep
from robust_flatness.functional.checks import Eps, check_choice, check_count, check_number
from robust_flatness.functional.flatness import LossKind
from robust_flatness.functional.noise import Norm
from robust_flatness.functional.worst_case_flatness import (
    Sharing,
    WorstCaseFlatnessResult,
    worst_case_flatness,
)


class WorstCaseFlatness(Measurement):
    """Logs how much RLoss rises when weights move in the worst direction; lower is flatter.

    Logs `flatness/worst/test`, or `flatness/clean_worst/test` for the clean loss. The defaults are
    the paper's tables: 1000 images, 20 steps of joint ascent, 10 restarts, ξ = 0.003. That costs
    about twice what the average-case measure does, so it is made every few epochs at most, or once
    in `trainer.test`.

    Args:
        split: `train`, `val` or `test`.
        dataset: Where the images come from; `None` finds the split.
        num_examples: The first so many images are measured.
        xi: Relative radius ξ of the perturbation in each layer.
        weight_step: Length of a step on the weights, relative to each layer.
        loss: `robust`, or `clean` for the images themselves.
        keep: `last` or `best` iterate; `None` is the paper's, see `functional.worst_case_flatness`.
        per_batch: Whether each batch has a perturbation of its own.
        every_n_epochs: Measured in epochs 0, n, 2n, ... and in the last.
        eps: Radius of the attack, say 8/255; `None` takes the datamodule's `eps`, else 8/255.
        steps: Steps of the joint ascent and of the reference attack.
        step_size: Length of the attack's step; `None` is the paper's 0.007 at 8/255, in proportion
            elsewhere.
        norm: `linf` or `l2`.
        restarts: Restarts of both.
        batch_size: Images measured at once, and the unit that ranks share out.
        seed: Of the starts.
        normalization: `(mean, std)` where module and dataset deal in normalised images.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> WorstCaseFlatness(restarts=2, every_n_epochs=10).state_key
        'WorstCaseFlatness[test]'
    """

    moves_weights = True

    def __init__(
        self,
        *,
        split: str = "test",
        dataset: Dataset[Any] | None = None,
        num_examples: int = 1000,
        xi: float = 0.003,
        weight_step: float = 0.01,
        loss: LossKind = "robust",
        keep: Keep | None = None,
        per_batch: bool = False,
        every_n_epochs: int = 1,
        eps: Eps | None = None,
        steps: int = 20,
        step_size: Eps | None = None,
        norm: Norm = "linf",
        restarts: int = 10,
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
        check_number("xi", xi)
        check_number("weight_step", weight_step)
        check_count("steps", steps, low=1)
        check_choice("loss", loss, get_args(LossKind))
        if keep is not None:
            check_choice("keep", keep, get_args(Keep))
        self.xi, self.weight_step, self.loss = xi, weight_step, loss
        self.keep, self.per_batch = keep, per_batch

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Name of the value."""
        kind = "worst" if self.loss == "robust" else "clean_worst"
        return (f"flatness/{kind}/{self.split}",)

    def passes(self) -> tuple[int, int]:
        """Attacks at the weights, and as many ascents, which cost as much as an attack."""
        forward, backward = self.restarts * (self.steps + 1), self.restarts * self.steps
        if self.loss == "clean":
            return 1 + forward, backward
        return 2 * forward, 2 * backward

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Value of the worst-case flatness."""
        (name,) = self.metric_names
        found = self.evaluate(trainer, pl_module)
        self.arrays = {name: found.increases[found.worst_restart]}
        return {name: found.value}

    def evaluate(self, trainer: Trainer, pl_module: LightningModule) -> WorstCaseFlatnessResult:
        """Reference and perturbed losses of each example, on every rank."""
        settings = self.attack_settings(trainer)
        sharing = self._sharing(trainer, len(self.examples(trainer, pl_module)))
        references = self.restarts if self.loss == "robust" else 1
        with self.network(trainer, pl_module) as network:
            values = self.sharded(
                trainer,
                pl_module,
                lambda images, labels, indices, on_attack: _rows(
                    worst_case_flatness(
                        network,
                        images,
                        labels,
                        xi=self.xi,
                        weight_step=self.weight_step,
                        loss=self.loss,
                        keep=self.keep,
                        per_batch=self.per_batch,
                        indices=indices,
                        sharing=sharing,
                        on_attack=on_attack,
                        **settings,
                    )
                ),
                what=f"worst-case flatness {self.split}: {self.restarts} × {self.steps} steps",
                attacks_per_batch=references + self.restarts,
            )
        return WorstCaseFlatnessResult(values[0], values[1:])

    def _sharing(self, trainer: Trainer, count: int) -> Sharing | None:
        """One perturbation for all ranks, of which the first has the most batches."""
        if trainer.world_size == 1:
            return None
        rounds = math.ceil(count / (self.batch_size * trainer.world_size))
        return Sharing(rounds, lambda part: trainer.strategy.all_gather(part).unbind())


def _rows(found: WorstCaseFlatnessResult) -> torch.Tensor:
    return torch.cat([found.reference_losses[None], found.perturbed_losses])
