"""The loss along directions and on planes in weight space (Fig. 4)."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robust_flatness.functional.attack import PGD
from robust_flatness.functional.checks import check_count
from robust_flatness.functional.directions import (
    Direction,
    DirectionKind,
    check_direction,
    make_directions,
)
from robust_flatness.functional.evaluation import evaluation_context
from robust_flatness.functional.layer_weights import perturbed_weights
from robust_flatness.functional.noise import Norm, Start
from robust_flatness.functional.robust_loss import AttackedSet, LossKind
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
        num_directions, relative_to, length: Of a kind, as in `weight_directions`.
        num_steps: Number S of steps, both ends of `extent` included.
        extent: First and last s; `None` is (0, 1) for `adversarial`, else (-1, 1).
        loss: `robust`, or `clean` without an attack, also on adversarial directions.
        eps, steps, restarts, step_size, norm, start: The attack, as in `evaluate_robustness`.
        seed: Seed of all random numbers.
        batch_size, indices, on_attack: As in `evaluate_robustness`.

    Raises:
        ValueError: If pixels, shapes, or an argument are out of range.

    Example:
        >>> images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> result = loss_landscape(model, images, torch.arange(4), num_steps=5, steps=2)
        >>> result.coordinates.tolist(), result.losses.shape
        ([-1.0, -0.5, 0.0, 0.5, 1.0], torch.Size([10, 5, 4]))
    """
    pgd = PGD(eps, steps, step_size, norm, start=start)
    attacked = AttackedSet(images, labels, pgd, restarts, seed, batch_size, indices, on_attack)
    attacked = attacked.for_loss(loss)
    coordinates = steps_along(directions, num_steps, extent)
    with evaluation_context(model):
        lines = _directions(model, attacked, directions, num_directions, relative_to, length)
        return measure_landscape(model, attacked, lines, coordinates)


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
    pgd = PGD(eps, steps, step_size, norm, start=start)
    attacked = AttackedSet(images, labels, pgd, restarts, seed, batch_size, indices, on_attack)
    attacked = attacked.for_loss(loss)
    coordinates = steps_along(directions, num_steps, extent)
    with evaluation_context(model):
        pair = list(_directions(model, attacked, directions, 2, relative_to, length))
        if len(pair) != 2:
            raise ValueError(f"Expected `directions` to be two for a surface but got {len(pair)}.")
        return measure_surface(model, attacked, pair, coordinates)


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
    model: nn.Module,
    attacked: AttackedSet,
    directions: Directions,
    num_directions: int | None,
    relative_to: RelativeTo,
    length: float | None,
) -> Iterable[Direction]:
    """Directions of a kind, or those of the caller after a check."""
    if isinstance(directions, str):
        return make_directions(
            model,
            attacked,
            directions,
            num_directions=num_directions,
            relative_to=relative_to,
            length=length,
        )
    directions = [directions] if isinstance(directions, Mapping) else list(directions)
    if not directions:
        raise ValueError("Expected `directions` to hold a direction at least but got none.")
    for direction in directions:
        check_direction(model, direction)
    return directions


def measure_landscape(
    model: nn.Module,
    attacked: AttackedSet,
    directions: Iterable[Direction],
    coordinates: Sequence[float],
) -> LandscapeResult:
    """`loss_landscape` along at least one direction, inside `evaluation_context`."""
    points = (((s, direction),) for direction in directions for s in coordinates)
    return LandscapeResult(*_losses(model, attacked, points, coordinates))


def measure_surface(
    model: nn.Module,
    attacked: AttackedSet,
    directions: Iterable[Direction],
    coordinates: Sequence[float],
) -> SurfaceResult:
    """`loss_surface` along two directions, inside `evaluation_context`."""
    first, second = directions
    points = (((s, first), (t, second)) for s in coordinates for t in coordinates)
    return SurfaceResult(*_losses(model, attacked, points, coordinates))


def _losses(
    model: nn.Module,
    attacked: AttackedSet,
    points: Iterable[Sequence[tuple[float, Direction]]],
    coordinates: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """The coordinates `(S,)` and the losses `(..., S, N)` at combinations of directions."""
    rows = []
    for terms in points:
        perturbation: dict[str, Tensor] = {}
        for step, direction in terms:
            for name, value in direction.items():
                moved = step * value
                perturbation[name] = perturbation[name] + moved if name in perturbation else moved
        with perturbed_weights(model, perturbation):
            rows.append(attacked.losses(model))
    losses = torch.stack(rows).unflatten(0, (-1, len(coordinates)))
    return torch.tensor(coordinates, dtype=torch.float64), losses
