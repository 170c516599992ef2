"""Adversarial examples that an attack keeps."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from robust_flatness.functional.checks import losses_of_finite, predicted_classes

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
        predictions: Predicted classes there, `(N,)`, -1 if logits are not finite; `None` likewise.
    """

    images: Tensor
    losses: Tensor | None
    predictions: Tensor | None

    def or_better(self, images: Tensor, losses: Tensor, logits: Tensor) -> "Iterate":
        """For each example the iterate of higher loss, the earlier one on ties.

        A loss that is not a number, or that comes from logits that are not finite, is the highest.

        Args:
            images: The later iterate `(N, C, H, W)`.
            losses: Its losses `(N,)`.
            logits: Its logits `(N, K)`.
        """
        predictions, losses = predicted_classes(logits), losses_of_finite(losses, logits)
        if self.losses is None or self.predictions is None:
            return Iterate(images, losses, predictions)
        higher = losses.nan_to_num(math.inf, math.inf) > self.losses.nan_to_num(math.inf, math.inf)
        return Iterate(
            torch.where(higher.view(-1, *[1] * (images.ndim - 1)), images, self.images),
            torch.where(higher, losses, self.losses),
            torch.where(higher, predictions, self.predictions),
        )

    @torch.no_grad()
    def told_anew(
        self, network: Callable[[Tensor], Tensor], labels: Tensor, criterion: Criterion
    ) -> "Iterate":
        """The same images with the losses and predictions that the model has there now.

        Args:
            network: Maps images to logits.
            labels: Handed to `criterion`.
            criterion: Maps logits and labels to losses `(N,)`.

        Returns:
            Itself, if it has no losses.
        """
        if self.losses is None:
            return self
        logits = network(self.images)
        return Iterate(self.images, None, None).or_better(
            self.images, criterion(logits, labels), logits
        )
