"""Perturbations of weights, relative to each tensor's own norm (Eq. 2)."""

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from robust_flatness.functional.checks import check_choice, check_number
from robust_flatness.functional.layer_weights import perturbed_parameters
from robust_flatness.functional.noise import keyed_generator

Distribution = Literal["sphere", "ball"]

RelativeTo = Literal["layer", "filter", "network"]


def sample_weight_perturbation(
    model: nn.Module,
    *,
    xi: float = 0.5,
    seed: int = 0,
    direction: int = 0,
    distribution: Distribution = "sphere",
    relative_to: RelativeTo = "layer",
    batch: int | None = None,
) -> dict[str, Tensor]:
    """Draws a random direction of length ξ‖w_l‖ for every layer l (Eq. 2).

    A Gaussian vector is scaled to the sphere, as the paper's code does. In high dimension that is
    the uniform distribution on the ball of Eq. (2); they differ for biases of few entries.

    Args:
        model: The network; convolution and linear weights and biases are perturbed, those that
            layers compute with where these are parametrised.
        xi: Relative length ξ, 0.5 in the paper.
        seed: The measure's seed.
        direction: Number of the direction; each has random numbers of its own.
        distribution: `sphere` (the paper's code) has length ξ‖w_l‖; `ball` (the paper's text) is
            uniform in the ball of that radius, so the length is u^(1/d) ξ‖w_l‖ in d dimensions.
        relative_to: What length is relative to. `layer` (the paper): each tensor's own norm.
            `filter` (Li et al., 2018): that of each output filter, a slice along a weight's first
            dimension; a bias, one number a filter, stays whole. `network`: one norm over all
            tensors, which moves also those that are zero, and is not scale-invariant.
        batch: Number of the batch that has a direction to itself; `None` where all share one.

    Returns:
        Perturbation by parameter name, with the parameter's shape, dtype and device; zero where
        what it is relative to is zero.

    Raises:
        ValueError: If `xi` is negative, a choice unknown, or there is nothing to perturb.

    Example:
        >>> model = nn.Linear(4, 3)
        >>> nu = sample_weight_perturbation(model, xi=0.5)["weight"]
        >>> torch.allclose(nu.norm(), 0.5 * model.weight.norm())
        True
    """
    check_number("xi", xi)
    check_choice("distribution", distribution, get_args(Distribution))
    check_choice("relative_to", relative_to, get_args(RelativeTo))
    weights = {name: weight.detach() for name, weight in perturbed_parameters(model).items()}
    batch_key = () if batch is None else ("batch", batch)

    def numbers(what: str, position: int) -> torch.Generator:
        return keyed_generator(seed, what, direction, position, *batch_key)

    def scaled(noise: Tensor, weight: Tensor, position: int) -> Tensor:
        per_filter = relative_to == "filter" and weight.ndim > 1
        if distribution == "sphere":
            return scale_to(noise, weight, xi, per_filter=per_filter)
        radii = _ball_radii(weight, per_filter, numbers("radius", position))
        return scale_to(noise, weight, xi * radii, per_filter=per_filter)

    noise = {
        name: torch.randn(weight.shape, generator=numbers("direction", position)).to(weight)
        for position, (name, weight) in enumerate(weights.items())
    }
    if relative_to == "network":
        return split_like(scaled(_joined(noise), _joined(weights), 0), weights)
    return {
        name: scaled(noise[name], weight, position)
        for position, (name, weight) in enumerate(weights.items())
    }


def _ball_radii(weight: Tensor, per_filter: bool, generator: torch.Generator) -> Tensor:
    """Lengths of vectors that are uniform in a unit ball: one, or one for each filter."""
    shape = (len(weight), *[1] * (weight.ndim - 1)) if per_filter else ()
    dimension = weight[0].numel() if per_filter else weight.numel()
    radii = torch.rand(shape, generator=generator, dtype=torch.float64) ** (1 / dimension)
    return radii.to(_wide(weight))


def _joined(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def split_like(vector: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cuts a vector into tensors of the shapes and dtypes of the weights.

    Args:
        vector: As many entries as all weights together, in their order.
        weights: By name.

    Example:
        >>> split_like(torch.arange(3), {"a": torch.zeros(1, 2), "b": torch.zeros(1)})
        {'a': tensor([[0., 1.]]), 'b': tensor([2.])}
    """
    pieces = vector.split([weight.numel() for weight in weights.values()])
    return {
        name: piece.view(weight.shape).to(weight.dtype)
        for (name, weight), piece in zip(weights.items(), pieces)
    }


@torch.no_grad()
def scale_to(
    direction: Tensor, weight: Tensor, xi: float | Tensor, *, per_filter: bool = False
) -> Tensor:
    """Scales a direction to length ξ‖w‖; zero where it, or the weight, is zero or not finite.

    Args:
        direction: Of the weight's shape.
        weight: What length is relative to.
        xi: Relative length; with `per_filter` also one for each filter, shaped to broadcast.
        per_filter: Takes the norms of each slice along the first dimension instead of the whole.

    Example:
        >>> scale_to(torch.tensor([0.0, 2.0]), torch.tensor([3.0, 4.0]), 0.5)
        tensor([0.0000, 2.5000])
    """
    wide = _wide(direction)
    length = _norm(wide, per_filter)
    target = xi * _norm(weight.detach().to(wide.dtype), per_filter)
    usable = (length > 0) & length.isfinite()
    return torch.where(usable, wide * (target / length), 0.0).to(weight.dtype)


@torch.no_grad()
def onto_ball(perturbation: Tensor, weight: Tensor, xi: float) -> Tensor:
    """Shortens a perturbation to length ξ‖w‖ where it is longer.

    Example:
        >>> weight = torch.tensor([3.0, 4.0])
        >>> onto_ball(torch.tensor([0.0, 9.0]), weight, 0.5)
        tensor([0.0000, 2.5000])
        >>> onto_ball(torch.tensor([0.0, 2.0]), weight, 0.5)
        tensor([0., 2.])
    """
    wide = _wide(perturbation)
    length = _norm(wide).clamp_min(torch.finfo(wide.dtype).tiny)
    ratio = xi * _norm(weight.detach().to(wide.dtype)) / length
    return (wide * ratio.clamp_max(1)).to(weight.dtype)


def _wide(values: Tensor) -> Tensor:
    """At least float32: half precision would overflow in the squares of a norm."""
    return values if values.dtype == torch.float64 else values.float()


def _norm(values: Tensor, per_filter: bool = False) -> Tensor:
    if not per_filter:
        return torch.linalg.vector_norm(values)
    return torch.linalg.vector_norm(values, dim=tuple(range(1, values.ndim)), keepdim=True)


def random_perturbation(
    weights: Mapping[str, Tensor], xi: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """A random direction of length ξ‖w_l‖ for each weight: AT at random weight perturbations.

    Args:
        weights: By name.
        xi: Relative length ξ.
        generator: Where the numbers come from, on the weights' device.

    Returns:
        Perturbation by name.

    Example:
        >>> weights = {"a": torch.tensor([3.0, 4.0])}
        >>> random_perturbation(weights, 0.1, torch.Generator().manual_seed(0))["a"].norm()
        tensor(0.5000)
    """
    return {
        name: scale_to(
            torch.randn(weight.shape, generator=generator, device=weight.device), weight, xi
        )
        for name, weight in weights.items()
    }
