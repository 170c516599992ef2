"""Random and adversarial perturbations of weights, relative to each tensor's norm (Eq. 2)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import cross_entropy

from robust_flatness.functional.checks import check_choice, check_count, check_number
from robust_flatness.functional.evaluation import Mode, differentiable, logits_function
from robust_flatness.functional.layer_weights import (
    LayerTensor,
    differentiable_weights,
    layer_tensor,
    layer_tensors,
    perturbed_parameters,
    perturbed_weights,
)
from robust_flatness.functional.noise import keyed_generator

Perturbation = dict[str, Tensor]
Distribution = Literal["sphere", "ball"]
RelativeTo = Literal["layer", "filter", "network"]
Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]


def sample_weight_perturbation(
    model: nn.Module,
    *,
    xi: float = 0.5,
    seed: int = 0,
    direction: int = 0,
    distribution: Distribution = "sphere",
    relative_to: RelativeTo = "layer",
    batch: int | None = None,
) -> Perturbation:
    """Draws a random direction of length ξ‖w_l‖ for every layer l (Eq. 2).

    A Gaussian vector is scaled to the sphere, as the paper's code does. In high dimension that is
    the uniform distribution on the ball of Eq. (2); they differ for biases of few entries.

    Args:
        model: The network; convolution and linear weights and biases are perturbed, for
            parametrized layers the tensors that they compute with.
        xi: Relative length ξ, 0.5 in the paper.
        seed: Seed of the measure.
        direction: Number of the direction; each has its own random numbers.
        distribution: `sphere` (the paper's code) has length ξ‖w_l‖; `ball` (the paper's text) is
            uniform in the ball of that radius, so the length is u^(1/d) ξ‖w_l‖ in d dimensions.
        relative_to: `layer` (the paper): each tensor's norm. `filter` (Li et al., 2018): that of
            each output filter, a slice along a weight's first dimension; a bias stays whole.
            `network`: one norm over all tensors, which is not scale-invariant.
        batch: Number of the batch that has its own direction; `None` if all share one.

    Returns:
        Perturbation by parameter name, with the parameter's shape, dtype and device; zero if what
        it is relative to is zero.

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
    weights = perturbed_parameters(model)
    return random_direction(weights, xi, seed, direction, distribution, relative_to, batch)


def random_direction(
    weights: Mapping[str, Tensor],
    xi: float,
    seed: int,
    direction: int,
    distribution: Distribution = "sphere",
    relative_to: RelativeTo = "layer",
    batch: int | None = None,
) -> Perturbation:
    """`sample_weight_perturbation` for the tensors of `perturbed_parameters`."""
    batch_key = () if batch is None else ("batch", batch)

    def generator(purpose: str, position: int) -> torch.Generator:
        return keyed_generator(seed, purpose, direction, position, *batch_key)

    def radius(position: int, weight: Tensor, per_filter: bool) -> float | Tensor:
        if distribution == "sphere":
            return 1.0
        # Uniform in the unit ball of the tensor, or of each of its filters.
        shape = (len(weight), *[1] * (weight.ndim - 1)) if per_filter else ()
        dimension = weight[0].numel() if per_filter else weight.numel()
        numbers = generator("radius", position)
        radii = torch.rand(shape, generator=numbers, dtype=torch.float64) ** (1 / dimension)
        return radii.to(_at_least_float32(weight))

    noise = {
        name: torch.randn(weight.shape, generator=generator("direction", position)).to(weight)
        for position, (name, weight) in enumerate(weights.items())
    }
    return scale_direction(noise, weights, xi, relative_to, radius)


def random_perturbation(
    weights: Mapping[str, Tensor], xi: float, generator: torch.Generator
) -> Perturbation:
    """A random direction of length ξ‖w_l‖ for each weight: AT at random weight perturbations."""
    noise = [torch.randn(w.shape, generator=generator, device=w.device) for w in weights.values()]
    return dict(zip(weights, scale_each_to(noise, list(weights.values()), xi)))


def mean_cross_entropy(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of a batch, which AT-AWP's perturbation increases."""
    return cross_entropy(logits_function(model, images)(images), labels)


def adversarial_weight_perturbation(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    xi: float = 0.01,
    steps: int = 1,
    objective: Objective = mean_cross_entropy,
    mode: Mode = "eval",
    reduce: Callable[[list[Tensor]], list[Tensor]] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> Perturbation:
    """The weight perturbation that raises the loss most, to first order, layer by layer (AWP).

    One step is ν_l = ξ‖w_l‖ g_l / ‖g_l‖ with g the gradient at w (Wu et al., 2020); each further
    step has the same length and ends on the ball ‖ν_l‖ ≤ ξ‖w_l‖. Weights of convolution and linear
    layers are perturbed, but no biases, normalization layers or frozen weights. Weights, `.grad`
    and buffers are not changed.

    Args:
        model: The network.
        images: Usually adversarial examples, `(N, C, H, W)`.
        labels: `(N,)`.
        xi: Relative length ξ, 0.01 in the paper.
        steps: Number of ascent steps, 1 in the paper.
        objective: Maps model, images and labels to the scalar loss to increase.
        mode: `eval` uses BatchNorm's running statistics (the paper's code), `train` those of the
            batch (the original's).
        reduce: Averages the gradients over processes, so that all ranks take one direction.
        weights: The weights to perturb, by name; `None` takes all of `perturbed_parameters`.

    Returns:
        Perturbation by parameter name; zero if the weight or its gradient is zero.

    Raises:
        ValueError: If an argument is out of range, or there is no weight that is trained.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        >>> images, labels = torch.rand(2, 1, 2, 2), torch.tensor([0, 2])
        >>> nu = adversarial_weight_perturbation(model, images, labels, xi=0.01)["1.weight"]
        >>> torch.allclose(nu.norm(), 0.01 * model[1].weight.norm())
        True
    """
    check_number("xi", xi)
    check_count("steps", steps, low=1)
    check_choice("mode", mode, get_args(Mode))
    if weights is None:
        tensors = layer_tensors(model, biases=False)
    else:
        tensors = {name: layer_tensor(model, name) for name in weights}

    def loss() -> Tensor:
        return objective(model, images, labels)

    return adversarial_perturbation(
        model, tensors, loss, xi=xi, steps=steps, mode=mode, reduce=reduce
    )


def adversarial_perturbation(
    model: nn.Module,
    tensors: Mapping[str, LayerTensor],
    objective: Callable[[], Tensor],
    *,
    xi: float,
    steps: int = 1,
    mode: Mode = "eval",
    reduce: Callable[[list[Tensor]], list[Tensor]] | None = None,
) -> Perturbation:
    """`adversarial_weight_perturbation` with checked arguments, for a training loop.

    It calls `layer_tensors` once. `objective` returns the scalar loss to increase.

    Raises:
        ValueError: If all weights are frozen.
    """
    values = {name: tensor.value() for name, tensor in tensors.items()}
    weights = {name: value for name, value in values.items() if value.requires_grad}
    if not weights:
        raise ValueError("Expected `model` to have trained weights to perturb but got frozen ones.")
    trained = {name: tensors[name] for name in weights}
    perturbation: Perturbation = {}
    for step in range(steps):
        with (
            differentiable(model, mode),
            _buffers_restored(model, mode),
            perturbed_weights(model, perturbation, tensors),
            differentiable_weights(model, trained) as leaves,
        ):
            gradients = list(
                torch.autograd.grad(objective(), list(leaves.values()), materialize_grads=True)
            )
        if reduce is not None:
            gradients = reduce(gradients)
        scaled = scale_each_to(gradients, list(weights.values()), xi)
        for (name, weight), nu in zip(weights.items(), scaled):
            perturbation[name] = onto_ball(perturbation[name] + nu, weight, xi) if step else nu
    return perturbation


def mean_over_ranks(gradients: list[Tensor]) -> list[Tensor]:
    """Gradients averaged over all processes in one all-reduce, so that ν is the same on each."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return gradients
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    means = (flat / distributed.get_world_size()).split([g.numel() for g in gradients])
    return [mean.view_as(gradient) for mean, gradient in zip(means, gradients)]


@contextmanager
def _buffers_restored(model: nn.Module, mode: Mode) -> Iterator[None]:
    """Restores BatchNorm's statistics, which forwards in train mode update."""
    buffers = list(model.buffers()) if mode == "train" else []
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before):
                buffer.copy_(value)


def scale_direction(
    direction: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    xi: float,
    relative_to: RelativeTo,
    radius: Callable[[int, Tensor, bool], float | Tensor] = lambda *_: 1.0,
) -> Perturbation:
    """Scales a direction to length ξ relative to the weights of its names.

    `radius` maps position, weight and whether it is scaled by filter to a factor on ξ.
    """
    if relative_to == "network":
        weights = {name: weights[name] for name in direction}
        vector = torch.cat([value.flatten() for value in direction.values()])
        weight = torch.cat([value.flatten() for value in weights.values()])
        return split_like(scale_to(vector, weight, xi * radius(0, weight, False)), weights)
    scaled = {}
    for position, (name, value) in enumerate(direction.items()):
        weight = weights[name]
        per_filter = relative_to == "filter" and weight.ndim > 1
        length = xi * radius(position, weight, per_filter)
        scaled[name] = scale_to(value, weight, length, per_filter=per_filter)
    return scaled


def split_like(vector: Tensor, weights: Mapping[str, Tensor]) -> Perturbation:
    """Splits a vector into tensors of the shapes, dtypes and devices of the weights."""
    pieces = vector.split([weight.numel() for weight in weights.values()])
    return {
        name: piece.view(weight.shape).to(weight)
        for (name, weight), piece in zip(weights.items(), pieces)
    }


@torch.no_grad()
def scale_to(
    direction: Tensor, weight: Tensor, xi: float | Tensor, *, per_filter: bool = False
) -> Tensor:
    """Scales a direction to length ξ‖w‖; zero if it, or the weight, is zero or not finite.

    With `per_filter` each slice along the first dimension is scaled to ξ times the weight's.
    """
    direction = _at_least_float32(direction)
    length = _norm(direction, per_filter)
    target = xi * _norm(weight.detach().to(direction.dtype), per_filter)
    usable = (length > 0) & length.isfinite()
    return torch.where(usable, direction * (target / length), 0.0).to(weight.dtype)


@torch.no_grad()
def scale_each_to(
    directions: Sequence[Tensor], weights: Sequence[Tensor], xi: float
) -> list[Tensor]:
    """`scale_to` for each direction and weight, in fewer operations.

    Results are those of `scale_to` bit for bit on CPUs; on GPUs the norms may round differently.
    """
    directions = [_at_least_float32(direction) for direction in directions]
    values = [weight.detach().to(d.dtype) for weight, d in zip(weights, directions)]
    lengths, norms = torch.stack(torch._foreach_norm([*directions, *values])).chunk(2)
    usable = ((lengths > 0) & lengths.isfinite()).unbind()
    scaled = torch._foreach_mul(directions, (xi * norms / lengths).unbind())
    # A product with 0 would keep NaN.
    zero = lengths.new_zeros(())
    parts = zip(usable, scaled, weights)
    return [torch.where(use, values, zero).to(weight.dtype) for use, values, weight in parts]


@torch.no_grad()
def onto_ball(perturbation: Tensor, weight: Tensor, xi: float) -> Tensor:
    """Shortens a perturbation to length ξ‖w‖ if it is longer."""
    perturbation = _at_least_float32(perturbation)
    length = _norm(perturbation).clamp_min(torch.finfo(perturbation.dtype).tiny)
    ratio = xi * _norm(weight.detach().to(perturbation.dtype)) / length
    return (perturbation * ratio.clamp_max(1)).to(weight.dtype)


def _at_least_float32(values: Tensor) -> Tensor:
    # Half precision would overflow in the squares of a norm.
    return values if values.dtype == torch.float64 else values.float()


def _norm(values: Tensor, per_filter: bool = False) -> Tensor:
    if not per_filter:
        return torch.linalg.vector_norm(values)
    return torch.linalg.vector_norm(values, dim=tuple(range(1, values.ndim)), keepdim=True)
