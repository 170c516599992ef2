"""The loss along directions and on planes in weight space (Fig. 4)."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from robust_flatness.functional.attack import PGD
from robust_flatness.functional.checks import check_choice, check_count, check_number
from robust_flatness.functional.evaluation import evaluation_context, to_float64
from robust_flatness.functional.hessian import hessian_extreme_eigenvalues, weight_gradients
from robust_flatness.functional.layer_weights import (
    LayerTensor,
    differentiable_weights,
    layer_tensor,
    layer_tensors,
    perturbed_weights,
)
from robust_flatness.functional.memory import fitting
from robust_flatness.functional.noise import Norm, Start
from robust_flatness.functional.robust_loss import AttackedSet, LossKind
from robust_flatness.functional.weight_perturbation import (
    Perturbation,
    RelativeTo,
    random_direction,
    scale_direction,
    scale_to,
)

Direction = Mapping[str, Tensor]
DirectionKind = Literal["random", "adversarial", "hessian"]
Directions = DirectionKind | Direction | Sequence[Direction]
Extent = tuple[float, float]

ASCENT_STEPS = 5
LENGTH = {"random": 0.5, "adversarial": 0.025, "hessian": 0.5}
COUNT = {"random": 10, "adversarial": 10, "hessian": 1}


@dataclass(frozen=True)
class LandscapeResult:
    """The loss at w + s · ν_d.

    Attributes:
        coordinates: The steps s, `(S,)`, float64.
        losses: Loss of each example at each step of each direction, `(D, S, N)`, in nats.
    """

    coordinates: Tensor
    losses: Tensor

    def __repr__(self) -> str:
        """One line: the size, and the lowest and the highest point of the mean curve."""
        directions, steps, _ = self.losses.shape
        return (
            f"loss {self.mean.min():.3f} to {self.mean.max():.3f} at {steps} steps from "
            f"{self.coordinates.min():g} to {self.coordinates.max():g}, mean of {directions} "
            "directions"
        )

    @property
    def curves(self) -> Tensor:
        """Mean loss along each direction, `(D, S)`."""
        return to_float64(self.losses).mean(dim=2)

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

    def __repr__(self) -> str:
        """One line: the size, and the lowest and the highest mean loss."""
        return (
            f"loss {self.mean.min():.3f} to {self.mean.max():.3f} on a grid of "
            f"{len(self.coordinates)} x {len(self.coordinates)} steps from "
            f"{self.coordinates.min():g} to {self.coordinates.max():g}"
        )

    @property
    def mean(self) -> Tensor:
        """Mean loss at each point, `(S, S)`."""
        return to_float64(self.losses).mean(dim=2)


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
    # All points share their starts.
    attacked = replace(attacked, keep_starts=True)
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


def steps_along(directions: Directions, num_steps: int, extent: Extent | None) -> list[float]:
    """The steps s of a landscape along a kind of directions, or other ones."""
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
        return make_directions(model, attacked, directions, num_directions, relative_to, length)
    directions = [directions] if isinstance(directions, Mapping) else list(directions)
    if not directions:
        raise ValueError("Expected `directions` to hold at least one direction but got none.")
    for direction in directions:
        _check_direction(model, direction)
    return directions


def weight_directions(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    kind: DirectionKind = "random",
    num_directions: int | None = None,
    relative_to: RelativeTo = "layer",
    length: float | None = None,
    eps: float = 8 / 255,
    steps: int = 10,
    step_size: float | None = None,
    norm: Norm = "linf",
    start: Start = "paper",
    ascent_steps: int = ASCENT_STEPS,
    seed: int = 0,
    batch_size: int = 128,
    indices: Sequence[int] | None = None,
    on_attack: Callable[[], None] | None = None,
) -> Iterator[Perturbation]:
    """Directions as the paper scales them: the length of each layer is a share of its weight's.

    `random` directions are those of `sample_weight_perturbation` by number, so that average-case
    flatness at ξ = `length` measures the ends of the same lines; they include biases.
    `adversarial` ones increase the mean robust loss: from random direction k, `ascent_steps` steps
    of full length along its gradient, each layer projected back onto its sphere, with adversarial
    examples computed anew at each step from the direction's starts. The paper's joint attack also
    ends where its last gradients point, as its steps are longer than its radius. `hessian` ones are
    the eigenvectors of λ_max and, as a second one, λ_min of the clean loss, without biases.

    Args:
        model, images, labels: As in `loss_landscape`; random directions need no images.
        kind: `random`, `adversarial` or `hessian`.
        num_directions: Number of directions; `None` is 10, or 1 for `hessian`, which has at most 2.
        relative_to: `layer`, `filter` (Li et al., 2018) or `network`, see `normalize_direction`.
        length: Relative length; `None` is the paper's 0.5, or 0.025 for `adversarial`.
        eps, steps, step_size, norm, start: The attack of adversarial directions, as in
            `evaluate_robustness`.
        ascent_steps: Steps in weight space of an adversarial direction.
        seed: Seed of all random numbers.
        batch_size, indices, on_attack: As in `evaluate_robustness`.

    Returns:
        The directions by parameter name, computed one after the other.

    Raises:
        ValueError: If pixels, shapes, or an argument are out of range.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> images = torch.rand(4, 1, 8, 8)
        >>> first = next(weight_directions(model, images, torch.arange(4)))["1.weight"]
        >>> torch.allclose(first.norm(), 0.5 * model[1].weight.norm())
        True
    """
    pgd = PGD(eps, steps, step_size, norm, start=start)
    attacked = AttackedSet(images, labels, pgd, 1, seed, batch_size, indices, on_attack)
    described = (kind, num_directions, relative_to, length, ascent_steps)
    return make_directions(model, attacked, *described)


def check_direction_kind(
    kind: DirectionKind, num_directions: int | None, relative_to: RelativeTo, length: float | None
) -> None:
    """Checks the arguments that describe a kind of directions."""
    check_choice("kind", kind, get_args(DirectionKind))
    check_choice("relative_to", relative_to, get_args(RelativeTo))
    count = COUNT[kind] if num_directions is None else num_directions
    check_count("num_directions", count, low=1)
    if kind == "hessian" and count > 2:
        raise ValueError(f"Expected `num_directions` to be 1 or 2 for hessian but got {count}.")
    check_number("length", LENGTH[kind] if length is None else length)


def make_directions(
    model: nn.Module,
    attacked: AttackedSet,
    kind: DirectionKind,
    num_directions: int | None,
    relative_to: RelativeTo,
    length: float | None,
    ascent_steps: int = ASCENT_STEPS,
) -> Iterator[Perturbation]:
    """`weight_directions` of an attacked set."""
    check_direction_kind(kind, num_directions, relative_to, length)
    check_count("ascent_steps", ascent_steps, low=1)
    length = LENGTH[kind] if length is None else length
    count = COUNT[kind] if num_directions is None else num_directions
    tensors = layer_tensors(model)
    weights = {name: tensor.value() for name, tensor in tensors.items()}

    def random(relative_to: RelativeTo) -> Iterator[Perturbation]:
        for k in range(count):
            yield random_direction(weights, length, attacked.seed, k, relative_to=relative_to)

    def adversarial() -> Iterator[Perturbation]:
        for k, direction in enumerate(random("layer")):
            for _ in range(ascent_steps):
                with perturbed_weights(model, direction, tensors):
                    gradient = _robust_loss_gradient(model, attacked, tensors, k)
                # The gradient is scaled to the weights w, not to the perturbed ones.
                for (name, weight), part in zip(weights.items(), gradient):
                    moved = direction[name] + scale_to(part, weight, length)
                    direction[name] = scale_to(moved, weight, length)
            yield direction

    if kind == "random":
        return random(relative_to)
    directions = adversarial()
    if kind == "hessian":
        images, labels = attacked.images, attacked.labels
        result = hessian_extreme_eigenvalues(
            model, images, labels, seed=attacked.seed, batch_size=attacked.batch_size
        )
        directions = iter([result.max_eigenvector, result.min_eigenvector][:count])
    return (scale_direction(direction, weights, length, relative_to) for direction in directions)


def _robust_loss_gradient(
    model: nn.Module, attacked: AttackedSet, tensors: Mapping[str, LayerTensor], restart: int
) -> list[Tensor]:
    """Gradient for the weights of the summed loss on the adversarial examples of one restart."""
    with evaluation_context(model), differentiable_weights(model, tensors) as leaves:
        weights = list(leaves.values())
        total = [torch.zeros_like(weight) for weight in weights]
        for part in attacked.batches:
            # Tensors made under inference mode cannot be saved for backward, clones can.
            labels = attacked.labels[part].clone()
            adversarial = attacked.attack_once(model, part, restart).images
            if attacked.on_attack is not None:
                attacked.on_attack()
            for gradients in fitting(
                partial(weight_gradients, model, weights), adversarial, labels
            ):
                total = [summand + more for summand, more in zip(total, gradients)]
    return total


def normalize_direction(
    model: nn.Module,
    direction: Direction,
    *,
    length: float,
    relative_to: RelativeTo = "layer",
) -> Perturbation:
    """Scales a direction relative to the weights.

    `layer` scales each tensor d_l to length · ‖w_l‖, `filter` each slice of it along the first
    dimension to length times the norm of that filter of w_l (Li et al., 2018), a bias as a whole,
    and `network` the direction as one vector, so that an eigenvector stays one. What is zero, or
    relative to zero, becomes zero.

    Raises:
        ValueError: If a name or a shape is not that of a parameter.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> ones = {"weight": torch.ones(2, 2)}
        >>> scaled = normalize_direction(model, ones, length=1.0, relative_to="filter")
        >>> torch.allclose(scaled["weight"].norm(dim=1), model.weight.norm(dim=1))
        True
    """
    _check_direction(model, direction)
    weights = {name: layer_tensor(model, name).value().detach() for name in direction}
    return scale_direction(direction, weights, length, relative_to)


def _check_direction(model: nn.Module, direction: Direction) -> None:
    """Raises if a name or a shape of a direction is not that of a parameter."""
    for name, value in direction.items():
        wanted: object = "a weight of the network"
        with suppress(ValueError):
            wanted = tuple(layer_tensor(model, name).value().shape)
        if wanted != tuple(value.shape):
            raise ValueError(
                f"Expected {name} of a direction in `directions` to be {wanted} but got "
                f"a tensor of shape {tuple(value.shape)}."
            )
