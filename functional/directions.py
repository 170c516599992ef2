"""Directions in weight space along which the loss is drawn."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from robust_flatness.functional.attack import PGD
from robust_flatness.functional.checks import (
    check_choice,
    check_count,
    check_examples,
    check_number,
)
from robust_flatness.functional.evaluation import evaluation_context
from robust_flatness.functional.hessian import hessian_extreme_eigenvalues, weight_gradients
from robust_flatness.functional.layer_weights import (
    differentiable_weights,
    perturbed_parameters,
    perturbed_weights,
    weight_at,
)
from robust_flatness.functional.noise import Norm, Start
from robust_flatness.functional.weight_perturbation import (
    RelativeTo,
    sample_weight_perturbation,
    scale_to,
    split_like,
)

ASCENT_STEPS = 5


@dataclass(frozen=True)
class WeightAscent:
    """How adversarial directions are found: a few steps that raise the mean robust loss.

    From a random perturbation of length ξ‖w_l‖, each step adds the gradient of the mean loss at
    that length and takes every layer back to it. Adversarial examples are crafted anew at each
    step, from starts that belong to the direction's number.

    Args:
        pgd: The attack on the images.
        steps: Steps in weight space.
        length: Relative length ξ.
        seed: Of the perturbation and of the attack's starts.
        batch_size: Images looked at at once.
        indices: Global index of each image.
        on_attack: Called after each attack on each batch, for progress.
    """

    pgd: PGD
    steps: int
    length: float
    seed: int
    batch_size: int
    indices: Sequence[int]
    on_attack: Callable[[], None] | None

    def direction(
        self, model: nn.Module, images: Tensor, labels: Tensor, number: int
    ) -> dict[str, Tensor]:
        """An adversarial direction.

        Args:
            model: Maps images in [0, 1] to logits.
            images: `(N, C, H, W)`.
            labels: `(N,)`.
            number: Of the direction.

        Returns:
            By parameter name, of length ξ‖w_l‖ in each layer; zero where the weight is zero.
        """
        weights = perturbed_parameters(model)
        found = sample_weight_perturbation(model, xi=self.length, seed=self.seed, direction=number)
        for _ in range(self.steps):
            with perturbed_weights(model, found):
                gradient = self._gradient(model, weights, images, labels, number)
            # The gradient is scaled to the weights w, not to those that were perturbed.
            for name, weight in weights.items():
                moved = found[name] + scale_to(gradient[name], weight, self.length)
                found[name] = scale_to(moved, weight, self.length)
        return found

    def _gradient(
        self,
        model: nn.Module,
        weights: Mapping[str, Tensor],
        images: Tensor,
        labels: Tensor,
        number: int,
    ) -> dict[str, Tensor]:
        """Gradient of the summed loss on adversarial examples of these weights."""
        with evaluation_context(model), differentiable_weights(model, weights) as leaves:
            # Tensors made under inference mode cannot be saved for backward, their clones can.
            labels, inputs = labels.clone(), list(leaves.values())
            total = [torch.zeros_like(weight) for weight in inputs]
            for begin in range(0, len(images), self.batch_size):
                part = slice(begin, begin + self.batch_size)
                crafted = self._craft(model, images[part], labels[part], part, number)
                found = weight_gradients(model, inputs, crafted, labels[part])
                total = [t + f for t, f in zip(total, found)]
        return dict(zip(weights, total))

    def _craft(
        self, model: nn.Module, images: Tensor, labels: Tensor, part: slice, number: int
    ) -> Tensor:
        starts = self.pgd.starts(images, self.indices[part], seed=self.seed, restart=number)
        crafted = self.pgd.attack(model, images, labels, starts).images
        if self.on_attack is not None:
            self.on_attack()
        return crafted


Direction = Mapping[str, Tensor]

DirectionKind = Literal["random", "adversarial", "hessian"]

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
) -> Iterator[dict[str, Tensor]]:
    """Directions as the paper scales them: the length of each layer is a share of its weight's.

    `random` directions are those of `sample_weight_perturbation` by number, so that average-case
    flatness at ξ = `length` measures the ends of the same lines; biases belong to them.
    `adversarial` ones raise the mean robust loss: from random direction k, `ascent_steps` steps of
    full length along its gradient, each layer back on its sphere, with adversarial examples
    crafted anew at each step from starts of their own. The paper's joint attack also ends where
    its last gradients point, as its steps are longer than its radius. `hessian` ones are the
    eigenvectors of λ_max and, as a second one, λ_min of the clean loss, without biases.

    Args:
        model: Maps images in [0, 1] to logits; BatchNorm layers are left out, and of parametrised
            layers it is the tensor that they compute with.
        images: `(N, C, H, W)` in [0, 1]; random directions do not depend on them.
        labels: `(N,)` true classes.
        kind: `random`, `adversarial` or `hessian`.
        num_directions: How many; `None` is 10, or 1 for `hessian`, which has 2 at most.
        relative_to: `layer`, `filter` (Li et al., 2018) or `network`, see `normalize_direction`.
        length: Relative length; `None` is the paper's 0.5, or 0.025 for `adversarial`.
        eps: Radius of the attack that adversarial directions face.
        steps: Its steps.
        step_size: As in `pgd_attack`.
        norm: As in `pgd_attack`.
        start: As in `pgd_attack`.
        ascent_steps: Steps in weight space of an adversarial direction.
        seed: Of all random numbers.
        batch_size: Images looked at at once.
        indices: Global index of each image in the whole measured set; `None` numbers them.
        on_attack: Called after each attack on each batch, for progress.

    Returns:
        The directions, made one after the other, by parameter name.

    Raises:
        ValueError: If pixels, shapes, or an argument are out of range.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> images = torch.rand(4, 1, 8, 8)
        >>> first = next(weight_directions(model, images, torch.arange(4)))["1.weight"]
        >>> torch.allclose(first.norm(), 0.5 * model[1].weight.norm())
        True
    """
    check_examples(images, labels)
    check_choice("kind", kind, get_args(DirectionKind))
    check_choice("relative_to", relative_to, get_args(RelativeTo))
    count = COUNT[kind] if num_directions is None else num_directions
    share = LENGTH[kind] if length is None else length
    check_count("num_directions", count, low=1)
    check_count("ascent_steps", ascent_steps, low=1)
    check_count("batch_size", batch_size, low=1)
    check_number("length", share)
    pgd = PGD(eps, steps, step_size, norm, "best", start)
    found: Iterator[Direction]
    if kind == "random":
        found = (
            sample_weight_perturbation(
                model, xi=share, seed=seed, direction=k, relative_to=relative_to
            )
            for k in range(count)
        )
    elif kind == "hessian":
        found = _eigenvectors(model, images, labels, count, seed, batch_size)
    else:
        ascent = WeightAscent(
            pgd,
            ascent_steps,
            share,
            seed,
            batch_size,
            range(len(images)) if indices is None else indices,
            on_attack,
        )
        found = (ascent.direction(model, images, labels, k) for k in range(count))
    if kind == "random":
        # They are scaled already, and scaling twice would round twice.
        return (dict(direction) for direction in found)
    return (normalize_direction(model, d, length=share, relative_to=relative_to) for d in found)


def normalize_direction(
    model: nn.Module,
    direction: Direction,
    *,
    length: float,
    relative_to: RelativeTo = "layer",
) -> dict[str, Tensor]:
    """Scales a direction relative to the weights.

    Args:
        model: The network.
        direction: By parameter name.
        length: Relative length.
        relative_to: `layer` scales each tensor d_l to length · ‖w_l‖. `filter` scales each slice
            of it along the first dimension, the weights of one output, to length times the norm
            of that filter of w_l (Li et al., 2018); a bias is taken as a whole. `network` scales
            the direction as one vector, which keeps an eigenvector what it is.

    Returns:
        The scaled direction, zero where it or what it is relative to is zero.

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
    weights = {name: weight_at(model, name).detach() for name in direction}
    if relative_to == "network":
        vector, weight = (
            torch.cat([tensor.flatten() for tensor in tensors.values()])
            for tensors in (direction, weights)
        )
        return split_like(scale_to(vector, weight, length), weights)
    return {
        name: scale_to(
            value, weights[name], length, per_filter=relative_to == "filter" and value.ndim > 1
        )
        for name, value in direction.items()
    }


def check_direction(model: nn.Module, direction: Direction) -> None:
    """Raises if a direction is not one in the weight space of a network.

    Raises:
        ValueError: If a name or a shape is not that of a parameter.
    """
    for name, value in direction.items():
        wanted: object = "a weight of the network"
        with suppress(ValueError):
            wanted = tuple(weight_at(model, name).shape)
        if wanted != tuple(value.shape):
            raise ValueError(
                f"Expected {name} of a direction in `directions` to be {wanted} but got "
                f"a tensor of shape {tuple(value.shape)}."
            )


def _eigenvectors(
    model: nn.Module, images: Tensor, labels: Tensor, count: int, seed: int, batch_size: int
) -> Iterator[Direction]:
    if count > 2:
        raise ValueError(f"Expected `num_directions` to be 1 or 2 for hessian but got {count}.")
    found = hessian_extreme_eigenvalues(model, images, labels, seed=seed, batch_size=batch_size)
    return iter([found.max_eigenvector, found.min_eigenvector][:count])
