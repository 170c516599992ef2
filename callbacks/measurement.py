"""What all measuring callbacks share: when, on which images, and how without a trace."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.utils.data import Dataset

from robust_flatness.callbacks.cost import announce_cost
from robust_flatness.callbacks.examples import (
    Examples,
    Normalization,
    PixelInput,
    warn_of_one_class,
)
from robust_flatness.callbacks.isolation import averaged_weights, isolated
from robust_flatness.callbacks.logs import log_after_epochs, log_equal
from robust_flatness.callbacks.measured_images import FixedImages, find_examples, has_examples
from robust_flatness.callbacks.progress import measuring
from robust_flatness.callbacks.sharding import measure_sharded
from robust_flatness.functional.checks import (
    Eps,
    check_choice,
    check_count,
    check_examples,
    check_radius,
    errors_on_all_ranks,
)
from robust_flatness.functional.evaluation import first_logits
from robust_flatness.functional.layer_weights import perturbed_parameters
from robust_flatness.functional.noise import Norm
from robust_flatness.networks import Normalize

DEFAULT_EPS = 8 / 255
SPLITS = ("train", "val", "test")
# Images whose logits are looked at before training.
LOOKED_AT = 8
# What is measured on training images must not be mistaken for what training batches gave.
PREFIX = {"train": "train_eval", "val": "val", "test": "test"}


class Measurement(FixedImages, ABC):
    """Measures the network at the end of epochs, on fixed images, without touching training.

    A subclass says what in `measure`; this class says when and on what, and logs it. It serves any
    LightningModule whose `forward` maps images to logits and whose batches are
    `(images, labels)`. Measuring is in float32 (float64 if the weights are), outside autocast, in
    eval mode, sharded over ranks by global index; where training averages weights, what is measured
    are the averaged ones. The last epoch is measured however training ends: if it turns out to be
    the last only afterwards, its figures are logged when training has ended. A figure that is not
    finite is logged as it is.

    The images of a loader are those that it delivers first: its sampler or batch sampler, its
    `collate_fn`, the transfer hooks of module and datamodule, `limit_*_batches` and
    `overfit_batches` apply. A shuffled set counts in its own order; a part that is drawn at random
    is drawn once for a run and kept in its checkpoints. They are read in a fork of the process, so
    that training does not notice. What is not sure is refused: drawing with replacement, iterable
    datasets, training images that change (random augmentation), ranks that read different images.

    Args:
        split: `train`, `val` or `test`.
        dataset: Items `(image, label)`, read as they are; `None` takes the datamodule's
            `split_dataset(split)` if it has one, else the trainer's loader for that stage. In
            `trainer.test` after `fit`, a split that the test does not bring is that of `fit`.
        num_examples: The first so many images are measured, or all there are.
        every_n_epochs: Measured in epochs 0, n, 2n, ... and in the last.
        eps: Radius of the attack, say 8/255, at most 1 with `linf`; `None` takes the datamodule's
            `eps`, else 8/255.
        steps: Steps of the attack.
        step_size: Length of a step; `None` is the paper's 0.007 at 8/255, in proportion elsewhere.
        norm: `linf` or `l2`.
        restarts: Restarts of the attack.
        batch_size: Images measured at once, and the unit that ranks share out.
        seed: Of all random numbers; independent of the training seed.
        normalization: `(mean, std)` where module and dataset deal in normalised images; attacks
            act on pixels in [0, 1] all the same.

    Attributes:
        moves_weights: Whether it needs weights that can be perturbed.
        arrays: What the last measurement found of each example, `(N,)` by name; may be empty.
        figures: Figures of the last measurement in `fit`, by logged name.
        measured_step: Optimizer steps before it, -1 if there was none.
        measured_late: Whether it came when training had ended.

    Raises:
        ValueError: If an argument is out of range; before training, if the images are not sure, or
            labels are not one class index for each image.
    """

    moves_weights = False

    def __init__(
        self,
        *,
        split: str = "test",
        dataset: Dataset[Any] | None = None,
        num_examples: int = 1000,
        every_n_epochs: int = 1,
        eps: Eps | None = None,
        steps: int = 10,
        step_size: Eps | None = None,
        norm: Norm = "linf",
        restarts: int = 1,
        batch_size: int = 128,
        seed: int = 0,
        normalization: Normalization | None = None,
    ) -> None:
        check_choice("split", split, SPLITS)
        check_choice("norm", norm, get_args(Norm))
        for name, value in {
            "num_examples": num_examples,
            "every_n_epochs": every_n_epochs,
            "restarts": restarts,
            "batch_size": batch_size,
        }.items():
            check_count(name, value, low=1)
        check_count("steps", steps)
        for name, number in {"eps": eps, "step_size": step_size}.items():
            if number is not None:
                check_radius(name, number, norm)
        if normalization is not None:
            Normalize(*map(list, normalization))  # checks it
        self.split, self.dataset, self.num_examples = split, dataset, num_examples
        self.every_n_epochs, self.eps, self.steps = every_n_epochs, eps, steps
        self.step_size, self.norm, self.restarts = step_size, norm, restarts
        self.batch_size, self.seed, self.normalization = batch_size, seed, normalization
        self.arrays: dict[str, Tensor] = {}
        self._examples: Examples | None = None
        self._fitted: Examples | None = None
        self._begin()

    def _begin(self) -> None:
        self.figures: dict[str, float] = {}
        self.measured_step, self.measured_late = -1, False
        self._unmeasured_epoch: int | None = None

    @abstractmethod
    def measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Measures the module as it stands, on all ranks.

        Args:
            trainer: The trainer.
            pl_module: The module.

        Returns:
            Figures by logged name, the same on every rank; what is undefined, such as a mean over
            nothing, is left out.
        """

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of what `measure` returns, where they are known in advance."""
        return ()

    def passes(self) -> tuple[int, int] | None:
        """Forward and backward passes of each image that one measurement costs.

        Returns:
            Both numbers, or None where they depend on the network.
        """
        return None

    def count_of_images(self) -> int:
        """Number of images that are measured, at most `num_examples`."""
        return self.num_examples if self._examples is None else len(self._examples)

    @property
    def state_key(self) -> str:
        """Tells two callbacks of a class apart in checkpoints, by their split."""
        return f"{type(self).__name__}[{self.split}]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets the figures of an earlier run, and its images unless a test brings no such split.

        Raises:
            ValueError: If the radius that the datamodule says is out of range.
        """
        super().setup(trainer, pl_module, stage)
        self._fitted = None if stage == "fit" else self._examples or self._fitted
        self._examples = None
        self._begin()
        self.radius(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reads the images, so that bad ones are refused before anything is trained.

        Raises:
            ValueError: On all processes, if there are no images, if they do not fit the network, if
                it does not return logits, or if it has weights that cannot be perturbed and this
                measure would.
        """
        examples = self.examples(trainer, pl_module)
        images = examples.images[:LOOKED_AT].to(pl_module.device)
        with (
            self.network(trainer, pl_module) as network,
            torch.no_grad(),
            errors_on_all_ranks(),
        ):
            classes = first_logits(network, images).shape[1]
            check_examples(examples.images, examples.labels, classes)
            if self.moves_weights:
                perturbed_parameters(pl_module)
        warn_of_one_class(examples, classes, self.split)
        watching = [c for c in trainer.callbacks if isinstance(c, Measurement)]  # type: ignore[attr-defined]
        if trainer.state.fn == TrainerFn.FITTING and watching and watching[-1] is self:
            announce_cost(trainer, pl_module, watching)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reads the images, so that bad ones are refused before anything is measured."""
        self.on_train_start(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures and logs, if this epoch is one to measure."""
        epoch = trainer.current_epoch
        if self.is_due(trainer):
            self._unmeasured_epoch = None
            log_equal(pl_module, self.take(trainer, pl_module, epoch))
        else:
            self._unmeasured_epoch = epoch

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the last epoch, if nobody knew at its end that it was the last."""
        epoch, self._unmeasured_epoch = self._unmeasured_epoch, None
        if epoch is not None:
            self.measured_late = True
            log_after_epochs(trainer, self.take(trainer, pl_module, epoch), epoch)

    def take(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> dict[str, float]:
        """Measures the weights that an epoch ended with.

        Args:
            trainer: The trainer.
            pl_module: The module.
            epoch: The epoch; the trainer's own is the next one when training has ended.

        Returns:
            Figures by logged name.
        """
        with averaged_weights(trainer, pl_module):
            self.figures = self.measure(trainer, pl_module)
        self.measured_step = trainer.global_step
        return self.figures

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures and logs in `trainer.test`."""
        log_equal(pl_module, self.measure(trainer, pl_module))

    def is_due(self, trainer: Trainer) -> bool:
        """Whether the current epoch is measured: every n-th from the first on, and the last."""
        epoch, steps = trainer.current_epoch, trainer.global_step
        stops = trainer.should_stop and (
            epoch + 1 >= (trainer.min_epochs or 0) and steps >= (trainer.min_steps or 0)
        )
        last = epoch + 1 == trainer.max_epochs or steps >= trainer.max_steps > -1 or stops
        return epoch % self.every_n_epochs == 0 or last

    def examples(self, trainer: Trainer, pl_module: LightningModule) -> Examples:
        """The measured images, read once."""
        if self._examples is None and self._fitted is not None and self.dataset is None:
            # `trainer.test` forgets the loaders of `fit`.
            self._examples = None if has_examples(trainer, self.split) else self._fitted
        if self._examples is None:
            with isolated(trainer, pl_module):
                self._examples = find_examples(
                    trainer,
                    pl_module,
                    split=self.split,
                    count=self.num_examples,
                    dataset=self.dataset,
                    normalization=self.normalization,
                )
        return self._examples

    def radius(self, trainer: Trainer) -> float:
        """The attack's radius: as given, else the datamodule's, else 8/255.

        Raises:
            ValueError: If the datamodule's is out of range.
        """
        if self.eps is not None:
            return self.eps
        eps = float(getattr(getattr(trainer, "datamodule", None), "eps", DEFAULT_EPS))
        check_radius("data.eps", eps, self.norm)
        return eps

    def attack_settings(self, trainer: Trainer) -> dict[str, Any]:
        """What the functions of `functional` that attack a set are given alike."""
        return {
            "eps": self.radius(trainer),
            "steps": self.steps,
            "restarts": self.restarts,
            "step_size": self.step_size,
            "norm": self.norm,
            "seed": self.seed,
            "batch_size": self.batch_size,
        }

    @contextmanager
    def network(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[nn.Module]:
        """The network to measure, as a map from pixels in [0, 1] to logits, in isolation."""
        with isolated(trainer, pl_module):
            if self.normalization is None:
                yield pl_module
            else:
                yield PixelInput(pl_module, self.normalization)

    def sharded(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        measure: Callable[[Tensor, Tensor, list[int], Callable[[], None]], Tensor],
        *,
        what: str,
        attacks_per_batch: int,
    ) -> Tensor:
        """Measures every example once, on some rank.

        Args:
            trainer: The trainer.
            pl_module: The module, for its device.
            measure: Maps images, labels, global indices and a progress callback to values
                `(rows, N)`.
            what: Said beside the progress bar.
            attacks_per_batch: Attacks that `measure` reports for each batch.

        Returns:
            `(rows, N)` for all examples, float64, on the CPU of every rank.
        """
        examples, device = self.examples(trainer, pl_module), pl_module.device

        def part(indices: list[int]) -> Tensor:
            total = math.ceil(len(indices) / self.batch_size) * attacks_per_batch
            with measuring(trainer, what, total) as on_attack:
                return measure(
                    examples.images[indices].to(device),
                    examples.labels[indices].to(device),
                    indices,
                    on_attack,
                )

        return measure_sharded(trainer, len(examples), self.batch_size, part, device)
