"""Average-case flatness of the robust loss in weight space (Eq. 1)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from robust_flatness.functional.attack import PGD
from robust_flatness.functional.checks import check_choice, check_count, check_examples
from robust_flatness.functional.evaluation import evaluation_context
from robust_flatness.functional.layer_weights import perturbed_parameters, perturbed_weights
from robust_flatness.functional.noise import Norm, Start
from robust_flatness.functional.robust_loss import worst_losses
from robust_flatness.functional.weight_perturbation import (
    Distribution,
    RelativeTo,
    sample_weight_perturbation,
)

LossKind = Literal["robust", "clean"]

Protocol = Literal["shared", "paper"]

PAPER_REFERENCE_RESTARTS = 10

NO_ATTACK = PGD(0.0, steps=0, start="zero")


@dataclass(frozen=True)
class FlatnessResult:
    """Average-case flatness with what it was computed from.

    Attributes:
        reference_losses: Robust loss of each example at the weights w, `(N,)`.
        perturbed_losses: Robust loss of each example at w + ν_k, `(K, N)`.
    """

    reference_losses: Tensor
    perturbed_losses: Tensor

    @property
    def increases(self) -> Tensor:
        """Perturbed minus reference loss of each example, `(K, N)`, float64."""
        return self.perturbed_losses.double() - self.reference_losses.double()

    @property
    def value(self) -> float:
        """Eq. (1): mean perturbed minus reference RLoss, in nats; lower is flatter."""
        return self.increases.mean().item()

    @property
    def standard_error(self) -> float:
        """Standard error of `value` over the K directions, for this set; NaN for one direction."""
        return _standard_error(self.increases.mean(dim=1))

    @property
    def standard_error_examples(self) -> float:
        """Standard error of `value` over the N examples, for these directions; NaN for one."""
        return _standard_error(self.increases.mean(dim=0))

    @property
    def reference_loss(self) -> float:
        """RLoss at w, in nats."""
        return self.reference_losses.double().mean().item()


def _standard_error(values: Tensor) -> float:
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
) -> FlatnessResult:
    """Measures how much RLoss rises when weights move in random directions (Eq. 1).

    Adversarial examples are computed anew at w + ν. The measure is invariant to the scale of
    layers that a BatchNorm follows, unless lengths are relative to the whole network. A batch costs
    `(K + 1) · restarts · (steps + 1)` forwards and `(K + 1) · restarts · steps` backwards to the
    input, on clean images `K + 1` forwards. Nothing is left behind in the network, and one of half
    precision is measured in float32, see `evaluation_context`. If an example's logits are not
    finite at w or at some w + ν, neither is the value.

    Args:
        model: Maps images in [0, 1] to logits `(N, K)`.
        images: `(N, C, H, W)` in [0, 1]; 1000 in the paper.
        labels: `(N,)` true classes.
        xi: Relative length ξ of ν in each layer.
        num_perturbations: Number K of directions.
        eps: Radius of the attack.
        steps: Steps of the attack.
        restarts: Restarts of the attack, for reference and perturbed losses alike.
        protocol: `shared` starts the attacks at w and at w + ν from the same points, so that
            ξ = 0 gives exactly 0 and noise cancels. `paper` is the published recipe: 10 restarts
            at w against one at each w + ν, from other points, which biases the value downwards.
        loss: `robust`, or `clean` for the rise of the cross-entropy on the images themselves; what
            is said of the attack is ignored then. The paper takes 50 directions for it.
        distribution: `sphere` or `ball`, see `sample_weight_perturbation`.
        relative_to: `layer`, `filter` or `network`, see `sample_weight_perturbation`.
        per_batch: Whether each batch of `batch_size` images by global index has directions of its
            own (the paper's text), so that the value depends on `batch_size`, or the whole set
            shares K directions (its code).
        step_size: As in `pgd_attack`.
        norm: As in `pgd_attack`.
        start: As in `pgd_attack`.
        seed: Of directions and starts.
        batch_size: Images measured at once.
        indices: Global index of each image in the whole measured set; `None` numbers them.
        on_attack: Called after each restart on each batch, for progress.

    Returns:
        Value, standard error, and the losses behind them.

    Raises:
        ValueError: If pixels, shapes, or an argument are out of range.

    Example:
        >>> images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> average_case_flatness(model, images, torch.arange(4), xi=0.0, steps=2).value
        0.0
    """
    pgd = PGD(eps, steps, step_size, norm, "best", start)
    check_examples(images, labels)
    check_count("num_perturbations", num_perturbations, low=1)
    check_count("restarts", restarts, low=1)
    check_count("batch_size", batch_size, low=1)
    check_choice("protocol", protocol, get_args(Protocol))
    check_choice("loss", loss, get_args(LossKind))
    # What cannot be perturbed is refused before anything is measured.
    perturbed_parameters(model)
    where = range(len(images)) if indices is None else list(indices)
    if loss == "clean":
        pgd, restarts, protocol = NO_ATTACK, 1, "shared"

    def losses(parts: list[slice], attempts: range) -> Tensor:
        found = [
            worst_losses(
                model,
                images[part],
                labels[part],
                pgd,
                restarts=attempts,
                seed=seed,
                indices=where[part],
                on_attack=on_attack,
            )[0]
            for part in parts
        ]
        return torch.cat(found) if found else images.new_zeros(0)

    def perturbed_losses(direction: int, attempts: range) -> Tensor:
        found = []
        for batch, parts in units:
            with perturbed_weights(model, sample(direction=direction, batch=batch)):
                found.append(losses(parts, attempts))
        return torch.cat(found) if found else images.new_zeros(0)

    sample = partial(
        sample_weight_perturbation,
        model,
        xi=xi,
        seed=seed,
        distribution=distribution,
        relative_to=relative_to,
    )
    units = perturbed_units(where, batch_size, per_batch)
    paper = protocol == "paper"
    first = range(PAPER_REFERENCE_RESTARTS if paper else restarts)
    perturbed = []
    with evaluation_context(model):
        reference = losses([part for _, parts in units for part in parts], first)
        for k in range(num_perturbations):
            fresh = PAPER_REFERENCE_RESTARTS + k
            attempts = range(fresh, fresh + 1) if paper else range(restarts)
            perturbed.append(perturbed_losses(k, attempts))
    return FlatnessResult(reference, torch.stack(perturbed))


def perturbed_units(
    indices: Sequence[int], batch_size: int, per_batch: bool
) -> list[tuple[int | None, list[slice]]]:
    """What shares one weight perturbation: the set, or each batch by global index.

    Args:
        indices: Global index of each image.
        batch_size: Images in a batch.
        per_batch: Whether each batch has a perturbation of its own.

    Returns:
        Number of the batch, `None` for the set, and the positions of its images, batch by batch.

    Example:
        >>> perturbed_units([0, 1, 4], 2, per_batch=False)
        [(None, [slice(0, 2, None), slice(2, 3, None)])]
        >>> perturbed_units([0, 1, 4], 2, per_batch=True)
        [(0, [slice(0, 2, None)]), (2, [slice(2, 3, None)])]
    """
    count = len(indices)
    if not per_batch:
        begins = range(0, count, batch_size)
        return [(None, [slice(begin, min(begin + batch_size, count)) for begin in begins])]
    units: list[tuple[int | None, list[slice]]] = []
    begin = 0
    for batch, members in groupby(indices, key=lambda index: index // batch_size):
        end = begin + len(list(members))
        units.append((batch, [slice(begin, end)]))
        begin = end
    return units
