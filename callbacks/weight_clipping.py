"""Clipping of each weight."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from robust_flatness.functional.checks import check_number, check_strategy

# `_NormBase` is the base of BatchNorm, SyncBatchNorm and InstanceNorm in all dimensions.
SCALING = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class WeightClipping(Callback):
    """Clips every trainable parameter to [-w_max, w_max] after each optimizer step.

    The paper's row "weight clipping" (Table 1) has w_max = 0.005, chosen from 0.005, 0.01 and
    0.025. It clips weights, biases and the parameters of its BatchNorm, whose scale is 1 + weight
    (`networks.ReparameterizedBatchNorm2d`). Clipping follows directly after the step, before
    averages, measures and checkpoints, whatever the order of the callbacks. The authors clip before
    each forward instead: because the initial weights are clipped here, training is the same, but
    their last step stays unclipped.

    Logs `weight_clipping/largest_weight`, the largest |w|, and `weight_clipping/share_clipped`, the
    share of entries with |w| = w_max, of all clipped parameters, once an epoch.

    Args:
        w_max: Largest absolute value, > 0, as the type of the weights rounds it.
        leave_out: Names of parameters that are not clipped, or shell patterns: `*.norm1.weight`.

    Raises:
        ValueError: If `w_max` is not positive; before training, if the scale of an ordinary
            normalization layer would be clipped, or `leave_out` names no parameter or all of them.

    Example:
        >>> WeightClipping(0.01, leave_out=["*.bias"]).leave_out
        ('*.bias',)
    """

    def __init__(self, w_max: float = 0.005, *, leave_out: Sequence[str] = ()) -> None:
        check_number("w_max", w_max)
        if w_max == 0:
            raise ValueError("Expected `w_max` to be above 0, where all weights are, but got 0.")
        self.w_max = w_max
        self.leave_out = (leave_out,) if isinstance(leave_out, str) else tuple(leave_out)
        self._hooks: list[RemovableHandle] = []

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._release()
        check_strategy(trainer, type(self).__name__)
        self._check(pl_module)
        self._clip(pl_module)
        # On the optimizer itself, so that nothing can see weights that are not yet clipped.
        hook = partial(self._clip, pl_module)
        self._hooks = [o.register_step_post_hook(hook) for o in trainer.optimizers]

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        entries = torch.cat([p.detach().abs().flatten() for p in self._clipped(pl_module).values()])
        metrics = {
            "weight_clipping/largest_weight": entries.max(),
            "weight_clipping/share_clipped": (entries >= self.w_max).float().mean(),
        }
        pl_module.log_dict(metrics, sync_dist=True, reduce_fx="max")

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._release()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    def _release(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    @torch.no_grad()
    def _clip(self, module: nn.Module, *_: Any) -> None:
        for parameter in self._clipped(module).values():
            parameter.clamp_(-self.w_max, self.w_max)

    def _clipped(self, module: nn.Module) -> dict[str, nn.Parameter]:
        return {
            name: parameter
            for name, parameter in module.named_parameters()
            if parameter.requires_grad and not any(fnmatchcase(name, p) for p in self.leave_out)
        }

    def _check(self, module: nn.Module) -> None:
        names = [name for name, _ in module.named_parameters()]
        for pattern in self.leave_out:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"Expected `leave_out` to name parameters such as {names[0]} but got {pattern}."
                )
        clipped = self._clipped(module)
        if not clipped:
            raise ValueError(
                "Expected `leave_out` to leave trainable parameters to clip but got "
                f"{list(self.leave_out)}."
            )
        scales = [
            f"{name}.weight"
            for name, layer in module.named_modules()
            if isinstance(layer, SCALING) and f"{name}.weight" in clipped
        ]
        if scales:
            raise ValueError(
                f"Expected `leave_out` to name the scales {', '.join(scales)}, without which "
                f"normalized activations would shrink to {self.w_max:g}, but got "
                f"{list(self.leave_out)}; a network with `ReparameterizedBatchNorm2d` needs none."
            )
