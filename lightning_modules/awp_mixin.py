"""Adversarial weight perturbation for any variant of adversarial training."""

from contextlib import ExitStack
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from robust_flatness.functional.checks import check_choice, check_count, check_number
from robust_flatness.functional.evaluation import Mode
from robust_flatness.functional.layer_weights import LayerTensor, layer_tensors, perturbed_weights
from robust_flatness.functional.weight_perturbation import (
    adversarial_perturbation,
    mean_over_ranks,
    random_perturbation,
)
from robust_flatness.lightning_modules.pgd_mixin import PGDMixin
from robust_flatness.lightning_modules.schedules import epochs_of_share

Order = Literal["sam", "awp"]
Direction = Literal["adversarial", "random"]


class AWPMixin(PGDMixin):
    """Takes the gradient of a variant's objective at adversarially perturbed weights.

    It comes before the variant: `class TRADESAWP(AWPMixin, TRADES)`. In each step, after crafting,
    weights move to w + ν with ν_l = ξ‖w_l‖ g_l / ‖g_l‖, g the gradient of the variant's objective;
    the loss is differentiated there, and the weights are restored bit for bit before the optimizer
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
        args, kwargs: Arguments of the variant.

    Raises:
        ValueError: If an argument is out of range; before training, if the warm-up is a share of
            endless training, if `order` is awp and the optimizer decouples weight decay from
            gradients, or if it is not certain what tensors a layer computes with.
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
        self._tensors: dict[str, LayerTensor] = {}
        self._perturbed = ExitStack()
        # ν by parameter, of the steps since the last update, and ‖ν_l‖ / ‖w_l‖, of the epoch.
        self._decay_shifts: list[dict[int, Tensor]] = []
        self._relative_norms: list[Tensor] = []

    def perturb(self, images: Tensor, adversarial: Tensor, labels: Tensor) -> None:
        """Moves the weights to w + ν until the backward is done."""
        if self.current_epoch < epochs_of_share(self.warmup, self.trainer.max_epochs or 0):
            return
        weights = {name: tensor.value() for name, tensor in self._tensors.items()}
        if self.direction == "random":
            generator = self.noise.generator("weights", self.device)
            perturbation = random_perturbation(weights, self.xi, generator)
        else:
            perturbation = adversarial_perturbation(
                self,
                self._tensors,
                lambda: self.objective(images, adversarial, labels)[0],
                xi=self.xi,
                steps=self.awp_steps,
                mode=self.awp_mode,
                reduce=mean_over_ranks,
            )
        ratios = [
            nu.norm() / weights[name].detach().norm().clamp_min(torch.finfo(nu.dtype).tiny)
            for name, nu in perturbation.items()
        ]
        self._relative_norms.append(torch.stack(ratios))
        if self.order == "awp":
            shifts = ((self._tensors[name].own(), nu) for name, nu in perturbation.items())
            # What is computed decays only through the parameters behind it, which are not moved.
            self._decay_shifts.append({id(w): nu for w, nu in shifts if w is not None})
        self._perturbed.enter_context(perturbed_weights(self, perturbation, self._tensors))

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Differentiates at w + ν and restores w, whatever happens."""
        try:
            super().backward(loss, *args, **kwargs)
        finally:
            self.restore_weights()

    def restore_weights(self) -> None:
        """Ends the perturbation, bit for bit; without one nothing happens."""
        self._perturbed.close()

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

    def on_train_start(self) -> None:
        """Refuses a network that cannot be perturbed, also if a warm-up comes first."""
        super().on_train_start()
        self._decay_shifts, self._relative_norms = [], []
        self._find_weights()

    def on_train_epoch_start(self) -> None:
        """Finds the weights again, as a callback may have replaced layers."""
        super().on_train_epoch_start()
        self._find_weights()

    def _find_weights(self) -> None:
        # The network's own: an auxiliary head beside it is left alone, as in the paper's code.
        self._tensors = layer_tensors(self.network, biases=False)

    def on_train_epoch_end(self) -> None:
        """Logs the variant's metrics, and the extremes of ‖ν_l‖ / ‖w_l‖."""
        super().on_train_epoch_end()
        if self._relative_norms:
            low, high = torch.cat(self._relative_norms).aminmax()
            self.log("awp/relative_norm_min", low, reduce_fx="min", sync_dist=True)
            self.log("awp/relative_norm_max", high, reduce_fx="max", sync_dist=True)
            self._relative_norms = []

    def configure_callbacks(self) -> list[Callback]:
        """The variant's callbacks, and one that restores the weights if training fails."""
        callbacks: Any = super().configure_callbacks()
        return [*callbacks, RestoreWeights()]

    def configure_optimizers(self) -> Any:
        """The variant's optimizer and schedule, if `order` and `warmup` suit them."""
        configured: Any = super().configure_optimizers()
        if self.warmup and (self.trainer.max_epochs or 0) < 1:
            raise ValueError(
                "Expected `trainer.max_epochs` to be >= 1, as `warmup` is a share of training, but "
                f"got {self.trainer.max_epochs}."
            )
        optimizer = configured["optimizer"]
        decoupled = any(
            group.get("weight_decay") and group.get("decoupled_weight_decay")
            for group in optimizer.param_groups
        )
        if self.order == "awp" and decoupled:
            raise ValueError(
                "Expected an optimizer with coupled weight decay for `order` awp but got "
                f"{type(optimizer).__name__}."
            )
        return configured


class RestoreWeights(Callback):
    """Ends the perturbation before other callbacks save the weights of a training that failed."""

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Restores the weights."""
        if isinstance(pl_module, AWPMixin):
            pl_module.restore_weights()
