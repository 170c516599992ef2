"""The loss along directions and on planes in weight space (Fig. 4)."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from robust_flatness.functional.attack import PGD
from robust_flatness.functional.checks import check_choice, check_count, check_examples
from robust_flatness.functional.directions import (
    Direction,
    DirectionKind,
    check_direction,
    weight_directions,
)
from robust_flatness.functional.evaluation import evaluation_context
from robust_flatness.functional.flatness import NO_ATTACK, LossKind
from robust_flatness.functional.layer_weights import perturbed_weights
from robust_flatness.functional.noise import Norm, Start
from robust_flatness.functional.robust_loss import worst_losses
from robust_flatness.functional.weight_perturbation import RelativeTo

Extent = tuple[float, float]


@dataclass(frozen=True)
class LandscapeResult:
    """The loss at w + s · ν_d.

    Attributes:
        coordinates: The steps s, `(S,)`, float64.
        losses: LossKind of each example at each step of each direction, `(D, S, N)`, in nats.
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


def loss_landscape(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    directions: DirectionKind | Direction | Sequence[Direction] = "random",
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
    ξ of average-case flatness. Costs `D · S · restarts` attacks on each image. Nothing is left
    behind in the network, and one of half precision is measured in float32, see
    `evaluation_context`.

    Args:
        model: Maps images in [0, 1] to logits `(N, K)`.
        images: `(N, C, H, W)` in [0, 1]; 128 in the paper.
        labels: `(N,)` true classes.
        directions: A kind of `weight_directions`, or directions by parameter name, taken as they
            are.
        num_directions: Of a kind; `None` is the paper's 10, or 1 for `hessian`.
        relative_to: Of a kind: `layer`, `filter` (Li et al., 2018) or `network`.
        length: Of a kind, relative to the weights; `None` is the paper's 0.5, 0.025 for
            `adversarial`.
        num_steps: Number S of steps, both ends of `extent` included.
        extent: First and last s; `None` is (0, 1) for `adversarial`, else (-1, 1).
        loss: `robust`, or `clean` without an attack, also on adversarial directions.
        eps: Radius of the attack.
        steps: Steps of the attack.
        restarts: Restarts of the attack.
        step_size: As in `pgd_attack`.
        norm: As in `pgd_attack`.
        start: As in `pgd_attack`.
        seed: Of directions and starts; all points share their starts.
        batch_size: Images measured at once.
        indices: Global index of each image in the whole measured set; `None` numbers them.
        on_attack: Called after each restart on each batch, for progress.

    Returns:
        The loss of each example at each step of each direction.

    Raises:
        ValueError: If pixels, shapes, or an argument are out of range.

    Example:
        >>> images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> found = loss_landscape(model, images, torch.arange(4), num_steps=5, steps=2)
        >>> found.coordinates.tolist(), found.losses.shape
        ([-1.0, -0.5, 0.0, 0.5, 1.0], torch.Size([10, 5, 4]))
    """
    attack = attack_for(loss, PGD(eps, steps, step_size, norm, "best", start))
    view = View(model, images, labels, attack, restarts, seed, batch_size, indices, on_attack)
    points = steps_along(directions, num_steps, extent)
    with evaluation_context(model):
        found = view.directions(directions, num_directions, relative_to, length)
        curves = [torch.stack([view.losses((s, direction)) for s in points]) for direction in found]
    return LandscapeResult(torch.tensor(points, dtype=torch.float64), torch.stack(curves))


def attack_for(loss: LossKind, attack: PGD) -> PGD:
    """The attack, or for the clean loss none.

    Raises:
        ValueError: If `loss` is neither `robust` nor `clean`.
    """
    check_choice("loss", loss, get_args(LossKind))
    return attack if loss == "robust" else NO_ATTACK


def steps_along(
    directions: DirectionKind | Direction | Sequence[Direction],
    num_steps: int,
    extent: Extent | None,
) -> list[float]:
    """The steps s of a landscape.

    Args:
        directions: Of which kind.
        num_steps: Number of steps.
        extent: First and last; `None` is that of the kind.

    Raises:
        ValueError: If there are fewer than two, or `extent` does not go upwards.

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


@dataclass(frozen=True)
class View:
    """The loss seen from points around the weights, attacked anew at each.

    Args:
        model: As in `loss_landscape`, like all others.
        images: `(N, C, H, W)`.
        labels: `(N,)`.
        attack: That the loss and adversarial directions face; without steps it is the clean loss.
        restarts: Of the attack.
        seed: Of directions and starts.
        batch_size: Images measured at once.
        indices: Global index of each image.
        on_attack: For progress.

    Raises:
        ValueError: If pixels, shapes, or an argument are out of range.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    attack: PGD
    restarts: int
    seed: int
    batch_size: int
    indices: Sequence[int] | None
    on_attack: Callable[[], None] | None

    def __post_init__(self) -> None:
        check_examples(self.images, self.labels)
        check_count("restarts", self.restarts, low=1)
        check_count("batch_size", self.batch_size, low=1)

    def directions(
        self,
        given: DirectionKind | Direction | Sequence[Direction],
        num_directions: int | None,
        relative_to: RelativeTo,
        length: float | None,
    ) -> Iterable[Direction]:
        """Directions of a kind, or the given ones after a check."""
        if isinstance(given, str):
            return weight_directions(
                self.model,
                self.images,
                self.labels,
                kind=given,
                num_directions=num_directions,
                relative_to=relative_to,
                length=length,
                eps=self.attack.eps,
                steps=self.attack.steps,
                step_size=self.attack.step_size,
                norm=self.attack.norm,
                start=self.attack.start,
                seed=self.seed,
                batch_size=self.batch_size,
                indices=self.indices,
                on_attack=self.on_attack,
            )
        found = [given] if isinstance(given, Mapping) else list(given)
        if not found:
            raise ValueError("Expected `directions` to hold a direction at least but got none.")
        for direction in found:
            check_direction(self.model, direction)
        return found

    def losses(self, *terms: tuple[float, Direction]) -> Tensor:
        """Losses `(N,)` at the weights plus a combination of directions."""
        moved: dict[str, Tensor] = {}
        for step, direction in terms:
            for name, value in direction.items():
                moved[name] = moved[name] + step * value if name in moved else step * value
        with perturbed_weights(self.model, moved):
            begins = range(0, len(self.images), self.batch_size)
            parts = [self._batch(slice(begin, begin + self.batch_size)) for begin in begins]
            return torch.cat([self.images.new_zeros(0), *parts])

    def _batch(self, part: slice) -> Tensor:
        indices = range(len(self.images)) if self.indices is None else self.indices
        losses, _ = worst_losses(
            self.model,
            self.images[part],
            self.labels[part],
            self.attack,
            # Without steps all restarts are the image itself.
            restarts=range(self.restarts if self.attack.steps else 1),
            seed=self.seed,
            indices=indices[part],
            on_attack=self.on_attack,
        )
        return losses


@dataclass(frozen=True)
class SurfaceResult:
    """The loss at w + s · ν_1 + t · ν_2.

    Attributes:
        coordinates: The steps s and t, `(S,)`, float64.
        losses: LossKind of each example, `(S, S, N)`, first s, then t.
    """

    coordinates: Tensor
    losses: Tensor

    @property
    def mean(self) -> Tensor:
        """Mean loss at each point, `(S, S)`."""
        return self.losses.double().mean(dim=2)


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

    Args and errors are those of `loss_landscape`; directions are the first two of a kind (for
    `hessian` those of λ_max and λ_min), or two given ones. Costs `S² · restarts` attacks on each
    image.

    Returns:
        The loss of each example at each point of the grid.

    Example:
        >>> images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> loss_surface(model, images, torch.arange(4), num_steps=3, steps=2).mean.shape
        torch.Size([3, 3])
    """
    attack = attack_for(loss, PGD(eps, steps, step_size, norm, "best", start))
    view = View(model, images, labels, attack, restarts, seed, batch_size, indices, on_attack)
    points = steps_along(directions, num_steps, extent)
    with evaluation_context(model):
        found = list(view.directions(directions, 2, relative_to, length))
        if len(found) != 2:
            raise ValueError(f"Expected `directions` to be two for a surface but got {len(found)}.")
        rows = [
            torch.stack([view.losses((s, found[0]), (t, found[1])) for t in points]) for s in points
        ]
    return SurfaceResult(torch.tensor(points, dtype=torch.float64), torch.stack(rows))
