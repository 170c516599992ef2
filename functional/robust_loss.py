"""Robust loss and robust error of a network on a fixed set of images."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robust_flatness.functional.attack import PGD, Criterion, example_losses
from robust_flatness.functional.checks import check_count, check_examples
from robust_flatness.functional.evaluation import (
    Model,
    evaluation_context,
    logits_function,
    nan_unless_finite,
    predicted_classes,
)
from robust_flatness.functional.noise import Norm, Start


@dataclass(frozen=True)
class RobustnessResult:
    """What PGD found about each example of a set.

    An example whose logits are not finite, clean or attacked, is incorrect, and its loss there is
    not finite: so are RLoss and its parts.

    Attributes:
        clean_losses: Cross-entropy on the clean images, `(N,)`.
        clean_correct: Whether the clean image is classified correctly, bool `(N,)`.
        losses: Cross-entropy on the worst restart's adversarial example, `(N,)`; NaN if the logits
            are not finite there.
        robust_correct: Whether the clean image and the adversarial examples of all restarts are
            classified correctly, bool `(N,)`.
    """

    clean_losses: Tensor
    clean_correct: Tensor
    losses: Tensor
    robust_correct: Tensor

    @property
    def error(self) -> float:
        """Share of clean images that are misclassified, in [0, 1]."""
        return 1 - _mean(self.clean_correct)

    @property
    def robust_loss(self) -> float:
        """RLoss: mean cross-entropy on adversarial examples, in nats (Sec. 2)."""
        return _mean(self.losses)

    @property
    def robust_error(self) -> float:
        """RErr: share of examples misclassified clean or under attack, in [0, 1]."""
        return 1 - _mean(self.robust_correct)

    @property
    def robust_loss_correct(self) -> float:
        """RLoss of the examples that are correct when clean (Fig. 2); NaN where there are none."""
        return _mean(self.losses[self.clean_correct])

    @property
    def robust_loss_incorrect(self) -> float:
        """RLoss of the examples that are incorrect when clean (Fig. 2); NaN without any."""
        return _mean(self.losses[~self.clean_correct])


def _mean(values: Tensor) -> float:
    return values.double().mean().item() if len(values) else math.nan


def worst_losses(
    model: Model,
    images: Tensor,
    labels: Tensor,
    pgd: PGD,
    *,
    restarts: Sequence[int],
    seed: int,
    indices: Sequence[int],
    criterion: Criterion = example_losses,
    on_attack: Callable[[], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Highest loss over restarts, and whether every restart failed to change the class.

    Args:
        model: Maps images in [0, 1] to logits.
        images: One batch `(N, C, H, W)`.
        labels: `(N,)`.
        pgd: The attack; keeps the best iterate.
        restarts: Numbers of the restarts, which name their starts.
        seed: Of the starts.
        indices: Global index of each image.
        criterion: LossKind per example, raised by the attack and reported.
        on_attack: Called after each restart, for progress.

    Returns:
        Losses `(N,)` and correctness, bool `(N,)`.
    """
    losses = torch.full(labels.shape, -math.inf, device=images.device)
    correct = torch.ones_like(labels, dtype=torch.bool)
    for restart in restarts:
        starts = pgd.starts(images, indices, seed=seed, restart=restart)
        found = pgd.attack(model, images, labels, starts, criterion)
        if found.losses is None or found.predictions is None:
            raise ValueError(f"Expected `keep` to be best for a measure but got {pgd.keep}.")
        losses = torch.maximum(losses.to(found.losses), found.losses)
        correct &= found.predictions == labels
        if on_attack is not None:
            on_attack()
    return losses, correct


def evaluate_robustness(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    steps: int = 20,
    restarts: int = 10,
    step_size: float | None = None,
    norm: Norm = "linf",
    start: Start = "paper",
    seed: int = 0,
    batch_size: int = 128,
    indices: Sequence[int] | None = None,
    on_attack: Callable[[], None] | None = None,
) -> RobustnessResult:
    """RLoss and RErr as the paper estimates them: PGD-20 with 10 restarts (Sec. 3).

    The loss of an example is that of its worst restart. A batch costs `restarts · (steps + 1) + 1`
    forwards and `restarts · steps` backwards to the input. Nothing is left behind in the network,
    and one of half precision is measured in float32, see `evaluation_context`.

    Args:
        model: Maps images in [0, 1] to logits `(N, K)`.
        images: `(N, C, H, W)` in [0, 1].
        labels: `(N,)` true classes.
        eps: Radius of the attack, say 8/255.
        steps: Steps of each restart.
        restarts: Number of restarts.
        step_size: As in `pgd_attack`.
        norm: As in `pgd_attack`.
        start: As in `pgd_attack`.
        seed: Of the starts, which belong to (seed, example index, restart).
        batch_size: Images measured at once; changes the result by rounding only.
        indices: Global index of each image in the whole measured set; `None` numbers them.
        on_attack: Called after each restart on each batch, for progress.

    Returns:
        Per-example losses and correctness on the device of `images`.

    Raises:
        ValueError: If pixels, shapes, or an argument are out of range.

    Example:
        >>> images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        >>> found = evaluate_robustness(model, images, torch.arange(4), eps=0.1, restarts=2)
        >>> found.robust_error >= found.error
        True
    """
    pgd = PGD(eps, steps, step_size, norm, "best", start)
    check_examples(images, labels)
    check_count("restarts", restarts, low=1)
    check_count("batch_size", batch_size, low=1)
    where = range(len(images)) if indices is None else list(indices)
    columns: list[tuple[Tensor, ...]] = []
    with evaluation_context(model):
        network = logits_function(model, images)
        for begin in range(0, len(images), batch_size):
            part = slice(begin, begin + batch_size)
            with torch.no_grad():
                logits = network(images[part].clone())
                clean = nan_unless_finite(example_losses(logits, labels[part].clone()), logits)
                clean_correct = predicted_classes(logits) == labels[part]
            losses, correct = worst_losses(
                model,
                images[part],
                labels[part],
                pgd,
                restarts=range(restarts),
                seed=seed,
                indices=where[part],
                on_attack=on_attack,
            )
            columns.append((clean, clean_correct, losses, clean_correct & correct))
    if not columns:
        none, flags = images.new_zeros(0), torch.zeros(0, dtype=torch.bool, device=images.device)
        return RobustnessResult(none, flags, none, flags)
    return RobustnessResult(*(torch.cat(column) for column in zip(*columns)))


def robust_loss(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    steps: int = 20,
    restarts: int = 10,
    step_size: float | None = None,
    norm: Norm = "linf",
    start: Start = "paper",
    seed: int = 0,
    batch_size: int = 128,
) -> Tensor:
    """Robust loss of each example: its cross-entropy under the worst of the restarts.

    Args and errors are those of `evaluate_robustness`, which also tells errors and clean losses.

    Returns:
        Losses `(N,)`, in nats; their mean is the paper's RLoss.

    Example:
        >>> images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        >>> robust_loss(model, images, torch.arange(4), eps=0.1, restarts=2).shape
        torch.Size([4])
    """
    return evaluate_robustness(
        model,
        images,
        labels,
        eps=eps,
        steps=steps,
        restarts=restarts,
        step_size=step_size,
        norm=norm,
        start=start,
        seed=seed,
        batch_size=batch_size,
    ).losses
