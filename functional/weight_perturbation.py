"""Perturbations of weights, relative to each tensor's own norm (Eq. 2)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from robust_flatness.functional.checks import check_number
from robust_flatness.functional.noise import stream

PERTURBED_LAYERS = (_ConvNd, nn.Linear, nn.MultiheadAttention)


def perturbed_parameters(model: nn.Module, *, biases: bool = True) -> dict[str, nn.Parameter]:
    """The tensors that a weight perturbation moves: those of convolutions and linear layers.

    Normalisation layers are left out, as in the paper. Each weight and each bias is a layer of its
    own in Eq. (2).

    Args:
        model: The network.
        biases: Whether biases belong to them (flatness) or not (AT-AWP).

    Returns:
        Parameters by name, each once, in the order of `model.named_modules()`.

    Raises:
        ValueError: If the network has no convolution and no linear layer.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten())
        >>> list(perturbed_parameters(model))
        ['0.weight', '0.bias']
    """
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        if not isinstance(module, PERTURBED_LAYERS):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen and (biases or parameter.ndim > 1):
                seen.add(id(parameter))
                found[f"{prefix}.{name}" if prefix else name] = parameter
    if not found:
        raise ValueError(
            "Expected `model` to have convolution or linear layers to perturb but got "
            f"{type(model).__name__} without any."
        )
    return found


def sample_weight_perturbation(
    model: nn.Module, *, xi: float = 0.5, seed: int = 0, direction: int = 0
) -> dict[str, Tensor]:
    """Draws a random direction of length ξ‖w_l‖ for every layer l (Eq. 2).

    A Gaussian vector is scaled to the sphere, as the paper's code does; in high dimension that is
    the uniform distribution on the ball of Eq. (2) for all practical purposes.

    Args:
        model: The network; convolution and linear weights and biases are perturbed.
        xi: Relative length ξ, 0.5 in the paper.
        seed: The measure's seed.
        direction: Number of the direction; each has random numbers of its own.

    Returns:
        Perturbation by parameter name, with the parameter's shape, dtype and device; zero where
        the parameter is zero.

    Raises:
        ValueError: If `xi` is negative or there is nothing to perturb.

    Example:
        >>> model = nn.Linear(4, 3)
        >>> nu = sample_weight_perturbation(model, xi=0.5)["weight"]
        >>> torch.allclose(nu.norm(), 0.5 * model.weight.norm())
        True
    """
    check_number("xi", xi)
    perturbation = {}
    for position, (name, parameter) in enumerate(perturbed_parameters(model).items()):
        generator = stream(seed, "direction", direction, position)
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        perturbation[name] = scale_to(noise, parameter, xi)
    return perturbation


@torch.no_grad()
def scale_to(direction: Tensor, weight: Tensor, xi: float) -> Tensor:
    """Scales a direction to length ξ‖w‖; zero where it, or the weight, is zero or not finite.

    Example:
        >>> scale_to(torch.tensor([0.0, 2.0]), torch.tensor([3.0, 4.0]), 0.5)
        tensor([0.0000, 2.5000])
    """
    # Half precision would overflow in the squares, so the norms are at least float32.
    wide = direction if direction.dtype == torch.float64 else direction.float()
    length = torch.linalg.vector_norm(wide)
    target = xi * torch.linalg.vector_norm(weight.detach().to(wide.dtype))
    usable = (length > 0) & length.isfinite()
    return torch.where(usable, wide * (target / length), 0.0).to(weight.dtype)


@contextmanager
def perturbed_weights(model: nn.Module, perturbation: Mapping[str, Tensor]) -> Iterator[None]:
    """Adds a perturbation to the weights in place and gives the weights back bit for bit.

    They come back from copies, also after an exception: subtracting would leave rounding behind.

    Args:
        model: The network.
        perturbation: Summand by parameter name.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> before = model.weight.clone()
        >>> with perturbed_weights(model, {"weight": torch.ones(1, 2)}):
        ...     moved = model.weight.detach().clone()
        >>> torch.equal(moved, before + 1), torch.equal(model.weight, before)
        (True, True)
    """
    named = dict(model.named_parameters())
    parameters = {name: named[name] for name in perturbation}
    with torch.inference_mode(False), torch.no_grad():
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.add_(perturbation[name])
        # Autocast keeps casts of the weights: without this the network would not see the change.
        torch.clear_autocast_cache()
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(before[name])
        torch.clear_autocast_cache()
