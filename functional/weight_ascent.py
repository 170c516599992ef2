"""Directions in weight space that raise the robust loss."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robust_flatness.functional.attack import PGD
from robust_flatness.functional.evaluation_context import evaluation_context
from robust_flatness.functional.hessian import weight_gradients
from robust_flatness.functional.layer_weights import differentiable_weights, perturbed_parameters
from robust_flatness.functional.weight_perturbation import (
    perturbed_weights,
    sample_weight_perturbation,
    scale_to,
)

ASCENT_STEPS = 5


@dataclass(frozen=True)
class WeightAscent:
    """How adversarial directions are found: a few steps that raise the mean robust loss.

    From a random perturbation of length ξ‖w_l‖, each step adds the gradient of the mean loss at
    that length and takes every layer back to it. Adversarial examples are crafted anew at each
    step, from starts that belong to the direction's number.

    Args:
        pgd: The attack on the images.
        steps: Steps in weight space.
        length: Relative length ξ.
        seed: Of the perturbation and of the attack's starts.
        batch_size: Images looked at at once.
        indices: Global index of each image.
        on_attack: Called after each attack on each batch, for progress.
    """

    pgd: PGD
    steps: int
    length: float
    seed: int
    batch_size: int
    indices: Sequence[int]
    on_attack: Callable[[], None] | None

    def direction(
        self, model: nn.Module, images: Tensor, labels: Tensor, number: int
    ) -> dict[str, Tensor]:
        """An adversarial direction.

        Args:
            model: Maps images in [0, 1] to logits.
            images: `(N, C, H, W)`.
            labels: `(N,)`.
            number: Of the direction.

        Returns:
            By parameter name, of length ξ‖w_l‖ in each layer; zero where the weight is zero.
        """
        weights = perturbed_parameters(model)
        found = sample_weight_perturbation(model, xi=self.length, seed=self.seed, direction=number)
        for _ in range(self.steps):
            with perturbed_weights(model, found):
                gradient = self._gradient(model, weights, images, labels, number)
            # The gradient is scaled to the weights w, not to those that were perturbed.
            for name, weight in weights.items():
                moved = found[name] + scale_to(gradient[name], weight, self.length)
                found[name] = scale_to(moved, weight, self.length)
        return found

    def _gradient(
        self,
        model: nn.Module,
        weights: Mapping[str, Tensor],
        images: Tensor,
        labels: Tensor,
        number: int,
    ) -> dict[str, Tensor]:
        """Gradient of the summed loss on adversarial examples of these weights."""
        with evaluation_context(model), differentiable_weights(model, weights) as leaves:
            # Tensors made under inference mode cannot be saved for backward, their clones can.
            labels, inputs = labels.clone(), list(leaves.values())
            total = [torch.zeros_like(weight) for weight in inputs]
            for begin in range(0, len(images), self.batch_size):
                part = slice(begin, begin + self.batch_size)
                crafted = self._craft(model, images[part], labels[part], part, number)
                found = weight_gradients(model, inputs, crafted, labels[part])
                total = [t + f for t, f in zip(total, found)]
        return dict(zip(weights, total))

    def _craft(
        self, model: nn.Module, images: Tensor, labels: Tensor, part: slice, number: int
    ) -> Tensor:
        starts = self.pgd.starts(images, self.indices[part], seed=self.seed, restart=number)
        crafted = self.pgd.attack(model, images, labels, starts).images
        if self.on_attack is not None:
            self.on_attack()
        return crafted
