"""Random numbers that belong to an example or a direction, not to a machine or a batch."""

import hashlib
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Norm = Literal["linf", "l2"]
Start = Literal["paper", "uniform", "gaussian", "zero"]


def keyed_generator(
    seed: int, *key: int | str, device: torch.device | str = "cpu"
) -> torch.Generator:
    """Returns a generator for a key, whose numbers do not depend on what was drawn before.

    Args:
        seed: Seed of the measure or the run.
        key: Purpose of the numbers, such as `("start", example index, restart)`.
        device: Device of the generator; measures draw on the CPU, so that all machines agree.

    Example:
        >>> first = torch.rand(1, generator=keyed_generator(0, "a", 3))
        >>> first == torch.rand(1, generator=keyed_generator(0, "a", 3))
        tensor([True])
        >>> first == torch.rand(1, generator=keyed_generator(0, "a", 4))
        tensor([False])
    """
    return torch.Generator(device).manual_seed(keyed_seed(seed, *key))


def keyed_seed(seed: int, *key: int | str) -> int:
    """Returns the seed of a `keyed_generator`, for code that takes no generator."""
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=8).digest()
    # manual_seed takes 64 bits, but a sign bit would make it negative.
    return int.from_bytes(digest, "big") >> 1


def per_example_norm(values: Tensor, norm: Norm) -> Tensor:
    """The norm of each example, `(N, 1, ...)` for values `(N, ...)`."""
    order = torch.inf if norm == "linf" else 2
    flat = torch.linalg.vector_norm(values.flatten(1), ord=order, dim=1)
    return flat.view(-1, *[1] * (values.ndim - 1))


def random_start(
    shape: Sequence[int],
    *,
    eps: float,
    norm: Norm = "linf",
    start: Start = "paper",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws the perturbations from which an attack starts.

    Args:
        shape: `(N, C, H, W)`.
        eps: Radius of the ball, in pixel units.
        norm: The ball's norm.
        start: `paper` draws a direction (a Gaussian vector over its own norm) and a radius uniform
            in [0, eps]: Stutz et al.'s code, close to the center more often than `uniform`, which
            fills the ball. `gaussian` is TRADES' 0.001 · N(0, 1); `zero` is the image itself.
        generator: Source of the random numbers; its device is that of the result.

    Returns:
        Float32 perturbations of shape `shape`, within the ball except for `gaussian`, which the
        attack projects.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> random_start((2, 1, 4, 4), eps=0.1, generator=generator).abs().amax() <= 0.1
        tensor(True)
    """
    device = generator.device if generator is not None else torch.device("cpu")
    if start == "zero":
        return torch.zeros(*shape, device=device)
    if start == "uniform" and norm == "linf":
        return (2 * torch.rand(*shape, generator=generator, device=device) - 1) * eps
    direction = torch.randn(*shape, generator=generator, device=device)
    if start == "gaussian":
        return 0.001 * direction
    radius = torch.rand(shape[0], *[1] * (len(shape) - 1), generator=generator, device=device)
    if start == "uniform":
        radius = radius ** (1 / direction[0].numel())
    return direction / per_example_norm(direction, norm) * radius * eps
