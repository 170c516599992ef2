"""Directions in weight space along which the loss is drawn."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from robust_flatness.functional.attack import PGD
from robust_flatness.functional.checks import check_choice, check_count, check_number
from robust_flatness.functional.evaluation import evaluation_context
from robust_flatness.functional.hessian import hessian_extreme_eigenvalues, weight_gradients
from robust_flatness.functional.layer_weights import (
    LayerTensor,
    differentiable_weights,
    layer_tensor,
    layer_tensors,
    perturbed_weights,
)
from robust_flatness.functional.noise import Norm, Start
from robust_flatness.functional.robust_loss import AttackedSet
from robust_flatness.functional.weight_perturbation import (
    Perturbation,
    RelativeTo,
    random_direction,
    scale_direction,
    scale_to,
)

Direction = Mapping[str, Tensor]
DirectionKind = Literal["random", "adversarial", "hessian"]

ASCENT_STEPS = 5
LENGTH = {"random": 0.5, "adversarial": 0.025, "hessian": 0.5}
COUNT = {"random": 10, "adversarial": 10, "hessian": 1}


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
        model: Maps images in [0, 1] to logits.
        images: `(N, C, H, W)` in [0, 1]; random directions do not depend on them.
        labels: `(N,)` true classes.
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
    return make_directions(
        model,
        attacked,
        kind,
        num_directions=num_directions,
        relative_to=relative_to,
        length=length,
        ascent_steps=ascent_steps,
    )


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
    *,
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
            yield random_direction(
                weights, xi=length, seed=attacked.seed, direction=k, relative_to=relative_to
            )

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
        result = hessian_extreme_eigenvalues(
            model,
            attacked.images,
            attacked.labels,
            seed=attacked.seed,
            batch_size=attacked.batch_size,
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
            images, labels = attacked.images[part], attacked.labels[part].clone()
            starts = attacked.starts(part, restart)
            adversarial = attacked.pgd.attack(model, images, labels, starts).images
            if attacked.on_attack is not None:
                attacked.on_attack()
            gradient = weight_gradients(model, weights, adversarial, labels)
            total = [summand + more for summand, more in zip(total, gradient)]
    return total


def normalize_direction(
    model: nn.Module,
    direction: Direction,
    *,
    length: float,
    relative_to: RelativeTo = "layer",
) -> Perturbation:
    """Scales a direction relative to the weights.

    Args:
        model: The network.
        direction: By parameter name.
        length: Relative length.
        relative_to: `layer` scales each tensor d_l to length · ‖w_l‖. `filter` scales each slice
            of it along the first dimension, the weights of one output, to length times the norm
            of that filter of w_l (Li et al., 2018); a bias is scaled as a whole. `network` scales
            the direction as one vector, so that an eigenvector stays one.

    Returns:
        The scaled direction, zero if it or what it is relative to is zero.

    Raises:
        ValueError: If a name or a shape is not that of a parameter.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> ones = {"weight": torch.ones(2, 2)}
        >>> scaled = normalize_direction(model, ones, length=1.0, relative_to="filter")
        >>> torch.allclose(scaled["weight"].norm(dim=1), model.weight.norm(dim=1))
        True
    """
    check_direction(model, direction)
    weights = {name: layer_tensor(model, name).value().detach() for name in direction}
    return scale_direction(direction, weights, length, relative_to)


def check_direction(model: nn.Module, direction: Direction) -> None:
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
