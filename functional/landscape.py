"""The loss along directions and on planes in weight space (Fig. 4)."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from robust_flatness.functional.attack import PGD
from robust_flatness.functional.checks import check_choice, check_count
from robust_flatness.functional.directions import (
    Direction,
    DirectionKind,
    check_direction,
    check_direction_kind,
    make_directions,
)
from robust_flatness.functional.evaluation import evaluation_context
from robust_flatness.functional.flatness import LossKind
from robust_flatness.functional.layer_weights import perturbed_weights
from robust_flatness.functional.noise import Norm, Start
from robust_flatness.functional.robust_loss import NO_ATTACK, batched_losses, batches, check_set
from robust_flatness.functional.weight_perturbation import RelativeTo

Directions = DirectionKind | Direction | Sequence[Direction]
Extent = tuple[float, float]


@dataclass(frozen=True)
class LandscapeResult:
    """The loss at w + s · ν_d.

    Attributes:
        coordinates: The steps s, `(S,)`, float64.
        losses: Loss of each example at each step of each direction, `(D, S, N)`, in nats.
    """

    coordinates: Tensor
    losses: Tensor

    @property
    def curves(self) -> Tensor:
        """Mean loss along each direction, `(D, S)`."""
        return self.losses.double().mean(dim=2)

    @property
    def mean(self) -> Tensor:
        """Mean over directions, `(S,)`: what the paper draws for random ones."""
        return self.curves.mean(dim=0)

    @property
    def max(self) -> Tensor:
        """Highest direction at each step, `(S,)`: what the paper draws for adversarial ones."""
        return self.curves.amax(dim=0)

    @property
    def band(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest direction at each step, `(S,)` each."""
        return self.curves.amin(dim=0), self.curves.amax(dim=0)


@dataclass(frozen=True)
class SurfaceResult:
    """The loss at w + s · ν_1 + t · ν_2.

    Attributes:
        coordinates: The steps s and t, `(S,)`, float64.
        losses: Loss of each example, `(S, S, N)`, first s, then t, in nats.
    """

    coordinates: Tensor
    losses: Tensor

    @property
    def mean(self) -> Tensor:
        """Mean loss at each point, `(S, S)`."""
        return self.losses.double().mean(dim=2)


def loss_landscape(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    directions: Directions = "random",
    num_directions: int | None = None,
    relative_to: RelativeTo = "layer",
    length: float | None = None,
    num_steps: int = 51,
    extent: Extent | None = None,
    loss: LossKind = "robust",
    eps: float = 8 / 255,
    steps: int = 10,
    restarts: int = 1,
    step_size: float | None = None,
    norm: Norm = "linf",
    start: Start = "paper",
    seed: int = 0,
    batch_size: int = 128,
    indices: Sequence[int] | None = None,
    on_attack: Callable[[], None] | None = None,
) -> LandscapeResult:
    """The loss along lines through the weights, attacked anew at each step (Fig. 4).

    At s = 0 it is the robust loss of the same attack; along random directions, s · `length` is the
    ξ of average-case flatness. Costs `D · S · restarts` attacks on each image. All points share
    their starts.

    Args:
        model: Maps images in [0, 1] to logits `(N, K)`.
        images: `(N, C, H, W)` in [0, 1]; 128 in the paper.
        labels: `(N,)` true classes.
        directions: A kind of `weight_directions`, or directions by parameter name, which are not
            scaled.
        num_directions: Of a kind, as in `weight_directions`, like the next two.
        relative_to: `layer`, `filter` or `network`.
        length: Relative length.
        num_steps: Number S of steps, both ends of `extent` included.
        extent: First and last s; `None` is (0, 1) for `adversarial`, else (-1, 1).
        loss: `robust`, or `clean` without an attack, also on adversarial directions.
        eps: Radius of the attack.
        steps: Steps of the attack.
        restarts: Restarts of the attack.
        step_size: Length of a step, as in `PGD`, like the next two.
        norm: `linf` or `l2`.
        start: Where the attack starts.
        seed: Seed of all random numbers.
        batch_size: Images measured at once.
        indices: Global index of each image in the whole measured set; `None` numbers them.
        on_attack: Called after each restart on each batch, for progress.

    Raises:
        ValueError: If pixels, shapes, or an argument are out of range.

    Example:
        >>> images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> result = loss_landscape(model, images, torch.arange(4), num_steps=5, steps=2)
        >>> result.coordinates.tolist(), result.losses.shape
        ([-1.0, -0.5, 0.0, 0.5, 1.0], torch.Size([10, 5, 4]))
    """
    pgd = attack_of(loss, PGD(eps, steps, step_size, norm, start=start))
    check_set(images, labels, restarts, batch_size)
    coordinates = steps_along(directions, num_steps, extent)
    data = model, images, labels, pgd
    kind: dict[str, Any] = {
        "num_directions": num_directions,
        "relative_to": relative_to,
        "length": length,
    }
    shared: dict[str, Any] = {
        "seed": seed,
        "batch_size": batch_size,
        "indices": indices,
        "on_attack": on_attack,
    }
    with evaluation_context(model):
        lines = _directions(directions, *data, kind, shared)
        return measure_landscape(
            *data, directions=lines, coordinates=coordinates, restarts=restarts, **shared
        )


def loss_surface(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    directions: DirectionKind | Sequence[Direction] = "random",
    relative_to: RelativeTo = "layer",
    length: float | None = None,
    num_steps: int = 21,
    extent: Extent | None = None,
    loss: LossKind = "robust",
    eps: float = 8 / 255,
    steps: int = 10,
    restarts: int = 1,
    step_size: float | None = None,
    norm: Norm = "linf",
    start: Start = "paper",
    seed: int = 0,
    batch_size: int = 128,
    indices: Sequence[int] | None = None,
    on_attack: Callable[[], None] | None = None,
) -> SurfaceResult:
    """The loss on the plane through the weights that two directions span, attacked anew everywhere.

    Arguments and errors are those of `loss_landscape`; directions are the first two of a kind (for
    `hessian` those of λ_max and λ_min), or a sequence of two. Costs `S² · restarts` attacks on each
    image.

    Example:
        >>> images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> loss_surface(model, images, torch.arange(4), num_steps=3, steps=2).mean.shape
        torch.Size([3, 3])
    """
    pgd = attack_of(loss, PGD(eps, steps, step_size, norm, start=start))
    check_set(images, labels, restarts, batch_size)
    coordinates = steps_along(directions, num_steps, extent)
    data = model, images, labels, pgd
    kind = {"num_directions": 2, "relative_to": relative_to, "length": length}
    shared: dict[str, Any] = {
        "seed": seed,
        "batch_size": batch_size,
        "indices": indices,
        "on_attack": on_attack,
    }
    with evaluation_context(model):
        pair = list(_directions(directions, *data, kind, shared))
        if len(pair) != 2:
            raise ValueError(f"Expected `directions` to be two for a surface but got {len(pair)}.")
        return measure_surface(
            *data, directions=pair, coordinates=coordinates, restarts=restarts, **shared
        )


def attack_of(loss: LossKind, pgd: PGD) -> PGD:
    """Returns the attack for a loss: `NO_ATTACK` for the clean one."""
    check_choice("loss", loss, get_args(LossKind))
    return pgd if loss == "robust" else NO_ATTACK


def steps_along(directions: Directions, num_steps: int, extent: Extent | None) -> list[float]:
    """The steps s of a landscape along a kind of directions, or other ones.

    Raises:
        ValueError: If there are fewer than two, or `extent` is not increasing.

    Example:
        >>> steps_along("adversarial", 3, None), steps_along("random", 3, None)
        ([0.0, 0.5, 1.0], [-1.0, 0.0, 1.0])
    """
    check_count("num_steps", num_steps, low=2)
    low, high = extent or ((0.0, 1.0) if directions == "adversarial" else (-1.0, 1.0))
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"Expected `extent` to go from low to high but got {low} to {high}.")
    # Written so that the middle of a symmetric extent is 0 exactly.
    return [low + (high - low) * i / (num_steps - 1) for i in range(num_steps)]


def _directions(
    directions: Directions,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    pgd: PGD,
    kind: dict[str, Any],
    shared: dict[str, Any],
) -> Iterable[Direction]:
    """Directions of a kind, or those of the caller after a check."""
    if isinstance(directions, str):
        check_direction_kind(directions, **kind)
        return make_directions(model, images, labels, pgd, kind=directions, **kind, **shared)
    directions = [directions] if isinstance(directions, Mapping) else list(directions)
    if not directions:
        raise ValueError("Expected `directions` to hold a direction at least but got none.")
    for direction in directions:
        check_direction(model, direction)
    return directions


def measure_landscape(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    pgd: PGD,
    *,
    directions: Iterable[Direction],
    coordinates: Sequence[float],
    **settings: Any,
) -> LandscapeResult:
    """`loss_landscape` with checked arguments, inside `evaluation_context`.

    Args:
        model: Maps images in [0, 1] to logits.
        images: `(N, C, H, W)`.
        labels: `(N,)`.
        pgd: The attack, see `attack_of`.
        directions: At least one, for example of `make_directions`.
        coordinates: The steps s, see `steps_along`.
        **settings: `restarts`, `seed`, `batch_size`, `indices` and `on_attack` of `loss_landscape`.
    """
    points = (((s, direction),) for direction in directions for s in coordinates)
    losses = _losses(model, images, labels, pgd, points, **settings)
    steps = torch.tensor(coordinates, dtype=torch.float64)
    return LandscapeResult(steps, losses.unflatten(0, (-1, len(coordinates))))


def measure_surface(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    pgd: PGD,
    *,
    directions: Sequence[Direction],
    coordinates: Sequence[float],
    **settings: Any,
) -> SurfaceResult:
    """`loss_surface` with checked arguments, see `measure_landscape`."""
    first, second = directions
    points = (((s, first), (t, second)) for s in coordinates for t in coordinates)
    losses = _losses(model, images, labels, pgd, points, **settings)
    steps = torch.tensor(coordinates, dtype=torch.float64)
    return SurfaceResult(steps, losses.unflatten(0, (-1, len(coordinates))))


def _losses(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    pgd: PGD,
    points: Iterable[Sequence[tuple[float, Direction]]],
    *,
    restarts: int,
    seed: int,
    batch_size: int,
    indices: Sequence[int] | None = None,
    on_attack: Callable[[], None] | None = None,
) -> Tensor:
    """Losses `(P, N)` at the weights plus combinations of directions, attacked anew at each."""
    rows = []
    for terms in points:
        perturbation: dict[str, Tensor] = {}
        for step, direction in terms:
            for name, value in direction.items():
                moved = step * value
                perturbation[name] = perturbation[name] + moved if name in perturbation else moved
        with perturbed_weights(model, perturbation):
            losses = batched_losses(
                model,
                images,
                labels,
                pgd,
                # Without steps all restarts are the image itself.
                restarts=range(restarts if pgd.steps else 1),
                seed=seed,
                indices=range(len(images)) if indices is None else indices,
                parts=batches(len(images), batch_size),
                on_attack=on_attack,
            )
        rows.append(losses)
    return torch.stack(rows)
