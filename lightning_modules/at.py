"""Adversarial training."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric

from robust_flatness.configs.types import Eps
from robust_flatness.functional.attack import PGD, Keep
from robust_flatness.functional.checks import check_count, upcast
from robust_flatness.functional.modes import Mode
from robust_flatness.functional.noise import Norm, Start
from robust_flatness.lightning_modules.pgd_mixin import PGDMixin
from robust_flatness.lightning_modules.schedules import MultiStep
from robust_flatness.networks import Normalize, ResNet18

NetworkCallable = Callable[[int, int], nn.Module]
CLASS_KEY, SEED_KEY = "robust_flatness_class", "robust_flatness_seed"


class AT(PGDMixin, LightningModule):
    """Adversarial training (Madry et al., 2018): minimises cross-entropy on PGD examples alone.

    The base of all variants: a variant overrides `objective`, or `perturb`, which comes between
    attack and objective. Defaults are the paper's baseline (Sec. 3): ResNet-18, PGD-7 at 8/255,
    SGD with Nesterov momentum, drops at 40, 60 and 80 %. Weight decay is 5e-4 as in the paper's
    code and tables; its text prints 0.005.

    Args:
        network: Builds the network from number of classes and of channels; it takes normalised
            images `(N, C, H, W)` and returns logits `(N, num_classes)`.
        num_classes: Number of classes, linked from the data on the command line.
        in_channels: Number of image channels, linked likewise.
        mean: Per-channel mean for the normalisation in front of the network, linked likewise.
        std: Per-channel standard deviation, linked likewise.
        eps: Radius of the training attack, in pixel units of images in [0, 1].
        steps: Steps of the training attack.
        step_size: Length of a step; `None` is the paper's 0.007 at 8/255, in proportion elsewhere.
        norm: `linf` or `l2`.
        keep: `best` (the paper) or `last` iterate.
        start: `paper`, `uniform`, `gaussian` or `zero`, see `functional.noise.random_start`.
        craft_mode: `eval` (the paper) or `train`, which moves BatchNorm statistics while crafting.
        optimizer: Builds the optimizer from the parameters.
        lr_scheduler: Builds the schedule from the optimizer; stepped once an epoch.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> from functools import partial
        >>> module = AT(partial(ResNet18, width=4))
        >>> module(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        network: NetworkCallable = ResNet18,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        mean: Sequence[float] = (0.4914, 0.4822, 0.4465),
        std: Sequence[float] = (0.2470, 0.2435, 0.2616),
        eps: Eps = 8 / 255,
        steps: int = 7,
        step_size: Eps | None = None,
        norm: Norm = "linf",
        keep: Keep = "best",
        start: Start = "paper",
        craft_mode: Mode = "eval",
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(
            params, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4
        ),
        lr_scheduler: LRSchedulerCallable = MultiStep,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        for name in ("network", "optimizer", "lr_scheduler"):
            # The command line records how to build these; a Python callable cannot be stored.
            if callable(self.hparams.get(name)):
                self.hparams.pop(name)
        check_count("num_classes", num_classes, low=2)
        self.num_classes = num_classes
        self.pgd = PGD(eps, steps, step_size, norm, keep, start, craft_mode)
        self.normalize = Normalize(mean, std)
        # Convolutions are faster on CPU and GPU alike with channels innermost in memory.
        self.network = network(num_classes, in_channels).to(memory_format=torch.channels_last)
        self._optimizer, self._lr_scheduler = optimizer, lr_scheduler
        # By default these would hide batches whose loss is NaN, and wait for the device to do so.
        self.train_loss = MeanMetric(nan_strategy="disable")
        self.train_robust_loss = MeanMetric(nan_strategy="disable")
        self.train_robust_error = MeanMetric(nan_strategy="disable")

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(N, num_classes)` of images `(N, C, H, W)` in [0, 1]."""
        logits: Tensor = self.network(self.normalize(images))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """One step: craft, perturb weights (nothing here), objective on the result."""
        images, labels = batch
        adversarial = self.craft(images, labels)
        self.perturb(images, adversarial, labels)
        loss, logits = self.objective(images, adversarial, labels)
        self._record(loss.detach(), logits.detach(), labels)
        return loss

    def perturb(self, images: Tensor, adversarial: Tensor, labels: Tensor) -> None:
        """Comes before the objective; variants that perturb weights do it here."""

    def objective(
        self, images: Tensor, adversarial: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss to minimise, and the logits of the adversarial examples.

        Args:
            images: `(N, C, H, W)` clean images in [0, 1].
            adversarial: `(N, C, H, W)` adversarial examples.
            labels: `(N,)` true classes.

        Returns:
            Scalar loss and logits `(N, num_classes)`.
        """
        logits = upcast(self(adversarial))
        return cross_entropy(logits, labels), logits

    def _record(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        # Once for each example, so that every example weighs the same in the epoch's mean.
        self.train_loss.update(loss.expand(len(labels)))
        self.train_robust_loss.update(cross_entropy(logits, labels, reduction="none"))
        self.train_robust_error.update((logits.argmax(1) != labels).float())

    def on_train_epoch_end(self) -> None:
        """Logs what the training batches gave; once an epoch, as each `log` call costs time."""
        self.log("train/loss", self.train_loss)
        self.log("train/robust_loss", self.train_robust_loss, prog_bar=True)
        self.log("train/robust_error", self.train_robust_error)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Does nothing: `trainer.test` is measured by callbacks, on fixed sets of images."""

    def configure_optimizers(self) -> Any:
        """Optimizer and schedule from the module's arguments.

        Raises:
            ValueError: If the schedule counts in shares and the number of epochs is unlimited.
        """
        optimizer = self._optimizer(self.parameters())
        scheduler = self._lr_scheduler(optimizer)
        if isinstance(scheduler, MultiStep):
            epochs = self.trainer.max_epochs
            if epochs is None or epochs < 1:
                raise ValueError(
                    "Expected `trainer.max_epochs` to be >= 1, as the schedule drops at shares of "
                    f"training, but got {epochs}."
                )
            scheduler.total = epochs
        monitor = getattr(scheduler, "monitor", None)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "monitor": monitor},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Writes down which class made the checkpoint, and the seed of its noise."""
        checkpoint[CLASS_KEY] = type(self).__name__
        checkpoint[SEED_KEY] = self._run_seed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses the checkpoint of another variant.

        Raises:
            ValueError: If another class wrote the checkpoint.
        """
        written = checkpoint.get(CLASS_KEY, type(self).__name__)
        if written != type(self).__name__:
            raise ValueError(
                f"Expected a checkpoint written by {type(self).__name__} but got one of {written}."
            )
        self._run_seed = checkpoint.get(SEED_KEY)
