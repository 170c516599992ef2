"""Boundary thickness (Yang et al., NeurIPS 2020)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robust_flatness.functional.attack import PGD, example_losses
from robust_flatness.functional.evaluation import (
    Model,
    differentiable,
    logits_function,
    nan_unless_finite,
    predicted_classes,
    to_float32,
)
from robust_flatness.functional.noise import keyed_generator, per_example_norm
from robust_flatness.functional.robust_loss import estimate_text


@dataclass(frozen=True)
class BoundaryThicknessResult:
    """Thickness of the boundary on the way from each image to another class, `(N,)` each.

    Attributes:
        thickness: In pixel units of l2. It is 0 if the target is the predicted class, and NaN if
            logits are not finite.
        reached: Whether the end of the way is classified as the target.
        same_class: Whether the target is the class that is predicted for the image.
    """

    thickness: Tensor
    reached: Tensor
    same_class: Tensor

    def __repr__(self) -> str:
        """One line: the mean with its standard error over examples."""
        return (
            f"boundary thickness {estimate_text(self.thickness)}, target not reached "
            f"{estimate_text(~self.reached, percent=True)} ({len(self.thickness)} examples)"
        )


def random_targets(
    labels: Tensor, num_classes: int, indices: Sequence[int], *, seed: int = 0
) -> Tensor:
    """Draws for each example a class that is not its label, `(N,)`.

    It depends on (seed, example index, label) alone.

    Example:
        >>> bool((random_targets(torch.tensor([0, 1]), 2, [0, 1]) == torch.tensor([1, 0])).all())
        True
    """
    draws = [
        torch.randint(num_classes - 1, (1,), generator=keyed_generator(seed, "target", index))
        for index in indices
    ]
    others = torch.cat(draws).to(labels) if draws else labels
    return others + (others >= labels).to(labels)


def boundary_thickness(
    model: Model,
    images: Tensor,
    labels: Tensor,
    attack: PGD,
    *,
    indices: Sequence[int] | None = None,
    seed: int = 0,
    alpha: float = 0.0,
    beta: float = 0.75,
    num_points: int = 128,
) -> BoundaryThicknessResult:
    """Length of the way from each image to a target class on which the classes are in doubt.

    Θ = ‖x - x_s‖₂ ∫ 1{α < p_i(x(t)) - p_j(x(t)) < β} dt over t in [0, 1], with x(t) on the line
    from the image x to x_s (Yang et al., Eq. 1). i is the predicted class of x, and x_s is the end
    of a targeted attack from x towards j, a random class that is not the label. The integral is the
    mean at the midpoints of `num_points` intervals, exact up to 1 / (2 · `num_points`) for each
    border that the line crosses.

    A batch costs `num_points + steps + 2` forwards and `steps` backwards to the input.

    Args:
        model: Maps images in [0, 1] to logits `(N, K)`; measured in eval mode.
        images: `(N, C, H, W)` in [0, 1].
        labels: True classes `(N,)`.
        attack: The targeted attack, which starts at the image itself. Yang et al. use the last
            iterate in `l2`.
        indices: Global index of each image, for its target; `None` numbers them.
        seed: Seed of the targets.
        alpha, beta: Bounds of the difference of probabilities, in [-1, 1].
        num_points: Number of points on each line.

    Example:
        >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
        >>> attack = PGD(1.0, 20, 0.2, "l2", keep="last", start="zero")
        >>> images, labels = torch.rand(3, 1, 2, 2), torch.tensor([0, 0, 1])
        >>> boundary_thickness(network, images, labels, attack).thickness.shape
        torch.Size([3])
    """
    with differentiable(model):
        network, images = logits_function(model, images), to_float32(images.detach()).clone()
        with torch.no_grad():
            logits = network(images)
        predicted, numbers = predicted_classes(logits), range(len(images))
        targets = random_targets(labels, logits.shape[1], indices or numbers, seed=seed)
        ends = attack.attack(model, images, targets, torch.zeros_like(images), _towards).images
        with torch.no_grad():
            reached = predicted_classes(network(ends)) == targets
            share = nan_unless_finite(torch.zeros_like(logits[:, 0]), logits)
            for point in range(num_points):
                logits = network(images + (point + 0.5) / num_points * (ends - images))
                pair = torch.stack([predicted.clamp_min(0), targets], 1)
                first, second = logits.softmax(1).gather(1, pair).unbind(1)
                inside = (alpha < first - second) & (first - second < beta)
                share += nan_unless_finite(inside.to(share) / num_points, logits)
        # At α < 0 the difference of a class to itself, 0, would be inside.
        same = predicted == targets
        share = torch.where(same, 0.0 * share, share)
        length = per_example_norm(ends - images, "l2").flatten()
        return BoundaryThicknessResult(length * share, reached, same)


def _towards(logits: Tensor, targets: Tensor) -> Tensor:
    return -example_losses(logits, targets)
