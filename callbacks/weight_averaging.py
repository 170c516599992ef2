"""Exponential moving averages of the weights, whose horizon is a share of training."""

import math
from contextlib import ExitStack
from itertools import chain
from typing import Any, ClassVar, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging as LightningWeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn, update_bn
from torch.utils.data import Dataset
from typing_extensions import override

from robust_flatness.callbacks.fixed_images import FixedImages, Normalization, PixelInput
from robust_flatness.callbacks.measuring import (
    averaged_weights,
    copy_weights,
    own_weights,
)
from robust_flatness.functional.checks import check_choice, check_count, check_number
from robust_flatness.functional.evaluation import HALF, full_float32
from robust_flatness.measures.base import Split

BatchNormChoice = Literal["average", "reestimate"]
PAPER_STEPS = 58_650


class WeightAveraging(FixedImages, LightningWeightAveraging):
    """Averages the weights after each optimizer step, w̄ ← τ w̄ + (1 - τ) w, beginning with w̄ = w.

    The paper's row "weight averaging" (Table 1; Izmailov et al., 2018) has τ = 0.9975 from the
    start of 58,650 steps. All measures of this package, Lightning's validation and the checkpoints
    of `ModelCheckpoint` use the averaged weights, whatever the order of the callbacks; training
    continues with its own, which checkpoints hold as `current_model_state`. After `fit` the module
    holds the averaged weights. Logs `weight_averaging/relative_distance`, ‖w̄ - w‖ / ‖w‖ over all
    parameters, once an epoch.

    The paper's code copies the BatchNorm statistics of training, and re-estimates them from clean
    images after it. Here they are averaged like the weights, or re-estimated whenever the averaged
    weights are measured or saved: by one pass in train mode over equal batches. Integer buffers
    are copied.

    Args:
        decay: τ in [0, 1).
        reference_steps: Number of optimizer steps of the training that `decay` is meant for: a
            training of T steps uses 1 - (1 - τ) · reference_steps / T, so that the horizon is the
            same share of training. None uses `decay` as it is.
        batch_norm: `average` or `reestimate`.
        num_examples: Number of images, the first ones, that statistics are estimated from.
        batch_size: Number of images in a batch there, at most.
        dataset: Where those images come from; None takes those of the data, see `FixedImages`.
        split: `train`, `val` or `test`.
        normalization: `(mean, std)` if module and dataset use normalized images.

    Attributes:
        effective_decay: The decay of this training, None before it starts.

    Raises:
        ValueError: If an argument is out of range; before training, if its steps are unlimited, or
            if a `ModelCheckpoint` saves weights only, without the state of callbacks.

    Example:
        >>> WeightAveraging(0.99, reference_steps=None, batch_norm="reestimate").decay
        0.99
    """

    # Statistics may be those of augmented images.
    images_must_stay: ClassVar[bool] = False

    # Arguments of Lightning's callback are no arguments of this one, so none is passed on.
    def __init__(
        self,
        decay: float = 0.9975,
        *,
        reference_steps: int | None = PAPER_STEPS,
        batch_norm: BatchNormChoice = "average",
        num_examples: int = 1000,
        batch_size: int = 128,
        dataset: Dataset[Any] | None = None,
        split: Split = "train",
        normalization: Normalization | None = None,
    ) -> None:
        super().__init__(
            split=split,
            dataset=dataset,
            num_examples=num_examples,
            normalization=normalization,
            use_buffers=True,
            multi_avg_fn=self._move,
        )
        check_number("decay", decay, high=1)
        if decay == 1:
            raise ValueError("Expected `decay` to be below 1, as nothing moves at 1, but got 1.")
        check_count("batch_size", batch_size, low=1)
        if reference_steps is not None:
            check_count("reference_steps", reference_steps, low=1)
        check_choice("batch_norm", batch_norm, get_args(BatchNormChoice))
        self.decay, self.reference_steps = decay, reference_steps
        self.batch_norm, self.batch_size = batch_norm, batch_size
        self._validation = ExitStack()
        self._forget()

    def _forget(self) -> None:
        self.effective_decay: float | None = None
        self._average_model = None
        self._reestimated_at: int | None = None
        self._own: dict[str, Tensor] | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # An average belongs to one fit: left over in a test, it would replace what is tested.
        self._validation.close()
        self._forget()
        if stage != "fit":
            return
        if any(getattr(c, "save_weights_only", False) for c in trainer.checkpoint_callbacks):
            raise ValueError(
                "Expected `ModelCheckpoint` to save all beside `WeightAveraging` but got "
                "`save_weights_only=True`, which leaves the averaged weights out."
            )
        super().setup(trainer, pl_module, stage)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        average = self._average_model
        assert average is not None
        networks = (average.module, pl_module)
        for ours, theirs in zip(*(chain(n.parameters(), n.buffers()) for n in networks)):
            # Only now has the trainer's precision chosen a type.
            ours.data = ours.data.to(theirs)
        if any(weight.dtype in HALF for weight in pl_module.parameters()):
            rank_zero_warn(
                "WeightAveraging with weights in half precision: an average that moves by "
                f"1 - {self.decay:g} of a difference moves less than these resolve, and may stand "
                "still; precision 32-true or bf16-mixed averages float32 weights."
            )
        # It is read in each step, which must not wait for a device.
        average.n_averaged = average.n_averaged.cpu()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.effective_decay = self.decay
        if self.reference_steps is not None:
            steps = trainer.estimated_stepping_batches
            self.effective_decay = scaled_decay(self.decay, self.reference_steps, steps)
        # A batch that ends before the first step has nothing to average.
        self._latest_update_step = trainer.global_step
        if self.batch_norm == "reestimate":
            self.examples(trainer, pl_module)

    def _move(self, averages: list[Tensor], weights: list[Tensor], _: Any) -> None:
        """One step of the average, for tensors of one type."""
        if averages[0].is_floating_point() or averages[0].is_complex():
            assert self.effective_decay is not None
            get_ema_multi_avg_fn(self.effective_decay)(averages, weights, _)
            return
        for average, weight in zip(averages, weights):
            average.copy_(weight)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Entropy-SGD's weights between its outer steps are those of a walk.
        walking = any(getattr(optimizer, "walking", False) for optimizer in trainer.optimizers)
        step = trainer.global_step
        if not walking and step > self._latest_update_step and self.should_update(step - 1):
            self._update(pl_module)
            self._latest_update_step = step

    def _update(self, pl_module: LightningModule) -> None:
        """`AveragedModel.update_parameters`, but its counter is not copied to the device."""
        average = self._average_model
        assert average is not None
        groups: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        networks = (average.module, pl_module)
        for ours, theirs in zip(*(chain(n.parameters(), n.buffers()) for n in networks)):
            averages, weights = groups.setdefault(ours.dtype, ([], []))
            averages.append(ours.detach())
            weights.append(theirs.detach())
        for averages, weights in groups.values():
            if average.n_averaged == 0:
                torch._foreach_copy_(averages, weights)
            else:
                self._move(averages, weights, None)
        average.n_averaged += 1

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if self._updates > 0:
            assert self._average_model is not None
            weights = list(pl_module.parameters())
            with torch.no_grad():
                pairs = zip(self._average_model.module.parameters(), weights)
                distance = nn.utils.get_total_norm([average - w for average, w in pairs])
                distance = distance / nn.utils.get_total_norm(weights)
            pl_module.log(
                "weight_averaging/relative_distance", distance, sync_dist=True, reduce_fx="max"
            )

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation.enter_context(averaged_weights(trainer, pl_module))

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation.close()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._validation.close()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._updates > 0 and self._own is None:
            assert self._average_model is not None
            self.refresh_average(trainer, pl_module)
            # Checkpoints still to come must let training continue from here.
            named = [*pl_module.named_parameters(), *pl_module.named_buffers()]
            self._own = {name: tensor.detach().cpu().clone() for name, tensor in named}
            copy_weights(self._average_model.module, pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A finished run that is resumed skips training and the hooks at its end.
        self.on_train_end(trainer, pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._examples = {}
        if self._average_model is not None:
            self._average_model.cpu()

    @property
    def _updates(self) -> int:
        return 0 if self._average_model is None else int(self._average_model.n_averaged)

    def refresh_average(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Re-estimates the average's BatchNorm statistics, if that is requested and not yet done.

        All processes have the same averaged weights and images, so they need not communicate.
        """
        if self.batch_norm == "average" or self._updates in (0, self._reestimated_at):
            return
        assert self._average_model is not None
        network: nn.Module = self._average_model.module
        if self.normalization is not None:
            network = PixelInput(network, self.normalization)
        images = self.examples(trainer, pl_module).images
        # Forwards create tensors of the type that they have in training.
        types = trainer.precision_plugin.forward_context()
        with types, full_float32(pl_module.device):
            reestimate_batch_norm(network, images, self.batch_size)
        self._reestimated_at = self._updates

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "effective_decay": self.effective_decay}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.effective_decay = state_dict.get("effective_decay")

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._average_model is not None:
            self.refresh_average(trainer, pl_module)
            own = self._own or own_weights(pl_module) or {}
            checkpoint["state_dict"] = {
                name: own.get(name, value) for name, value in checkpoint["state_dict"].items()
            }
        super().on_save_checkpoint(trainer, pl_module, checkpoint)

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # In a test there is nothing to load: the module gets the averaged weights as its own.
        if self._average_model is not None:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)


def scaled_decay(decay: float, reference_steps: int, steps: float) -> float:
    """Returns the decay τ whose horizon 1 / (1 - τ) is the same share of another training.

    It is 0 if the horizon would be less than a step.

    Args:
        decay: Decay in [0, 1) of a training of `reference_steps`.
        reference_steps: Number of steps of that training, >= 1.
        steps: Number of steps of the other one, as Lightning counts them: -1 or infinite if
            unlimited.

    Raises:
        ValueError: If `steps` is no number of steps.

    Example:
        >>> round(scaled_decay(0.9975, 58_650, 5_865), 9), scaled_decay(0.9975, 58_650, 100)
        (0.975, 0.0)
    """
    if not 0 < steps < math.inf:
        raise ValueError(
            "Expected `max_epochs` or `max_steps` to limit training, for the averages to span a "
            f"share of it, but got {steps} steps; `reference_steps=None` takes `decay` as it is."
        )
    return max(0.0, 1 - (1 - decay) * (reference_steps / steps))


def reestimate_batch_norm(network: nn.Module, images: Tensor, batch_size: int) -> None:
    """Replaces BatchNorm's running statistics by the mean of those of batches of images.

    One pass in train mode over batches of at most `batch_size`, with a fixed seed for Dropout, that
    leaves global random state alone.
    """
    parameters = list(network.parameters())
    images = images.to(parameters[0]) if parameters else images
    # Batches count alike, so they are of one size, up to one image.
    batches = images.tensor_split(math.ceil(len(images) / batch_size))
    with torch.inference_mode(False), isolate_rng():
        torch.manual_seed(0)
        update_bn(batches, network)
