"""Average-case flatness of the robust loss in weight space (Eq. 1)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from robust_flatness.functional.attack import PGD
from robust_flatness.functional.checks import check_choice, check_count, check_number
from robust_flatness.functional.evaluation import evaluation_context, to_float64
from robust_flatness.functional.layer_weights import layer_tensors, perturbed_weights
from robust_flatness.functional.noise import Norm, Start
from robust_flatness.functional.robust_loss import AttackedSet, KnownLosses, LossKind, estimate_text
from robust_flatness.functional.weight_perturbation import (
    Distribution,
    RelativeTo,
    random_direction,
)

Protocol = Literal["shared", "paper"]

PAPER_REFERENCE_RESTARTS = 10


@dataclass(frozen=True)
class LossIncrease:
    """Losses of each example at w and, in each row, at other weights.

    Attributes:
        reference_losses: Robust loss at the weights w, `(N,)`.
        perturbed_losses: Loss at each w + ν, `(K, N)`.
    """

    reference_losses: Tensor
    perturbed_losses: Tensor

    @property
    def increases(self) -> Tensor:
        """Perturbed minus reference loss, `(K, N)`, float64."""
        return to_float64(self.perturbed_losses) - to_float64(self.reference_losses)

    @property
    def reference_loss(self) -> float:
        """RLoss at w, in nats."""
        return to_float64(self.reference_losses).mean().item()


@dataclass(frozen=True)
class FlatnessResult(LossIncrease):
    """Average-case flatness, with the losses at w and at w + ν_k for K directions."""

    def __repr__(self) -> str:
        """One line: the value with its standard error over directions."""
        return (
            f"average-case flatness {estimate_text(self.increases.mean(dim=1))} "
            f"({len(self.increases)} directions), loss at w {estimate_text(self.reference_losses)}"
        )

    @property
    def value(self) -> float:
        """Eq. (1): mean perturbed minus reference RLoss, in nats; lower is flatter."""
        return self.increases.mean().item()

    @property
    def standard_error(self) -> float:
        """Standard error of `value` over the K directions, for this set; NaN for one direction."""
        return standard_error(self.increases.mean(dim=1))

    @property
    def standard_error_examples(self) -> float:
        """Standard error of `value` over the N examples, for these directions; NaN for one."""
        return standard_error(self.increases.mean(dim=0))


def standard_error(values: Tensor) -> float:
    """Standard error of the mean of values `(N,)`; NaN for one value."""
    return (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else math.nan


def average_case_flatness(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    xi: float = 0.5,
    num_perturbations: int = 10,
    eps: float = 8 / 255,
    steps: int = 20,
    restarts: int = 1,
    protocol: Protocol = "shared",
    loss: LossKind = "robust",
    distribution: Distribution = "sphere",
    relative_to: RelativeTo = "layer",
    per_batch: bool = False,
    step_size: float | None = None,
    norm: Norm = "linf",
    start: Start = "paper",
    seed: int = 0,
    batch_size: int = 128,
    indices: Sequence[int] | None = None,
    on_attack: Callable[[], None] | None = None,
    fold_batch_norm: bool = False,
) -> FlatnessResult:
    """Measures how much RLoss rises when weights move in random directions (Eq. 1).

    Adversarial examples are computed anew at w + ν. The measure is invariant to the scale of
    layers that a BatchNorm follows, unless lengths are relative to the whole network. A batch costs
    `(K + 1) · restarts · (steps + 1)` forwards and `(K + 1) · restarts · steps` backwards to the
    input, on clean images `K + 1` forwards. If an example's logits are not finite at w or at some
    w + ν, neither is the value.

    Args:
        model: Maps images in [0, 1] to logits `(N, K)`.
        images: `(N, C, H, W)` in [0, 1]; 1000 in the paper.
        labels: `(N,)` true classes.
        xi: Relative length ξ of ν in each layer.
        num_perturbations: Number K of directions.
        eps, steps, step_size, norm, start: The attack, as in `evaluate_robustness`.
        restarts: Restarts of the attack, for reference and perturbed losses alike.
        protocol: `shared` starts the attacks at w and at w + ν from the same points, so that
            ξ = 0 gives exactly 0 and noise cancels. `paper` is the published recipe: 10 restarts
            at w against one at each w + ν, from other points, which biases the value downwards.
        loss: `robust`, or `clean` for the cross-entropy on the images themselves, without an
            attack. The paper takes 50 directions for it.
        distribution: `sphere` or `ball`, see `sample_weight_perturbation`.
        relative_to: `layer`, `filter` or `network`, see `sample_weight_perturbation`.
        per_batch: Whether each batch of `batch_size` images by global index has its own directions
            (the paper's text), so that the value depends on `batch_size`, or the whole set shares
            K directions (its code).
        seed: Seed of all random numbers.
        batch_size, indices, on_attack: As in `evaluate_robustness`.
        fold_batch_norm: As in `PGD`.

    Raises:
        ValueError: If pixels, shapes, or an argument are out of range.

    Example:
        >>> images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> average_case_flatness(model, images, torch.arange(4), xi=0.0, steps=2).value
        0.0
    """
    pgd = PGD(eps, steps, step_size, norm, start=start, fold_batch_norm=fold_batch_norm)
    attacked = AttackedSet(images, labels, pgd, restarts, seed, batch_size, indices, on_attack)
    check_number("xi", xi)
    check_count("num_perturbations", num_perturbations, low=1)
    check_choice("protocol", protocol, get_args(Protocol))
    check_choice("distribution", distribution, get_args(Distribution))
    check_choice("relative_to", relative_to, get_args(RelativeTo))
    measured = (xi, num_perturbations, protocol, loss, distribution, relative_to, per_batch)
    with evaluation_context(model):
        return measure_flatness(model, attacked, *measured)


def measure_flatness(
    model: nn.Module,
    attacked: AttackedSet,
    xi: float,
    num_perturbations: int,
    protocol: Protocol,
    loss: LossKind,
    distribution: Distribution,
    relative_to: RelativeTo,
    per_batch: bool,
    known: KnownLosses | None = None,
) -> FlatnessResult:
    """`average_case_flatness` with checked arguments, inside `evaluation_context`.

    Eq. (1): the mean over ν of max over δ of L(w + ν, x + δ), minus max over δ of L(w, x + δ). With
    `known` as in `AttackedSet.attack`, for the losses at w.
    """
    # Raises, before anything is measured, if a weight cannot be perturbed.
    tensors = layer_tensors(model)
    weights = {name: tensor.value() for name, tensor in tensors.items()}
    attacked = attacked.for_loss(loss)
    units = attacked.units(per_batch)
    paper = protocol == "paper" and loss == "robust"
    # All directions have the starts of the reference, except in the paper's protocol.
    attacked = replace(attacked, keep_starts=not paper)
    reference = attacked.losses(
        model,
        [part for _, parts in units for part in parts],
        range(PAPER_REFERENCE_RESTARTS) if paper else None,
        known,
    )
    perturbed = []
    for k in range(num_perturbations):
        losses = []
        for batch, parts in units:
            nu = random_direction(weights, xi, attacked.seed, k, distribution, relative_to, batch)
            with perturbed_weights(model, nu, tensors):
                restarts = [PAPER_REFERENCE_RESTARTS + k] if paper else None
                losses.append(attacked.losses(model, parts, restarts))
        perturbed.append(torch.cat(losses))
    return FlatnessResult(reference, torch.stack(perturbed))
