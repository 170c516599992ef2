"""Adversarial examples in a training step."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from robust_flatness.functional.attack import PGD, Criterion, example_losses
from robust_flatness.functional.batch_noise import BatchNoise, agreed_seed, forked_random_state
from robust_flatness.functional.checks import (
    check_examples,
    check_outputs,
    check_strategy,
    errors_on_all_ranks,
)
from robust_flatness.functional.evaluation import (
    Model,
    evaluation_context,
    first_logits,
    module_modes,
    to_float32,
)

# Loss, logits of adversarial examples, and further terms to log, one value for each example.
ObjectiveTerms = tuple[Tensor, Tensor, Mapping[str, Tensor]]


class PGDMixin(LightningModule):
    """A LightningModule that is trained on adversarial examples of its own `forward`.

    Attributes:
        network: Maps normalized images to logits.
        pgd: The attack on the images.
        num_classes: Number of classes.
        run_seed: Seed of all noise, the same on all processes and after a resume; `None` before
            the first `fit`.
    """

    network: nn.Module
    pgd: PGD
    num_classes: int
    run_seed: int | None = None

    def attack(self, images: Tensor, labels: Tensor) -> Tensor:
        """The examples that a step trains on.

        Args:
            images: `(N, C, H, W)` clean images in [0, 1].
            labels: `(N,)` classes to leave, before label noise.

        Returns:
            `(N, C, H, W)`, adversarial, without a graph.
        """
        return self.craft(images, labels)

    def perturb(self, images: Tensor, adversarial: Tensor, labels: Tensor) -> None:
        """Comes before the objective; `AWPMixin` perturbs the weights here."""

    def objective(self, images: Tensor, adversarial: Tensor, labels: Tensor) -> ObjectiveTerms:
        """The loss to minimize.

        Args:
            images: `(N, C, H, W)` clean images in [0, 1].
            adversarial: `(N, C, H, W)` adversarial examples.
            labels: `(N,)` classes, after label noise.

        Returns:
            Scalar loss; logits `(M, num_classes)` of the first M examples, all that are adversarial
            and have labels; and further terms to log, `(N,)` each, by the name that their mean over
            an epoch gets. Terms may have a graph: they are detached before they are summed.
        """
        raise NotImplementedError

    def craft(
        self,
        images: Tensor,
        labels: Tensor,
        criterion: Criterion = example_losses,
        *,
        model: Model | None = None,
        start: Tensor | None = None,
    ) -> Tensor:
        """Runs the module's attack `pgd`.

        Args:
            images: `(N, C, H, W)` clean images in [0, 1].
            labels: `(N,)`, or any target with N rows that `criterion` takes.
            criterion: Maps logits `(N, num_classes)` and labels to the losses `(N,)` to increase;
                cross-entropy by default.
            model: What is attacked; the module by default.
            start: Perturbations `(N, C, H, W)` to start from; `None` draws them.

        Returns:
            `(N, C, H, W)` in [0, 1], adversarial, without a graph.
        """
        attacked = self if model is None else model
        return self.noise.craft(self.pgd, attacked, images, labels, criterion, start)

    @property
    def noise(self) -> BatchNoise:
        """Random numbers of the current batch."""
        return BatchNoise.of(self.trainer, self.run_seed or 0)

    def clean_logits(self, images: Tensor) -> Tensor:
        """Logits `(N, K)` of clean images `(N, C, H, W)` in eval mode, without a graph."""
        with torch.no_grad(), module_modes(self, "eval"):
            return to_float32(self(images))

    def setup(self, stage: str) -> None:
        """Refuses a strategy that leaves a process without some of the weights.

        Raises:
            ValueError: If it is FSDP, DeepSpeed or the like.
        """
        check_strategy(self.trainer, type(self).__name__)

    def on_fit_start(self) -> None:
        """Agrees on one seed for the noise of all processes, or keeps that of the checkpoint."""
        self.run_seed = agreed_seed(self.trainer, self.run_seed)

    def on_train_batch_start(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Checks images and labels of the first batch, and the size of the last one.

        Raises:
            ValueError: On all processes, if pixels are outside [0, 1] or labels outside the classes
                on any, or if the last batch of an epoch is one image that the network cannot train
                on.
        """
        # Once only: the check waits for the device.
        if self.noise.step == 0:
            with errors_on_all_ranks():
                check_examples(batch[0], batch[1], self.num_classes)
            self._check_last_batch(batch[0][:1])

    def _check_last_batch(self, image: Tensor) -> None:
        """Tries a single image if an epoch ends with one: BatchNorm may have one value of it."""
        loader = self.trainer.train_dataloader
        sampler, size = getattr(loader, "sampler", ()), getattr(loader, "batch_size", None) or 1
        if getattr(loader, "drop_last", True) or len(sampler) % size != 1:
            return
        buffers = [(buffer, buffer.clone()) for buffer in self.buffers()]
        try:
            with torch.no_grad(), forked_random_state(self.device):
                self(image)
        except ValueError as error:
            raise ValueError(
                f"Expected the last batch of an epoch to have more than one image for the network "
                f"to train on but got {len(sampler)} images in batches of {size} ({error})."
            ) from error
        finally:
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)

    @contextmanager
    def network_checked(self, images: Tensor) -> Iterator[None]:
        """If the first step fails, raises a ValueError if the network does not take the images."""
        try:
            yield
        except Exception:
            if self.noise.step == 0:
                with evaluation_context(self), torch.no_grad():
                    check_outputs(first_logits(self, images[:1]), self.num_classes)
            raise
