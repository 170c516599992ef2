"""Adversarial weight perturbation for any variant of adversarial training."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from robust_flatness.functional.awp import AWP, Direction, Order, skips_backward
from robust_flatness.functional.checks import check_count, check_number
from robust_flatness.functional.evaluation import Mode
from robust_flatness.lightning_modules.pgd_mixin import PGDMixin
from robust_flatness.lightning_modules.schedules import epochs_of_share


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
        args: Positional arguments of the variant.
        xi: Relative length ξ; the paper's AT-AWP takes 0.01.
        awp_steps: Ascent steps on the weights; the paper takes 1.
        order: `sam` decays the restored weights (the paper); `awp` decays the perturbed ones, as
            the original code does by stepping before restoring.
        warmup: Share of training before weights are perturbed.
        awp_mode: `eval` ascends on running BatchNorm statistics (the paper's code), `train` on
            those of the batch (the original's).
        direction: `adversarial`, or `random` for one drawn on the sphere in each step.
        kwargs: Other arguments of the variant.

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
        check_count("awp_steps", awp_steps, low=1)
        check_number("warmup", warmup, high=1.0)
        self.awp, self.xi, self.warmup = AWP(xi, awp_steps, awp_mode, direction, order), xi, warmup

    def perturb(self, images: Tensor, adversarial: Tensor, labels: Tensor) -> None:
        """Moves the weights to w + ν until the backward is done."""
        warm = self.current_epoch >= epochs_of_share(self.warmup, self.trainer.max_epochs or 0)
        if warm and not skips_backward(self.trainer):
            self.awp.perturb(
                self, lambda: self.objective(images, adversarial, labels)[0], self.noise
            )

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Any:
        """The variant's, after which callbacks and hooks see w until the backward."""
        loss: Any = super().training_step(batch, batch_idx)
        self.awp.exchange()
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Differentiates at w + ν and restores w, whatever happens."""
        self.awp.exchange()
        try:
            super().backward(loss, *args, **kwargs)
        finally:
            self.awp.restore()

    def configure_gradient_clipping(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        """Clips, and with `order: awp` turns the decay of w, which is not clipped, into w + ν's."""
        super().configure_gradient_clipping(optimizer, *args, **kwargs)
        self.awp.shift_decay(optimizer)

    def on_train_start(self) -> None:
        """Refuses a network that cannot be perturbed, also if a warm-up comes first."""
        super().on_train_start()
        self.awp.forget()
        self.awp.find(self.network)

    def on_train_epoch_start(self) -> None:
        """Finds the weights again, as a callback may have replaced layers."""
        super().on_train_epoch_start()
        # The network's own: an auxiliary head beside it is left alone, as in the paper's code.
        self.awp.find(self.network)

    def on_train_epoch_end(self) -> None:
        """Logs the variant's metrics, and the extremes of ‖ν_l‖ / ‖w_l‖."""
        super().on_train_epoch_end()
        if (extremes := self.awp.take_relative_norms()) is not None:
            for name, value in zip(("min", "max"), extremes):
                self.log(f"awp/relative_norm_{name}", value, reduce_fx=name, sync_dist=True)

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
        self.awp.check_optimizer(configured["optimizer"])
        return configured


class RestoreWeights(Callback):
    """Ends the perturbation before other callbacks save the weights of a training that failed."""

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Restores the weights."""
        if isinstance(pl_module, AWPMixin):
            pl_module.awp.restore()
