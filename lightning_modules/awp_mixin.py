"""Adversarial weight perturbation for any variant of adversarial training."""

from contextlib import ExitStack
from typing import Any, Literal, cast, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import MaxMetric, MinMetric

from robust_flatness.functional.awp import adversarial_weight_perturbation
from robust_flatness.functional.checks import check_choice, check_count, check_number
from robust_flatness.functional.evaluation import Mode
from robust_flatness.functional.layer_weights import (
    own_tensor,
    perturbed_parameters,
    perturbed_weights,
    weight_at,
)
from robust_flatness.functional.weight_perturbation import random_perturbation
from robust_flatness.lightning_modules.at import AT
from robust_flatness.lightning_modules.schedules import epochs_of_share

Order = Literal["sam", "awp"]
Direction = Literal["adversarial", "random"]


class _GiveWeightsBack(Callback):
    """Ends the perturbation before anybody saves the weights of a training that failed."""

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        cast(AWPMixin, pl_module).restore_weights()


class AWPMixin(AT):
    """Takes the gradient of the variant's objective at adversarially perturbed weights.

    Put it before the variant: `class TRADESAWP(AWPMixin, TRADES)`. In each step, after crafting,
    weights move to w + ν with ν_l = ξ‖w_l‖ g_l / ‖g_l‖, g the gradient of the variant's objective;
    the loss is differentiated there, and the weights come back bit for bit before the optimizer
    moves them. If a layer has spectral norm, weight norm or another parametrization, the tensor
    that it computes with is moved, and the gradient goes on to the parameters behind it, which the
    optimizer moves and decays. `awp/relative_norm_min` and `_max` log ‖ν_l‖ / ‖w_l‖ over layers and
    steps. The perturbed forward updates BatchNorm statistics, as in the original code; the paper's
    code spends one more forward to update them at w.

    Args:
        xi: Relative length ξ; the paper's AT-AWP takes 0.01.
        awp_steps: Ascent steps on the weights; the paper takes 1.
        order: `sam` decays the restored weights (the paper); `awp` decays the perturbed ones, as
            the original code does by stepping before restoring.
        warmup: Share of training before weights are perturbed.
        awp_mode: `eval` ascends on running BatchNorm statistics (the paper's code), `train` on
            those of the batch (the original's).
        direction: `adversarial`, or `random` for one drawn on the sphere in each step.
        args: The network, as the first argument of `AT`.
        kwargs: Arguments of the variant.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        *args: Any,
        xi: float = 0.01,
        awp_steps: int = 1,
        order: Order = "sam",
        warmup: float = 0.0,
        awp_mode: Mode = "eval",
        direction: Direction = "adversarial",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_number("xi", xi)
        check_count("awp_steps", awp_steps, low=1)
        check_number("warmup", warmup, high=1.0)
        check_choice("order", order, get_args(Order))
        check_choice("direction", direction, get_args(Direction))
        self.xi, self.awp_steps, self.awp_mode = xi, awp_steps, awp_mode
        self.order, self.warmup, self.direction = order, warmup, direction
        self.relative_norm_min = MinMetric(nan_strategy="disable")
        self.relative_norm_max = MaxMetric(nan_strategy="disable")
        self._perturbed = ExitStack()
        self._decay_shifts: list[dict[int, Tensor]] = []

    def perturb(self, images: Tensor, adversarial: Tensor, labels: Tensor) -> None:
        """Moves the weights to w + ν until the backward is done."""
        if self._warming_up:
            return
        if self.direction == "random":
            generator = self.generator("weights", self.device)
            perturbation = random_perturbation(self._perturbed_weights(), self.xi, generator)
        else:
            with self.means.paused():
                perturbation = self._adversarial_perturbation(images, adversarial, labels)
        self._record_norms(perturbation)
        if self.order == "awp":
            shifts = ((own_tensor(self, name), nu) for name, nu in perturbation.items())
            # What is computed decays only through the parameters behind it, which are not moved.
            self._decay_shifts += [{id(w): nu for w, nu in shifts if w is not None}]
        self._perturbed.enter_context(perturbed_weights(self, perturbation))

    def _adversarial_perturbation(
        self, images: Tensor, adversarial: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        return adversarial_weight_perturbation(
            self,
            adversarial,
            labels,
            xi=self.xi,
            steps=self.awp_steps,
            objective=lambda _, inputs, targets: self.objective(images, inputs, targets)[0],
            mode=self.awp_mode,
            reduce=self._mean_over_ranks,
            weights=self._perturbed_weights(),
        )

    def _perturbed_weights(self) -> dict[str, Tensor]:
        """The network's own: an auxiliary head beside it is left alone, as in the paper's code."""
        found = perturbed_parameters(self.network, biases=False)
        return {f"network.{name}": weight for name, weight in found.items()}

    def on_train_start(self) -> None:
        """Refuses a network that cannot be perturbed, also if a warm-up comes first.

        Raises:
            ValueError: If a layer's weight is not certain.
        """
        super().on_train_start()
        self._perturbed_weights()

    @property
    def _warming_up(self) -> bool:
        return self.current_epoch < epochs_of_share(self.warmup, self.trainer.max_epochs or 0)

    def configure_callbacks(self) -> list[Callback]:
        """A callback that gives the weights back where training ends with an exception."""
        return [_GiveWeightsBack()]

    def restore_weights(self) -> None:
        """Ends the perturbation, bit for bit; nothing where there is none."""
        self._perturbed.close()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Differentiates at w + ν and gives w back, whatever happens."""
        try:
            super().backward(loss, *args, **kwargs)
        finally:
            self.restore_weights()

    def configure_optimizers(self) -> Any:
        """The variant's optimizer and schedule.

        Raises:
            ValueError: If `order` is awp and the optimizer decouples weight decay from gradients,
                or if the warm-up is a share of endless training.
        """
        configured = super().configure_optimizers()
        if self.warmup and (self.trainer.max_epochs or 0) < 1:
            raise ValueError(
                "Expected `trainer.max_epochs` to be >= 1, as `warmup` is a share of training, but "
                f"got {self.trainer.max_epochs}."
            )
        optimizer = configured["optimizer"]
        if self.order == "awp" and any(map(_decouples_decay, optimizer.param_groups)):
            raise ValueError(
                "Expected an optimizer with coupled weight decay for `order` awp but got "
                f"{type(optimizer).__name__}."
            )
        return configured

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """With `order: awp`, turns the decay of w into that of w + ν by adding wd · ν."""
        shifts, self._decay_shifts = self._decay_shifts, []
        if not shifts:
            return
        for group in optimizer.param_groups:
            decay = group.get("weight_decay", 0.0)
            for parameter in group["params"]:
                for shift in shifts:
                    if id(parameter) in shift and parameter.grad is not None:
                        parameter.grad.add_(shift[id(parameter)], alpha=decay / len(shifts))

    def on_train_epoch_end(self) -> None:
        """Logs the variant's metrics, and that the perturbation had its length."""
        super().on_train_epoch_end()
        if not self._warming_up:
            self.log("awp/relative_norm_min", self.relative_norm_min)
            self.log("awp/relative_norm_max", self.relative_norm_max)

    def _record_norms(self, perturbation: dict[str, Tensor]) -> None:
        weights = {name: weight_at(self, name).detach() for name in perturbation}
        ratios = torch.stack(
            [
                nu.norm() / weights[name].norm().clamp_min(torch.finfo(nu.dtype).tiny)
                for name, nu in perturbation.items()
            ]
        )
        self.relative_norm_min.update(ratios)
        self.relative_norm_max.update(ratios)

    def _mean_over_ranks(self, gradients: list[Tensor]) -> list[Tensor]:
        """One all-reduce for all gradients, so that every rank climbs in the same direction."""
        if self.trainer.world_size == 1:
            return gradients
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        # The strategy's own reduction waits for all ranks first.
        torch.distributed.all_reduce(flat)
        parts = (flat / self.trainer.world_size).split([gradient.numel() for gradient in gradients])
        return [part.view_as(gradient) for part, gradient in zip(parts, gradients)]


def _decouples_decay(group: dict[str, Any]) -> bool:
    return bool(group.get("weight_decay") and group.get("decoupled_weight_decay"))
