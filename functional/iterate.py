"""Adversarial examples that an attack keeps."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from robust_flatness.functional.checks import upcast
from robust_flatness.functional.modes import Model

Criterion = Callable[[Tensor, Tensor], Tensor]


def example_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each example, `(N,)`: what an attack ascends by default."""
    return cross_entropy(logits, labels, reduction="none")


class Iterate(NamedTuple):
    """The iterate that an attack keeps for each example.

    Attributes:
        images: Adversarial examples `(N, C, H, W)` in [0, 1].
        losses: The attack's objective there, `(N,)`; `None` where the last iterate is kept, which
            saves the forward that would tell it.
        predictions: Predicted classes there, `(N,)`, or `None` likewise.
    """

    images: Tensor
    losses: Tensor | None
    predictions: Tensor | None

    def or_better(self, images: Tensor, losses: Tensor, logits: Tensor) -> "Iterate":
        """For each example the iterate of higher loss, the earlier one on ties.

        Args:
            images: The later iterate `(N, C, H, W)`.
            losses: Its losses `(N,)`.
            logits: Its logits `(N, K)`.
        """
        predictions = logits.argmax(1)
        if self.losses is None or self.predictions is None:
            return Iterate(images, losses, predictions)
        higher = losses > self.losses
        return Iterate(
            torch.where(higher.view(-1, *[1] * (images.ndim - 1)), images, self.images),
            torch.where(higher, losses, self.losses),
            torch.where(higher, predictions, self.predictions),
        )

    @torch.no_grad()
    def told_anew(self, model: Model, labels: Tensor, criterion: Criterion) -> "Iterate":
        """The same images with the losses and predictions that the model has there now.

        Args:
            model: Maps images to logits.
            labels: Handed to `criterion`.
            criterion: Maps logits and labels to losses `(N,)`.

        Returns:
            Itself, if it has no losses.
        """
        if self.losses is None:
            return self
        logits = upcast(model(self.images))
        return Iterate(self.images, criterion(logits, labels), logits.argmax(1))
