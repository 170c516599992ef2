"""Local Lipschitz constants of a network (Yang et al., NeurIPS 2020)."""

import math

import torch
from torch import Tensor

from robust_flatness.functional.attack import PGD
from robust_flatness.functional.evaluation import (
    Model,
    differentiable,
    logits_function,
    nan_unless_finite,
    to_float32,
)
from robust_flatness.functional.noise import per_example_norm


def local_lipschitz(
    model: Model, images: Tensor, search: PGD, start: Tensor, *, through_distance: bool = False
) -> Tensor:
    """Searches, around each image, for the steepest change of the logits.

    The value is ‖z(x) - z(x')‖₁ / ‖x - x'‖, the quotient with the norm of the ball, for the x' in
    the ball and in [0, 1] that gradient ascent reaches: a lower bound of the local Lipschitz
    constant. Yang et al. search with 10 steps of eps/3 in `linf` from x + 0.001 · N(0, 1), keep the
    last iterate, which may be below an earlier one, and follow the gradient of the distance as
    well, which moves the pixel with the largest change back in each step.

    A batch costs `steps + 2` forwards and `steps` backwards to the input.

    Args:
        model: Maps images in [0, 1] to logits `(N, K)`; measured in eval mode.
        images: `(N, C, H, W)` in [0, 1].
        search: Ball, steps and which iterate to keep, `best` or `last`.
        start: Perturbations `(N, C, H, W)` from which the search starts. A perturbation of 0 has no
            gradient and stays.
        through_distance: Whether the search follows the gradient of the distance as well.

    Returns:
        Quotients `(N,)`, 0 at x' = x, NaN for an image with logits that are not finite.

    Example:
        >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
        >>> search = PGD(0.1, 10, 0.1 / 3, start="gaussian")
        >>> images = torch.full((1, 1, 2, 2), 0.5)
        >>> found = local_lipschitz(network, images, search, 0.01 * torch.ones(1, 1, 2, 2))
        >>> bool(found <= network[1].weight.abs().sum() + 1e-4)
        True
    """
    with differentiable(model):
        network, images = logits_function(model, images), to_float32(images.detach()).clone()
        with torch.no_grad():
            clean = network(images)

        def quotients(inputs: Tensor) -> Tensor:
            change = network(inputs) - clean
            distance = per_example_norm(inputs - images, search.norm).flatten(1)
            distance = distance if through_distance else distance.detach()
            # At x' = x the change may be rounding.
            return change / torch.where(distance > 0, distance, math.inf)

        def size(values: Tensor, _: Tensor) -> Tensor:
            return values.abs().sum(1)

        kept = search.attack(quotients, images, images, start, size)
        if kept.losses is not None:
            return kept.losses
        with torch.no_grad():
            values = quotients(kept.images)
        return nan_unless_finite(values.abs().sum(1), values)
