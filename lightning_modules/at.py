"""Adversarial training."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from robust_flatness.functional.attack import PGD, FriendlyPGD, Keep
from robust_flatness.functional.checks import (
    Eps,
    check_choice,
    check_count,
    check_number,
    check_outputs,
    check_radius,
)
from robust_flatness.functional.evaluation import (
    Mode,
    evaluation_context,
    first_logits,
    nan_unless_finite,
    predicted_classes,
    to_float32,
)
from robust_flatness.functional.noise import Norm, Start
from robust_flatness.functional.objectives import Smoothing, TrainingLabels
from robust_flatness.lightning_modules.epoch_means import EpochMeans
from robust_flatness.lightning_modules.fast_mixin import Fast, FastMixin
from robust_flatness.lightning_modules.network_of_checkpoint import (
    LAYERS_KEY,
    check_network_of,
    plain_layers,
)
from robust_flatness.lightning_modules.pgd_mixin import PGDMixin
from robust_flatness.lightning_modules.schedules import MultiStep, prepare_schedule
from robust_flatness.lightning_modules.walk_mixin import WalkMixin
from robust_flatness.networks import Normalize, ResNet18, build_network, channels_last
from robust_flatness.networks.layers import channel_values
from robust_flatness.networks.user_network import Network

Incorrect = Literal["attack", "ignore", "predicted"]
CLASS_KEY, SEED_KEY = "robust_flatness_class", "robust_flatness_seed"


class AT(FastMixin, PGDMixin, WalkMixin):
    """Adversarial training (Madry et al., 2018): minimises cross-entropy on PGD examples alone.

    The base of all variants: a variant overrides `objective`, `attack`, or `perturb`, which comes
    between them. Defaults are the paper's baseline (Sec. 3): ResNet-18, PGD-7 at 8/255, SGD with
    Nesterov momentum, drops at 40, 60 and 80 %. Weight decay is 5e-4 as in the paper's code and
    tables; its text prints 0.005.

    Args:
        network: Takes normalised images `(N, C, H, W)` and returns logits `(N, num_classes)`: a
            class or function that builds it, see `build_network`; or a module, which is trained as
            it is: two variants of one module share its weights. A checkpoint does not hold what was
            built in Python: load it with `network=`.
        num_classes: Number of classes, linked from the data on the command line.
        in_channels: Number of image channels, linked likewise.
        mean: Per-channel mean for the normalisation in front of the network, linked likewise: a
            sequence of numbers, a tensor or an array.
        std: Per-channel standard deviation, linked likewise.
        eps: Radius of the training attack, in pixel units of images in [0, 1].
        eps_scale: Factor on the radius, but not on the step; 9/8 is the paper's larger ε.
        steps: Steps of the training attack.
        step_size: Length of a step; `None` is the paper's 0.007 at 8/255, in proportion elsewhere.
        norm: `linf` or `l2`.
        keep: `best` (the paper) or `last` iterate.
        start: `paper`, `uniform`, `gaussian` or `zero`, see `functional.noise.random_start`.
        craft_mode: `eval` (the paper) or `train`, which moves BatchNorm statistics while crafting.
        tau: Stops the attack τ iterates after an example is misclassified, see `FriendlyPGD`.
        incorrect: What to do with images that are misclassified when clean: `attack` them, `ignore`
            the attack and train on the clean image, or attack the `predicted` class in place of the
            label, which prevents label leaking. Predictions are made in eval mode.
        label_noise: Share of labels drawn anew in each batch, see `TrainingLabels`.
        label_smoothing: Probability taken from the true class.
        smoothing_spread: Who receives it: `others` (the paper's text) or `all` (its code).
        optimizer: Builds the optimizer from the parameters.
        lr_scheduler: Builds the schedule from the optimizer; stepped once an epoch, `Cyclic` after
            each step.
        fast: bfloat16 and fused steps on GPUs that have them, see `FastMixin`; `graph` is the same
            as `True`.

    Raises:
        ValueError: If an argument is out of range; before the first step, if the network does not
            take the images or has not as many outputs as there are classes.

    Example:
        >>> from functools import partial
        >>> module = AT(partial(ResNet18, width=4))
        >>> module(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        network: Network = ResNet18,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        mean: Sequence[float] = (0.4914, 0.4822, 0.4465),
        std: Sequence[float] = (0.2470, 0.2435, 0.2616),
        eps: Eps = 8 / 255,
        eps_scale: float = 1.0,
        steps: int = 7,
        step_size: Eps | None = None,
        norm: Norm = "linf",
        keep: Keep = "best",
        start: Start = "paper",
        craft_mode: Mode = "eval",
        tau: int | None = None,
        incorrect: Incorrect = "attack",
        label_noise: float = 0.0,
        label_smoothing: float = 0.0,
        smoothing_spread: Smoothing = "others",
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(
            params, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4
        ),
        lr_scheduler: LRSchedulerCallable = MultiStep,
        fast: Fast = True,
    ) -> None:
        super().__init__()
        mean, std = channel_values("mean", mean), channel_values("std", std)
        self.save_hyperparameters(ignore=["network"] if isinstance(network, nn.Module) else None)
        self._keep_plain_arguments({"mean": mean, "std": std})
        check_count("num_classes", num_classes, low=2)
        check_number("eps_scale", eps_scale)
        check_radius("eps", eps, norm)
        check_radius("eps * eps_scale", eps * eps_scale, norm)
        check_choice("incorrect", incorrect, get_args(Incorrect))
        self.num_classes, self.incorrect = num_classes, incorrect
        if eps_scale != 1:
            step_size = PGD(eps, steps, step_size, norm).length
        settings = (eps * eps_scale, steps, step_size, norm, keep, start, craft_mode)
        self.pgd = PGD(*settings) if tau is None else FriendlyPGD(*settings, tau)
        self.training_labels = TrainingLabels(label_noise, label_smoothing, smoothing_spread)
        self.normalize = Normalize(mean, std)
        self.network = channels_last(build_network(network, num_classes, in_channels))
        if not any(True for _ in self.network.parameters()):
            name = type(self.network).__name__
            raise ValueError(f"Expected `network` to have weights to train but {name} has none.")
        self._optimizer, self._lr_scheduler = optimizer, lr_scheduler
        self.means, self.fast = EpochMeans(), fast

    def _keep_plain_arguments(self, checked: Mapping[str, Any]) -> None:
        """Leaves in the hyperparameters what a checkpoint can hold and give back."""
        for name, value in dict(self.hparams).items():
            # The command line records how to build these; a Python callable cannot be stored.
            if name in ("network", "optimizer", "lr_scheduler") and callable(value):
                self.hparams.pop(name)
                continue
            plain = checked.get(name, value)
            # Numbers of NumPy could be stored but not loaded again.
            self.hparams[name] = plain.tolist() if hasattr(plain, "tolist") else plain

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(N, num_classes)` of images `(N, C, H, W)` in [0, 1]."""
        logits: Tensor = self.network(self.normalize(images))
        return logits

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """One step: craft, draw label noise, perturb weights (nothing here), take the objective.

        Raises:
            ValueError: In the first step, if the network does not take the images, or if it has
                another number of outputs than there are classes.
        """
        images, labels = batch[:2]
        self._learning_rate = float(self.trainer.optimizers[0].param_groups[0]["lr"])
        try:
            with self.own_dropout(), self.arithmetic():
                adversarial = self._attacked(images, labels)
                noisy = self._noisy(labels)
                # Older versions of PyTorch keep casts of the weights made without a graph.
                torch.clear_autocast_cache()
                self.perturb(images, adversarial, noisy)
                loss, logits = self.objective(images, adversarial, noisy)
        except Exception:
            # The network may be at fault, which is not worth a pass unless something failed.
            if self.batches_seen == 0:
                with evaluation_context(self), torch.no_grad():
                    check_outputs(first_logits(self, images[:1]), self.num_classes)
            raise
        if self.batches_seen == 0:
            check_outputs(logits, self.num_classes)
        self._record(loss.detach(), logits.detach(), labels[: len(logits)])
        return loss

    def attack(self, images: Tensor, labels: Tensor) -> Tensor:
        """The examples that a step trains on.

        Args:
            images: `(N, C, H, W)` clean images in [0, 1].
            labels: `(N,)` classes to be left.

        Returns:
            `(N, C, H, W)`, adversarial, without a graph.
        """
        return self.craft(images, labels)

    def perturb(self, images: Tensor, adversarial: Tensor, labels: Tensor) -> None:
        """Comes before the objective; variants that perturb weights do it here."""

    def objective(
        self, images: Tensor, adversarial: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss to minimise, and the logits of the adversarial examples.

        Args:
            images: `(N, C, H, W)` clean images in [0, 1].
            adversarial: `(N, C, H, W)` adversarial examples.
            labels: `(N,)` classes, with label noise where there is any.

        Returns:
            Scalar loss and logits `(M, num_classes)` of the first M examples, all that are
            adversarial and have labels.
        """
        logits = to_float32(self(adversarial))
        return self.training_labels.loss(logits, labels), logits

    def _attacked(self, images: Tensor, labels: Tensor) -> Tensor:
        if self.incorrect == "attack":
            return self.attack(images, labels)
        predicted = predicted_classes(self.clean_logits(images))
        if self.incorrect == "predicted":
            # Without a prediction the label is attacked.
            return self.attack(images, torch.where(predicted < 0, labels, predicted))
        correct = (predicted == labels).view(-1, 1, 1, 1)
        return torch.where(correct, self.attack(images, labels), images)

    def _noisy(self, labels: Tensor) -> Tensor:
        if self.training_labels.noise == 0:
            return labels
        draws = self.draws("label noise", len(labels), 2, labels.device)
        noisy = self.training_labels.resample(labels, draws, self.num_classes)
        self.means.add("label_noise/changed", noisy != labels)
        return noisy

    def _record(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        # Once for each example, so that every example weighs the same in the epoch's mean.
        self.means.add("train/loss", loss.expand(len(labels)))
        losses = cross_entropy(logits, labels, reduction="none")
        self.means.add("train/robust_loss", nan_unless_finite(losses, logits))
        self.means.add("train/robust_error", predicted_classes(logits) != labels)

    def on_train_start(self) -> None:
        """Tells a schedule that counts steps how many there are."""
        super().on_train_start()
        self.means.reset()
        prepare_schedule(self.lr_schedulers(), self.trainer)

    def on_train_epoch_end(self) -> None:
        """Logs what the training batches gave; once an epoch, as each `log` call costs time."""
        self.means.log(self)
        # That of the epoch's last step: schedules have moved on already.
        self.log("train/learning_rate", self._learning_rate)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Does nothing: `trainer.test` is measured by callbacks, on fixed sets of images."""

    def configure_optimizers(self) -> Any:
        """Optimizer and schedule from the module's arguments.

        Raises:
            ValueError: If the schedule counts in shares and the number of epochs is unlimited.
        """
        optimizer = self.fused(self._optimizer(self.parameters()))
        scheduler = self._lr_scheduler(optimizer)
        prepare_schedule(scheduler, self.trainer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": scheduler,
                "monitor": getattr(scheduler, "monitor", None),
                "interval": getattr(scheduler, "interval", "epoch"),
            },
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Writes down which class made the checkpoint, and the seed of its noise."""
        checkpoint[CLASS_KEY] = type(self).__name__
        checkpoint[SEED_KEY] = self._run_seed
        checkpoint[LAYERS_KEY] = plain_layers(self.network)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses the checkpoint of another variant, or of another network.

        Raises:
            ValueError: If another class wrote the checkpoint, or if it was trained with a network
                of other weights or other layers.
        """
        written = checkpoint.get(CLASS_KEY, type(self).__name__)
        if written != type(self).__name__:
            raise ValueError(
                f"Expected a checkpoint written by {type(self).__name__} but got one of {written}."
            )
        check_network_of(checkpoint, self.network)
        self._run_seed = checkpoint.get(SEED_KEY)
