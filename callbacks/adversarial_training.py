"""Callbacks that train any LightningModule on adversarial examples and at perturbed weights."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from robust_flatness.callbacks.fixed_images import (
    ROUNDING,
    Normalization,
    channels,
    check_normalized,
)
from robust_flatness.callbacks.training_step import TrainingStepCallback, unwrap, wrap
from robust_flatness.functional.attack import PGD, example_losses
from robust_flatness.functional.awp import AWP, skips_backward
from robust_flatness.functional.checks import Eps, check_count, check_number
from robust_flatness.functional.evaluation import to_float32

CLOSURES = "an optimizer that evaluates its closure once in a step"


class _HoldsPGD:
    """Holds an attack.

    Args:
        eps: Radius of the perturbation, in pixel units of images in [0, 1].
        step_size: Length of a step; None is eps · 0.007 / (8/255), the paper's 0.007 at 8/255.
        **kwargs: Other arguments of `functional.PGD`.
    """

    def __init__(self, *, eps: Eps = 8 / 255, step_size: Eps | None = None, **kwargs: Any) -> None:
        self.pgd = PGD(eps, step_size=step_size, **kwargs)


class AdversarialTraining(TrainingStepCallback, _HoldsPGD):
    """Replaces the images that `training_step` gets by adversarial examples (Madry et al., 2018).

    It serves any LightningModule whose `forward` maps images to logits. The attack acts on the
    batch that `training_step` would get, after all transfer hooks; the batch itself, and so the
    dataset, is never written. Validation, test and all measures see clean images. `forward` is
    called several times in a step, in eval mode.

    The noise belongs to (seed, number of the batch): a resumed run continues exactly, and several
    processes train as one if each has every N-th image of a batch, as with `DistributedSampler`.

    Args:
        fraction: Share of each batch that is attacked: its first images, which are random ones if
            the loader shuffles. The others stay as they are.
        warmup: Number of epochs in which the radius rises: in epoch e < `warmup`, counted from 0,
            radius and step are (e + 1) / (warmup + 1) of theirs.
        normalization: `(mean, std)` if the batches are normalized images; the attack acts on pixels
            in [0, 1] all the same, and `eps` is in their units.
        **kwargs: Arguments of `TrainingStepCallback` and of `functional.PGD`.

    Raises:
        ValueError: If an argument is out of range; before training, if the module has several
            optimizers; in the first step, if images are not in [0, 1] or were not normalized, or if
            labels are soft or outputs are no logits and there is no criterion.

    Example:
        >>> AdversarialTraining(eps=8 / 255, steps=10, keep="last").pgd.steps
        10
    """

    order: ClassVar[int] = 0

    def __init__(
        self,
        *,
        fraction: float = 1.0,
        warmup: int = 0,
        normalization: Normalization | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_number("fraction", fraction, high=1.0)
        check_count("warmup", warmup)
        if normalization is not None:
            channels(normalization)  # Checks it.
        self.fraction, self.warmup, self.normalization = fraction, warmup, normalization
        self._channels: list[Tensor] = []

    @override
    def check_images(self, images: Tensor) -> None:
        if images.ndim != 4 or not images.is_floating_point():
            raise ValueError(
                "Expected images to be floating point of shape (N, C, H, W) for the attack but got "
                f"{images.dtype} of shape {tuple(images.shape)}."
            )
        if self.normalization is not None:
            self._channels = [
                values.to(to_float32(images)) for values in channels(self.normalization)
            ]
            if (count := len(self._channels[0])) not in (1, images.shape[1]):
                raise ValueError(
                    f"Expected `normalization` to be of {images.shape[1]} channels, as the images "
                    f"of a batch, but got {count}."
                )
        if len(images) == 0:
            return
        pixels = self.to_pixels(images)
        low, high = pixels.min().item(), pixels.max().item()
        # Undoing a normalization rounds.
        slack = ROUNDING if self.normalization else 0.0
        if not (low >= -slack and high <= 1 + slack):
            raise ValueError(
                "Expected `normalization` to be (mean, std) that maps pixels in [0, 1] to the "
                f"images of a batch but got {self.normalization}, with which pixels are in "
                f"[{low:.3g}, {high:.3g}]."
            )
        if self.normalization is not None:
            check_normalized(images, self.normalization)

    @override
    def around_step(self, step: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
        images, labels = self.images_and_labels(batch)
        batch = self.with_images(batch, self.craft(images, labels))
        # Older versions of PyTorch keep casts of the weights that were made without a graph.
        torch.clear_autocast_cache()
        return step(batch, *args, **kwargs)

    def craft(self, images: Tensor, labels: Tensor) -> Tensor:
        """Images `(N, C, H, W)` of this process's part of the batch, the first ones adversarial."""
        noise, pgd = self.noise, self.attack_of(self.trainer.current_epoch)
        attacked = round(self.fraction * noise.world_size * len(images))
        # The first rows of the global batch, so that any number of processes attacks the same.
        first = slice(len(range(noise.rank, attacked, noise.world_size)))
        start = noise.starts(pgd, images.shape, "start", images.device)[first]
        pixels = self.to_pixels(images[first])
        network = _AttackedModule(self.module, self, labels[first])
        criterion = example_losses if self.criterion is None else _first_column
        with noise.dropout(self.module, images.device):
            adversarial = noise.craft(pgd, network, pixels, labels[first], criterion, start)
        # A copy has the type and the memory format of the batch.
        crafted = images.detach().clone()
        crafted[first] = self.from_pixels(adversarial).to(images)
        return crafted

    def attack_of(self, epoch: int) -> PGD:
        """The attack in an epoch, which is weaker in the warm-up."""
        if epoch >= self.warmup:
            return self.pgd
        share = (epoch + 1) / (self.warmup + 1)
        return replace(self.pgd, eps=share * self.pgd.eps, step_size=share * self.pgd.length)

    def to_pixels(self, images: Tensor) -> Tensor:
        """Images of a batch as pixels, float32 at least, in [0, 1] up to rounding."""
        if self.normalization is None:
            return images
        images = to_float32(images)
        mean, std = (values.to(images) for values in self._channels)
        return images * std + mean

    def from_pixels(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1] as images of a batch."""
        if self.normalization is None:
            return pixels
        mean, std = (values.to(pixels) for values in self._channels)
        return (pixels - mean) / std


class _AttackedModule(nn.Module):
    """A module as a map from pixels to what attacks take: logits, or by a criterion losses."""

    def __init__(self, module: nn.Module, callback: AdversarialTraining, labels: Tensor) -> None:
        super().__init__()
        self.module, self.callback, self.labels = module, callback, labels

    def forward(self, pixels: Tensor) -> Tensor:
        outputs = self.module(self.callback.from_pixels(pixels))
        if self.callback.criterion is None:
            return self.callback.logits(outputs)
        losses = self.callback.losses(outputs, self.labels)
        # Attacks take two outputs at least, and warn of probabilities.
        return torch.stack([losses, -torch.ones_like(losses)], dim=1)


def _first_column(outputs: Tensor, labels: Tensor) -> Tensor:
    return outputs[:, 0]


class _HoldsAWP:
    def __init__(self, **kwargs: Any) -> None:
        self.awp = AWP(**kwargs)


class AdversarialWeightPerturbation(TrainingStepCallback, _HoldsAWP):
    """Differentiates the loss of `training_step` at adversarially perturbed weights (AWP).

    In each step the weights of convolution and linear layers move to w + ν, ν_l = ξ‖w_l‖ g_l /
    ‖g_l‖, where g is the gradient of the criterion on what `forward` returns for the batch that
    `training_step` gets: the adversarial one beside `AdversarialTraining`. `training_step` and its
    backward run there, so BatchNorm statistics come from w + ν, and the weights are restored bit
    for bit before the optimizer moves them (Wu et al., 2020). Processes average g before they
    normalize it. `awp/relative_norm_min` and `_max` log ‖ν_l‖ / ‖w_l‖ over layers and steps.

    With manual optimization a batch may have one backward.

    Args:
        warmup: Number of epochs before weights are perturbed.
        **kwargs: Arguments of `TrainingStepCallback` and of `functional.AWP`.

    Raises:
        ValueError: If an argument is out of range; before training, if the module has several
            optimizers, or one that evaluates its closure repeatedly, if `order` does not suit it,
            or if it is not certain what tensors a layer computes with; in a step, if labels are
            soft or outputs are no logits and there is no criterion, or if a batch has several
            backwards.

    Example:
        >>> AdversarialWeightPerturbation(xi=0.005).awp.xi
        0.005
    """

    order: ClassVar[int] = 1

    def __init__(self, *, warmup: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_count("warmup", warmup)
        self.warmup = warmup
        self._hooks: list[RemovableHandle] = []
        self._forget()

    def _forget(self) -> None:
        self.awp.forget()
        self._batch, self._counts = -1, Counter[str]()

    def _count(self, event: str) -> int:
        """Counts an event, and returns how often it has happened in the current batch."""
        if self._batch != self.noise.step:
            self._batch, self._counts = self.noise.step, Counter()
        self._counts[event] += 1
        return self._counts[event]

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._forget()
        self.awp.find(pl_module)
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, LBFGS):
                raise self._refusal(CLOSURES, "LBFGS")
            self.awp.check_optimizer(optimizer)
            # With manual optimization the user may call `loss.backward()`.
            self._hooks.append(optimizer.register_step_pre_hook(self._before_update))
        if self.awp.order == "awp" and not pl_module.automatic_optimization:
            raise self._refusal("automatic optimization for `order` awp", "manual optimization")
        wrap(pl_module, "backward", self.order, self._around_backward)
        wrap(pl_module, "configure_gradient_clipping", self.order, self._around_clipping)

    def _refusal(self, wanted: str, came: str) -> ValueError:
        return ValueError(f"Expected {wanted} beside {type(self).__name__} but got {came}.")

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A callback may have replaced layers.
        self.awp.find(pl_module)

    @override
    def around_step(self, step: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
        module, noise = self.module, self.noise
        if self._count("step") > 1:
            raise self._refusal(CLOSURES, type(self.trainer.optimizers[0]).__name__)
        if self.trainer.current_epoch >= self.warmup and not skips_backward(self.trainer):
            images, labels = self.images_and_labels(batch)
            with noise.dropout(module, images.device):
                self.awp.perturb(module, lambda: self.losses(module(images), labels).mean(), noise)
        output = None
        try:
            output = step(batch, *args, **kwargs)
        finally:
            # Without a loss nothing follows that needs the perturbation, but maybe an update.
            if output is None or not module.automatic_optimization:
                self.awp.restore()
            else:
                # Averages of weights may be taken in `on_before_zero_grad`.
                self.awp.exchange()
        return output

    def _around_backward(self, backward: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        if self._count("backward") > 1:
            raise self._refusal("one backward for each batch", "a second one")
        if self.module.automatic_optimization:
            self.awp.exchange()
        try:
            backward(*args, **kwargs)
        finally:
            self.awp.restore()

    def _before_update(self, optimizer: Optimizer, *_: Any) -> None:
        self.awp.restore()
        if not self.module.automatic_optimization and self._count("update") > 1:
            raise self._refusal("one optimizer step for each batch", "a second one")

    def _around_clipping(
        self, clip: Callable[..., Any], optimizer: Optimizer, *args: Any, **kwargs: Any
    ) -> None:
        clip(optimizer, *args, **kwargs)
        self.awp.shift_decay(optimizer)

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        # Lightning may skip the backward.
        self.awp.restore()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.awp.restore()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (extremes := self.awp.take_relative_norms()) is not None:
            for name, value in zip(("min", "max"), extremes):
                pl_module.log(f"awp/relative_norm_{name}", value, reduce_fx=name, sync_dist=True)

    @override
    def _release(self) -> None:
        self.awp.restore()
        if self._module is not None:
            for name in ("backward", "configure_gradient_clipping"):
                unwrap(self._module, name, self.order)
        while self._hooks:
            self._hooks.pop().remove()
        super()._release()
