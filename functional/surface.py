"""The loss on a plane through the weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robust_flatness.functional.attack import PGD
from robust_flatness.functional.directions import Direction, DirectionKind
from robust_flatness.functional.evaluation_context import evaluation_context
from robust_flatness.functional.flatness import Loss
from robust_flatness.functional.landscape import Extent, View, attack_for, steps_along
from robust_flatness.functional.noise import Norm, Start
from robust_flatness.functional.weight_perturbation import RelativeTo


@dataclass(frozen=True)
class SurfaceResult:
    """The loss at w + s · ν_1 + t · ν_2.

    Attributes:
        coordinates: The steps s and t, `(S,)`, float64.
        losses: Loss of each example, `(S, S, N)`, first s, then t.
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
    loss: Loss = "robust",
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
