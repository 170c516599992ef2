"""Robust loss and robust error of a network on a fixed set of images."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

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

NO_ATTACK = PGD(0.0, steps=0, start="zero")


@dataclass(frozen=True)
class RobustnessResult:
    """Losses and predictions of each example of a set, clean and under PGD, `(N,)` each.

    An example whose logits are not finite, clean or attacked, is incorrect, and its loss there is
    not finite: so are RLoss and its parts.

    Attributes:
        clean_losses: Cross-entropy on the clean images.
        clean_correct: Whether the clean image is classified correctly.
        losses: Cross-entropy on the worst restart's adversarial example.
        robust_correct: Whether the clean image and the adversarial examples of all restarts are
            classified correctly.
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
        """RLoss of the examples that are correct when clean (Fig. 2); NaN if there are none."""
        return _mean(self.losses[self.clean_correct])

    @property
    def robust_loss_incorrect(self) -> float:
        """RLoss of the examples that are incorrect when clean (Fig. 2); NaN if there are none."""
        return _mean(self.losses[~self.clean_correct])


def _mean(values: Tensor) -> float:
    return values.double().mean().item() if len(values) else math.nan


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
    forwards and `restarts · steps` backwards to the input. The network is measured and restored as
    `evaluation_context` says.

    Args:
        model: Maps images in [0, 1] to logits `(N, K)`.
        images: `(N, C, H, W)` in [0, 1].
        labels: `(N,)` true classes.
        eps: Radius of the attack, such as 8/255.
        steps: Steps of each restart.
        restarts: Number of restarts.
        step_size: Length of a step, as in `PGD`.
        norm: `linf` or `l2`.
        start: Where the attack starts, see `random_start`.
        seed: Seed of the starts, which depend on (seed, example index, restart).
        batch_size: Images measured at once; changes the result by rounding only.
        indices: Global index of each image in the whole measured set; `None` numbers them.
        on_attack: Called after each restart on each batch, for progress.

    Raises:
        ValueError: If pixels, shapes, or an argument are out of range.

    Example:
        >>> images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        >>> result = evaluate_robustness(model, images, torch.arange(4), eps=0.1, restarts=2)
        >>> result.robust_error >= result.error
        True
    """
    pgd = PGD(eps, steps, step_size, norm, start=start)
    check_set(images, labels, restarts, batch_size)
    with evaluation_context(model):
        return measure_robustness(
            model,
            images,
            labels,
            pgd,
            restarts=restarts,
            seed=seed,
            batch_size=batch_size,
            indices=indices,
            on_attack=on_attack,
        )


def check_set(images: Tensor, labels: Tensor, restarts: int, batch_size: int) -> None:
    """Checks what all measures under attack take."""
    check_examples(images, labels)
    check_count("restarts", restarts, low=1)
    check_count("batch_size", batch_size, low=1)


def measure_robustness(
    model: Model,
    images: Tensor,
    labels: Tensor,
    pgd: PGD,
    *,
    restarts: int,
    seed: int,
    batch_size: int,
    indices: Sequence[int] | None = None,
    on_attack: Callable[[], None] | None = None,
) -> RobustnessResult:
    """`evaluate_robustness` with checked arguments, inside `evaluation_context`."""
    indices = range(len(images)) if indices is None else indices
    columns: list[tuple[Tensor, ...]] = []
    network = logits_function(model, images)
    for part in batches(len(images), batch_size):
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
            indices=indices[part],
            on_attack=on_attack,
        )
        columns.append((clean, clean_correct, losses, clean_correct & correct))
    if not columns:
        none, flags = images.new_zeros(0), torch.zeros(0, dtype=torch.bool, device=images.device)
        return RobustnessResult(none, flags, none, flags)
    return RobustnessResult(*(torch.cat(column) for column in zip(*columns)))


def batches(count: int, batch_size: int) -> list[slice]:
    """Cuts `count` images into batches."""
    return [slice(i, min(i + batch_size, count)) for i in range(0, count, batch_size)]


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
    """Attacks one batch several times.

    Args:
        model: Maps images in [0, 1] to logits.
        images: `(N, C, H, W)`.
        labels: `(N,)`.
        pgd: The attack, with `keep` best.
        restarts: Numbers of the restarts, which select their starts.
        seed: Seed of the starts.
        indices: Global index of each image.
        criterion: Loss of each example, which the attack increases.
        on_attack: Called after each restart.

    Returns:
        Highest loss over restarts, and whether none changed the class, `(N,)` each.
    """
    losses = torch.full(labels.shape, -math.inf, device=images.device)
    correct = torch.ones_like(labels, dtype=torch.bool)
    for restart in restarts:
        starts = pgd.starts(images, indices, seed=seed, restart=restart)
        kept = pgd.attack(model, images, labels, starts, criterion)
        if kept.losses is None or kept.predictions is None:
            raise ValueError(f"Expected `keep` to be best for a measure but got {pgd.keep}.")
        losses = torch.maximum(losses.to(kept.losses), kept.losses)
        correct &= kept.predictions == labels
        if on_attack is not None:
            on_attack()
    return losses, correct


def batched_losses(
    model: Model,
    images: Tensor,
    labels: Tensor,
    pgd: PGD,
    *,
    indices: Sequence[int],
    parts: Iterable[slice],
    **settings: Any,
) -> Tensor:
    """The losses of `worst_losses`, which takes `settings`, for each part of a set, `(N,)`."""
    losses = [
        worst_losses(model, images[part], labels[part], pgd, indices=indices[part], **settings)[0]
        for part in parts
    ]
    return torch.cat(losses) if losses else images.new_zeros(0)


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

    Arguments and errors are those of `evaluate_robustness`, which also returns errors and clean
    losses. The mean of the result `(N,)`, in nats, is the paper's RLoss.

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
