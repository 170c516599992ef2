"""Adversarial training, and AT-AWP."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from robust_flatness.functional.attack import PGD, FriendlyPGD, Keep, example_losses
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
    nan_unless_finite,
    predicted_classes,
    to_float32,
)
from robust_flatness.functional.noise import Norm, Start
from robust_flatness.functional.objectives import Smoothing, TrainingLabels
from robust_flatness.lightning_modules.awp_mixin import AWPMixin
from robust_flatness.lightning_modules.checkpoints import (
    CLASS_KEY,
    LAYERS_KEY,
    SEED_KEY,
    check_network_of,
    plain_layers,
    warn_of_fast,
)
from robust_flatness.lightning_modules.entropy_sgd import EndOfWalk
from robust_flatness.lightning_modules.pgd_mixin import ObjectiveTerms, PGDMixin
from robust_flatness.lightning_modules.schedules import MultiStep, prepare_schedule
from robust_flatness.networks import Normalize, ResNet18, build_network, channels_last
from robust_flatness.networks.layers import channel_values
from robust_flatness.networks.user_network import Network

Incorrect = Literal["attack", "ignore", "predicted"]


class AT(PGDMixin):
    """Adversarial training (Madry et al., 2018): minimizes cross-entropy on PGD examples alone.

    The base of all variants: a variant overrides `objective`, and `attack` if it attacks another
    loss. Defaults are the paper's baseline (Sec. 3): ResNet-18, PGD-7 at 8/255, SGD with Nesterov
    momentum, drops at 40, 60 and 80 %. Weight decay is 5e-4 as in the paper's code and tables; its
    text prints 0.005. With the trainer's `precision` bf16-mixed, forwards are autocast to bfloat16;
    perturbations, logits and losses stay float32.

    Args:
        network: Takes normalized images `(N, C, H, W)` and returns logits `(N, num_classes)`: a
            class or function that builds it, see `build_network`; or a module, which is trained as
            it is: two variants of one module share its weights. A checkpoint does not hold a
            network that was built in Python: load it with `network=`.
        num_classes: Number of classes. The command line takes it, `in_channels`, `mean` and `std`
            from the data.
        in_channels: Number of image channels.
        mean: Per-channel mean for the normalization in front of the network: a sequence of numbers,
            a tensor or an array. The default is that of CIFAR-10.
        std: Per-channel standard deviation; the default is that of CIFAR-10.
        eps: Radius of the training attack, in pixel units of images in [0, 1].
        eps_scale: Factor on the radius, but not on the step; 9/8 is the paper's larger ε.
        steps: Steps of the training attack.
        step_size: Length of a step; `None` is the paper's 0.007 at 8/255, in proportion elsewhere.
        norm: `linf` or `l2`.
        keep: `best` (the paper) or `last` iterate.
        start: `paper`, `uniform`, `gaussian` or `zero`, see `functional.noise.random_start`.
        start_scale: Factor on the radius of a `paper` or `uniform` start, see `PGD`.
        projection: Whether the training attack stays in the ball; without, FGSM becomes N-FGSM, see
            `PGD`. Measures always stay in it.
        craft_mode: `eval` (the paper) or `train`, which moves BatchNorm statistics while crafting.
        fold_batch_norm: Whether crafting computes BatchNorm with the convolution before it, which
            is faster and rounds differently, see `PGD`.
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
        fast: Deprecated, without effect: the trainer's `precision` decides.

    Raises:
        ValueError: If an argument is out of range; before training, if it is endless and the
            schedule counts in shares of it; in the first step, if the network does not take the
            images or has another number of outputs than there are classes.

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
        start_scale: float = 1.0,
        projection: bool = True,
        craft_mode: Mode = "eval",
        fold_batch_norm: bool = False,
        tau: int | None = None,
        incorrect: Incorrect = "attack",
        label_noise: float = 0.0,
        label_smoothing: float = 0.0,
        smoothing_spread: Smoothing = "others",
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(
            params, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4
        ),
        lr_scheduler: LRSchedulerCallable = MultiStep,
        fast: bool | Literal["graph"] | None = None,
    ) -> None:
        super().__init__()
        warn_of_fast(fast)
        mean, std = channel_values("mean", mean), channel_values("std", std)
        built = isinstance(network, nn.Module)
        self.save_hyperparameters(ignore=["fast", "network"] if built else ["fast"])
        self._keep_plain_hyperparameters({"mean": mean, "std": std})
        check_count("num_classes", num_classes, low=2)
        check_number("eps_scale", eps_scale)
        check_radius("eps", eps, norm)
        check_radius("eps * eps_scale", eps * eps_scale, norm)
        check_choice("incorrect", incorrect, get_args(Incorrect))
        self.num_classes, self.incorrect = num_classes, incorrect
        if eps_scale != 1:
            step_size = PGD(eps, steps, step_size, norm).length
        settings = (eps * eps_scale, steps, step_size, norm, keep, start, craft_mode)
        further: dict[str, Any] = {
            "start_scale": start_scale,
            "projection": projection,
            "fold_batch_norm": fold_batch_norm,
        }
        self.pgd = (
            PGD(*settings, **further) if tau is None else FriendlyPGD(*settings, **further, tau=tau)
        )
        self.training_labels = TrainingLabels(label_noise, label_smoothing, smoothing_spread)
        self.normalize = Normalize(mean, std)
        self.network = channels_last(build_network(network, num_classes, in_channels))
        if not any(True for _ in self.network.parameters()):
            name = type(self.network).__name__
            raise ValueError(f"Expected `network` to have weights to train but {name} has none.")
        self._optimizer, self._lr_scheduler = optimizer, lr_scheduler
        self.means = EpochMeans()

    def _keep_plain_hyperparameters(self, checked: Mapping[str, Any]) -> None:
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

    def to_torch(self) -> nn.Sequential:
        """A copy in eval mode without Lightning, which maps images in [0, 1] to logits.

        Its parts are `normalize` and `network`; it returns the same bits as this module.
        """
        parts = OrderedDict(normalize=self.normalize, network=self.network)
        return deepcopy(nn.Sequential(parts)).eval()

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Crafts, draws label noise, perturbs the weights (`AWPMixin`), and takes the objective."""
        images, labels = batch[:2]
        with self.network_checked(images), self.noise.dropout(self, self.device):
            adversarial = self._attack_unless_incorrect(images, labels)
            noisy = self._noisy_labels(labels)
            # Older versions of PyTorch keep casts of the weights that were made without a graph.
            torch.clear_autocast_cache()
            self.perturb(images, adversarial, noisy)
            loss, logits, terms = self.objective(images, adversarial, noisy)
        if self.noise.step == 0:
            check_outputs(logits, self.num_classes)
        self._record(loss.detach(), logits.detach(), labels[: len(logits)], terms)
        return loss

    def objective(self, images: Tensor, adversarial: Tensor, labels: Tensor) -> ObjectiveTerms:
        """Cross-entropy of adversarial examples."""
        logits = to_float32(self(adversarial))
        return self.training_labels.loss(logits, labels), logits, {}

    def _attack_unless_incorrect(self, images: Tensor, labels: Tensor) -> Tensor:
        if self.incorrect == "attack":
            return self.attack(images, labels)
        predicted = predicted_classes(self.clean_logits(images))
        if self.incorrect == "predicted":
            # Without a prediction the label is attacked.
            return self.attack(images, torch.where(predicted < 0, labels, predicted))
        correct = (predicted == labels).view(-1, 1, 1, 1)
        return torch.where(correct, self.attack(images, labels), images)

    def _noisy_labels(self, labels: Tensor) -> Tensor:
        if self.training_labels.noise == 0:
            return labels
        draws = self.noise.uniform("label noise", len(labels), 2, labels.device)
        noisy = self.training_labels.resample(labels, draws, self.num_classes)
        self.means.add({"label_noise/changed": noisy != labels})
        return noisy

    def _record(
        self, loss: Tensor, logits: Tensor, labels: Tensor, terms: Mapping[str, Tensor]
    ) -> None:
        self._learning_rate = float(self.trainer.optimizers[0].param_groups[0]["lr"])
        self.means.add(
            {
                **terms,
                # Once for each example, so that every example weighs the same in the mean.
                "train/loss": loss.expand(len(labels)),
                "train/robust_loss": nan_unless_finite(example_losses(logits, labels), logits),
                "train/robust_error": predicted_classes(logits) != labels,
            }
        )

    def on_train_start(self) -> None:
        """Sets the length of a schedule that counts steps."""
        self.means.sums.clear()
        prepare_schedule(self.lr_schedulers(), self.trainer)

    def on_train_epoch_end(self) -> None:
        """Logs the means over the examples of the training batches."""
        self.means.log(self)
        # That of the epoch's last step: schedules have moved on already.
        self.log("train/learning_rate", self._learning_rate)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Does nothing: `trainer.test` is measured by callbacks, on fixed sets of images."""

    def configure_callbacks(self) -> list[Callback]:
        """A callback that ends the walks of `EntropySGD` with the epoch."""
        return [EndOfWalk()]

    def configure_optimizers(self) -> Any:
        """Optimizer and schedule from the module's arguments."""
        optimizer = self._optimizer(self.parameters())
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
        """Adds the class that wrote the checkpoint, its network's layers, and the seed."""
        checkpoint[CLASS_KEY] = type(self).__name__
        checkpoint[SEED_KEY] = self.run_seed
        checkpoint[LAYERS_KEY] = plain_layers(self.network)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses the checkpoint of another variant, or of another network."""
        written = checkpoint.get(CLASS_KEY, type(self).__name__)
        if written != type(self).__name__:
            raise ValueError(
                f"Expected a checkpoint written by {type(self).__name__} but got one of {written}."
            )
        check_network_of(checkpoint, self.network)
        self.run_seed = checkpoint.get(SEED_KEY)


class ATAWP(AWPMixin, AT):
    """Adversarial training at adversarially perturbed weights (Wu et al., 2020; Table 1, AT-AWP).

    Args are those of `AWPMixin` and of `AT`.

    Example:
        >>> ATAWP(xi=0.005).xi
        0.005
    """


class EpochMeans:
    """Means over the examples of an epoch and over all processes.

    Values are summed on the device, as `LightningModule.log` and the update of a metric cost time
    in each step.

    Example:
        >>> means = EpochMeans()
        >>> means.add({"train/loss": torch.tensor([1.0, 2.0])})
        >>> means.sums
        {'train/loss': (tensor(3.), 2)}
    """

    def __init__(self) -> None:
        self.sums: dict[str, tuple[Tensor, int]] = {}

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Adds values of any shape and type, one for each example, by the name of their mean."""
        for name, values in terms.items():
            if values.numel():
                total, count = self.sums.get(name, (0.0, 0))
                total = values.detach().sum(dtype=torch.float32) + total
                self.sums[name] = total, count + values.numel()

    def log(self, module: LightningModule) -> None:
        """Logs the means once an epoch, after which sums start at zero."""
        for name, (total, count) in self.sums.items():
            shown = name == "train/robust_loss"
            # Lightning weighs the mean of each process by `batch_size`.
            module.log(name, total / count, batch_size=count, sync_dist=True, prog_bar=shown)
        self.sums.clear()
